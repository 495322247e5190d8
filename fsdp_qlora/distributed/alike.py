"""What the nodes of a run must have alike: one line where they differ, before anything is trained on the difference."""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from fsdp_qlora.config.options import OPTIONS, Config, show
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError

# Options that may have another value on another node: its own memory, its own threads.
OWN = ("gpu_memory_gib", "host_memory_gib", "loading_workers")
LIBRARIES = ("torch", "transformers")
PACKAGE = Path(__file__).resolve().parents[1]


def check_nodes(config: Config, world: World) -> None:
    """Raise UserError on every rank where nodes run another program, have other options or cannot share the work.

    A collective. What nodes read, they compare when they have read it: see `check_alike`."""
    if not world.has_several_nodes:
        return
    check_alike(_program(), world, "install the same on every node")
    check_alike(_options(config), world, "start every node with the same options")
    sizes = sorted({int(size) for (size,) in world.gather([world.local_size])})
    if len(sizes) > 1 and config.memory.sharding_strategy.startswith("hybrid") and config.memory.hybrid_shard_size < 0:
        raise UserError(
            f"sharding_strategy: {config.memory.sharding_strategy} keeps a copy of the base on each node, and nodes "
            f"have {' and '.join(map(str, sizes))} ranks; start as many on each, or set hybrid_shard_size, or take "
            "full_shard"
        ).on_every_rank(world.rank)


def check_alike(values: Mapping[str, str], world: World, cure: str) -> None:
    """Raise UserError on every rank, naming every value that nodes have not alike. A collective.

    values: what a message says of this rank's, by name. cure: what the user is to do. Compares nothing on one node."""
    if not world.has_several_nodes:
        return
    everyone: list[dict[str, str]] = [json.loads(text) for text in world.gather_texts(json.dumps(dict(values)))]
    hosts = world.gather_texts(platform.node())
    names = dict.fromkeys(name for one in everyone for name in one)
    wrong = [name for name in names if len({one.get(name) for one in everyone}) > 1]
    if wrong:
        told = "; ".join(f"{name}: {_who_has(name, everyone, hosts)}" for name in wrong)
        raise UserError(f"{told}: all nodes must have the same; {cure}").on_every_rank(world.rank)


def _who_has(name: str, everyone: list[dict[str, str]], hosts: list[str]) -> str:
    """Return who has which value: "rank 0 (node0) has 1 and ranks 1, 2 (node1) have 2"."""
    ranks: dict[str, list[int]] = {}
    for rank, one in enumerate(everyone):
        ranks.setdefault(one.get(name, "none"), []).append(rank)
    return " and ".join(
        f"rank{'s' * (len(those) > 1)} {', '.join(map(str, those))} "
        f"({', '.join(dict.fromkeys(hosts[rank] for rank in those))}) {'have' if len(those) > 1 else 'has'} {value}"
        for value, those in ranks.items()
    )


def _options(config: Config) -> dict[str, str]:
    """Return option -> its value in words; of a path only whether it is given, for nodes have folders of their own."""
    return {
        name: _path(name, value) if OPTIONS[name].spec.is_path else show(value)
        for name, value in config.to_flat().items()
        if name not in OWN and OPTIONS[name].group != "launch"
    }


def _path(name: str, value: str | None) -> str:
    if value in (None, "auto", "dummy"):
        return show(value)
    if name == "model_name" and not Path(str(value)).is_dir():
        return str(value)  # the hub's
    return "a path"


def _program() -> dict[str, str]:
    """Return the program's source, as a short checksum, and the versions of libraries that decide numbers."""
    source = hashlib.sha256()
    files = {*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py")}  # in a checkout that is a link
    for file in sorted(files):
        source.update(f"{file.relative_to(PACKAGE)}\n".encode() + file.read_bytes())
    return {"fsdp_qlora": f"source {source.hexdigest()[:12]}"} | {name: metadata.version(name) for name in LIBRARIES}
