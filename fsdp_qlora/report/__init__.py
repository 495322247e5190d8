"""What a run tells: its start, its steps, its end."""

__all__ = ["callback", "loggers", "machine", "metrics", "page", "profiler", "records", "startup"]
