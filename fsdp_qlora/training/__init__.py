"""The training loop, its step, and what it does when memory runs out."""

__all__ = ["agreement", "checkpoint", "loop", "resume", "retry", "step"]
