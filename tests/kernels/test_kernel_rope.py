"""Rotary embedding against Hugging Face's own formula and float64, whole and partial, any layout, forward and back."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fsdp_qlora.kernels.rope import rope, rope_, rope_tables
from tests.support.tiers import some_slow
from tests.support.truth import KERNEL_DTYPES, assert_as_good_as_plain

# batch, sequence, heads, kv heads, head dim, rotated features: GQA 1, 4, 8; sizes that are no powers of two; partial.
SHAPES = [(1, 1, 1, 1, 8, 8), (1, 63, 4, 1, 24, 24), (1, 5, 24, 3, 16, 16), (3, 7, 2, 2, 80, 32), (1, 3, 4, 4, 96, 96)]


def frequencies(rotated):
    return 1.0 / 10000 ** (torch.arange(0, rotated, 2) / rotated)


def plain(q, k, rotated, positions, dtype):
    """Hugging Face's, with angles and tables in `dtype`; q, k [B, S, heads, D]."""
    angles = positions[..., None].to(dtype) * frequencies(rotated).to(positions.device, dtype)
    table = torch.cat([angles, angles], -1)
    cos, sin = table.cos().to(dtype), table.sin().to(dtype)
    turned = apply_rotary_pos_emb(q[..., :rotated].to(dtype), k[..., :rotated].to(dtype), cos, sin, unsqueeze_dim=2)
    return [torch.cat([t.to(x.dtype), x[..., rotated:]], -1) for t, x in zip(turned, (q, k), strict=True)]


def check(shape, dtype, device, transposed=False, packed=False):
    batch, sequence, n_q, n_k, head_dim, rotated = shape
    make = torch.Generator().manual_seed(sequence)

    def heads(n):
        if transposed:  # as Hugging Face's attention holds them
            return torch.randn(batch, n, sequence, head_dim, generator=make).to(device, dtype).transpose(1, 2)
        return torch.randn(batch, sequence, n, head_dim, generator=make).to(device, dtype)

    q, k, d_q, d_k = heads(n_q), heads(n_k), heads(n_q), heads(n_k)
    positions = torch.arange(sequence, device=device).expand(batch, -1)
    if packed:
        positions = torch.randint(0, 100, (batch, sequence), generator=make).to(device)
    cos, sin = (t.to(device) for t in rope_tables(frequencies(rotated), 100))

    def gradients(op, q, k, d_q, d_k):
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        out = op(q, k)
        return *out, *torch.autograd.grad(out, [q, k], [d_q, d_k])

    ours = gradients(lambda q, k: rope(q, k, cos, sin, positions if packed else None), q, k, d_q, d_k)
    theirs = gradients(lambda q, k: plain(q, k, rotated, positions, torch.float32), q, k, d_q, d_k)
    wide = (t.double() for t in (q, k, d_q, d_k))
    truth = gradients(lambda q, k: plain(q, k, rotated, positions, torch.float64), *wide)
    for name, *values in zip(("q", "k", "d_q", "d_k"), ours, theirs, truth, strict=True):
        assert_as_good_as_plain(*values, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_form(shape, dtype):
    check(shape, dtype, "cpu")
    check(shape, dtype, "cpu", packed=True)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", some_slow(SHAPES, 2), ids=str)
def test_kernel(shape, dtype, triton_device):
    check(shape, dtype, triton_device)
    check(shape, dtype, triton_device, transposed=True, packed=True)


@pytest.mark.parametrize("form", ["plain", "triton"])
def test_in_place_and_back_again(form, request):
    device = "cpu" if form == "plain" else request.getfixturevalue("triton_device")
    # q and k as slices of one fused product, as a fused block has them: the values beside them must not move.
    fused = torch.randn(2, 9, 6 * 16, device=device)
    before = fused.clone()
    q, k = fused[..., :64].view(2, 9, 4, 16), fused[..., 64:80].view(2, 9, 1, 16)
    cos, sin = (t.to(device) for t in rope_tables(frequencies(16), 9))
    truth = rope(q, k, cos, sin)
    rope_(q, k, cos, sin)
    assert torch.equal(q, truth[0])
    assert torch.equal(k, truth[1])
    assert not torch.equal(fused, before)
    assert torch.equal(fused[..., 80:], before[..., 80:])
    rope_(q, k, cos, sin, backward=True)
    torch.testing.assert_close(fused, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rotated", [16, 10])
@pytest.mark.parametrize("form", ["plain", "triton"])
def test_elsewhere(form, rotated, request):
    """Into parts of longer rows, what is not rotated as well; the inputs stay."""
    device = "cpu" if form == "plain" else request.getfixturevalue("triton_device")
    q, k = torch.randn(2, 9, 6, 16, device=device), torch.randn(2, 9, 1, 16, device=device)
    before_q, before_k = q.clone(), k.clone()
    cos, sin = (t.to(device) for t in rope_tables(frequencies(rotated), 9))
    truth = q.clone(), k.clone()
    rope_(*truth, cos, sin, backward=True)
    rows = torch.full((2, 9, 7 * 16 + 5), 7.0, device=device)
    out = rows[..., :96].view(2, 9, 6, 16), rows[..., 96:112].view(2, 9, 1, 16)
    rope_(q, k, cos, sin, backward=True, out=out)
    assert torch.equal(out[0], truth[0])
    assert torch.equal(out[1], truth[1])
    assert torch.equal(q, before_q)
    assert torch.equal(k, before_k)
    assert (rows[..., 112:] == 7).all(), "wrote beside the rows"


def test_wrong_inputs_are_refused():
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 1, 8)
    cos, sin = rope_tables(frequencies(8), 4)
    with pytest.raises(ValueError, match="tables hold 3 positions"):
        rope(q, k, cos[:3], sin[:3])
    with pytest.raises(ValueError, match="cos and sin must be float32"):
        rope(q, k, cos.bfloat16(), sin.bfloat16())
    with pytest.raises(ValueError, match="positions must be int64"):
        rope(q, k, cos, sin, torch.arange(4))
    with pytest.raises(ValueError, match="of one dtype"):
        rope(q, k.bfloat16(), cos, sin)
    with pytest.raises(ValueError, match="out must be"):
        rope_(q, k, cos, sin, out=(q, k.double()))
