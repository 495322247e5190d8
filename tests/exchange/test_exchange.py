"""Exchanges through host memory give what collectives give, wait for late ranks, and release waits for ended ones."""

from dataclasses import replace

import pytest
import torch

from fsdp_qlora.config.options import OPTIONS, LaunchOptions, MemoryOptions
from fsdp_qlora.distributed.world import World, open_world
from fsdp_qlora.errors import UserError
from fsdp_qlora.exchange import choose
from fsdp_qlora.exchange.choose import EXCHANGES, check_exchange, choose_exchange, through_host
from fsdp_qlora.exchange.collectives import Collectives
from fsdp_qlora.exchange.host import HostExchange, store_bytes
from fsdp_qlora.plan.candidate import Candidate
from fsdp_qlora.plan.memory import Memory
from tests.support.known_runs import facts
from tests.support.torchrun import run_torchrun

START = """
    import sys, threading, time
    import torch
    from fsdp_qlora.config.options import LaunchOptions
    from fsdp_qlora.distributed.world import open_world
    from fsdp_qlora.exchange.collectives import Collectives
    from fsdp_qlora.exchange.host import HostExchange
    from tests.support.on_host import OnHost
"""
SAME = (
    START
    + """
    with open_world(LaunchOptions(), 0) as world:
        on_gpu, n = world.device.type == "cuda", world.size
        ours = (HostExchange if on_gpu else OnHost)(4 * n * 1000, world)
        assert ours.fault() == ""
        plain, torch_rank = Collectives(), torch.Generator().manual_seed(world.rank)
        flying = []
        for k in range(60):
            size = [1, 7, 250, 1000][k % 4]
            dtype = torch.float32 if size == 1000 or k % 3 else torch.bfloat16
            # Whole numbers: their sums are exact, in any order.
            whole = torch.randint(-40, 40, (n * size,), generator=torch_rank).to(world.device, dtype)
            if on_gpu and (k + world.rank) % 5 == 0:  # this rank is late
                torch.cuda._sleep(20_000_000)
            elif (k + world.rank) % 5 == 0:
                time.sleep(0.01)
            sent = whole.to(torch.bfloat16) if k % 4 == 3 else whole  # sums may be wider than what they are of
            if k % 2:
                mine, expected = (torch.full((size,), torch.nan, dtype=dtype, device=world.device) for _ in range(2))
                plain.reduce_scatter(expected, whole).wait()
                flying.append((ours.reduce_scatter(mine, sent), mine, expected, sent))
            else:
                expected = torch.empty_like(whole)
                mine = whole[world.rank * size : (world.rank + 1) * size]
                plain.all_gather(expected, mine.clone()).wait()
                if k % 3:
                    mine = mine.clone()
                    whole.fill_(torch.nan)
                whole[: world.rank * size] = whole[(world.rank + 1) * size :] = torch.nan
                flying.append((ours.all_gather(whole, mine), whole, expected, mine))
            if len(flying) > 3:  # several are under way at once
                pending, got, expected, _ = flying.pop(0)
                pending.wait()
                assert torch.equal(got, expected), (k, got, expected)
        for pending, got, expected, _ in flying:
            pending.wait()
            assert torch.equal(got, expected)
        rows, long = (torch.zeros(n * size, device=world.device) for size in (8, 1001))
        wrong = [
            ("all_gather", long, long[:1001]),
            ("all_gather", rows[::2], rows[:4]),
            ("all_gather", rows, rows.view(n, 8)[:, :1].expand(n, 8)[0]),
            ("all_gather", rows, rows[:8].view(torch.int32)),
            ("all_gather", rows, rows[:4]),
            ("reduce_scatter", long[:1001], long),
            ("reduce_scatter", rows[:4], rows[::2]),
            ("reduce_scatter", rows[:16:2], rows),
            ("reduce_scatter", rows[:4], rows),
            ("reduce_scatter", long[:1000].half(), long[: n * 1000]),
        ]
        for call, first, second in wrong[: 9 if n > 2 else None]:  # more peers leave room for the last
            try:
                getattr(ours, call)(first, second)
            except AssertionError:
                continue
            raise RuntimeError(f"{call} took {first.shape}, {second.shape}")
        sys.stdout.write(f"rank {world.rank}: the same\\n")
    """
)
GONE = (
    START
    + """
    with open_world(LaunchOptions(), 0) as world:
        on_gpu = world.device.type == "cuda"
        ours = (HostExchange if on_gpu else OnHost)(4000, world)
        assert ours.fault() == ""
        if world.rank == 0:  # the other one never comes
            whole, mine = torch.ones(1000, device=world.device), torch.empty(500, device=world.device)
            found = []
            waiting = threading.Thread(target=lambda: found.append(ours.reduce_scatter(mine, whole)), daemon=True)
            waiting.start()
            time.sleep(0.5)
            assert not (found and found[0].is_completed()), "nobody has sent anything"
            ours.release_waits()
            waiting.join(5)
            end = time.monotonic() + 5
            while not found[0].is_completed() and time.monotonic() < end:
                time.sleep(0.01)
            assert found[0].is_completed(), "the stream still waits"
            sys.stdout.write("released\\n")
    """
)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_as_collectives_however_late_a_rank_is(ranks):
    done = run_torchrun(SAME, ranks)
    for rank in range(ranks):
        assert f"rank {rank}: the same" in done.stdout, f"{done.stdout}\n{done.stderr}"


def test_waits_for_a_rank_that_ended_are_released():
    done = run_torchrun(GONE, 2)
    assert "released" in done.stdout, f"{done.stdout}\n{done.stderr}"


def test_what_the_system_refuses_is_an_error_where_it_was_asked_for_and_said_once_where_not(monkeypatch, capfd):
    class Refused(HostExchange):
        def __init__(self, nbytes: int, world: World) -> None:
            self.world, self._peers, self._stream = world, [], None

        def _probe(self) -> None:
            raise RuntimeError("cuStreamWaitValue32_v2: CUDA error 801\nmore")

    monkeypatch.setattr(choose, "HostExchange", Refused)
    with open_world(LaunchOptions(), 0) as world:
        with pytest.raises(
            UserError, match=r"copy engines \(cuStreamWaitValue32_v2: CUDA error 801\): use --exchange_by"
        ):
            choose_exchange(1 << 20, MemoryOptions(exchange_by="host"), world)
        monkeypatch.setattr(choose, "through_host", lambda *_: True)
        assert isinstance(choose_exchange(1 << 20, MemoryOptions(), world), Collectives)
        assert capfd.readouterr().out.count("(cuStreamWaitValue32_v2: CUDA error 801): NCCL does it") == 1


def test_each_choice_of_the_option_has_its_maker():
    assert set(EXCHANGES) == set(OPTIONS["exchange_by"].choices)


@pytest.mark.parametrize(
    ("changes", "wanted", "told"),
    [
        ({"device": torch.device("cpu"), "size": 2}, "host", "without GPUs"),
        ({"device": torch.device("cpu"), "size": 2}, "nccl", "without GPUs"),
        ({"device": torch.device("cuda"), "size": 1}, "host", "on one rank"),
        ({"device": torch.device("cuda"), "size": 4, "local_size": 2}, "host", "take auto or nccl"),
    ],
)
def test_asking_for_what_has_no_effect_is_an_error(changes, wanted, told):
    with open_world(LaunchOptions(), 0) as world:
        with pytest.raises(UserError, match=told):
            check_exchange(MemoryOptions(exchange_by=wanted), replace(world, **changes))
        check_exchange(MemoryOptions(), replace(world, **changes))


@pytest.mark.parametrize(("reach", "disabled", "host"), [(True, "0", False), (False, "0", True), (True, "1", True)])
def test_auto_takes_host_memory_where_cards_cannot_reach_each_other(monkeypatch, reach, disabled, host):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, other: reach)
    monkeypatch.setenv("NCCL_P2P_DISABLE", disabled)
    with open_world(LaunchOptions(), 0) as world:
        pair = replace(world, device=torch.device("cuda", 0), size=2, local_size=2)
        assert through_host(MemoryOptions(), pair) is host
        assert through_host(MemoryOptions(exchange_by="nccl"), pair) is False
        assert through_host(MemoryOptions(), replace(pair, size=4)) is False, "over two nodes"
        assert through_host(MemoryOptions(), world) is False, "alone"


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_plan_counts_its_host_memory(ranks):
    known = replace(facts("llama2_70b", 2, 512, 64, ranks=ranks), exchange_by_host=True)
    parts = Memory(known).host_parts(Candidate("replicate", (), True, 0))
    assert parts["exchange"] == pytest.approx(store_bytes(4 * known.largest_adapters, ranks), rel=1e-3)
