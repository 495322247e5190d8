"""GGUF files, which llama.cpp and programs built on it open: a model in a quantization, or a LoRA adapter alone."""
