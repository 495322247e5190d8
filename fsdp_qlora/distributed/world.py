"""The ranks of a run: who this process is, its device, and a process group that is closed however the run ends."""

import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy
import psutil
import torch
import torch.distributed as dist
from tqdm import tqdm

from fsdp_qlora.config.options import LaunchOptions
from fsdp_qlora.distributed.group import COLLECTIVE_TIMEOUT, abort_group, open_group, within
from fsdp_qlora.errors import RunEnded, TrainingStopped, UserError, first_line, refused_by_system
from fsdp_qlora.runtime.gpu_memory import note_others
from fsdp_qlora.runtime.launcher import Launch, check_launch, read_launch, usable_cores, user_set_omp_threads

TEARDOWN_SECONDS = 10.0

# What gloo, NCCL and the store say when the other end of a connection is gone, across torch 2.11 to 2.13.
_PEER_GONE = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "remote process exited",
    "nccl communicator was aborted",
    "failed to recv",
    "recvvalue failed",
    "sendbytes failed",
    "gloo connectfullmesh failed",
)
_SILENT = ("socket timeout", "timed out waiting")  # and where it is there, but sends nothing


T = TypeVar("T")


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    value: T
    error: RunEnded | None


@dataclass(frozen=True)
class World:
    """This process among the ranks. A process group exists as long as this does, also for one rank."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def has_several_nodes(self) -> bool:
        return self.local_size != self.size

    def say(self, text: str) -> None:
        """Print a line on rank 0, above the progress bar where one is up; nothing on other ranks."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def barrier(self) -> None:
        """Return when every rank has called it. Over gloo, so that a dead peer is an error and not a hang."""
        dist.all_reduce(torch.zeros(1))

    def main_only(self, do: Callable[[], object]) -> None:
        """Run `do` on rank 0 while the others wait. A collective: what is wrong there ends every rank alike."""
        self._agree(self._try(do).error if self.is_main else None)

    def agree(self, do: Callable[[], bool]) -> bool:
        """Return rank 0's answer, on every rank. A collective: what is wrong there ends every rank alike."""
        return self.from_main(do)

    def from_main(self, do: Callable[[], T]) -> T:
        """Return what `do` gives on rank 0, on every rank. A collective: what is wrong there ends every rank alike."""
        done = self._try(do) if self.is_main else None
        self._agree(done.error if done is not None else None)
        found: list[T] = [done.value if done is not None else None]  # type: ignore[list-item]
        dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        return found[0]

    def first_on_node(self, do: Callable[[], T]) -> T:
        """Run `do` on one rank of each node and then on its others, which find what it has cached. A collective."""
        first = self.local_rank == 0
        done = self._try(do) if first else None
        self._agree(done.error if done is not None else None)
        done = done if done is not None else self._try(do)
        self._agree(done.error)
        return done.value

    def together(self, do: Callable[[], T]) -> T:
        """Run `do`, which is no collective, on every rank. A collective: what is wrong on one ends all alike."""
        done = self._try(do)
        self._agree(done.error)
        return done.value

    def _try(self, do: Callable[[], T]) -> "_Outcome[T]":
        try:
            return _Outcome(do(), None)
        except RunEnded as error:
            return _Outcome(None, error)  # type: ignore[arg-type]

    def _agree(self, error: RunEnded | None) -> None:
        """Raise on every rank what some rank met, so that all leave with the same exit code; rank 0 tells the user."""
        failed = [rank for rank, (flag,) in enumerate(self.gather([float(error is not None)])) if flag]
        if not failed:
            return
        met: list[tuple[type[RunEnded], str]] = [(type(error or RunEnded()), str(error))]
        dist.broadcast_object_list(met, src=failed[0], device=torch.device("cpu"))
        kind, message = met[0]
        raise kind(message).on_every_rank(self.rank) from error

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return every rank's `numbers` (as many on each), in rank order, on every rank. A collective, on the host."""
        mine = torch.tensor(numbers, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        return [row.tolist() for row in everyone]

    def gather_texts(self, text: str) -> list[str]:
        """Return every rank's `text`, in rank order, on every rank. A collective, on the host."""
        everyone: list[str] = [""] * self.size
        dist.all_gather_object(everyone, text)
        return everyone


@contextmanager
def open_world(launch: LaunchOptions, seed: int) -> Iterator[World]:
    """Return the `World` of this process, from torchrun's environment, or alone without it.

    Sets the device, the CPU threads and the seeds (the same on every rank, so that what is initialised at random is
    equal everywhere), opens the process group (gloo for CPU tensors, NCCL for CUDA's) and closes it on every way out.

    Raises UserError when the launch does not fit the options or the machine, TrainingStopped when the block failed
    because another rank had ended."""
    place = read_launch()
    note_others()
    try:
        check_launch(launch, place)
        device = _choose_device(place)
    except UserError as error:
        raise error.on_every_rank(place.local_rank) from None  # of this node
    _set_threads(place)
    _seed(seed)
    open_group(place, device)
    world = World(place.rank, place.size, place.local_rank, place.local_size, device)
    try:
        yield world
        world.barrier()  # a rank that is done early waits here, not inside NCCL's teardown
    except BaseException as error:
        # Peers may be gone or may be waiting for us in a collective that will never come: abort, do not negotiate.
        within(TEARDOWN_SECONDS, abort_group)
        if isinstance(error, torch.OutOfMemoryError):
            raise TrainingStopped(
                f"rank {world.rank}: GPU memory ran out while the model was made or loaded "
                f"({first_line(error)}); use a lower lora_rank, or another --gpu_memory_gib (the plan fills it), and "
                "see with `nvidia-smi` what else is on the card"
            ) from error
        if refused := refused_by_system(error):
            raise TrainingStopped(
                f"rank {world.rank}: the system refused what the run needs ({refused}); see to that and start again"
            ) from error
        if world.size > 1 and isinstance(error, Exception) and peer_is_gone(error):
            raise TrainingStopped(f"rank {world.rank} stopped because {_why_gone(error)}") from error
        raise
    else:
        within(TEARDOWN_SECONDS, dist.destroy_process_group)


def idle_gpus(world: World) -> str | None:
    """Return a line about GPUs of this node that no rank uses; None where there are none."""
    gpus = torch.cuda.device_count() if world.device.type == "cuda" else 0
    if gpus <= world.local_size:
        return None
    return f"cards     {world.local_size} of {gpus} GPUs used; torchrun --nproc_per_node {gpus} starts a rank on each"


def peer_is_gone(error: BaseException) -> bool:
    """Return whether an exception, or one it was raised from, is a collective failing because its peer ended or has
    been silent for too long."""
    return any(
        isinstance(one, dist.DistNetworkError) or _says(one, (*_PEER_GONE, *_SILENT)) for one in _with_causes(error)
    )


def _why_gone(error: BaseException) -> str:
    if any(_says(one, _SILENT) for one in _with_causes(error)):
        return (
            f"another rank sent nothing for {COLLECTIVE_TIMEOUT.total_seconds() / 60:.0f} minutes: it hangs "
            "(`py-spy dump --pid` of its process says where), or its node or the network to it is down"
        )
    return (
        "another rank ended while this one was waiting for it: the cause is in that rank's messages (killed without "
        "one: out of host memory, see `dmesg`)"
    )


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _says(error: BaseException, signs: Sequence[str]) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def _choose_device(place: Launch) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if place.local_size > gpus:
        raise UserError(
            f"{place.local_size} ranks were started on this machine but it has {gpus} usable GPU{'s' * (gpus > 1)}, "
            f"and every rank needs its own: start with torchrun --nproc_per_node {gpus}, check CUDA_VISIBLE_DEVICES "
            f"({os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}), or set it to nothing to train on the CPU"
        )
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


def _set_threads(place: Launch) -> None:
    """Share the cores among the ranks of a node, unless the user has said how many threads each shall have."""
    if place.local_size == 1 or user_set_omp_threads():
        return
    threads = max(1, usable_cores(psutil.cpu_count(logical=False)) // place.local_size)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for OpenMP libraries loaded later; torch has read it already
    torch.set_num_threads(threads)


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # every CUDA device's generator too
