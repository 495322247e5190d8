"""Models: a Hugging Face skeleton over frozen bytes, its blocks fused where their family is known."""

__all__ = ["attention", "causal_lm", "fitting", "fuse", "fused", "generic_block", "precision", "skeleton"]
