"""Memory that is placed and copied: the arena of a step, pinned and shared host memory, the host link."""

__all__ = ["activation_offload", "arena", "arena_layout", "host_link", "pinned", "shared"]
