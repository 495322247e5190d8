"""Chunked head + cross-entropy against the plain one on full logits: loss and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from fsdp_qlora.kernels.cross_entropy import linear_cross_entropy
from fsdp_qlora.kernels.device import tl, triton
from fsdp_qlora.kernels.tanh import tanh
from tests.support.tiers import some_slow
from tests.support.truth import KERNEL_DTYPES, assert_as_good_as_plain

CASES = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.25},
    "softcap and scale": {"softcap": 3.0, "logit_scale": 2.0},
    "bias": {"bias": True},
    "divisor": {"divisor": 37.0},
}


def inputs(n_tokens, n_hidden, n_vocabulary, dtype, device="cpu", bias=False, seed=0):
    make = torch.Generator().manual_seed(n_tokens + 1000 * seed)
    hidden = torch.randn(n_tokens, n_hidden, generator=make).to(device, dtype)
    weight = (torch.randn(n_vocabulary, n_hidden, generator=make) * 0.3).to(device, dtype)
    labels = torch.randint(n_vocabulary, (n_tokens,), generator=make)
    labels[1::3] = -100
    b = torch.randn(n_vocabulary, generator=make).to(device, dtype) if bias else None
    return hidden, weight, labels.to(device), b


def full(hidden, weight, labels, b, softcap=None, logit_scale=1.0, divisor=1.0):
    logits = F.linear(hidden, weight, b)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        wide = softcap * torch.tanh(wide / softcap)
    return F.cross_entropy(wide, labels, reduction="sum", ignore_index=-100) / divisor


def gradients(op, hidden, weight, b, d_loss):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, b) if t is not None]
    loss = op(*leaves, *[None] * (3 - len(leaves)))
    return [loss, *torch.autograd.grad(loss * d_loss, leaves)]


def compare(n_tokens, dtype, device, chunk=16, counted=False, n_vocabulary=101, **options):
    bias = options.pop("bias", False)
    drawn = []
    for seed in range(8 if n_tokens == 1 else 1):  # one token alone has too few numbers: plain may be exact by luck
        hidden, weight, labels, b = inputs(n_tokens, 48, n_vocabulary, dtype, device, bias, seed)
        count = int((labels != -100).sum()) if counted else None

        def ours(h, w, b, labels=labels, count=count):
            return linear_cross_entropy(h, w, labels, bias=b, chunk=chunk, label_count=count, **options)

        def plain(h, w, b, labels=labels):
            return full(h, w, labels, b, **options)

        wide = [None if t is None else t.double() for t in (hidden, weight, b)]
        forms = [(ours, (hidden, weight, b)), (plain, (hidden, weight, b)), (plain, wide)]
        drawn.append([gradients(op, *tensors, 1 / 32) for op, tensors in forms])
    rows = zip(
        ("loss", "d_hidden", "d_weight", "d_bias"),
        *([torch.stack(draws) for draws in zip(*form, strict=True)] for form in zip(*drawn, strict=True)),
        strict=False,
    )
    for name, got, theirs, truth in rows:
        assert_as_good_as_plain(got, theirs, truth, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n_tokens", [1, 63, 1000])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_plain_form(options, n_tokens, dtype):
    compare(n_tokens, dtype, "cpu", chunk=256, **options)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("n_tokens", [1, 19])
@pytest.mark.parametrize("options", some_slow(CASES.values(), 2), ids=CASES)
def test_kernel(options, n_tokens, dtype, triton_device):
    compare(n_tokens, dtype, triton_device, **options)
    compare(n_tokens, dtype, triton_device, counted=True, **options)


def test_kernel_over_several_tiles(triton_device):
    compare(5, torch.float16, triton_device, n_vocabulary=8192 * 2 + 17)


@triton.jit
def tanh_kernel(x_ptr, TILE: tl.constexpr):
    at = tl.arange(0, TILE)
    tl.store(x_ptr + at, tanh(tl.load(x_ptr + at)))


def test_tanh_in_a_kernel(triton_device):
    x = torch.cat(
        [torch.linspace(-12, 12, 4000), torch.logspace(-30, 0, 89), torch.tensor([0.0, torch.inf, -torch.inf])]
    )
    x = torch.cat([x, torch.full((4096 - x.numel(),), torch.nan)]).to(triton_device)
    truth = x.double().tanh()
    tanh_kernel[(1,)](x, TILE=4096)
    torch.testing.assert_close(x.double(), truth, rtol=6 * 2**-23, atol=0, equal_nan=True)


def test_only_ignored_labels_cost_nothing_and_give_zero():
    hidden, weight, _, _ = inputs(9, 48, 11, torch.float32)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full((9,), -100))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(hidden.grad, torch.zeros(9, 48))


def test_no_gradient_is_computed_where_none_is_wanted():
    hidden, weight, labels, _ = inputs(9, 48, 11, torch.float32)
    truth = full(hidden, weight, labels, None)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), truth)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    torch.testing.assert_close(loss, truth)
    assert not loss.requires_grad


def test_the_weight_may_be_gone_by_backward():
    hidden, weight, labels, _ = inputs(20, 48, 11, torch.float32)
    hidden.requires_grad_()
    truth = torch.autograd.grad(full(hidden, weight, labels, None), hidden)[0]
    loss = linear_cross_entropy(hidden, weight, labels)
    weight.fill_(float("nan"))
    loss.backward()
    torch.testing.assert_close(hidden.grad, truth)


def test_a_second_backward_is_refused():
    hidden, weight, labels, _ = inputs(4, 48, 11, torch.float32)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


def test_autocast_casts():
    hidden, weight, labels, _ = inputs(20, 48, 11, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    loss.backward()
    assert hidden.grad.dtype == torch.float32
    low = linear_cross_entropy(hidden.detach().bfloat16(), weight.bfloat16(), labels)
    assert loss.item() == low.item()


def test_a_label_outside_the_vocabulary_does_not_pass(triton_device):
    hidden, weight, labels, _ = inputs(4, 48, 11, torch.float32, triton_device)
    labels[0] = 11
    assert torch.isnan(linear_cross_entropy(hidden, weight, labels))


@pytest.mark.parametrize("form", ["plain", "triton"])
def test_labels_may_lie_apart(form, request):
    device = request.getfixturevalue("triton_device") if form == "triton" else "cpu"
    hidden, weight, labels, _ = inputs(9, 48, 101, torch.float32, device)
    apart = torch.stack([labels, labels.flip(0)], 1)[:, 0]
    count = len(labels)  # as the head calls it: all rows are computed, in their order
    losses = [linear_cross_entropy(hidden, weight, each, label_count=count) for each in (labels, apart)]
    assert torch.equal(*losses)


def test_wrong_inputs_are_refused():
    hidden, weight, labels, _ = inputs(4, 48, 11, torch.float32)
    with pytest.raises(ValueError, match="labels must be int64"):
        linear_cross_entropy(hidden, weight, labels[:3])
    with pytest.raises(ValueError, match=r"\[T, H\]"):
        linear_cross_entropy(hidden, weight[:, 1:], labels)
    with pytest.raises(ValueError, match="float32 as hidden"):
        linear_cross_entropy(hidden, weight.bfloat16(), labels)
