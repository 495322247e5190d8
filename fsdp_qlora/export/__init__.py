"""What a run leaves for other programs: a PEFT adapter and its tokenizer."""

__all__ = ["peft"]
