"""The training loop, its step, and what it does when memory runs out."""

__all__ = ["agreement", "checkpoint", "evaluate", "evaluations", "loop", "resume", "retry", "step"]
