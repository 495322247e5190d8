"""More memory makes no plan slower: what is found within less of it fits within more."""

from dataclasses import replace
from typing import Any

import pytest

from fsdp_qlora.plan.inputs import Facts
from fsdp_qlora.plan.plan import Budget, Wishes, make_plan
from fsdp_qlora.plan.rates import Rates
from fsdp_qlora.units import GIB
from tests.support.known_runs import H200, facts
from tests.support.tiers import some_slow

SLOWER = 1.001  # times the seconds within less memory that a plan may have: it is the most frugal of those as fast


def of_layers(layers: int, shape: str, batch: int, context: int, rank: int, ranks: int, **changes: Any) -> Facts:
    return replace(facts(shape, batch, context, rank, ranks), layers=layers, **changes)


def card(link: float, slower: float) -> Rates:
    """A card that computes so many times slower than an H200. link: bytes per second to it."""
    rates = replace(H200, h2d=link, h2d_both=0.7 * link, d2h_both=0.7 * link, gather=0.45 * link, reduce=0.45 * link)
    names = ("matmul_forward", "matmul_backward", "attention_forward", "attention_backward", "copy", "dequantize")
    return replace(rates, **{name: getattr(H200, name) / slower for name in names})


# Name -> facts, rates, GiB of a GPU and of host memory, least first
MORE = {
    "6 of 70B": (of_layers(6, "llama2_70b", 8, 512, 8, 1), card(25e9, 10), [8], [1.03, 1.3, 1.6, 2, 3]),
    "5 of 70B, 8192 tokens": (of_layers(5, "llama3_70b", 2, 8192, 64, 4), card(12e9, 10), [12], [10.2, 11, 12.5, 40]),
    "5 of 70B, 2048 tokens": (of_layers(5, "llama3_70b", 8, 2048, 8, 2), card(12e9, 1), [12], [5.91, 7.1, 26]),
    "8 of 70B": (
        of_layers(8, "llama3_70b", 2, 2048, 64, 2, accumulation=4, exchange_by_host=True),
        card(6e9, 1),
        [10],
        [7.19, 7.84, 9.2, 39],
    ),
    "12 of 70B": (
        of_layers(12, "llama2_70b", 2, 8192, 8, 4, exchange_by_host=True),
        card(12e9, 1),
        [12, 16],
        [4.41, 5.4, 6.39, 7.37],
    ),
    "24 of 13B": (
        of_layers(24, "llama2_13b", 1, 1024, 64, 2, accumulation=4),
        card(55e9, 1),
        [7, 8],
        [1.65, 2.4, 5.7, 37],
    ),
    "16 of 8B": (
        of_layers(16, "llama3_8b", 8, 8192, 64, 2, accumulation=4, exchange_by_host=True),
        card(55e9, 3),
        [32],
        [2.97, 5.12, 6.29],
    ),
}


@pytest.mark.parametrize("name", some_slow(list(MORE), 3))
def test_more_memory_makes_no_plan_slower(name: str) -> None:
    known, rates, devices, hosts = MORE[name]
    budgets = [Budget(int(device * GIB), int(host * GIB)) for device in devices for host in hosts]
    seconds = {budget: make_plan(known, rates, Wishes(), budget).seconds or 0.0 for budget in budgets}
    for budget, here in seconds.items():
        less = [b for b in budgets if b.device_bytes <= budget.device_bytes and b.host_bytes <= budget.host_bytes]
        assert here <= SLOWER * min(seconds[b] for b in less), budget
