"""Copies that take turns: the right bytes in order, and a small copy of another stream waits for a piece or two."""

import pytest
import torch

from fsdp_qlora.memory import host_link
from fsdp_qlora.memory.host_link import LEAST_PIECE, PIECE, TRAFFIC, HostLink, piece_bytes
from tests.support.slow_gpu import CUDA, SlowGpu, slow_gpu

KIB = 1 << 10


def numbered(n: int, nbytes: int) -> torch.Tensor:
    return torch.full((nbytes,), n, dtype=torch.uint8)


def small_copy_waits_behind(gpu: SlowGpu) -> int:
    """Bytes that are copied before 10 KiB which were queued when 6 x 421 KiB had just begun."""
    link, other = HostLink(CUDA, to_device=True), HostLink(CUDA, to_device=True)
    target = torch.empty(421 * KIB, dtype=torch.uint8)
    transfers = [link.prepare([(target, numbered(n, 421 * KIB))]) for n in range(6)]
    for transfer in transfers:
        link.copy(transfer)
    gpu.run(until=lambda: bool(gpu.copied))
    small, start = torch.zeros(10 * KIB, dtype=torch.uint8), len(gpu.copied)
    urgent = other.prepare([(small, numbered(7, 10 * KIB))])
    other.copy(urgent)
    gpu.run(until=lambda: bool(small[0] == 7))
    return sum(nbytes for _, nbytes in gpu.copied[start:-1])


def test_a_small_copy_waits_for_a_piece_or_two_and_not_for_all_that_is_queued(monkeypatch):
    monkeypatch.setattr(host_link, "PIECE", 32 * KIB)
    with slow_gpu(monkeypatch, seed=None) as gpu:
        assert small_copy_waits_behind(gpu) <= 2 * 32 * KIB


@pytest.mark.parametrize("seed", range(20))
def test_copies_come_in_order_whatever_stream_gets_on(monkeypatch, seed):
    """Each into the same memory, read by the computing stream before the next may overwrite it."""
    monkeypatch.setattr(host_link, "PIECE", 700)
    with slow_gpu(monkeypatch, seed) as gpu:
        link, memory, seen = HostLink(CUDA, to_device=True), torch.zeros(5000, dtype=torch.uint8), []
        read, arrived, alive = None, None, []
        for n in range(1, 8):
            small = memory[4000:] if n % 3 else memory[:0]  # some have nothing more to bring
            pairs = [(memory[:4000], numbered(n, 4000)), (small, numbered(n, small.numel()))]
            alive.append(link.prepare(pairs))
            arrived = link.copy(alive[-1], () if read is None else (read,), arrived)
            gpu.current.wait_event(arrived)
            gpu.compute(lambda: seen.append(memory[:4000].unique().tolist()))
            read = gpu.current.record_event()
            gpu.run(least=n)
        gpu.run()
        assert seen == [[n] for n in range(1, 8)]
        assert max(nbytes for _, nbytes in gpu.copied) <= 700
        link.synchronize()


def test_small_tensors_share_a_turn(monkeypatch):
    with slow_gpu(monkeypatch):
        link = HostLink(CUDA, to_device=False)
        pairs = [(numbered(0, 5 * KIB), numbered(i, 5 * KIB)) for i in range(4)]
        assert [len(turn) for turn in link.prepare(pairs).turns] == [4]


def test_a_copy_that_the_driver_refuses_is_told(monkeypatch):
    with slow_gpu(monkeypatch) as gpu:
        gpu.status = 719
        link = HostLink(CUDA, to_device=True)
        with pytest.raises(RuntimeError, match="CUDA error 719"):
            link.copy(link.prepare([(numbered(0, 8), numbered(1, 8))]))


def test_without_a_gpu_it_copies_at_once():
    link, target = HostLink(torch.device("cpu"), to_device=True), torch.zeros(9, dtype=torch.uint8)
    assert link.copy(link.prepare([(target, numbered(3, 9))])) is None
    assert target.tolist() == [3] * 9
    link.synchronize()


def test_slower_links_have_smaller_pieces():
    assert piece_bytes(None) == piece_bytes(60e9) == PIECE
    assert piece_bytes(1e9) == LEAST_PIECE
    assert 11e6 < piece_bytes(20e9) < 13e6


@pytest.mark.gpu
def test_a_gpu_lets_a_small_copy_through():
    device = torch.device("cuda")
    link, other = HostLink(device, to_device=True), HostLink(device, to_device=True)
    source = torch.empty(200 << 20, dtype=torch.uint8).pin_memory()
    target, small = torch.empty_like(source, device=device), torch.empty(1 << 20, dtype=torch.uint8, device=device)
    bulk, urgent = link.prepare([(target, source)]), other.prepare([(small, source[: 1 << 20])])
    source.random_(255)
    ends = [link.copy(bulk) for _ in range(6)]
    came = other.copy(urgent)
    assert came is not None
    came.synchronize()
    assert ends[-1] is not None
    assert not ends[-1].query(), "it came after all that was queued"
    link.synchronize()
    assert torch.equal(target.cpu(), source)
    assert torch.equal(small.cpu(), source[: 1 << 20])


def test_bytes_are_counted_by_direction_each_time_they_are_copied():
    cpu = torch.device("cpu")
    to_device, from_device = HostLink(cpu, to_device=True), HostLink(cpu, to_device=False)
    before = TRAFFIC.to_device, TRAFFIC.from_device
    transfer = to_device.prepare([(torch.zeros(9, dtype=torch.uint8), numbered(1, 9)), (torch.zeros(4), torch.ones(4))])
    for _ in range(3):
        to_device.copy(transfer)
    from_device.copy(from_device.prepare([(torch.zeros(7, dtype=torch.uint8), numbered(1, 7))]))
    assert (TRAFFIC.to_device - before[0], TRAFFIC.from_device - before[1]) == (3 * 25, 7)
