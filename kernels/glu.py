"""The gated middle of an MLP, h = act(gate) * up, for SwiGLU and for GEGLU with the tanh and the exact gelu.

Forward reads two tensors and writes one. Backward has gate, up and d_h, needs d_gate and d_up for what comes before,
and needs h again for the gradient of the adapter that comes after: all three come out of one pass over the data, each
written over an input that is no longer wanted, so that backward allocates nothing:

    d_h  -> h = act(gate) * up        gate -> d_gate = d_h * up * act'(gate)        up -> d_up = d_h * act(gate)

Everything between load and store is float32, rounded once. gate and up may be the two halves of one [T, 2I] product.

T tokens, I intermediate.
"""

import math
from typing import Any

import torch

from fsdp_qlora.kernels.cost import Cost, cost_of
from fsdp_qlora.kernels.device import cdiv, empty_like, launch, next_power_of_2, on_triton, tl, triton

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """h = act(gate) * up, contiguous, of their shape [..., I] and dtype. Differentiable in both.

    activation: "silu", "gelu_tanh" (the tanh formula), "gelu" (exact). Raises ValueError on anything else, or if
    gate's and up's shapes differ."""
    h: torch.Tensor = _GLU.apply(gate, up, activation)
    return h


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return glu_forward(_rows(gate), _rows(up), activation).view(gate.shape)

    @staticmethod
    def backward(ctx: Any, d_h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        # Copies: autograd's tensors are not ours to overwrite. A fused MLP calls glu_backward_ on its own buffers.
        gate, up = (t.clone(memory_format=torch.contiguous_format) for t in ctx.saved_tensors)
        glu_backward_(_rows(d_h).clone(), _rows(gate), _rows(up), ctx.activation)
        return gate, up, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def glu_forward(gate: torch.Tensor, up: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """h [T, I]; gate, up and out [T, I] with stride 1 along I. out may be gate or up. Outside autograd."""
    if out is None:
        out = empty_like(gate)
    _check(activation, gate=gate, up=up, out=out)
    if on_triton(gate):
        _launch(_forward_kernel, activation, gate, up, out)
    else:
        act, _ = _plain_activation(_wide(gate), activation)
        out.copy_(act.mul_(up))
    return out


def glu_backward_(d_h: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    """In place: d_h becomes h, gate becomes d_gate, up becomes d_up. All [T, I] with stride 1 along I."""
    _check(activation, gate=gate, up=up, d_h=d_h)
    if on_triton(gate):
        _launch(_backward_kernel, activation, gate, up, d_h)
    else:
        act, slope = _plain_activation(_wide(gate), activation)
        gate.copy_(slope.mul_(up).mul_(d_h))
        h = act * up
        up.copy_(act.mul_(d_h))
        d_h.copy_(h)


def _check(activation: str, **tensors: torch.Tensor) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    gate = tensors["gate"]
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or tensor.shape != gate.shape or tensor.dtype != gate.dtype or tensor.stride(1) != 1:
            raise ValueError(
                f"{name} must be {gate.dtype} {tuple(gate.shape)} with stride 1 along its last axis like gate, "
                f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
            )


# ---- meaning, and the path on a CPU


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _plain_activation(g: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """act(g) and its derivative."""
    if activation == "gelu":
        share = 0.5 * (1 + torch.erf(g * math.sqrt(0.5)))
        return g * share, share + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2u), and sigmoid(-2u) is 1 minus that with its digits kept.
        c = math.sqrt(8 / math.pi)
        u = c * (g + 0.044715 * g * g * g)
        share = torch.sigmoid(u)
        return g * share, share + g * share * torch.sigmoid(-u) * c * (1 + 3 * 0.044715 * g * g)
    share = torch.sigmoid(g)
    return g * share, share * (1 + g * (1 - share))


# ---- Triton


@triton.jit
def _activation(g, ACTIVATION: tl.constexpr):
    """act(g) and its derivative, float32; the formulas of the plain form."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
        slope = share + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        u = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        share = tl.sigmoid(u)
        slope = share + g * share * tl.sigmoid(-u) * 1.5957691216057308 * (1 + 0.134145 * g * g)
    else:
        share = tl.sigmoid(g)
        slope = share * (1 + g * (1 - share))
    return g * share, slope


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, out_stride,
    I: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // TILES).to(tl.int64)
    column = (tl.program_id(0) % TILES) * TILE + tl.arange(0, TILE)
    live = column < I
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=live, other=0.0).to(tl.float32)
    act, _ = _activation(gate, ACTIVATION)
    tl.store(out_ptr + row * out_stride + column, (act * up).to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _backward_kernel(
    gate_ptr, up_ptr, d_h_ptr, gate_stride, up_stride, d_h_stride,
    I: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // TILES).to(tl.int64)
    column = (tl.program_id(0) % TILES) * TILE + tl.arange(0, TILE)
    live = column < I
    gate_ptr += row * gate_stride
    up_ptr += row * up_stride
    d_h_ptr += row * d_h_stride
    gate = tl.load(gate_ptr + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + column, mask=live, other=0.0).to(tl.float32)
    d_h = tl.load(d_h_ptr + column, mask=live, other=0.0).to(tl.float32)
    act, slope = _activation(gate, ACTIVATION)
    dtype = gate_ptr.dtype.element_ty
    tl.store(d_h_ptr + column, (act * up).to(dtype), mask=live)
    tl.store(gate_ptr + column, (d_h * up * slope).to(dtype), mask=live)
    tl.store(up_ptr + column, (d_h * act).to(dtype), mask=live)


@cost_of(_forward_kernel)
def _forward_cost(gate: torch.Tensor, *_: Any, **__: Any) -> Cost:
    return Cost(bytes=3 * gate.nbytes)


@cost_of(_backward_kernel)
def _backward_cost(gate: torch.Tensor, *_: Any, **__: Any) -> Cost:
    return Cost(bytes=6 * gate.nbytes)


def _launch(kernel: Any, activation: str, gate: torch.Tensor, up: torch.Tensor, third: torch.Tensor) -> None:
    n_rows, width = gate.shape
    if not gate.numel():
        return
    tile = min(1024, next_power_of_2(width))
    tiles = cdiv(width, tile)
    launch(
        kernel, (n_rows * tiles,),
        gate, up, third, gate.stride(0), up.stride(0), third.stride(0),
        I=width, TILES=tiles, TILE=tile, ACTIVATION=activation, num_warps=4,
    )  # fmt: skip
