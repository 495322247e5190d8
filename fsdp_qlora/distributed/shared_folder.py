"""Whether a folder is on a disk that all nodes of a run share, as checkpoints need."""

import platform
import time
import uuid
from pathlib import Path

from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError

SHARED = "output_dir must be on a disk that all nodes share"
UNSEEN = f"does not see the folder that rank 0 writes to: {SHARED}"
PATIENCE_SECONDS = 10.0  # in which a network file system shows a file to another node


def check_shared(folder: Path, world: World) -> None:
    """Raise UserError on every rank where some rank does not see what rank 0 writes in `output_dir`. A collective."""
    name = world.from_main(lambda: f".shared-{uuid.uuid4().hex}")  # never looked for before, so no node knows of none
    try:
        world.main_only(lambda: (folder / name).touch())
        unseen = [rank for rank, (seen,) in enumerate(world.gather([_appears(folder / name)])) if not seen]
    finally:
        if world.is_main:
            (folder / name).unlink(missing_ok=True)
    hosts = world.gather_texts(platform.node())
    if unseen:
        who = ", ".join(f"{rank} on {hosts[rank]}" for rank in unseen)
        raise UserError(
            f"output_dir: {folder} of rank 0 is not seen by rank{'s' * (len(unseen) > 1)} {who}, and every rank writes "
            "its part of a checkpoint there; choose a folder on a disk that all nodes share, or omit save_steps and "
            "resume"
        ).on_every_rank(world.rank)


def _appears(file: Path) -> bool:
    until = time.monotonic() + PATIENCE_SECONDS
    while not file.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
