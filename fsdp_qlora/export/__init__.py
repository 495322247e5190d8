"""Results of a run in the form of other programs: a PEFT adapter, a merged Hugging Face model, GGUF."""

__all__ = ["adapter_folder", "gguf", "merge", "peft"]
