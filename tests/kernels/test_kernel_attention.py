"""Attention with its backward apart: every backend against float64, with groups, windows, softcaps, odd sizes."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from fsdp_qlora.kernels.attention import Masking, attend, attend_backward, fastest, possible
from tests.support.truth import DEVICE, assert_as_good_as_plain

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ("flash_attn", "flash", "cudnn")
DTYPES = [torch.float32, torch.bfloat16] + ([torch.float16] if DEVICE.type == "cuda" else [])

# (B, S, N, K, D), window, softcap
CASES = {
    "one-token": ((2, 1, 4, 4, 16), None, None),
    "one-token-windowed": ((1, 1, 4, 1, 16), 1, None),
    "odd-sequence": ((1, 63, 4, 1, 24), None, None),
    "eight-groups": ((2, 63, 8, 1, 40), None, None),
    "one-group-each": ((2, 63, 3, 3, 64), None, None),
    "more-than-a-piece": ((1, 600, 4, 2, 16), None, None),
    "window-over-pieces": ((1, 600, 4, 1, 16), 100, None),
    "window-of-one": ((2, 63, 8, 2, 32), 1, None),
    "window-of-seven": ((2, 63, 8, 2, 32), 7, None),
    "window-longer-than-the-sequence": ((1, 63, 4, 2, 32), 64, None),
    "softcap": ((1, 63, 8, 2, 24), None, 2.0),
    "softcap-window-pieces": ((1, 600, 4, 2, 16), 33, 1.5),
    "wide-heads": ((1, 63, 4, 1, 256), None, None),
}
ODD = {"odd-features": ((2, 33, 4, 2, 23), 5, 3.0)}  # head dims no fused backend takes


def draw(shape, dtype, device=DEVICE):
    """q, k, v as slices of one buffer, where a stacked projection leaves them, and d_out."""
    b, s, n, kv, d = shape
    make = torch.Generator().manual_seed(s + d)
    whole = torch.randn(b, s, (n + 2 * kv) * d, generator=make).to(device, dtype)
    q, k, v = (part.view(b, s, -1, d) for part in whole.split([n * d, kv * d, kv * d], dim=2))
    return q, k, v, torch.randn(b, s, n, d, generator=make).to(device, dtype)


def eager(q, k, v, masking):
    """The textbook's form: all heads' keys written out, all scores at once."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * masking.scale
    if masking.softcap is not None:
        scores = masking.softcap * torch.tanh(scores / masking.softcap)
    scores = scores.masked_fill(~seen(q.shape[2], masking, q.device), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def seen(length, masking, device):
    ones = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return ones if masking.window is None else ones.triu(1 - masking.window)


def plain(q, k, v, masking):
    """PyTorch's own, but for a softcap, which it has not."""
    if masking.softcap is not None:
        return eager(q, k, v, masking)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = seen(q.shape[2], masking, q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=masking.scale, enable_gqa=True).transpose(1, 2)


def differentiated(op, q, k, v, d_out, masking):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = op(*leaves, masking)
    return [out, *torch.autograd.grad(out, leaves, d_out)]


def compare(case, dtype, backend, device=DEVICE):
    shape, window, softcap = case
    masking = Masking(1.3 * shape[-1] ** -0.5, window, softcap)
    q, k, v, d_out = draw(shape, dtype, device)
    given = [x.clone() for x in (q, k, v, d_out)]
    out, stats = attend(q, k, v, masking, backend)
    grads = attend_backward(d_out, q, k, v, out, stats, masking, backend)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v, d_out), given, strict=True)), "an input was written to"
    theirs = differentiated(plain, q, k, v, d_out, masking)
    truth = differentiated(eager, *(x.double() for x in (q, k, v, d_out)), masking)
    for name, *values in zip(("out", "d_q", "d_k", "d_v"), (out, *grads), theirs, truth, strict=True):
        if shape[1] == 1 and name in ("d_q", "d_k"):  # of one key all is seen, whatever the score
            assert values[0].abs().max() < 1e-2, name
        else:
            assert_as_good_as_plain(*values, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *ODD])
def test_math(case, dtype):
    compare((CASES | ODD)[case], dtype, "math")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [name for name, (_, window, softcap) in CASES.items() if not window and not softcap])
def test_pytorchs_for_cpus(case, dtype):
    compare(CASES[case], dtype, "cpu", torch.device("cpu"))


EXACT = [(name, "math") for name in ("window-over-pieces", "softcap-window-pieces", "eight-groups")]


@pytest.mark.parametrize(("case", "backend"), [*EXACT, ("eight-groups", "cpu"), ("more-than-a-piece", "cpu")])
def test_float64_is_the_textbooks(case, backend):
    shape, window, softcap = CASES[case]
    masking = Masking(0.3, window, softcap)
    q, k, v, d_out = draw(shape, torch.float64, "cpu")
    out, stats = attend(q, k, v, masking, backend)
    ours = (out, *attend_backward(d_out, q, k, v, out, stats, masking, backend))
    for mine, true in zip(ours, differentiated(eager, q, k, v, d_out, masking), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-12)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Stands where the flash-attn package (2.8) is not: its signature, and what its docstring says it means."""
    assert dropout_p == 0
    assert alibi_slopes is None
    assert not return_attn_probs
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bind,bjnd->bnij", q, k) * (q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    left, right = window_size
    offset = torch.arange(k.shape[1])[None, :] - torch.arange(q.shape[1])[:, None]  # of key j from query i
    attended = offset <= 0 if causal else torch.ones_like(offset, dtype=torch.bool)
    if left >= 0:
        attended &= offset >= -left
    if right >= 0:
        attended &= offset <= right
    p = scores.masked_fill(~attended, float("-inf")).softmax(-1)
    return torch.einsum("bnij,bjnd->bind", p, v)


def flash_attn_package():
    package = ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func
    return package


@pytest.mark.parametrize("case", CASES)
def test_the_flash_attn_package_is_asked_for_what_math_computes(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_package())
    shape, window, softcap = CASES[case]
    masking = Masking(0.3, window, softcap)
    q, k, v, d_out = draw(shape, torch.float64, "cpu")
    results = {}
    for backend in ("flash_attn", "math"):
        with torch.no_grad():  # as inside an autograd function
            out, stats = attend(q, k, v, masking, backend)
            grads = attend_backward(d_out, q, k, v, out, stats, masking, backend)
        assert not out.requires_grad
        results[backend] = (out, *grads)
    assert not q.requires_grad
    for ours, true in zip(results["flash_attn"], results["math"], strict=True):
        assert true.abs().max() > 0.1 or 1 in (shape[1], window), "nothing but zeros is compared"
        torch.testing.assert_close(ours, true, rtol=1e-11, atol=1e-12)


def test_large_scores_stay_finite():
    """A softcap saturates and a softmax underflows; neither may turn a hidden or forgotten key into NaN."""
    for softcap in (None, 30.0):
        masking = Masking(30.0, 20, softcap)
        q, k, v, d_out = draw((1, 50, 2, 1, 16), torch.float32)
        assert (torch.einsum("bsnd,btkd->bst", q, k) * masking.scale).std() > 100
        out, stats = attend(q, k, v, masking, "math")
        ours = (out, *attend_backward(d_out, q, k, v, out, stats, masking, "math"))
        truth = differentiated(eager, *(x.double() for x in (q, k, v, d_out)), masking)
        for mine, true in zip(ours, truth, strict=True):
            assert (mine.double() - true).abs().max() < 1e-4 * true.abs().max()  # a score of 500 is off by 3e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_backends(backend, case, dtype):
    shape, window, softcap = CASES[case]
    if backend not in possible(DEVICE, dtype, shape[1], shape[-1], Masking(1.0, window, softcap)):
        pytest.skip(f"{backend} is not possible here")
    compare(CASES[case], dtype, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 2048, 32, 8, 128), (2, 777, 16, 16, 64)], ids=str)
def test_fused_backends_agree_at_real_shapes(shape):
    """Against the math backend in float32, where no S x S matrix in float64 fits a test."""
    masking = Masking(shape[-1] ** -0.5)
    q, k, v, d_out = draw(shape, torch.bfloat16)
    wide = [x.float() for x in (q, k, v, d_out)]
    out, stats = attend(*wide[:3], masking, "math")
    truth = (out, *attend_backward(wide[3], *wide[:3], out, stats, masking, "math"))
    theirs = differentiated(plain, q, k, v, d_out, masking)
    for backend in possible(DEVICE, torch.bfloat16, shape[1], shape[-1], masking):
        out, stats = attend(q, k, v, masking, backend)
        ours = (out, *attend_backward(d_out, q, k, v, out, stats, masking, backend))
        for name, *values in zip(("out", "d_q", "d_k", "d_v"), ours, theirs, truth, strict=True):
            assert_as_good_as_plain(*values, f"{backend} {name}")
    assert fastest(DEVICE, torch.bfloat16, shape, masking) in BACKENDS


@pytest.mark.parametrize(("backend", "window"), [("flash", None), ("flash", 10), ("cudnn", None)])
def test_pytorchs_ops_take_what_they_are_given(backend, window):
    """Without a GPU no more than this: the private ops' arguments and shapes, on tensors without data."""
    q, d_out = (torch.empty(2, 63, 8, 64, device="meta", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.empty(2, 63, 2, 64, device="meta", dtype=torch.bfloat16) for _ in range(2))
    out, stats = attend(q, k, v, Masking(0.1, window), backend)
    grads = attend_backward(d_out, q, k, v, out, stats, Masking(0.1, window), backend)
    assert [x.shape for x in (out, *grads)] == [x.shape for x in (q, q, k, v)]


def test_what_is_possible(monkeypatch):
    gpu, cpu, bf16 = torch.device("cuda"), torch.device("cpu"), torch.bfloat16
    packages = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in packages else None)
    assert possible(cpu, bf16, 512, 128, Masking(1.0)) == ["cpu", "math"]
    assert possible(cpu, bf16, 512, 128, Masking(1.0, window=100)) == ["math"]
    assert possible(cpu, bf16, 512, 128, Masking(1.0, softcap=50.0)) == ["math"]
    assert possible(gpu, torch.float32, 512, 128, Masking(1.0)) == ["math"]
    assert possible(gpu, bf16, 512, 100, Masking(1.0)) == ["math"]
    assert possible(gpu, bf16, 512, 128, Masking(1.0)) == ["flash", "cudnn", "math"]
    assert possible(gpu, bf16, 512, 256, Masking(1.0)) == ["flash", "math"]
    assert possible(gpu, bf16, 512, 128, Masking(1.0, window=511)) == ["flash", "math"]
    assert possible(gpu, bf16, 512, 128, Masking(1.0, window=512)) == ["flash", "cudnn", "math"]
    assert possible(gpu, bf16, 512, 128, Masking(1.0, softcap=50.0)) == ["math"]
    packages.add("flash_attn")
    assert possible(gpu, bf16, 512, 128, Masking(1.0, 100, softcap=50.0)) == ["flash_attn", "math"]
    assert possible(gpu, bf16, 512, 64, Masking(1.0)) == ["flash_attn", "flash", "cudnn", "math"]
    assert fastest(cpu, bf16, (1, 512, 8, 2, 64), Masking(1.0)) == "cpu"
    assert fastest(cpu, bf16, (1, 512, 8, 2, 64), Masking(1.0, softcap=50.0)) == "math"
