"""The gated MLP with LoRA as one autograd function: y = down(act(gate(x)) * up(x)), each a frozen linear with adapters.

Autograd's own version keeps x, gate, up, act(gate) and h, and walks backward through five ops. Here backward has one
plan: gate and up are kept or recomputed (from x, at the price of their two products; down's is never redone), h comes
out of the same pass that gives d_gate and d_up, and those take the places of gate and up, so that beyond what was kept
backward needs memory for d_h and d_x alone.

T tokens, H hidden, I intermediate.
"""

from collections.abc import Sequence
from typing import Any

import torch

from fsdp_qlora.kernels.glu import glu_backward_, glu_forward
from fsdp_qlora.kernels.lora import (
    Projection,
    check,
    gradient_of_input,
    gradients_of_a,
    gradients_of_b,
    project,
    project_backward,
    put_together,
    take_apart,
)


def lora_mlp(
    x: torch.Tensor,
    inner: Sequence[Projection],
    down: Projection,
    activation: str,
    *,
    keep: bool = True,
    p: float = 0.0,
    seed: int = 0,
) -> torch.Tensor:
    """y [..., H] from x [..., H]. Differentiable, once, in x and the adapters' matrices.

    inner: (gate, up), each with weight [I, H], or one projection of both, gate's rows first ([2I, H]). activation: as
    `glu`'s. keep: save gate and up for backward (2 I numbers a token) rather than compute them again. p, seed: dropout
    of the adapters' inputs, replayed. Raises ValueError as `lora_projections` and `glu` do.
    """
    check(x, inner)
    for adapter in down.adapters:
        check(x, [down], features=adapter.a.shape[1])
    bare, matrices = take_apart([*inner, down])
    with torch.autocast(x.device.type, enabled=False):
        y: torch.Tensor = _MLP.apply(x, bare, activation, keep, p, seed, *matrices)
    return y


def _gate_up(outs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = outs if len(outs) == 2 else outs[0].chunk(2, dim=1)
    return gate, up


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bare: list[Projection],
        activation: str,
        keep: bool,
        p: float,
        seed: int,
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        *inner, down = put_together(bare, matrices)
        rows = x.reshape(-1, x.shape[-1])
        outs, xa = project(rows, inner, p=p, seed=seed)
        h = glu_forward(*_gate_up(outs), activation)
        (y,), ha = project(h, [down], p=p, seed=seed + 1)
        kept = outs if keep else []
        ctx.save_for_backward(x, xa, ha, *kept, *matrices)
        ctx.n_kept, ctx.spent = len(kept), False
        ctx.bare, ctx.activation, ctx.dropout = bare, activation, (p, seed)
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("lora_mlp's gate and up were overwritten by their gradients: it runs backward once")
        ctx.spent = True
        x, xa, ha, *rest = ctx.saved_tensors
        outs, matrices = rest[: ctx.n_kept], rest[ctx.n_kept :]
        *inner, down = put_together(ctx.bare, matrices)
        rows, d_y = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
        p, seed = ctx.dropout
        with torch.autocast(x.device.type, enabled=False):
            if not outs:
                outs, _ = project(rows, inner, p=p, seed=seed)
            d_ha, d_bs = gradients_of_b([d_y], ha, [down])
            h = gradient_of_input([d_y], d_ha, [down], p=p, seed=seed + 1)  # d_h, until the next line
            glu_backward_(h, *_gate_up(outs), ctx.activation)
            d_as = gradients_of_a(d_ha, h, [down], p=p, seed=seed + 1)
            del h
            d_x, gradients = project_backward(outs, rows, xa, inner, p=p, seed=seed, want_x=ctx.needs_input_grad[0])
        gradients += zip(d_as, d_bs, strict=True)
        d_matrices = [d for pair in gradients for d in pair]
        return None if d_x is None else d_x.view(x.shape), None, None, None, None, None, *d_matrices
