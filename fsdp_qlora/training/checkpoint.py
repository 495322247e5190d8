"""Checkpoints of a run: all that the next step depends on, written while no step is under way, and given back.

Written block by block from the device to the disk: nothing is copied aside first, for which a machine full of the base
has no memory. Training stands still for as long as the disk takes; copies from the device and checksums are made
meanwhile. Rank 0 writes the master weights once, as the adapter that PEFT opens, and each rank writes its slices of the
optimizer's state beside it: at 70B and rank 64 that is 3.3 GB and 6.6 GB, and no byte twice.
"""

import platform
import time
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import transformers

from fsdp_qlora.config.options import Config, OutputOptions
from fsdp_qlora.distributed.shared_folder import SHARED, UNSEEN
from fsdp_qlora.distributed.world import World
from fsdp_qlora.export.peft import ADAPTER, ADAPTER_CONFIG, adapter_settings, settings_text
from fsdp_qlora.optim.optimizers import state_bytes
from fsdp_qlora.report.callback import Callback
from fsdp_qlora.report.records import EvalRecord
from fsdp_qlora.training.checkpoint_folder import (
    PREFIX,
    Checkpoint,
    Manifest,
    appear,
    ours_in,
    part_of,
    rank_file,
    remove,
    surplus,
    write_manifest,
    write_synced,
)
from fsdp_qlora.training.checkpoint_tensors import (
    adapters_of,
    find_room,
    load_adapter,
    load_slices,
    tried,
    write_adapter,
    write_slices,
)
from fsdp_qlora.training.step import Stepper
from fsdp_qlora.training.tensor_file import Written

ON_REQUEST = "SAVE"  # a file of this name in output_dir asks for a checkpoint


class Stateful(Protocol):
    """A small part of a run that the next step depends on; its state is the same on every rank."""

    def state(self) -> Mapping[str, Any]:
        """Return numbers and texts by name, which JSON holds to the last bit."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` was taken."""
        ...


class Best(Callback):
    """The lowest evaluation loss so far, and the step that it was found after."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.loss: float | None = None

    def on_eval(self, record: EvalRecord) -> None:
        if record.is_best:
            self.step, self.loss = record.step, record.loss

    def state(self) -> Mapping[str, Any]:
        return {"step": self.step, "loss": self.loss}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.step, self.loss = state["step"], state["loss"]


class Checkpoints:
    """Writes the checkpoints of a run and gives one back; every rank has one, and its calls are collectives."""

    def __init__(
        self,
        config: Config,
        world: World,
        stepper: Stepper,
        place: Callable[[], Mapping[str, Any]],
        base: Mapping[str, Any],
        parts: Mapping[str, Stateful] | None = None,
    ) -> None:
        """place: as `resume.place_in`, asked on rank 0. base: as `resume.base_of`. parts: further ones, by name."""
        self.config, self.world, self.stepper = config, world, stepper
        self.folder = Path(config.output.output_dir)
        self.best = Best()  # a listener: its checkpoint is not removed
        self.parts: dict[str, Stateful] = {"schedule": stepper.schedule, "loss_scale": stepper.scale, "best": self.best}
        self.parts |= parts or {}
        self.adapters = adapters_of(stepper)
        self._place, self._base = place, base
        self._deaf = False  # to the file that asks for one: it is there for good
        self._newest: int | None = None  # step of the last one that was written, or tried

    def requested(self) -> bool:
        """Return whether the user asks for one, by a file in output_dir. Rank 0 looks."""
        if not self.world.is_main or self._deaf:
            return False
        try:
            return (self.folder / ON_REQUEST).exists()
        except OSError:  # a disk that does not answer asks for nothing
            return False

    def is_due(self, step: int, is_last: bool) -> bool:
        """Return whether the options ask for one after `step`."""
        every = self.config.output.save_steps
        return every is not None and (step % every == 0 or is_last) and step != self._newest

    def is_due_at_stop(self, step: int) -> bool:
        """Return whether there is to be one of a run that a signal ends after `step`."""
        return self.config.output.makes_checkpoints and step > 0 and step != self._newest

    def save(self, step: int) -> Path | None:
        """Write a checkpoint, whole or not at all; return its folder. A collective, between two steps.

        Where the disk or GPU memory fails the user is told, training goes on and earlier checkpoints stay."""
        self._newest, started = step, time.perf_counter()
        part, target = part_of(self.folder, step), self.folder / f"{PREFIX}{step}"
        why = self._on_main(partial(self._begin, part))
        written: dict[str, Written] = {}
        if not why:
            why, written = self._write(part)
        why = why or self._on_main(partial(self._complete, part, target, step, written))
        if why:
            self._on_main(partial(remove, part))
            self.world.say(
                f"step {step}: no checkpoint could be written in {self.folder} ({why}); training goes on, and earlier "
                "checkpoints stay"
            )
            return None
        seconds, size = time.perf_counter() - started, sum(file.nbytes for file in written.values())
        self.world.say(f"saved     {target} in {seconds:.1f} s ({size / 2**20:,.1f} MiB)")
        return target

    def load(self, checkpoint: Checkpoint) -> None:
        """Give every part of the run what it had when `checkpoint` was written."""
        load_adapter(checkpoint, self.stepper, self.config)
        load_slices(checkpoint, self.stepper, self.config.training.seed, self.world)
        state = checkpoint.manifest.state
        for name, part in self.parts.items():
            if name in state:  # else the run had no such part then
                part.load_state(state[name])
        self.stepper.go_on_from(checkpoint.step)
        if checkpoint.is_in(self.folder):
            self._newest = checkpoint.step

    def _begin(self, part: Path) -> None:
        try:  # whether the checkpoint succeeds or not: else each step would try again
            (self.folder / ON_REQUEST).unlink(missing_ok=True)
        except OSError as error:
            if not self._deaf:
                self.world.say(
                    f"{self.folder / ON_REQUEST} cannot be removed ({error.strerror}): this run does not look for it "
                    "any more"
                )
            self._deaf = True
        remove(part)
        part.mkdir()

    def _write(self, part: Path) -> tuple[str, dict[str, Written]]:
        """Write the tensors. Returns why it failed on some rank, or "", and what each file has. A collective."""
        own = part / rank_file(self.world.rank, self.world.size)
        why = self._agree(tried(partial(find_room, self.stepper, self.world))[0])
        if not why and self.world.has_several_nodes:
            why = self._agree("" if part.is_dir() else f"rank {self.world.rank} on {platform.node()} {UNSEEN}")
        if why:
            return why, {}
        why, adapter = write_adapter(part / ADAPTER, self.stepper, self.config, self.world)
        slices: Written | None = None
        if not why:
            why, slices = tried(lambda: write_slices(own, self.stepper, self.world))
        why = self._agree(why)
        of_ranks = self.world.gather(slices or Written(0, 0))
        files = {rank_file(rank, self.world.size): Written(*map(int, sums)) for rank, sums in enumerate(of_ranks)}
        return why, {ADAPTER: adapter, **files}

    def _complete(self, part: Path, target: Path, step: int, written: Mapping[str, Written]) -> None:
        """Make the folder a checkpoint and give it its name; then remove those that are too many."""
        for name, file in written.items():
            if not (part / name).is_file() or (part / name).stat().st_size != file.nbytes:
                raise OSError(f"{name} of another node is not there: {SHARED}")
        names = [name for name, _ in self.adapters]
        settings = settings_text(adapter_settings(names, self.stepper.model.linear_paths, self.config)).encode()
        write_synced(part / ADAPTER_CONFIG, settings)
        written = {**written, ADAPTER_CONFIG: Written(len(settings), zlib.crc32(settings))}
        write_manifest(part, self._manifest(step, written))
        appear(part, target)
        for old in surplus(ours_in(self.folder), self.config.output.save_total_limit, step, self.best.step):
            remove(self.folder / f"{PREFIX}{old}")

    def _manifest(self, step: int, written: Mapping[str, Written]) -> Manifest:
        return Manifest(
            step=step,
            ranks=self.world.size,
            options=self.config.to_flat(),
            data=dict(self._place()),
            base=dict(self._base),
            adapters=self.adapters,
            state={name: dict(part.state()) for name, part in self.parts.items()},
            files={name: list(file) for name, file in written.items()},
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
        )

    def _on_main(self, do: Callable[[], object]) -> str:
        """Run `do` on rank 0. Returns why it failed, or "", on every rank. A collective."""
        return self._agree(tried(do)[0] if self.world.is_main else "")

    def _agree(self, why: str) -> str:
        """Return the words of the first rank that has any. A collective."""
        said = [""] * self.world.size
        dist.all_gather_object(said, why)
        return next(filter(None, said), "")


def checkpoint_bytes(adapters: int, optimizer: str) -> int:
    """Return the bytes of a checkpoint, but for a few thousand. adapters: their parameters."""
    return round(adapters * (4 + state_bytes(optimizer, "cpu")))


def most_at_once(options: OutputOptions, folder: Path, steps: int) -> int:
    """Return how many more checkpoints than now there may be in `folder` at once in a run of `steps` more steps."""
    if not options.makes_checkpoints:
        return 0
    count = 1 if options.save_steps is None else -(-steps // options.save_steps)
    if options.save_total_limit is not None:
        count = min(count, max(1, options.save_total_limit + 1 - len(ours_in(folder))))
    return count
