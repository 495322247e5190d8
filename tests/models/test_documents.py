"""Documents one after the other through fused blocks: each as if it were alone, in every family and at every level."""

import pytest
import torch
from torch import Tensor

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.kernels.segments import segments_of
from tests.models.test_fused import CASES, case
from tests.support.fusable import Results, Subject, inputs
from tests.support.truth import DEVICE

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
LENGTHS = (21, 5, 1, 9)


def together(of: Subject, h: Tensor, d_out: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Results:
    of.model.rest.bind()
    of.model.current.segments = segments = segments_of(lengths).to(h.device)
    h = h.detach().requires_grad_()
    out = of.model.backbone(inputs_embeds=h, position_ids=segments.positions, use_cache=False)[0]
    grads = torch.autograd.grad(out, [h, *of.adapters.values()], d_out)
    of.model.current.segments = None
    return dict(zip(("out", "d_h", *of.adapters), (out.detach(), *grads), strict=True))


def apart(of: Subject, h: Tensor, d_out: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Results:
    pieces = [of.run(*piece) for piece in zip(h.split(lengths, 1), d_out.split(lengths, 1), strict=True)]
    rows = {name: torch.cat([piece[name] for piece in pieces], 1) for name in ("out", "d_h")}
    return rows | {name: torch.stack([piece[name] for piece in pieces]).sum(0) for name in of.adapters}


@pytest.mark.parametrize("name", CASES)
def test_documents_are_as_alone(name):
    """In float64: no rounding to hide behind."""
    of = case(name, torch.float64, CPU)
    of.fuse()
    h, d_out = inputs(of.hf_config, (1, sum(LENGTHS)), torch.float64, CPU)
    ours, true = together(of, h, d_out), apart(of, h, d_out)
    for key, value in true.items():
        largest = value.abs().max().item()
        assert largest > 1e-4, f"{key} tests nothing"
        assert (ours[key] - value).abs().max() < 1e-12 * max(largest, 1.0), key


@pytest.mark.parametrize("keep", [level.label for level in Keep])
def test_every_keep_level_gives_the_same_bits(keep):
    of = case("Qwen3", torch.float32, DEVICE)
    h, d_out = inputs(of.hf_config, (1, sum(LENGTHS)), torch.float32, DEVICE)
    results = []
    for level in ("input", keep):
        of.fuse(keep_activations=level)
        results.append(together(of, h, d_out))
    for key, value in results[0].items():
        assert torch.equal(results[1][key], value), key


@pytest.mark.parametrize("name", ["Llama", "Gemma3Text", "window-in-some-layers"])
def test_another_document_changes_no_bit(name):
    of = case(name, torch.float32, DEVICE)
    of.fuse()
    h, d_out = inputs(of.hf_config, (1, sum(LENGTHS)), torch.float32, DEVICE)
    changed = h.clone()
    second = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    changed[:, second] *= -2
    first, other = together(of, h, d_out), together(of, changed, d_out)
    for key in ("out", "d_h"):
        assert torch.equal(first[key][:, : second.start], other[key][:, : second.start]), key
        assert torch.equal(first[key][:, second.stop :], other[key][:, second.stop :]), key
        assert not torch.equal(first[key][:, second], other[key][:, second]), key
