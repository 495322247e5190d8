"""A decoder block as one autograd function over fused kernels."""

__all__ = ["block", "fuse", "scratch", "spec"]
