"""The training loop, its step, evaluations between steps, and what it does when memory runs out."""

__all__ = ["agreement", "checkpoint", "evaluate", "evaluations", "loop", "resume", "retry", "step"]
