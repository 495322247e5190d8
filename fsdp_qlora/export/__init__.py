"""Results of a run in the form of other programs: a PEFT adapter and its tokenizer."""

__all__ = ["peft"]
