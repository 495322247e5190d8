"""Frozen linears with LoRA, alone, together and as an MLP, against plain autograd and float64; dropout that replays."""

import pytest
import torch
import torch.nn.functional as F

from fsdp_qlora.kernels.dropout import dropout, dropout_add_
from fsdp_qlora.kernels.lora import Adapter, Projection, lora_projections, project
from fsdp_qlora.kernels.lora_mlp import lora_mlp
from fsdp_qlora.kernels.lora_wide import (
    adapt_,
    add_adapters_,
    extra,
    gradient_of_input_beside,
    gradient_of_input_wide,
    gradients_of_a_wide,
    gradients_of_b_wide,
    lay,
    pays_beside,
    products_of_b,
    project_wide,
    wide,
)
from tests.support.tiers import some_slow
from tests.support.truth import DEVICE, assert_as_good_as_plain

DTYPES = [torch.float32, torch.bfloat16]


class Layer:
    """A frozen weight, perhaps a bias, perhaps an adapter; its two forms."""

    def __init__(self, out_features, in_features, rank, dtype, bias=False, seed=0):
        make = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=make).div_(shape[-1] ** 0.5).to(DEVICE, dtype)

        self.weight = draw(out_features, in_features)
        self.bias = draw(out_features) if bias else None
        self.a = draw(rank, in_features).requires_grad_() if rank else None
        self.b = draw(out_features, rank).requires_grad_() if rank else None
        self.scale = 0.75

    def to(self, dtype):
        other = object.__new__(Layer)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                value = value.detach().to(dtype).requires_grad_(value.requires_grad)
            setattr(other, name, value)
        return other

    @property
    def trained(self):
        return [] if self.a is None else [self.a, self.b]

    def plain(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.a is None else y + (x @ self.a.T) @ self.b.T * self.scale

    def projection(self, scratch):
        def weight():
            scratch.fill_(float("nan"))  # all weights pass through one buffer, as they do in a block
            return scratch[: self.weight.numel()].view(self.weight.shape).copy_(self.weight)

        adapters = () if self.a is None else (Adapter(self.a, self.b, self.scale),)
        return Projection(weight, self.bias, adapters)


def results(layers, x, d_outs, op):
    """Outputs, then gradients of x and of every trained matrix."""
    x = x.detach().requires_grad_()
    outs = op(x)
    leaves = [x, *(m for layer in layers for m in layer.trained)]
    return [*outs, *torch.autograd.grad(outs, leaves, d_outs)]


def compare(layers, x, d_outs, ours, plain):
    """ours, plain: (layers, x) -> outputs."""
    wide = [layer.to(torch.float64) for layer in layers]
    got = results(layers, x, d_outs, lambda x: ours(layers, x))
    theirs = results(layers, x, d_outs, lambda x: plain(layers, x))
    truth = results(wide, x.double(), [d.double() for d in d_outs], lambda x: plain(wide, x))
    for i, values in enumerate(zip(got, theirs, truth, strict=True)):
        assert_as_good_as_plain(*values, f"result {i}")


def as_group(layers, x):
    scratch = torch.empty(4096, dtype=x.dtype, device=DEVICE)
    return lora_projections(x, [layer.projection(scratch) for layer in layers])


def one_by_one(layers, x):
    return [layer.plain(x) for layer in layers]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (63,), (2, 5)], ids=str)
@pytest.mark.parametrize("ranks", [(4,), (4, 4, 4), (4, 0, 7), (0, 0)], ids=str)
def test_projections(ranks, shape, dtype):
    layers = [Layer(40 - 8 * i, 24, r, dtype, bias=i == 1, seed=i) for i, r in enumerate(ranks)]
    x = torch.randn(*shape, 24).to(DEVICE, dtype)
    d_outs = [torch.randn(*shape, 40 - 8 * i).to(DEVICE, dtype) for i in range(len(ranks))]
    compare(layers, x, d_outs, as_group, one_by_one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_linears_as_rows_of_one_weight(dtype):
    layers = [Layer(out, 24, rank, dtype, seed=out) for out, rank in ((32, 4), (8, 0), (16, 3))]

    def stacked(layers, x):
        adapters, start = [], 0
        for layer in layers:
            if layer.a is not None:
                adapters.append(Adapter(layer.a, layer.b, layer.scale, start))
            start += layer.weight.shape[0]
        (y,) = lora_projections(x, [Projection(lambda: torch.cat([m.weight for m in layers]), None, tuple(adapters))])
        return y.split([m.weight.shape[0] for m in layers], dim=-1)

    x = torch.randn(63, 24).to(DEVICE, dtype)
    compare(layers, x, [torch.randn(63, n).to(DEVICE, dtype) for n in (32, 8, 16)], stacked, one_by_one)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_mlp(activation, dtype, keep):
    layers = [Layer(40, 24, 4, dtype, seed=1), Layer(40, 24, 4, dtype, seed=2), Layer(24, 40, 4, dtype, seed=3)]
    act = F.silu if activation == "silu" else lambda g: F.gelu(g, approximate="tanh")

    def ours(layers, x):
        scratch = torch.empty(4096, dtype=x.dtype, device=DEVICE)
        gate, up, down = (layer.projection(scratch) for layer in layers)
        return [lora_mlp(x, [gate, up], down, activation, keep=keep)]

    def plain(layers, x):
        gate, up, down = layers
        return [down.plain(act(gate.plain(x)) * up.plain(x))]

    x = torch.randn(3, 21, 24).to(DEVICE, dtype)
    compare(layers, x, [torch.randn(3, 21, 24).to(DEVICE, dtype)], ours, plain)


@pytest.mark.usefixtures("triton_device")
def test_mlp_with_gate_and_up_as_one_weight_and_in_the_kernel():
    gate, up, down = (Layer(o, i, 4, torch.float32, seed=o + i) for o, i in ((40, 24), (40, 24), (24, 40)))
    up.weight.neg_()
    x = torch.randn(9, 24, device=DEVICE, requires_grad=True)
    adapters = (Adapter(gate.a, gate.b, gate.scale, 0), Adapter(up.a, up.b, up.scale, 40))
    both = Projection(lambda: torch.cat([gate.weight, up.weight]), None, adapters)
    scratch = torch.empty(1000, device=DEVICE)
    leaves = [x, *gate.trained, *up.trained, *down.trained]
    y = lora_mlp(x, [both], down.projection(scratch), "silu")
    truth = down.plain(F.silu(gate.plain(x)) * up.plain(x))
    torch.testing.assert_close(y, truth)
    d_y = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, d_y), torch.autograd.grad(truth, leaves, d_y), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_mlp_backward_runs_once():
    scratch = torch.empty(1000, device=DEVICE)
    gate, up, down = (Layer(*size, 4, torch.float32).projection(scratch) for size in ((40, 24), (40, 24), (24, 40)))
    y = lora_mlp(torch.randn(2, 24, device=DEVICE), [gate, up], down, "silu").sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        y.backward()


def test_an_input_without_gradient_still_trains_the_adapter():
    layer = Layer(16, 24, 4, torch.float32)
    (y,) = as_group([layer], torch.randn(5, 24, device=DEVICE))
    y.sum().backward()
    assert layer.a.grad.abs().sum() > 0
    assert layer.b.grad.abs().sum() > 0


@pytest.mark.parametrize("form", ["plain", "triton"])
def test_dropout_replays_from_its_seed(form, request):
    device = "cpu" if form == "plain" else request.getfixturevalue("triton_device")
    x = torch.randn(100, 170, device=device)
    dropped = dropout(x, 0.3, seed=2**62 + 5)
    kept = dropped != 0
    assert abs(kept.float().mean().item() - 0.7) < 0.02
    torch.testing.assert_close(dropped[kept], x[kept] / 0.7)
    assert torch.equal(dropout(x, 0.3, seed=2**62 + 5), dropped)
    assert not torch.equal(dropout(x, 0.3, seed=2**62 + 6), dropped)
    target = torch.ones_like(x)
    dropout_add_(target, x, 0.3, seed=2**62 + 5)
    torch.testing.assert_close(target, 1 + dropped)


def test_dropout_takes_what_a_long_context_has():
    """100,000 tokens of the MLP of 70B: more numbers than 31 bits count."""
    x = torch.empty(100_000, 28_672, dtype=torch.bfloat16, device="meta")
    assert dropout(x, 0.3, seed=1).shape == x.shape


@pytest.mark.parametrize("form", ["plain", "triton"])
def test_projections_with_dropout_equal_those_with_its_mask(form, request):
    if form == "triton":
        request.getfixturevalue("triton_device")
    layers = [Layer(16, 24, 4, torch.float32, seed=i) for i in range(2)]
    x = torch.randn(7, 24, device=DEVICE, requires_grad=True)
    mask = dropout(torch.ones_like(x), 0.5, seed=9)
    scratch = torch.empty(1000, device=DEVICE)
    outs = lora_projections(x, [layer.projection(scratch) for layer in layers], p=0.5, seed=9)
    truth = [F.linear(x, m.weight) + ((x * mask) @ m.a.T) @ m.b.T * m.scale for m in layers]
    leaves = [x, *(m for layer in layers for m in layer.trained)]
    d_outs = [torch.randn_like(y) for y in outs]
    ours = [*outs, *torch.autograd.grad(outs, leaves, d_outs)]
    theirs = [*truth, *torch.autograd.grad(truth, leaves, d_outs)]
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("starts", [(), (0,), (5,), (0, 16), (0, 8, 24), (3, 11, 40)], ids=str)
@pytest.mark.parametrize("rank", some_slow([1, 3, 8, 40], 3))
@pytest.mark.parametrize("form", ["plain", "triton"])
def test_adapters_are_laid_beside_and_below_their_weight(form, rank, starts, request):
    device = torch.device("cpu") if form == "plain" else request.getfixturevalue("triton_device")
    out, wide = 48, 1100
    weight = torch.randn(out, wide, device=device)
    pairs = [(torch.randn(rank, wide, device=device), torch.randn(8, rank, device=device)) for _ in starts]
    adapters = tuple(Adapter(a, b, 0.5, start) for (a, b), start in zip(pairs, starts, strict=True))
    projection = Projection(lambda place: place.copy_(weight), None, adapters)
    scratch = torch.full((200, 1300), float("nan"), device=device)
    laid = lay(projection, out, wide, lambda rows, columns: scratch[:rows, :columns])
    beside = extra(projection)
    assert laid.shape == (out + beside, wide + beside)
    wanted = torch.zeros_like(laid)
    wanted[:out, :wide] = weight
    for i, ad in enumerate(adapters):
        part = slice(i * rank, (i + 1) * rank)
        wanted[ad.rows, wide:][:, part], wanted[out:, :wide][part] = ad.b, ad.a
    assert torch.equal(laid[:out], wanted[:out])
    assert torch.equal(laid[out:, :wide], wanted[out:, :wide])
    assert scratch[:, laid.shape[1] :].isnan().all(), "wrote beside its place"
    assert scratch[laid.shape[0] :].isnan().all(), "wrote below its place"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "rank"), [(1, 3), (63, 8)])
def test_each_way_through_adapters_beside_their_weight_gives_the_same(tokens, rank, dtype):
    """Input with and without room beside it; the gradient of x A^T before the input's, and in one product with it."""
    layers = [Layer(40, 24, rank, dtype, seed=1), Layer(56, 24, rank, dtype, seed=2)]
    x, d_out = torch.randn(tokens, 24).to(DEVICE, dtype), torch.randn(tokens, 96).to(DEVICE, dtype)

    def plainly(layers, x, d_out):
        x = x.detach().requires_grad_()
        y = torch.cat([layer.plain(x) for layer in layers], dim=1)
        leaves = [x, *(m for layer in layers for m in layer.trained)]
        return [y.detach(), *torch.autograd.grad(y, leaves, d_out)]

    theirs = plainly(layers, x, d_out)
    truth = plainly([layer.to(torch.float64) for layer in layers], x.double(), d_out.double())
    weight = torch.cat([layer.weight for layer in layers])
    adapters = tuple(
        Adapter(ly.a.detach(), ly.b.detach(), ly.scale, at) for ly, at in zip(layers, (0, 40), strict=True)
    )

    def decoded(place=None):
        return weight if place is None else place.copy_(weight)

    projection, once = Projection(decoded, None, adapters), {"p": 0.0, "seed": 0}
    laid = lay(
        projection, 96, 24, lambda rows, columns: torch.full((rows, columns), float("nan"), device=DEVICE).to(dtype)
    )
    laid[96:, 24:] = float("nan")  # the corner, which is never read

    x_wide = wide(tokens, 24 + extra(projection), x)
    x_wide[:, :24] = x
    xs = adapt_(x_wide, projection, laid, **once)
    y = x.new_empty(tokens, 96)
    project_wide(x_wide, projection, laid, y)
    d_wide = wide(tokens, 96 + extra(projection), x)
    d_wide[:, :96] = d_out
    d_xa = d_wide[:, 96:]
    d_bs = gradients_of_b_wide(d_wide[:, :96], d_xa, xs, projection, laid)
    d_as = gradients_of_a_wide(d_xa, x, projection, **once)
    first = [y, gradient_of_input_wide(d_wide, projection, laid, **once), *interleaved(d_as, d_bs)]

    (y,), xs = project(x, [projection], scale=adapters[0].scale)
    assert pays_beside(projection, 96, 24)
    d_x, d_xa = gradient_of_input_beside(d_out, projection, laid)
    d_bs, d_as = products_of_b(d_out, xs, projection), gradients_of_a_wide(d_xa, x, projection, **once)
    second = [y, add_adapters_(d_x, d_xa, laid), *interleaved(d_as, d_bs)]
    for got in (first, second):
        for name, *values in zip(("y", "d_x", *"abab"), got, theirs, truth, strict=True):
            assert_as_good_as_plain(*values, name)


def interleaved(d_as, d_bs):
    return [d for pair in zip(d_as, d_bs, strict=True) for d in pair]


def test_wrong_inputs_are_refused():
    layer = Layer(16, 24, 4, torch.float32)
    projection = layer.projection(torch.empty(1000, device=DEVICE))
    with pytest.raises(ValueError, match=r"a must be .* as x is"):
        lora_projections(torch.randn(2, 24, device=DEVICE).bfloat16(), [projection])
    with pytest.raises(ValueError, match=r"a must be \[R, 23\]"):
        lora_projections(torch.randn(2, 23, device=DEVICE), [projection])
    with pytest.raises(ValueError, match="frozen"):
        lora_projections(
            torch.randn(2, 24, device=DEVICE),
            [projection._replace(bias=torch.zeros(16, device=DEVICE, requires_grad=True))],
        )
    with pytest.raises(ValueError, match="p must be"):
        dropout(torch.ones(2), 1.0, seed=0)
