"""This process and its machine: what the launcher told it, its streams and folders, what memory there is."""

__all__ = ["background", "determinism", "files", "gpu_memory", "host_memory", "launcher", "libraries", "terminal"]
