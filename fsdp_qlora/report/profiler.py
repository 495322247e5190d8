"""torch.profiler around a few training steps: tables for people, and a trace and a memory timeline when asked for."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm

from fsdp_qlora.config.options import ProfileOptions
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import first_line
from fsdp_qlora.report.callback import Callback
from fsdp_qlora.report.records import StepRecord
from fsdp_qlora.runtime.files import check_writable

STEPS_RECORDED = 3
TABLE = "table.txt"


class Profiler(Callback):
    """A count of the steps for a recording; without one it does nothing."""

    def __init__(self, recording: profile | None) -> None:
        self._recording = recording

    def on_step(self, record: StepRecord) -> None:
        """Tell the recording that an optimizer step has ended."""
        if self._recording is not None:
            self._recording.step()


def check_profile(options: ProfileOptions) -> None:
    """Raise UserError where `profile` is on and its folder cannot be written."""
    if options.profile:
        check_writable(Path(options.profiling_output), "profiling_output", TABLE)


@contextmanager
def profiled(options: ProfileOptions, world: World, total_steps: int) -> Iterator[Profiler]:
    """Yield what is to be told of every optimizer step; it does nothing unless `profile` is on.

    Leaves out the first two steps where the run is long enough, then records three and writes, per rank, what the
    options ask for to `profiling_output`, and a table of the costliest operations on rank 0. A run that ends earlier
    leaves what was recorded until then. What cannot be written is told, and costs the run nothing."""
    if not options.profile:
        yield Profiler(None)
        return
    folder = Path(options.profiling_output)
    timeline = options.export_memory_timeline  # its categories are found from shapes, stacks and allocations
    recorded = min(STEPS_RECORDED, total_steps)
    left_out = min(2, total_steps - recorded)
    on_gpu = world.device.type == "cuda"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Profiler won't be using warmup")  # in a run of few steps there are none
        steps = schedule(wait=max(0, left_out - 1), warmup=min(1, left_out), active=recorded, repeat=1)
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
        schedule=steps,
        on_trace_ready=lambda recording: _write_or_tell(recording, options, world, folder),
        record_shapes=options.with_shapes or timeline,
        profile_memory=options.profile_memory or timeline,
        with_stack=options.with_stack or timeline,
        acc_events=True,
    ) as recording:
        yield Profiler(recording)


def _write_or_tell(recording: profile, options: ProfileOptions, world: World, folder: Path) -> None:
    try:
        _write(recording, options, world, folder)
    except Exception as error:  # what torch raises here is of many kinds, and training must not end for it
        why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {first_line(error)}"
        tqdm.write(
            f"rank {world.rank}: no profile could be written in {folder} ({why}); training goes on without it",
            file=sys.stdout,
        )


def _write(recording: profile, options: ProfileOptions, world: World, folder: Path) -> None:
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    if world.is_main:
        table = folder / TABLE
        table.write_text(_table(recording, options, world))
        written.append(table.name)
    if options.export_trace:
        trace = folder / f"trace_rank{world.rank}.json.gz"
        recording.export_chrome_trace(str(trace))
        written.append("trace_rank*.json.gz (open in ui.perfetto.dev)")
    if options.export_memory_timeline:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, yet nothing else sorts memory by category
            recording.export_memory_timeline(str(folder / f"memory_rank{world.rank}.html"), str(world.device))
        written.append("memory_rank*.html")
    world.say(f"profile of the recorded steps in {folder}: {', '.join(written)}")


def _table(recording: profile, options: ProfileOptions, world: World) -> str:
    """Return a table of the costliest operations, grouped by shape or source line too where those were recorded."""
    averages = recording.key_averages(
        group_by_input_shape=options.with_shapes, group_by_stack_n=5 if options.with_stack else 0
    )
    own_time = "self_cuda_time_total" if world.device.type == "cuda" else "self_cpu_time_total"
    return str(averages.table(sort_by=own_time, row_limit=60, max_name_column_width=70))
