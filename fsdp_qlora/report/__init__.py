"""What a run tells: its start, its steps, its end."""

__all__ = ["callback", "eval_record", "loggers", "machine", "metrics", "profiler", "startup", "step_record"]
