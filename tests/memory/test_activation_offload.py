"""Offloaded activations: the same numbers back, host buffers used again, and nothing kept alive on the device."""

import gc
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from fsdp_qlora.kernels.device import take_from
from fsdp_qlora.memory import host_link
from fsdp_qlora.memory import pinned_pool as host_pool
from fsdp_qlora.memory.activation_offload import ActivationOffload
from fsdp_qlora.memory.pinned import page_lock
from fsdp_qlora.models.fused.attention import AttentionSaved
from fsdp_qlora.models.fused.gated_mlp import GatedMlpSaved
from fsdp_qlora.models.fused.saved import SavedBlock
from tests.support.slow_gpu import CUDA, slow_gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
META = torch.device("meta")


def kept_of_a_block(seed: int, width: int = 3) -> SavedBlock:
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    tokens = 2 * width
    attention = AttentionSaved(qkv=some(tokens, 16), out=some(2, width, 2, 4))
    return SavedBlock(some(2, width, 8), some(tokens, 8), attention, GatedMlpSaved(gate_up=some(tokens, 40)[:, :36]))


def contents(kept: SavedBlock) -> list[torch.Tensor]:
    return [kept._owner(name)[key].clone() for name, key in kept._slots()]


def test_what_is_parked_comes_back_block_by_block_step_after_step() -> None:
    offload = ActivationOffload(DEVICE, 6)
    for step in range(3):
        blocks = [kept_of_a_block(10 * step + i, width=step + 1) for i in range(4)]
        before = [contents(kept) for kept in blocks]
        assert len(before[0]) == 5
        offloaded = [kept.offload(offload) for kept in blocks]
        assert all(not kept._slots() for kept in blocks)
        for kept, place, was in reversed(list(zip(blocks, offloaded, before, strict=True))):
            kept.restore(offload, place)
            assert all(torch.equal(a, b) for a, b in zip(contents(kept), was, strict=True))
    assert offload._pool.free == 4 * 5, "host buffers are made once, whatever the width"


def test_rows_with_room_beside_them_come_back_with_it() -> None:
    """Products of matrices with other strides may have other bits."""
    offload, kept = ActivationOffload(DEVICE, 6), kept_of_a_block(0)
    gate_up = torch.full((6, 64), torch.nan, device=DEVICE)[:, :40].copy_(torch.arange(240.0).view(6, 40))
    kept.mlp.gate_up = gate_up
    kept.restore(offload, kept.offload(offload))
    back = kept.mlp.gate_up
    assert torch.equal(back, torch.arange(240.0, device=DEVICE).view(6, 40))
    assert back.stride() == gate_up.stride() == (64, 1)
    assert back.data_ptr() != gate_up.data_ptr()


def test_what_was_parked_last_is_on_its_way_before_its_block_asks() -> None:
    offload = ActivationOffload(DEVICE, 6)
    offload.prefetch()  # nothing is offloaded: nothing to do
    blocks = [kept_of_a_block(i) for i in range(2)]
    before = [contents(kept) for kept in blocks]
    offloaded = [kept.offload(offload) for kept in blocks]
    assert not any(place.back for place in offloaded)
    offload.prefetch()
    ahead = [tensor.data_ptr() for tensor in offloaded[1].back]
    assert len(ahead) == 5
    assert not offloaded[0].back
    offload.prefetch()
    blocks[1].restore(offload, offloaded[1])
    came = [blocks[1]._owner(name)[key].data_ptr() for name, key in blocks[1]._slots()]
    assert came == ahead, "copied once"
    blocks[0].restore(offload, offloaded[0])
    for kept, was in zip(blocks, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(contents(kept), was, strict=True))


@pytest.mark.parametrize("restored", [False, True])
def test_nothing_stays_on_the_device_longer_than_needed(restored: bool) -> None:
    offload = ActivationOffload(DEVICE, 6)
    gc.disable()
    try:
        first, second = kept_of_a_block(1), kept_of_a_block(2)
        before = weakref.ref(first.h)
        offloaded = first.offload(offload), second.offload(offload)
        assert before() is None, "its copy went out a block ago"
        if restored:
            second.restore(offload, offloaded[1])
            first.restore(offload, offloaded[0])
            back = weakref.ref(first.h)
            del first
            assert back() is None, "the block is gone and so must be what it held"
    finally:
        gc.enable()


@pytest.fixture(autouse=True)
def _given_back() -> Iterator[None]:
    yield
    take_from(None)


class Memory:
    """Device memory in a few places: a place is free as soon as the host lets go of its tensor, as with PyTorch's.

    log: every birth and death, in order, with marks of what is being done."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.log = device, []
        self._free: list[int] = []
        self._places: list[torch.Tensor] = []
        self._born = 0
        take_from(lambda shape, dtype, _: self.empty(torch.Size(shape), dtype))

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        if not self._free:
            self._free.append(len(self._places))
            self._places.append(torch.zeros(4096, dtype=torch.uint8, device=self.device))
        place, number = self._free.pop(), self._born
        self._born += 1
        tensor = self._places[place][: shape.numel() * dtype.itemsize].view(dtype).view(shape)
        self.log.append(("born", number, place))
        weakref.finalize(tensor, self._dead, number, place)
        return tensor

    def _dead(self, number: int, place: int) -> None:
        self.log.append(("dead", number))
        self._free.append(place)


def run_steps(
    offload: ActivationOffload, memory: Memory, compute: Callable, blocks: Sequence[Sequence[int]], steps: int = 2
) -> list[float]:
    """Each block fills its tensors (rows of so many numbers; of an empty one nothing leaves), offloads them, and in
    backward reads what came back, beside working memory that comes and goes. What was read that is wrong."""
    wrong: list[float] = []

    def put(tensor: torch.Tensor, value: float) -> None:
        compute(partial(tensor.data.fill_, value))

    def read(tensor: torch.Tensor, value: float) -> None:
        compute(lambda data=tensor.data: wrong.extend(data[data != value].float().tolist()))

    for step in range(steps):
        rows, offloaded = 3 + step % 2, []  # micro-batches differ in width
        for number, widths in enumerate(blocks):
            memory.log.append(("forward", step, number))
            working = memory.empty(torch.Size((rows, 50)), torch.float32)
            put(working, -1.0)
            kept = [memory.empty(torch.Size((rows, width)), torch.bfloat16) for width in widths]
            for i, tensor in enumerate(kept):
                put(tensor, 10.0 * number + i + step)
            del working
            offloaded.append(offload.offload(kept, rows) if kept else None)
            tensor = None
            del kept
        for number in reversed(range(len(blocks))):
            memory.log.append(("backward", step, number))
            place = offloaded.pop()
            if place is None:
                offload.prefetch()
            back = [] if place is None else offload.restore(place)
            working = memory.empty(torch.Size((rows, 50)), torch.float32)
            put(working, -2.0)
            for i, tensor in enumerate(back):
                read(tensor, 10.0 * number + i + step)
            tensor = None
            del back, working, place
    return wrong


BLOCKS = [[8, 20], [8], [], [8, 8, 20], [20, 3], [8], [], []]


@pytest.mark.parametrize("seed", range(12))
def test_copies_beside_the_arithmetic_change_no_number(monkeypatch, seed: int) -> None:
    """In whatever order the streams get on, with memory that is somebody else's as soon as it is let go."""
    monkeypatch.setattr(host_link, "PIECE", 50)
    with slow_gpu(monkeypatch, seed) as gpu:
        memory = Memory(torch.device("cpu"))
        offload = ActivationOffload(CUDA, 4)

        def compute(do: Callable) -> None:
            gpu.compute(do)
            gpu.run(least=gpu.random.randint(1, 20))

        wrong = run_steps(offload, memory, compute, BLOCKS, steps=4)
        gpu.run()
    assert not wrong
    assert offload._pool is not None
    assert offload._pool.free == sum(map(len, BLOCKS)), "host buffers are made once"


def test_tensors_live_on_meta_as_long_as_on_a_gpu(monkeypatch) -> None:
    logs, sizes = [], []
    for device in (CUDA, META, torch.device("cpu")):
        memory = Memory(META if device == META else torch.device("cpu"))
        with slow_gpu(monkeypatch) if device == CUDA else nullcontext():
            offload = ActivationOffload(device, 4)
            run_steps(offload, memory, lambda do: None, BLOCKS)
        logs.append(memory.log)
        sizes.append(offload.offloaded_sizes)
    assert len(logs[0]) > 80
    assert logs[0] == logs[1] == logs[2]
    assert sizes[0] == sizes[1] == sizes[2] == [[2 * width for width in widths] for widths in BLOCKS if widths]


def test_a_step_that_was_given_up_leaves_nothing_behind(monkeypatch) -> None:
    def out_of_memory(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no more")

    with slow_gpu(monkeypatch) as gpu:
        memory = Memory(torch.device("cpu"))
        offload = ActivationOffload(CUDA, 4)
        tensors = [[memory.empty(torch.Size((4, 8)), torch.bfloat16)] for _ in range(3)]
        offloaded = [offload.offload(some, 4) for some in tensors]
        back = offload.restore(offloaded.pop())
        take_from(out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            offload.restore(offloaded.pop())  # it is there; the one before it has no room
        alive = [weakref.ref(some[0]) for some in tensors]
        del tensors, back
        offload.reset()
        assert not any(stream.queue for stream in gpu.streams[1:]), "a copy is under way"
        assert not any(ref() is not None for ref in alive)
        assert offload._pool is not None
        assert offload._pool.free == 3
        take_from(lambda shape, dtype, _: memory.empty(torch.Size(shape), dtype))
        wrong = run_steps(offload, memory, gpu.compute, BLOCKS)
        gpu.run()
    assert not wrong


def test_host_buffers_are_made_ahead_in_the_order_of_their_use(monkeypatch) -> None:
    locked: list[int] = []
    go_on = threading.Semaphore(0)

    def lock(region: torch.Tensor) -> int:
        go_on.acquire()
        locked.append(region.nbytes)
        return 0

    monkeypatch.setattr(host_pool, "THREADS", 1)
    with slow_gpu(monkeypatch) as gpu:
        gpu.page_lock = lock
        offload = ActivationOffload(CUDA, 4096)
        offload.reserve([[2, 40], [2], [2, 2]])
        kept = [torch.ones(4096, 1, dtype=torch.bfloat16), torch.ones(4096, 20, dtype=torch.bfloat16)]
        threading.Timer(0.2, go_on.release).start()
        first = offload.offload(kept, 4096)  # waits for the first region, and for no more
        assert locked == [4096 * 42]
        assert first.there[0].data_ptr() + 2 * 4096 == first.there[1].data_ptr()
        go_on.release(3)
        second = offload.offload([kept[0]], 4096)
        assert locked[:2] == [4096 * 42, 4096 * 2]
        third = offload.offload([kept[0], kept[0]], 4096)
        assert locked == [4096 * 42, 4096 * 2, 4096 * 4]
        go_on.release(1)
        offload.offload([kept[0]], 4096)  # of which none was reserved
        assert len(locked) == 4
        places = [there.data_ptr() for one in (first, second, third) for there in one.there]
        assert len(set(places)) == len(places)


def test_what_ends_a_thread_that_makes_buffers_ends_the_wait_for_them(monkeypatch) -> None:
    def full(nbytes: int) -> torch.Tensor:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(host_pool, "large_pages", full)
    offload = ActivationOffload(torch.device("cpu"), 4)
    offload.reserve([[2], [2]])
    with pytest.raises(OSError, match="Cannot allocate"):
        offload.offload([torch.ones(4, 1, dtype=torch.bfloat16)], 4)


@pytest.mark.slow
def test_a_process_that_ends_early_does_not_make_all_buffers_first() -> None:
    script = """
        import time, torch
        from fsdp_qlora.memory import host_link
        from fsdp_qlora.memory import pinned_pool as host_pool
        from fsdp_qlora.memory.activation_offload import ActivationOffload

        def slow(address, nbytes):
            time.sleep(0.3)

        host_pool.populate = slow
        offload = ActivationOffload(torch.device("cpu"), 4)
        offload.reserve([[2]] * 1000)
        time.sleep(0.1)
        raise SystemExit(3)
    """
    all_of_them = 300  # seconds
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=all_of_them / 2
    )
    assert done.returncode == 3, done.stderr


def test_page_locked_memory_is_let_go_with_the_last_tensor_that_has_it(monkeypatch) -> None:
    locked: set[tuple[int, int]] = set()

    class Driver:
        def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
            locked.add((address, nbytes))
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            locked.difference_update({piece for piece in locked if piece[0] == address})
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    whole = torch.empty(4096, dtype=torch.uint8)
    wanted = {(whole.data_ptr(), 4096)}
    assert page_lock(whole, "a test") is whole
    parameter = torch.nn.Parameter(whole.view(torch.float32), requires_grad=False)
    part = parameter.data[8:16]
    del whole, parameter
    gc.collect()
    assert locked == wanted
    del part
    gc.collect()
    assert not locked


@pytest.mark.gpu
def test_memory_that_cannot_be_page_locked_serves_and_is_told_once(monkeypatch, capsys) -> None:
    monkeypatch.setattr(host_pool, "try_page_lock", lambda tensor: 801)
    offload = ActivationOffload(DEVICE, 6)
    blocks = [kept_of_a_block(i) for i in range(3)]
    before = [contents(kept) for kept in blocks]
    offloaded = [kept.offload(offload) for kept in blocks]
    for kept, place, was in reversed(list(zip(blocks, offloaded, before, strict=True))):
        kept.restore(offload, place)
        assert all(torch.equal(a, b) for a, b in zip(contents(kept), was, strict=True))
    assert capsys.readouterr().out.count("--use_activation_cpu_offload false") == 1
