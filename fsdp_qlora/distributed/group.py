"""The process group of a run's ranks: opened once all of them have come, closed however the run ends."""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fsdp_qlora.distributed.interface import GLOO_INTERFACE, choose_interface
from fsdp_qlora.errors import TrainingStopped, UserError, first_line, is_out_of_memory
from fsdp_qlora.runtime.launcher import Launch
from fsdp_qlora.torch_compat import HashStore, PrefixStore, Store, abort_process_group

# A rank that dies is noticed by torchrun in a second, so this only bounds real deadlocks. It must outlast what ranks
# lawfully wait for: rank 0 tokenising a large dataset, or its turn at encoding a block on a slow disk.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# A node that fails before its ranks have come is no concern of another node's torchrun. Nodes may start minutes apart,
# but that torchrun waits for: a rank that was started comes as fast as its disk gives it Python's files.
SAID_SECONDS = 30.0  # until the user is told which ranks are missing
MISSING_SECONDS = 300.0  # until the run ends
OPENING_SECONDS = 300.0  # for the connections between ranks that have come; gloo itself waits for ever


def open_group(launch: Launch, device: torch.device) -> None:
    """Open the group: gloo for CPU tensors, NCCL for CUDA's.

    Raises UserError where PyTorch lacks one of them, TrainingStopped where the ranks do not meet."""
    if not dist.is_available() or not dist.is_gloo_available():
        raise UserError("this PyTorch is built without torch.distributed's gloo backend: install one from pytorch.org")
    if device.type == "cuda" and launch.size > 1 and not dist.is_nccl_available():
        raise UserError(
            "this PyTorch is built without NCCL, which several GPUs need to exchange tensors: install a CUDA build of "
            "PyTorch for Linux, or start one rank"
        )
    cuda = device.type == "cuda" and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    device_id = device if cuda else None
    if launch.size == 1:  # nobody to meet: no address, no port, nothing that a firewall could refuse
        dist.init_process_group(
            backend, store=HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT, device_id=device_id
        )
        return
    giving_up = threading.Timer(OPENING_SECONDS, _give_up, [launch])
    giving_up.daemon = True
    try:
        store = store_of(launch)
        await_ranks(store, launch)
        choose_interface(store, launch)
        giving_up.start()
        dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.size, timeout=COLLECTIVE_TIMEOUT,
            device_id=device_id,
        )  # fmt: skip
    except RuntimeError as error:  # gloo's and the store's
        if isinstance(error, TrainingStopped) or is_out_of_memory(error):
            raise
        raise TrainingStopped(
            f"rank {launch.rank} could not reach the other ranks at {launch.address}:{launch.port} "
            f"({first_line(error)}): check that every node started, that the address is reachable, that the port is "
            f"free, and {GLOO_INTERFACE} if it is set"
        ) from error
    finally:
        giving_up.cancel()


def store_of(launch: Launch) -> Store:
    """Return the store in which the ranks of this start meet.

    Torchrun keeps one store for all its restarts: an earlier start's addresses are those of ranks that are gone."""
    store: Store = next(iter(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT)))[0]
    return PrefixStore(f"fsdp_qlora/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def await_ranks(store: Store, launch: Launch) -> None:
    """Return when every rank has come. Raises TrainingStopped, naming those that have not, after MISSING_SECONDS."""
    came = [f"came/{rank}" for rank in range(launch.size)]
    store.set(came[launch.rank], "")
    if _have_come(store, came, SAID_SECONDS):
        return
    if launch.local_rank == 0:
        who = _missing(store, came)
        print(f"waiting for {who} of {launch.size}, for {SAID_SECONDS:.0f} s by now", file=sys.stderr, flush=True)
    if _have_come(store, came, MISSING_SECONDS - SAID_SECONDS):
        return
    raise TrainingStopped(
        f"rank {launch.rank}: {_missing(store, came)} of {launch.size} did not come within {MISSING_SECONDS:.0f} s: "
        "the cause is in the messages of their node; start all nodes again"
    )


def _have_come(store: Store, keys: Sequence[str], seconds: float) -> bool:
    try:
        store.wait(list(keys), timedelta(seconds=seconds))
    except dist.DistStoreError:
        return False
    return True


def _missing(store: Store, keys: Sequence[str]) -> str:
    absent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
    return f"rank{'s' * (len(absent) != 1)} {', '.join(absent)}"


def _give_up(launch: Launch) -> None:
    line = (
        f"rank {launch.rank}: the ranks have met at {launch.address}:{launch.port}, but were not connected with "
        f"each other within {OPENING_SECONDS:.0f} s: let the firewall pass all ports between the nodes, and name the "
        f"network interface that connects them in {GLOO_INTERFACE} and NCCL_SOCKET_IFNAME"
    )
    os.write(2, f"train.py: {line}\n".encode())
    os._exit(1)


def abort_group() -> None:
    """End the group without its peers' help: pending NCCL work is cancelled, for destroying would wait for it."""
    if not dist.is_initialized():
        return
    if dist.get_backend_config().find("nccl") >= 0 and abort_process_group is not None:
        abort_process_group()
        return
    dist.destroy_process_group()


def within(seconds: float, close: Callable[[], None]) -> None:
    """Run `close` for at most `seconds`. What has not returned by then is left to the end of the process: a second
    failure while closing must neither hide the first nor keep the process alive."""

    def attempt() -> None:
        try:
            close()
        except Exception as error:
            print(f"while closing the process group: {error}", file=sys.stderr, flush=True)

    closing = threading.Thread(target=attempt, daemon=True, name="close process group")
    closing.start()
    closing.join(seconds)
    if closing.is_alive():
        print(f"the process group did not close within {seconds:.0f} s; going on without", file=sys.stderr, flush=True)
