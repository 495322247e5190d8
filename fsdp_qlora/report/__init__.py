"""What a run tells: its start, its steps, its end."""

__all__ = ["callback", "loggers", "machine", "metrics", "profiler", "records", "startup"]
