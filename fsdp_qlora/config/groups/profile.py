"""The options of the group profile: the trace by torch.profiler."""

from dataclasses import dataclass

from fsdp_qlora.config.option import option


@dataclass
class ProfileOptions:
    """Profile: a trace of a few steps by torch.profiler."""

    profile: bool = option(
        False,
        "Record a few steps after the warm-up and write tables of where the time went.",
        "recording slows those steps",
        "the steps recorded are slower",
    )
    profiling_output: str = option(
        "profiles", "Folder for what the profiler writes.", "apart from the adapter's folder", is_path=True
    )
    with_stack: bool = option(
        False,
        "Record the Python line behind each operation.",
        "it distorts the times most",
        "slower steps, much larger traces",
    )
    with_shapes: bool = option(
        False, "Record the operations' input shapes.", "seldom needed", "slower steps, larger traces"
    )
    profile_memory: bool = option(
        False, "Record allocations and frees.", "seldom needed", "slower steps, larger traces"
    )
    export_trace: bool = option(
        False,
        "Write a Chrome trace for each rank (open it in ui.perfetto.dev).",
        "it can be hundreds of MB",
        "disk space and seconds at the end of the recording",
    )
    export_memory_timeline: bool = option(
        False,
        "Write memory over time by category for each rank. Turns on with_stack, with_shapes and profile_memory.",
        "it is slow to write",
        "as those three together, and minutes of export for large models",
    )
