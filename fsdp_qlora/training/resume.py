"""The checkpoint that a run goes on from: which one `--resume` means, and what the user is told of it."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from fsdp_qlora.config.options import OPTIONS, Config
from fsdp_qlora.config.parse import parse
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.export.peft import ADAPTER
from fsdp_qlora.runtime.files import check_empty
from fsdp_qlora.training.agreement import check_options, differences, is_same_run
from fsdp_qlora.training.checkpoint_folder import Checkpoint as Checkpoint
from fsdp_qlora.training.checkpoint_folder import (
    Damaged,
    check_files,
    checkpoints_in,
    ours_in,
    read_checkpoint,
    remove,
    remove_unfinished,
)
from fsdp_qlora.units import count_of

AUTO = "auto"
SILENT = ("output", "profile", "launch")  # groups of options that change nothing of what is trained
T = TypeVar("T")
BEGUN = ("config.yaml", "metrics.jsonl")  # what a run leaves that was killed before its first checkpoint


def find_checkpoint(config: Config, world: World) -> Checkpoint | None:
    """Return the checkpoint that `--resume` asks for, checked; None where the run starts from the beginning.

    A collective, in an output_dir that is taken: also removes there what killed runs left unfinished. Raises UserError
    on every rank."""
    chosen: list[str | None] = [None]

    def choose() -> None:
        folder = Path(config.output.output_dir)
        remove_unfinished(folder)
        if config.output.resume is not None:
            found = _newest(config, folder, world) if config.output.resume == AUTO else _named(config, folder)
            if found is not None:
                check_options(found, config, world.size)
                chosen[0] = str(found.path)

    world.main_only(lambda: _reading(choose))
    dist.broadcast_object_list(chosen, src=0, device=torch.device("cpu"))
    path = chosen[0]
    return None if path is None else world.together(lambda: _seen(Path(path), world))


def forget_others(folder: Path, checkpoint: Checkpoint | None, world: World) -> None:
    """Remove the checkpoints in `folder` that this run does not go on from: later ones, which it replaces, and those of
    another run. On one rank."""
    first = checkpoint.step if checkpoint is not None and checkpoint.is_in(folder) else -1
    others = [path for step, path in ours_in(folder).items() if step > first]
    for path in others:
        remove(path)
    if others:
        world.say(f"removed   {_names(others)} in {folder}, which this run replaces")


def notes_of(checkpoint: Checkpoint, config: Config, world: World) -> list[str]:
    """Return what the user is told of a run that goes on."""
    manifest = checkpoint.manifest
    lines = [f"resume    {checkpoint.path}: {manifest.step} steps are done"]
    before, now = manifest.options, config.to_flat()
    changed = [n for n in before if n in now and before[n] != now[n] and OPTIONS[n].group not in SILENT]
    if changed:
        lines.append(f"          not as before: {differences(changed, before, now)}")
    if manifest.ranks != world.size:
        dropout = ", dropout's random numbers are new ones" * (config.adapter.lora_dropout > 0)
        lines.append(
            f"          {count_of(world.size, 'rank')} instead of {manifest.ranks}: sums over ranks round otherwise"
            f"{dropout}"
        )
    return lines


def _newest(config: Config, folder: Path, world: World) -> Checkpoint | None:
    damaged: dict[Path, Damaged] = {}
    for path in reversed(checkpoints_in(folder).values()):
        try:
            found = _whole(path)
        except Damaged as why:
            damaged[path] = why
            continue
        for bad, reason in damaged.items():
            world.say(f"resume    {bad} is damaged ({reason}): the one before it is taken")
        return found
    if damaged:
        said = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise UserError(f"resume: no checkpoint in {folder} is whole ({said}); start anew in another output_dir")
    if not _has_begun(config, folder) and not config.output.overwrite_output_dir:
        check_empty(folder)
    world.say(f"resume    {folder} has no checkpoint yet: from the beginning")
    return None


def _has_begun(config: Config, folder: Path) -> bool:
    """Return whether a run that ended before its first checkpoint left `folder` as it is.

    An adapter in it may be a finished one, unless the same command line saved it: its end would have a checkpoint."""
    if not any((folder / name).exists() for name in BEGUN):
        return False
    if not (folder / ADAPTER).exists():
        return True
    try:
        before = parse(["--config", str(folder / BEGUN[0])])
    except UserError:
        return False
    return before.output.resume == AUTO and before.output.save_steps is not None and is_same_run(before, config)


def _named(config: Config, folder: Path) -> Checkpoint:
    path = Path(config.output.resume or "")
    newest = next(reversed(checkpoints_in(path).values()), None)
    try:
        if newest is not None:
            raise Damaged(f"it is a folder of checkpoints, of which {newest} is the newest")
        found = _whole(path)
    except Damaged as why:
        raise UserError(
            f"resume: {path} is no whole checkpoint ({why}); give the path of another, or auto for the newest whole "
            "one in output_dir"
        ) from why
    if config.output.overwrite_output_dir:
        return found
    if not found.is_in(folder):
        check_empty(folder)
    later = [p for step, p in checkpoints_in(folder).items() if step > found.step]
    if later:
        raise UserError(
            f"resume: {folder} has later checkpoints than {path} ({_names(later)}); go on from them with --resume "
            "auto, choose another output_dir, or remove them with --overwrite_output_dir true"
        )
    return found


def _whole(path: Path) -> Checkpoint:
    found = read_checkpoint(path)
    check_files(found)
    return found


def _reading(do: Callable[[], T]) -> T:
    """Return what `do` does. Raises UserError where a disk does not answer: what is on it may be whole."""
    try:
        return do()
    except OSError as error:
        raise UserError(
            f"resume: {error.filename or 'output_dir'} cannot be read ({error.strerror or error}); try again when it "
            "can, or start anew in another output_dir"
        ) from error


def _seen(path: Path, world: World) -> Checkpoint:
    try:
        return _reading(lambda: read_checkpoint(path))
    except Damaged as why:
        raise UserError(
            f"resume: rank {world.rank} cannot read {path} ({why}); checkpoints must be on a disk that all nodes share"
        ) from why


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)
