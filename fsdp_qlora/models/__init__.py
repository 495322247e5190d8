"""Models: a Hugging Face skeleton over frozen bytes, its blocks fused where their family is known."""

__all__ = ["assemble", "attention", "causal_lm", "fitting", "fused", "generic_block", "precision", "skeleton"]
