"""Linears of a step: from codes, decoded for the step or kept as a copy, they give what those of training give."""

import pytest
import torch
import transformers

from fsdp_qlora.config.options import AdapterOptions
from fsdp_qlora.generation import step_linears
from fsdp_qlora.generation.step_linears import StepLinears
from fsdp_qlora.models.fused.scratch import WeightScratch
from fsdp_qlora.models.generic_block import FrozenLinear
from fsdp_qlora.weights.codecs import HQQ, NF4, Codec
from tests.support import tiny
from tests.support.fusable import subject
from tests.support.truth import assert_as_good_as_plain

F16 = torch.float16
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "attention_bias": True}
SOME = AdapterOptions(lora_rank=3, lora_alpha=5.0, lora_target_modules=["q_proj", "v_proj"])
HQQ3, AXIS_0 = HQQ(3, 64, 1, F16, optimize=False), HQQ(4, 64, 0, F16, optimize=False)
CASES = [(NF4(True), "lora"), (NF4(True), "dora"), (HQQ3, "lora"), (HQQ3, "dora"), (AXIS_0, "lora")]


def linears_of(codec: Codec, kind: str, device: torch.device) -> list[FrozenLinear]:
    """q, k and v: with biases, adapters on two of them."""
    of = subject(transformers.LlamaConfig(**tiny.SHAPE | SHAPE), F16, device, codec, SOME, kind)
    of.model.rest.bind()
    return [linear for path, linear in of.model.linears().items() if path.endswith(("q_proj", "k_proj", "v_proj"))]


def expected(linears: list[FrozenLinear], x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What training's linears compute, in another dtype."""
    outs = []
    for linear in linears:
        y = x.to(dtype) @ linear.weight.decode(F16).to(dtype).T
        if linear.lora_A is not None and linear.lora_B is not None:
            y = y + linear.scale * (x.to(dtype) @ linear.lora_A.to(dtype).T @ linear.lora_B.to(dtype).T)
        factor = linear.factor()
        y = y if factor is None else y * factor.to(dtype)
        outs.append(y if linear.bias is None else y + linear.bias.decode(F16).to(dtype))
    return torch.cat(outs, 1).detach()


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "kind"), CASES, ids=[f"{codec.name}-{kind}" for codec, kind in CASES])
def test_codes_copies_and_decoded_matrices_multiply_alike(codec, kind, triton_device, monkeypatch):
    linears = linears_of(codec, kind, triton_device)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(triton_device, F16)
    plain, truth = (expected(linears, x, dtype) for dtype in (F16, torch.float64))
    took = []
    for cls in (NF4, HQQ):
        few_rows = cls.few_rows
        monkeypatch.setattr(cls, "few_rows", lambda *args, do=few_rows: took.append(1) or do(*args))

    def multiplied(copies: bool, most: int = step_linears.CODES_ROWS) -> torch.Tensor:
        monkeypatch.setattr(step_linears, "CODES_ROWS", most)
        of = StepLinears(linears, WeightScratch(F16, triton_device))
        if copies:
            of.decode()
        return of(x)

    assert_as_good_as_plain(multiplied(copies=False), plain, truth, "from codes")
    by_codes = not isinstance(codec, HQQ) or codec.axis == 1
    assert len(took) == len(linears) * by_codes
    assert_as_good_as_plain(multiplied(copies=False, most=4), plain, truth, "decoded for the step")
    assert_as_good_as_plain(multiplied(copies=True), plain, truth, "a copy")
    assert len(took) == len(linears) * by_codes, "codes are for what is not kept, and for few rows"
