"""Choice of the exchange that a run uses."""

import os
from collections.abc import Callable

import torch

from fsdp_qlora.config.options import MemoryOptions
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import UserError
from fsdp_qlora.exchange.base import Exchange
from fsdp_qlora.exchange.collectives import Collectives
from fsdp_qlora.exchange.host import FAILS, INSTEAD, HostExchange


def choose_exchange(nbytes: int, options: MemoryOptions, world: World) -> Exchange:
    """Make the exchange of `--exchange_by`. nbytes: of the largest tensor that ranks will exchange. A collective.

    Where the system refuses host memory: raises UserError if the options demand it, else says so once."""
    by_host = all(wanted for (wanted,) in world.gather([through_host(options, world)]))
    return EXCHANGES[options.exchange_by if by_host else "nccl"](nbytes, world)


def through_host(options: MemoryOptions, world: World) -> bool:
    """Return whether adapters shall be exchanged through host memory, as far as this rank can see its machine."""
    if options.exchange_by != "auto":
        return options.exchange_by == "host"
    if world.device.type != "cuda" or world.size == 1 or world.has_several_nodes:
        return False
    return not _peer_access(world)


def check_exchange(options: MemoryOptions, world: World) -> None:
    """Raise UserError where `exchange_by` asks for what this launch cannot do."""
    if options.exchange_by == "auto":
        return
    if world.size == 1 or world.device.type != "cuda":
        where = "without GPUs" if world.device.type != "cuda" else "on one rank"
        raise UserError(f"exchange_by: {options.exchange_by} has no effect {where}; omit it")
    if options.exchange_by == "host" and world.has_several_nodes:
        raise UserError("exchange_by: host is for ranks of one node, and these are several; take auto or nccl")


def _collectives(nbytes: int, world: World) -> Exchange:
    return Collectives()


def _host(nbytes: int, world: World) -> Exchange:
    """Make the exchange through host memory, or raise UserError on every rank."""
    exchange = HostExchange(nbytes, world)
    if fault := exchange.fault():
        raise UserError(f"{FAILS} ({fault}): {INSTEAD}").on_every_rank(world.rank)
    return exchange


def _host_or_collectives(nbytes: int, world: World) -> Exchange:
    """Make the exchange through host memory, or say why not and take the collectives."""
    try:
        exchange = HostExchange(nbytes, world)
        fault = exchange.fault()
    except UserError:
        fault = "no memory that ranks can share"
    if not fault:
        return exchange
    world.say(f"{FAILS} ({fault}): NCCL does it, beside which products run slower")
    return Collectives()


def _peer_access(world: World) -> bool:
    """Return whether the node's GPUs reach each other's memory, by NVLink or by PCI Express where the driver allows it.

    True where this process sees only its own GPU."""
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return False
    if torch.cuda.device_count() < world.local_size:
        return True
    own = world.device.index
    return all(torch.cuda.can_device_access_peer(own, peer) for peer in range(world.local_size) if peer != own)


# By `--exchange_by`: makes it for (bytes of the largest tensor, world).
EXCHANGES: dict[str, Callable[[int, World], Exchange]] = {
    "auto": _host_or_collectives,
    "host": _host,
    "nccl": _collectives,
}
