"""Streaming: the right bytes of every unit in any order of use, no more copies than are needed, nothing left over."""

import gc
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from fsdp_qlora.config.options import LaunchOptions
from fsdp_qlora.distributed.world import open_world
from fsdp_qlora.errors import UserError
from fsdp_qlora.memory import host_link, pinned
from fsdp_qlora.memory import shared as host_store
from fsdp_qlora.memory.pinned import register
from fsdp_qlora.memory.shared import HostStore, rounded
from fsdp_qlora.placement.streamer import StreamedUnit, Streamer, order_of_use
from fsdp_qlora.weights.codecs import Plain
from fsdp_qlora.weights.frozen_bytes import FrozenBytes
from fsdp_qlora.weights.layout import Layout
from tests.support import tiny
from tests.support.built import build_in
from tests.support.runs import Options
from tests.support.slow_gpu import CUDA, slow_gpu
from tests.support.torchrun import run_torchrun

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCKS, HEAD = 7, 7  # the head comes after the last block and is larger


def units(resident: set[int]) -> list[StreamedUnit]:
    made = []
    for i in range(BLOCKS + 1):
        frozen = FrozenBytes(Layout({"w": (Plain(torch.float32), (64 if i < HEAD else 100, 3))}))
        source = torch.full((frozen.layout.nbytes,), i + 1, dtype=torch.uint8)
        if i in resident:
            frozen.flat = torch.nn.Parameter(source.to(DEVICE).view(torch.float32), requires_grad=False)
        on_host = source.pin_memory() if DEVICE.type == "cuda" else source
        made.append(StreamedUnit(frozen, None if i in resident else on_host))
    return made


def walk(streamer: Streamer, positions: list[int], backward: bool) -> None:
    for position in positions:
        streamer.acquire(position, backward)
        found = streamer.units[position].frozen.flat.detach().view(torch.uint8)
        assert found.device.type == DEVICE.type
        assert bool((found == position + 1).all()), f"unit {position} has {found.unique().tolist()}"


def step(streamer: Streamer) -> None:
    walk(streamer, list(range(BLOCKS + 1)), backward=False)
    walk(streamer, list(range(BLOCKS))[::-1], backward=True)


@pytest.mark.parametrize("buffers", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("resident", [set(), {0}, {6}, {1, 3, 5}, {HEAD}, set(range(BLOCKS))], ids=str)
def test_every_unit_finds_its_bytes_and_none_is_copied_needlessly(resident, buffers):
    streamer = Streamer(units(resident), BLOCKS, buffers, DEVICE)
    step(streamer)
    before, counted = streamer.copied, host_link.TRAFFIC.to_device
    for _ in range(3):
        step(streamer)
    moved = [len(set(range(BLOCKS)) - resident), HEAD not in resident]
    size, head_size = (unit.frozen.layout.nbytes for unit in streamer.units[-2:])
    every_use = 3 * (2 * moved[0] * size + moved[1] * head_size)
    copied = streamer.copied - before
    assert host_link.TRAFFIC.to_device - counted == copied, "what the record of a step tells of the link"
    if buffers >= sum(moved):
        assert copied == 0, "all of them have a buffer of their own"
    else:  # the last of a pass are the first of the next: all that are still there but one, which the head may take
        kept = 3 * 2 * (buffers - 1) * size
        assert every_use - kept - 3 * 2 * size <= copied <= every_use - kept + 3 * 2 * size


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_a_walk_that_nobody_foresaw_finds_its_bytes_too(buffers):
    """Forwards that no backward follows, a backward that ends early, jumps."""
    streamer = Streamer(units({2}), BLOCKS, buffers, DEVICE)
    for positions, backward in (
        (range(BLOCKS + 1), False),
        (range(BLOCKS + 1), False),
        ((6, 5), True),
        ((0, 1, 2, 3), False),
        ((5, 1, 6), True),
        ((HEAD, 0, 4, 4, 0), False),
    ):
        walk(streamer, list(positions), backward)
    step(streamer)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_copies_and_computations_that_overlap_change_no_byte(monkeypatch, buffers, seed):
    """However far the host is ahead, and in whatever order the streams get on."""
    monkeypatch.setattr(host_link, "PIECE", 300)
    here = units({2})
    with slow_gpu(monkeypatch, seed) as gpu:
        streamer, seen = Streamer(here, BLOCKS, buffers, CUDA), []

        def use(position: int) -> None:
            flat = here[position].frozen.flat.detach().view(torch.uint8)
            gpu.compute(lambda: seen.append((position, flat.unique().tolist())))
            gpu.compute(lambda: None)
            gpu.compute(lambda: seen.append((position, flat.unique().tolist())))
            gpu.run(least=gpu.random.randint(1, 30))

        order = [(p, False) for p in range(BLOCKS + 1)] + [(p, True) for p in reversed(range(BLOCKS))]
        for position, backward in order + order[:4] + order:  # a walk that stops in the middle, too
            streamer.acquire(position, backward)
            use(position)
        gpu.run()
    assert len(seen) == 2 * (2 * len(order) + 4)
    assert all(found == [position + 1] for position, found in seen)


def test_the_order_of_use_is_that_of_a_step():
    whole = [*range(BLOCKS + 1), *reversed(range(BLOCKS)), *range(BLOCKS + 1), *reversed(range(BLOCKS))]
    for backward, at in [(False, p) for p in range(BLOCKS + 1)] + [(True, p) for p in range(BLOCKS)]:
        start = 2 * BLOCKS - at if backward else at
        wanted = list(dict.fromkeys(i for i in whole[start:] if i != 3))
        assert order_of_use([0, 1, 2, 4, 5, 6, 7], at, backward, BLOCKS + 1, BLOCKS) == wanted, (at, backward)


# ---- the memory that ranks share


def test_memory_that_cannot_be_had_is_a_users_error_of_one_line(monkeypatch):
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "memfd_create", refuse)
    told = r"^the frozen base .* 2\.00 GiB .*No space left.*raise the container's limit.*--cpu_offload_by fsdp2"
    with open_world(LaunchOptions(), 0) as world, pytest.raises(UserError, match=told):
        HostStore(2 << 30, replace(world, local_size=2))


def test_memory_that_is_forbidden_is_told_so(monkeypatch):
    def forbid(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbid)
    with open_world(LaunchOptions(), 0) as world:
        with pytest.raises(
            UserError, match="the system forbids it, or use --use_cpu_offload true --cpu_offload_by fsdp2"
        ):
            HostStore(1 << 20, replace(world, local_size=2))
        assert HostStore(1 << 20, world).take(5).tolist() == [0] * 5, "a lone rank shares with none"


def test_a_system_without_such_memory_is_told_what_to_use(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with open_world(LaunchOptions(), 0) as world, pytest.raises(UserError, match="--cpu_offload_by fsdp2"):
        HostStore(1 << 20, replace(world, local_size=2))


@pytest.mark.gpu
def test_memory_that_cannot_be_page_locked_still_serves(monkeypatch):
    def refuse(address: int, nbytes: int) -> int:
        assert register(address, nbytes) == 0
        return register(address, nbytes)  # for the second time, which is refused

    monkeypatch.setattr(pinned, "register", refuse)
    with open_world(LaunchOptions(), 0) as world:
        store = HostStore(1 << 20, world)
        piece = store.take(1000)
        torch.ones(1, device=DEVICE).add_(1)  # no kernel is told of the refusal
        piece.copy_(torch.arange(1000, device=DEVICE).to(torch.uint8), non_blocking=True)
        torch.cuda.synchronize()
        assert store.refused != 0
        assert piece.tolist() == [i % 256 for i in range(1000)]


def test_pieces_that_are_known_are_page_locked_ahead(monkeypatch):
    locked, go_on = [], threading.Semaphore(0)

    def slowly(address: int, nbytes: int) -> int:
        go_on.acquire()
        locked.append((address, nbytes))
        return 0 if len(locked) < 3 else 801

    monkeypatch.setattr(pinned, "register", slowly)
    monkeypatch.setattr(pinned, "unregister", lambda address: locked.remove((address, locked_bytes[address])))
    monkeypatch.setattr(host_store, "LOCKERS", 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with open_world(LaunchOptions(), 0) as world:
        sizes = [5000, 1, 9000]
        store = HostStore(sum(map(rounded, [*sizes, 7])), replace(world, device=CUDA), pieces=sizes)
        threading.Timer(0.1, go_on.release).start()
        pieces = [store.take(5000)]  # waits for its own
        assert locked == [(pieces[0].data_ptr(), 5000)]
        go_on.release(2)
        pieces += [store.take(1), store.take(9000)]
        assert [address for address, _ in locked] == [piece.data_ptr() for piece in pieces]
        assert store.refused == 801
        pieces.append(store.take(7))  # nobody spoke of it; after a refusal none is tried
        assert len(locked) == 3
        with pytest.raises(AssertionError, match="too small"):
            store.take(1)
        locked_bytes = dict(locked)
        first = pieces[0][10:20]
        del store, pieces
        gc.collect()
        assert [nbytes for _, nbytes in locked] == [5000, 9000], "a piece stays page-locked with any part of it"
        del first
        gc.collect()
        assert [nbytes for _, nbytes in locked] == [9000], "the refused one alone has nothing to be taken back"


def test_another_piece_than_was_foreseen_is_our_mistake(monkeypatch):
    monkeypatch.setattr(pinned, "register", lambda address, nbytes: 0)
    monkeypatch.setattr(pinned, "unregister", lambda address: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with open_world(LaunchOptions(), 0) as world:
        store = HostStore(1 << 20, replace(world, device=CUDA), pieces=[10])
        with pytest.raises(AssertionError, match="another piece"):
            store.take(11)


def test_a_refusal_while_blocks_leave_the_device_is_told_once(tmp_path, monkeypatch, capsys):
    take, plans = HostStore.take, []

    def takes(self: HostStore, nbytes: int) -> torch.Tensor:
        self.refused = 2
        return take(self, nbytes)

    options: Options = {
        "model_name": tiny.save_model(LlamaConfig(**tiny.SHAPE), tmp_path), "dataset": "dummy", "precision": "fp32",
        "lora_rank": 2, "use_cpu_offload": True, "resident_blocks": 1, "base_cache": "null",
    }  # fmt: skip
    with open_world(LaunchOptions(), 0) as world:
        placement = build_in(world, options, lambda plan: plans.append(plan) or plan).placement
        monkeypatch.setattr(HostStore, "take", takes)
        assert "refuses to page-lock" not in capsys.readouterr().out
        none = replace(plans[0], blocks=[replace(block, resident=False) for block in plans[0].blocks])
        for plan in (none, replace(none, staging=none.staging + 1)):
            placement.shrink(plan)
    out = capsys.readouterr().out
    assert out.count("the system refuses to page-lock the host copy of the frozen base (CUDA error 2)") == 1


SHARED = """
    import os, sys
    import torch
    from fsdp_qlora.config.options import LaunchOptions
    from fsdp_qlora.memory.shared import HostStore, rounded
    from fsdp_qlora.distributed.world import open_world

    with open_world(LaunchOptions(), 0) as world:
        sizes = [10_000, 1, 4096, 100_001]
        store = HostStore(sum(map(rounded, sizes)), world)
        pieces = [store.take(size) for size in sizes]
        assert all(piece.untyped_storage().nbytes() == piece.numel() for piece in pieces)
        for piece in pieces:
            mine = store.share(len(piece))
            piece[mine] = world.rank + 1
        world.barrier()
        for piece in pieces:  # each byte written by one rank and seen by all
            assert (piece > 0).all() and piece.tolist() == sorted(piece.tolist())
        sums = [int(p.to(torch.int64).sum()) for p in pieces]
        world.barrier()
        del store, pieces, piece
        open_files = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        names = [os.readlink(file) for file in open_files if os.path.islink(file)]
        assert not any("fsdp_qlora" in name for name in names), "the memory is still held"
        sys.stdout.write(f"rank {world.rank} saw {sums}\\n")
    """


def test_ranks_of_a_node_write_and_read_the_same_memory_which_has_no_name():
    before = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    done = run_torchrun(SHARED, 2)
    sums = [line.partition("saw")[2] for line in done.stdout.splitlines() if "saw" in line]
    assert len(sums) == 2, f"{done.stdout}\n{done.stderr}"
    assert sums[0] == sums[1]
    assert before >= {name for name in os.listdir("/dev/shm") if "fsdp" in name}


def test_pieces_lie_on_pages_of_their_own():
    with open_world(LaunchOptions(), 0) as world:
        store = HostStore(3 * rounded(5000), world)
        pieces = [store.take(5000) for _ in range(3)]
        assert [piece.data_ptr() % 4096 for piece in pieces] == [0, 0, 0]
        assert all(not piece.any() for piece in pieces), "fresh memory is zero"
        with pytest.raises(AssertionError, match="too small"):
            store.take(1)


NODES = """
    import os, sys
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    from fsdp_qlora.config.options import LaunchOptions
    from fsdp_qlora.memory.shared import HostStore
    from fsdp_qlora.distributed.world import open_world

    with open_world(LaunchOptions(), 0) as world:  # two nodes of two ranks, as the ranks see it
        piece = HostStore(1000, world).take(1000)
        piece[world.local_rank * 500 : world.local_rank * 500 + 500] = rank + 1
        world.barrier()
        sys.stdout.write(f"rank {rank} sees {sorted(set(piece.tolist()))}\\n")
        world.barrier()
    """


def test_each_node_has_a_copy_of_its_own():
    done = run_torchrun(NODES, 4, env={"CUDA_VISIBLE_DEVICES": ""})
    for rank, seen in enumerate(["[1, 2]", "[1, 2]", "[3, 4]", "[3, 4]"]):
        assert f"rank {rank} sees {seen}" in done.stdout, f"{done.stdout}\n{done.stderr}"
