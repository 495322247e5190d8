"""Where the base goes and how many rows are answered at a time: within the budget; a refusal has its numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from fsdp_qlora.errors import UserError
from fsdp_qlora.generation import placing
from fsdp_qlora.generation.needs import DRAWN, GREEDY, needs_of
from fsdp_qlora.generation.placing import STAGING, Fit, Workload, copies_bytes, fit
from fsdp_qlora.generation.sampling import Sampling, pick
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.plan.plan import Budget
from fsdp_qlora.units import as_gib
from tests.support import tiny
from tests.support.metered import WORLD, Meter, planned

WORK = Workload(capacity=96, longest=64, count=40)


@pytest.fixture(scope="module")
def llama() -> CausalModel:
    return planned(transformers.LlamaConfig(**tiny.SHAPE | {"num_hidden_layers": 8}))[0]


@pytest.fixture
def fitted(monkeypatch) -> Callable[..., Fit]:
    """Return what fits into so many bytes of a device and of host memory."""

    def find(model: CausalModel, work: Workload, device: float, host: float = 1 << 40, **options: Any) -> Fit:
        monkeypatch.setattr(placing, "find_budget", lambda memory, world: Budget(int(device), int(host)))
        config = planned(transformers.LlamaConfig(**tiny.SHAPE), **options)[1]
        return fit(model, config, WORLD, work)

    return find


def streaming(model: CausalModel, work: Workload, rows: int, blocks: float) -> int:
    """Bytes of a device that has room for so many rows, and blocks that stay."""
    needs = needs_of(model, work)
    taken = needs.work + needs.other + (STAGING + blocks) * max(needs.blocks) + rows * needs.row
    return int(taken / (1 - placing.SPARE)) + 1


def test_residents_and_copies_are_within_the_budget(llama, fitted):
    """Everything that lies on the device is in the plan, so that copies get what is left of it and no more."""
    needs = needs_of(llama, WORK)
    budget = streaming(llama, WORK, 40, 5.5)
    found = fitted(llama, WORK, budget, use_cpu_offload="true")
    stays = [nbytes for nbytes, block in zip(needs.blocks, found.plan.blocks, strict=True) if block.resident]
    assert (found.rows, len(stays)) == (40, 5)
    taken = needs.work + needs.other + STAGING * max(needs.blocks) + sum(stays) + found.rows * needs.row
    assert found.plan.device_bytes == taken
    assert taken + copies_bytes(budget, found.plan) <= budget
    assert copies_bytes(found.plan.device_bytes - 1, found.plan) == 0


def test_host_memory_is_asked_for_what_is_streamed_alone(llama, fitted):
    needs = needs_of(llama, WORK)
    largest = max(needs.blocks)
    budget = streaming(llama, WORK, 40, 5)
    whole = needs.host + sum(needs.blocks)
    found = fitted(llama, WORK, budget, needs.host + 3 * largest, use_cpu_offload="true")
    assert found.plan.host_bytes == needs.host + 3 * largest
    with pytest.raises(UserError) as refused:
        fitted(llama, WORK, streaming(llama, WORK, 1, 0), needs.host + largest, use_cpu_offload="true")
    assert str(refused.value).startswith("host_memory_gib: ")
    assert as_gib(whole, 2) in str(refused.value)
    assert "4294967296" not in str(refused.value)
    # Blocks that must stay come before rows.
    found = fitted(llama, WORK, streaming(llama, WORK, 2, 5), needs.host + 3 * largest, use_cpu_offload="true")
    assert (found.rows, sum(block.resident for block in found.plan.blocks)) == (2, 5)


@pytest.mark.parametrize(
    ("options", "work", "words"),
    [
        ({"use_cpu_offload": "false"}, WORK, ["gpu_memory_gib: replicate needs", "1 row", "--use_cpu_offload true"]),
        ({"use_cpu_offload": "true", "resident_blocks": 9}, WORK, ["resident_blocks: 9 are more than the model's 8"]),
        ({"use_cpu_offload": "true", "resident_blocks": 8}, WORK, ["resident_blocks: stream needs", "8 resident"]),
    ],
)
def test_a_refusal_names_its_option_and_its_numbers(options, work, words, llama, fitted):
    with pytest.raises(UserError) as refused:
        fitted(llama, work, streaming(llama, work, 1, 0), **options)
    assert all(word in str(refused.value) for word in words), refused.value


def test_rows_wait_for_the_blocks_that_are_to_stay(llama, fitted):
    budget = streaming(llama, WORK, 3, 6)
    found = fitted(llama, WORK, budget, use_cpu_offload="true", resident_blocks=6)
    assert (found.rows, sum(block.resident for block in found.plan.blocks)) == (3, 6)


def test_losses_and_padded_prompts_are_counted(llama):
    plain = needs_of(llama, WORK)
    measured = needs_of(llama, Workload(96, 64, 40, measured=1 << 16, widest=64))
    vocabulary = llama.backbone.config.vocab_size
    assert measured.row == plain.row
    assert measured.work > plain.work + 256 * vocabulary * 4
    generic = planned(transformers.LlamaConfig(**tiny.SHAPE), fused="false")[0]
    few, many = (needs_of(generic, Workload(longest + 8, longest, 40)) for longest in (8, 512))
    hidden = generic.backbone.config.hidden_size
    assert many.work == few.work
    assert many.row - few.row > 504 * 2 * 6 * hidden  # each row's prompt, as all go through together


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(0.7, top_k=50), Sampling(0.7, top_p=0.9)])
def test_memory_of_a_choice_of_tokens_is_counted(sampling):
    """Bytes of a row by the vocabulary, without the buffers inside topk: two pairs of values and numbers at most."""
    rows, vocabulary = 4, 1 << 14
    with Meter(on="cpu") as meter:
        logits, uniform = torch.randn(rows, vocabulary), torch.rand(rows)
        meter.mark()
        pick(logits, uniform, sampling)
    inside = 0 if sampling.is_greedy or sampling.top_k else 12
    counted = GREEDY if sampling.is_greedy else DRAWN
    assert meter.peak / (rows * vocabulary) + inside <= counted
