"""Optimizer state by name: given back it goes on to the last bit, and it is cut anew for other ranks."""

import pytest
import torch

from fsdp_qlora.config.options import TrainingOptions
from fsdp_qlora.optim.adapter_group import AdapterGroup
from fsdp_qlora.optim.master_weights import Masters
from fsdp_qlora.optim.optimizer_state import load_named_state, named_state, slice_of
from fsdp_qlora.optim.optimizers import OPTIMIZERS, make_optimizer
from fsdp_qlora.optim.schedules import SCHEDULES, make_schedule

LENGTH = 5000  # values of a slice: bitsandbytes keeps smaller ones in 32 bits
CPU = torch.device("cpu")


def make_groups() -> dict[str, AdapterGroup]:
    """Two blocks' adapters with bfloat16 working copies, of which this is the only rank."""
    working = torch.zeros(2, LENGTH, dtype=torch.bfloat16)
    masters = Masters(working)
    values = torch.randn(2, LENGTH, generator=torch.Generator().manual_seed(1))
    for index in range(2):
        masters.set(index, values[index])
    return {f"model.layers.{i}": AdapterGroup(working[i], masters.shards[i], masters, i) for i in range(2)}


def step(groups: dict[str, AdapterGroup], optimizer: torch.optim.Optimizer, number: int) -> None:
    draw = torch.Generator().manual_seed(number)
    masters = next(iter(groups.values())).masters
    masters.unfold()
    for group in groups.values():
        group.master.grad = torch.randn(LENGTH, generator=draw)
    optimizer.step()
    for group in groups.values():
        group.master.grad = None
    masters.fold()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_an_optimizer_with_its_state_given_back_goes_on_to_the_last_bit(name):
    options = TrainingOptions(optimizer=name, wd=0.1, lr=1e-2)
    groups = make_groups()
    optimizer = make_optimizer(options, [group.master for group in groups.values()], CPU)
    for number in range(3):
        step(groups, optimizer, number)
    saved = {key: tensor.clone() for key, tensor in named_state(optimizer, groups)}
    values = [group.masters.values(group.index).clone() for group in groups.values()]

    others = make_groups()
    other = make_optimizer(options, [group.master for group in others.values()], CPU)
    for group, value in zip(others.values(), values, strict=True):
        group.masters.set(group.index, value)
    load_named_state(other, others, saved, lambda key, group: saved[key])
    for number in range(3, 6):
        step(groups, optimizer, number)
        step(others, other, number)
    for group, copy in zip(groups.values(), others.values(), strict=True):
        assert torch.equal(group.masters.values(group.index), copy.masters.values(copy.index))
    again = dict(named_state(other, others))
    assert all(torch.equal(tensor, again[key]) for key, tensor in named_state(optimizer, groups))
    assert saved or name == "sgd"


@pytest.mark.parametrize("size", [1, 7, 12, 13])
@pytest.mark.parametrize("before", [1, 2, 3, 5])
@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_slices_are_cut_anew_for_any_number_of_ranks(size, before, after):
    whole, each, length = torch.arange(1.0, size + 1), -(-size // before), -(-size // after)
    padded = torch.cat([whole, torch.zeros(each * before - size)])
    parts = [lambda a, b, rank=rank: padded[rank * each :][:each][a:b] for rank in range(before)]
    cut = torch.cat([slice_of(parts, size, length, rank) for rank in range(after)])
    assert torch.equal(cut[:size], whole)
    assert not cut[size:].any()


def stepped(name: str, start: int, steps: int = 10) -> list[float]:
    """The rates of a schedule from step `start` on, where it is put."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    options = TrainingOptions(lr=0.3, lr_scheduler=name, warmup_ratio=0.3)
    schedule, rates = make_schedule(options, optimizer, steps), []
    if start:
        schedule.load_state({"updates": start})
    for _ in range(start, steps):
        assert schedule.get_last_lr()[0] == optimizer.param_groups[0]["lr"]
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_where_it_was(name):
    assert stepped(name, 4) == stepped(name, 0)[4:]
