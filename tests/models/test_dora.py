"""DoRA in the fused block is PEFT's formula: exact in float64, in other dtypes no worse than plain PyTorch.

Every family, adapters on all linears and on some, biases, odd sizes; magnitudes far from where they begin.
"""

import pytest
import torch

from fsdp_qlora.config.options import AdapterOptions
from fsdp_qlora.models.fused.block import FusedBlock
from fsdp_qlora.weights.codecs import NF4, Plain
from tests.models.test_families import config_of
from tests.models.test_fused import CASES, CPU, DTYPES, KEEP, assert_good, assert_same_bits
from tests.support.fusable import Subject, TrueFloat64, inputs, subject
from tests.support.tiers import some_slow
from tests.support.truth import DEVICE

pytestmark = pytest.mark.usefixtures("one_thread")


def case(name: str, dtype: torch.dtype, device: torch.device = DEVICE, **more: object) -> Subject:
    family, config, adapter = CASES[name]
    adapter = AdapterOptions(**vars(adapter) | more)
    codec = Plain(dtype) if dtype == torch.float64 else NF4(double_quant=name != "Mistral")
    return subject(config_of(family, config), dtype, device, codec, adapter, kind="dora")


@pytest.mark.parametrize("fused", ["auto", "false"])
@pytest.mark.parametrize("name", some_slow(CASES, 2))
def test_float64_is_exact(name, fused):
    of = case(name, torch.float64, CPU)
    of.fuse(fused=fused)
    assert isinstance(next(iter(of.model.blocks.values())).fused, FusedBlock) == (fused == "auto")
    h, d_out = inputs(of.hf_config, (2, 21), torch.float64, CPU)
    with TrueFloat64():  # for Hugging Face's layers around generic blocks
        ours = of.run(h, d_out)
    truth = of.truth(h, d_out)
    assert any("magnitude" in key for key in truth)
    for key, true in truth.items():
        largest = true.abs().max().item()
        assert largest > 1e-4, f"{key} tests nothing"
        assert (ours[key] - true).abs().max() < 1e-11 * max(largest, 1.0), key


# Not of linears with ten rows: the error of ten magnitudes is luck.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", some_slow([name for name in CASES if name != "eight-groups-odd-heads"], 3))
def test_rounding_is_at_most_plain_pytorchs(name, dtype):
    of = case(name, dtype)
    of.fuse()
    h, d_out = inputs(of.hf_config, (8, 21), dtype, DEVICE)
    assert_good(of.run(h, d_out), of.plain(h, d_out), of.truth(h, d_out))


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the tests above ran them")
@pytest.mark.parametrize(
    ("name", "dtype"), [("Gemma3Text", torch.float32), ("Phi3", torch.float16), ("biases-exact-gelu", torch.float16)]
)
def test_triton_kernels_through_the_interpreter(name, dtype, triton_device):
    of = case(name, dtype, triton_device)
    of.fuse(keep_activations="qkv")
    h, d_out = inputs(of.hf_config, (1, 7), dtype, triton_device)
    assert_good(of.run(h, d_out), of.plain(h, d_out), of.truth(h, d_out))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_keep_level_gives_the_same_bits(name):
    of = case(name, torch.bfloat16)
    h, d_out = inputs(of.hf_config, (2, 21), torch.bfloat16, DEVICE)
    results = {}
    for keep in KEEP:
        of.fuse(keep_activations=keep)
        if DEVICE.type == "cuda":  # not all fused backends give the same bits twice
            of.set_backend("math")
        results[keep] = of.run(h, d_out)
    for keep in KEEP[:-1]:
        assert_same_bits(results[keep], results["all"], keep)


def test_a_wide_rank_takes_the_pass_without_skinny_sums():
    of = case("biases-exact-gelu", torch.float64, CPU, lora_rank=72)
    of.fuse(keep_activations="all")
    h, d_out = inputs(of.hf_config, (2, 21), torch.float64, CPU)
    ours, truth = of.run(h, d_out), of.truth(h, d_out)
    for key, true in truth.items():
        assert (ours[key] - true).abs().max() < 1e-11 * max(true.abs().max(), 1.0), key


def test_norms_are_those_of_the_adapters_new_values():
    """They are computed once for each of the adapters' values, and not once and for all."""
    of = case("Llama", torch.float64, CPU)
    of.fuse()
    h, d_out = inputs(of.hf_config, (2, 21), torch.float64, CPU)
    before = of.run(h, d_out)
    with torch.no_grad():
        for name, parameter in of.adapters.items():
            if "lora_B" in name:
                parameter.mul_(2)
    for linear in of.model.linears().values():
        linear.values_change()
    ours, truth = of.run(h, d_out), of.truth(h, d_out)
    assert (ours["out"] - before["out"]).abs().max() > 1e-3
    for key, true in truth.items():
        assert (ours[key] - true).abs().max() < 1e-11 * max(true.abs().max(), 1.0), key
