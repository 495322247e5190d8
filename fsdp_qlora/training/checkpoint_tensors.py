"""The tensors of a checkpoint: written by all ranks block by block, and read on as many ranks or on others."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from fsdp_qlora.config.options import Config
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import first_line, is_out_of_memory
from fsdp_qlora.export.peft import ADAPTER, peft_name
from fsdp_qlora.optim.adapter_group import AdapterGroup
from fsdp_qlora.optim.optimizer_state import load_named_state, named_state, slice_of
from fsdp_qlora.safetensors_header import Form
from fsdp_qlora.training.checkpoint_folder import Checkpoint, rank_file
from fsdp_qlora.training.retry import RandomState
from fsdp_qlora.training.step import Stepper
from fsdp_qlora.training.tensor_file import TensorFile, Written

RANDOM = "random."  # before the names of random states in a rank's file

T = TypeVar("T")


def adapters_of(stepper: Stepper) -> list[list[Any]]:
    """Return [name, shape] of each adapter parameter, block by block."""
    groups = stepper.adapters.groups
    return [[name, list(p.shape)] for g in groups for name, p in zip(g.names, g.params, strict=True)]


def find_room(stepper: Stepper, world: World) -> None:
    """Take and give back the GPU memory for a block and the next one, while no rank waits for this one in a gather.

    Raises RuntimeError where there is none."""
    if world.device.type == "cuda":
        rooms = [torch.empty(stepper.adapters.largest, dtype=torch.uint8, device=world.device) for _ in range(2)]
        del rooms


def write_adapter(path: Path, stepper: Stepper, config: Config, world: World) -> tuple[str, Written]:
    """Write the master weights under PEFT's names, on rank 0. A collective: ranks gather a block at a time.

    Returns ("", what was written) or (why it was not, nothing); also then all gathers are made."""
    forms = {peft_name(name, config): Form(torch.float32, tuple(shape)) for name, shape in adapters_of(stepper)}
    why, file = tried(lambda: TensorFile(path, forms)) if world.is_main else ("", None)

    def write(group: AdapterGroup, whole: Tensor) -> None:
        assert file is not None
        size = sum(p.numel() for p in group.params)
        file.write_flat([peft_name(name, config) for name in group.names], whole[:size])

    for group, whole in stepper.adapters.whole_blocks():
        if file is not None and not why:
            why, _ = tried(partial(write, group, whole))
    if file is None:
        return why, Written(0, 0)
    if not why:
        why, written = tried(file.close)
    file.abandon()
    return (why, Written(0, 0)) if why or written is None else ("", written)


def write_slices(path: Path, stepper: Stepper, world: World) -> Written:
    """Write this rank's slices of the optimizer's state and its random numbers. Raises OSError."""
    tensors = dict(named_state(stepper.optimizer, stepper.adapters.by_block))
    tensors |= {f"{RANDOM}{name}": tensor for name, tensor in RandomState(world.device).tensors().items()}
    file = TensorFile(path, {name: Form(t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    try:
        for name, tensor in tensors.items():
            file.write(name, tensor)
        return file.close()
    finally:
        file.abandon()


def load_adapter(checkpoint: Checkpoint, stepper: Stepper, config: Config) -> None:
    """Give the adapters of every rank, and its slices of the master weights, the values of a checkpoint."""
    with safe_open(checkpoint.path / ADAPTER, framework="pt") as file:
        stepper.adapters.load_from(lambda name: file.get_tensor(peft_name(name, config)))


def load_slices(checkpoint: Checkpoint, stepper: Stepper, seed: int, world: World) -> None:
    """Give this rank's slices their optimizer state, cut anew where the checkpoint is of another number of ranks.

    Random numbers go on where they were; on another number of ranks they begin anew, the same in each such run."""
    ranks = checkpoint.manifest.ranks
    same = ranks == world.size
    numbers = [world.rank] if same else range(ranks)
    files = [safe_open(checkpoint.path / rank_file(rank, ranks), framework="pt") for rank in numbers]

    def read(name: str, group: AdapterGroup) -> Tensor:
        if same or not files[0].get_slice(name).get_shape():
            whole: Tensor = files[0].get_tensor(name)
            return whole
        parts = [partial(_values, file.get_slice(name)) for file in files]
        return slice_of(parts, sum(p.numel() for p in group.params), group.shard.numel(), world.rank)

    names = list(files[0].keys())
    state = [name for name in names if not name.startswith(RANDOM)]
    load_named_state(stepper.optimizer, stepper.adapters.by_block, state, read)
    if same:
        random = [name for name in names if name.startswith(RANDOM)]
        RandomState(world.device).load({n.removeprefix(RANDOM): files[0].get_tensor(n) for n in random})
    else:
        torch.manual_seed((seed * 1_000_003 + checkpoint.step) * 1_009 + world.rank)


def tried(do: Callable[[], T]) -> tuple[str, T | None]:
    """Return ("", what `do` returns), or (why the disk or GPU memory failed, None)."""
    try:
        return "", do()
    except OSError as error:
        return error.strerror or str(error), None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return f"GPU memory ran out: {first_line(error)}", None


def _values(slices: Any, first: int, last: int) -> Tensor:
    values: Tensor = slices[first:last]
    return values
