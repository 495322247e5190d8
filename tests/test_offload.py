"""Offloaded activations: the same numbers back, host buffers used again, and nothing kept alive on the device."""

import gc
import weakref

import pytest
import torch

from fsdp_qlora import offload as offload_module
from fsdp_qlora.fused import AttentionState, Kept, MLPState
from fsdp_qlora.host_buffers import page_lock
from fsdp_qlora.offload import ActivationOffload

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kept_of_a_block(seed: int, width: int = 3) -> Kept:
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    tokens = 2 * width
    attention = AttentionState(qkv=some(tokens, 16), out=some(2, width, 2, 4))
    return Kept(some(2, width, 8), some(tokens, 8), attention, MLPState(gate_up=some(tokens, 40)[:, :36]))


def contents(kept: Kept) -> list[torch.Tensor]:
    return [owner[key].clone() for owner, key in kept._slots()]


def test_what_is_parked_comes_back_block_by_block_step_after_step() -> None:
    offload = ActivationOffload(DEVICE, 6)
    for step in range(3):
        blocks = [kept_of_a_block(10 * step + i, width=step + 1) for i in range(4)]
        before = [contents(kept) for kept in blocks]
        assert len(before[0]) == 5
        parked = [kept.park(offload) for kept in blocks]
        assert all(not kept._slots() for kept in blocks)
        for kept, place, was in reversed(list(zip(blocks, parked, before, strict=True))):
            kept.fetch(offload, place)
            assert all(torch.equal(a, b) for a, b in zip(contents(kept), was, strict=True))
    assert sum(len(buffers) for buffers in offload._free.values()) == 4 * 5, (
        "host buffers are made once, whatever the width"
    )


def test_what_was_parked_last_is_on_its_way_before_its_block_asks() -> None:
    offload = ActivationOffload(DEVICE, 6)
    offload.ahead()  # nothing is parked: nothing to do
    blocks = [kept_of_a_block(i) for i in range(2)]
    before = [contents(kept) for kept in blocks]
    parked = [kept.park(offload) for kept in blocks]
    assert not any(place.back for place in parked)
    offload.ahead()
    ahead = [id(tensor) for tensor in parked[1].back]
    assert len(ahead) == 5
    assert not parked[0].back
    offload.ahead()
    blocks[1].fetch(offload, parked[1])
    assert [id(owner[key]) for owner, key in blocks[1]._slots()] == ahead, "copied once"
    blocks[0].fetch(offload, parked[0])
    for kept, was in zip(blocks, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(contents(kept), was, strict=True))


@pytest.mark.parametrize("fetched", [False, True])
def test_nothing_stays_on_the_device_longer_than_needed(fetched: bool) -> None:
    offload = ActivationOffload(DEVICE, 6)
    gc.disable()
    try:
        first, second = kept_of_a_block(1), kept_of_a_block(2)
        before = weakref.ref(first.h)
        parked = first.park(offload), second.park(offload)
        assert before() is None, "its copy went out a block ago"
        if fetched:
            second.fetch(offload, parked[1])
            first.fetch(offload, parked[0])
            back = weakref.ref(first.h)
            del first
            assert back() is None, "the block is gone and so must be what it held"
    finally:
        gc.enable()


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


@pytest.mark.skipif(DEVICE.type != "cuda", reason="only a GPU needs page-locked memory")
def test_memory_that_cannot_be_page_locked_serves_and_is_told_once(monkeypatch, capsys) -> None:
    monkeypatch.setattr(offload_module, "try_page_lock", lambda tensor: 801)
    offload = ActivationOffload(DEVICE, 6)
    blocks = [kept_of_a_block(i) for i in range(3)]
    before = [contents(kept) for kept in blocks]
    parked = [kept.park(offload) for kept in blocks]
    for kept, place, was in reversed(list(zip(blocks, parked, before, strict=True))):
        kept.fetch(offload, place)
        assert all(torch.equal(a, b) for a, b in zip(contents(kept), was, strict=True))
    assert capsys.readouterr().out.count("--use_activation_cpu_offload false") == 1
