"""LoRA fine-tuning over a frozen 4-bit base sharded across GPUs: `train.py` is the program, the file list its plan."""

__version__ = "0.1.0"
