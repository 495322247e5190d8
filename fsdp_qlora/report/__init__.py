"""What a run tells: its start, its steps, its end."""

__all__ = ["callback", "machine", "metrics", "profiler", "startup", "step_record"]
