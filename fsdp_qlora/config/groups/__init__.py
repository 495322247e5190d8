"""Option groups, one dataclass a file: each option with its type, default and its reason, meaning, unit and price."""

__all__ = ["adapter", "data", "evaluation", "launch", "memory", "model", "output", "profile", "training"]
