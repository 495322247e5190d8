"""A decoder layer over frozen bytes: each `nn.Linear` a frozen linear + LoRA, every other parameter a view.

This is the generic block, under checkpointing: it works for any layer of plain linears. It does not know ranks or
placements; the bytes come through `FrozenTensor`, whose buffer is gathered by whoever placed it before `Block.forward`
runs and again before its backward.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fsdp_qlora.kernels.dora import exact_dtype, whole_norms
from fsdp_qlora.weights.frozen_bytes import FrozenBytes, FrozenTensor

FusedForward = Callable[..., Tensor]  # (h, what the rotary embedding gives) -> h


class _FrozenMatmul(torch.autograd.Function):
    """x @ W^T + b with W decoded on the fly in forward and backward; nothing is saved, the bytes are there again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenTensor, bias: FrozenTensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.decode(x.dtype), None if bias is None else bias.decode(x.dtype))

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None, None]:
        return d_y @ ctx.weight.decode(d_y.dtype), None, None


class DeclaredAdapter(NamedTuple):
    """A linear's adapter before it has values."""

    shapes: Mapping[str, tuple[int, ...]]  # parameter -> its shape
    scale: float
    dropout: float
    norms: FrozenTensor | None = None  # |W| by rows [O], where there are magnitudes


class FrozenLinear(nn.Module):
    """y [..., O] = x [..., I] @ W^T + b + scale * dropout(x) @ A^T @ B^T, W and b frozen, A [R, I] and B [O, R] not.

    With a magnitude m [O] (`kernels/dora.py`) c = m / |W + scale B A| comes before both products; what is multiplied by
    c is, as in PEFT, of the dropped x: y = x W^T + b + (c - 1) * dropout(x) W^T + c * scale * dropout(x) A^T B^T.

    Everything is computed in `dtype`, to which x is cast. Without an adapter the layer is the base alone. An adapter's
    parameters are on the meta device until `ShardedAdapters` or `make_adapters` put others in their place.
    """

    def __init__(
        self,
        weight: FrozenTensor,
        bias: FrozenTensor | None,
        dtype: torch.dtype,
        adapter: DeclaredAdapter | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.dtype = weight, bias, dtype
        self.out_features, self.in_features = weight.shape
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.lora_magnitude_vector: nn.Parameter | None = None
        shapes, self.scale, self.dropout, self.norms = adapter or DeclaredAdapter({}, 0.0, 0.0)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))
        self.is_base = False  # True: its adapter is zeros, and magnitudes have no say: it computes as the base alone
        self.version = 0  # goes up with the adapter's values, which what is computed of them once a step depends on
        self._norms: Tensor | None = None  # of weight and adapter together, until these change

    def values_change(self) -> None:
        """Note that the adapter has new values, or will have by the next forward."""
        self.version += 1
        self._norms = None

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters by name, as they were declared: all that this layer has."""
        return {name: p for name, p in self._parameters.items() if p is not None}

    def forward(self, x: Tensor) -> Tensor:
        x_TI = x.to(self.dtype).flatten(0, -2)
        if self.lora_magnitude_vector is not None:
            return self._with_magnitude(x_TI).view(*x.shape[:-1], self.out_features)
        y_TO: Tensor = _FrozenMatmul.apply(x_TI, self.weight, self.bias)
        if self.lora_A is not None and self.lora_B is not None:
            dropped_TI = F.dropout(x_TI, self.dropout, self.training) if self.dropout else x_TI
            y_TO = y_TO.addmm_(dropped_TI @ self.lora_A.T, self.lora_B.T, alpha=self.scale)
        return y_TO.view(*x.shape[:-1], self.out_features)

    def _with_magnitude(self, x_TI: Tensor) -> Tensor:
        """Return y [T, O]. Sums are float32 and rounded once; float64 stays."""
        a, b = self.lora_A, self.lora_B
        assert a is not None
        assert b is not None
        drops = self.dropout > 0 and self.training
        dropped_TI = F.dropout(x_TI, self.dropout) if drops else x_TI
        base_TO: Tensor = _FrozenMatmul.apply(dropped_TI, self.weight, None)
        factor = self.factor()
        assert factor is not None
        scaled_TO = base_TO.addmm(dropped_TI @ a.T, b.T, alpha=self.scale) * factor
        if drops:
            scaled_TO = scaled_TO + (_FrozenMatmul.apply(x_TI, self.weight, None) - base_TO)
        if self.bias is not None:
            scaled_TO = scaled_TO + self.bias.decode(self.dtype)
        return scaled_TO.to(self.dtype)

    def factor(self) -> Tensor | None:
        """Return m / |W + scale B A| by rows [O], differentiable in m; None without a magnitude. Reads the weight where
        the adapter has changed."""
        a, b, magnitude = self.lora_A, self.lora_B, self.lora_magnitude_vector
        if a is None or b is None or magnitude is None:
            return None
        if self.is_base:
            return torch.ones(self.out_features, dtype=exact_dtype(self.dtype), device=b.device)
        norms = self._whole_norms(a, b)
        return torch.where(norms == 0, 0, magnitude / norms.masked_fill(norms == 0, 1))

    @torch.no_grad()
    def _whole_norms(self, a: Tensor, b: Tensor) -> Tensor:
        """Return |W + scale B A| by rows [O], a constant of the gradient, computed once for each of its values."""
        if self._norms is None:
            assert self.norms is not None
            products = torch.addmm(self.weight.decode(self.dtype) @ a.T, b, a @ a.T, alpha=self.scale / 2)
            self._norms = whole_norms(self.norms.decode(exact_dtype(self.dtype)), products, b, self.scale)
        return self._norms


class FrozenViews:
    """Parameters of no linear (norm weights, ...) and buffers: taken off their modules, bound as views before each
    forward."""

    def __init__(self, bindings: list[tuple[nn.Module, str, FrozenTensor]]) -> None:
        self.bindings = bindings
        for module, attribute, _ in bindings:
            del (module._parameters if attribute in module._parameters else module._buffers)[attribute]

    def bind(self) -> None:
        for module, attribute, tensor in self.bindings:
            # Stored plain, so its one part is the tensor itself. Past Module.__setattr__, which wants a parameter.
            values = tensor.home.parts(tensor.name)["values"]
            # Where another unit's bytes come to lie in the same place, autograd must keep a copy for its backward.
            module.__dict__[attribute] = values if tensor.home.acquire is None else values.clone()


@dataclass(frozen=True)
class FrozenLayer:
    """A decoder layer that reads all its tensors but the adapters' from frozen bytes; what a block is made of."""

    layer: nn.Module
    frozen: FrozenBytes
    views: FrozenViews


class Block(nn.Module):
    """One decoder layer, its frozen bytes, and its checkpointing. Replaces the layer in the Hugging Face model's list.

    fused: computes the block in place of the layer and does its own recomputation (`models/fused/block.py`); None: the
    block is generic. Only `CausalModel.keep` and `CausalModel.computing_by` set another one.
    remat: None keeps every activation, "reentrant" and "non_reentrant" keep the layer's input and recompute the rest.
    before_forward: called first in every forward, by whoever has something to wait for or to start then.
    """

    def __init__(self, of: FrozenLayer, remat: str | None, fused: FusedForward | None) -> None:
        super().__init__()
        self.layer, self.frozen, self.views, self.fused = of.layer, of.frozen, of.views, fused
        self.before_forward: list[Callable[[], None]] = []
        self.remat: Callable[..., Any] | None = None
        if remat is not None:
            self.remat = partial(checkpoint, use_reentrant=remat == "reentrant", preserve_rng_state=_drops(of.layer))

    def linears(self) -> dict[str, FrozenLinear]:
        """Path inside the layer -> linear."""
        return {name: m for name, m in self.layer.named_modules() if isinstance(m, FrozenLinear)}

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.frozen.acquire is not None:
            self.frozen.acquire(False)  # first: copies that it starts need not wait for what follows
        for call in self.before_forward:
            call()
        out = self._compute(hidden, *args, **kwargs)
        if self.frozen.acquire is not None and torch.is_grad_enabled():
            (out[0] if isinstance(out, tuple) else out).register_hook(self._before_backward)
        return out

    def _before_backward(self, _: Tensor) -> None:
        """When the gradient of this block's output is there, so that its backward is next."""
        assert self.frozen.acquire is not None
        self.frozen.acquire(True)
        if self.fused is None:
            self.views.bind()  # what is recomputed reads the bytes where they are now

    def _compute(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.fused is not None:
            return self.fused(hidden, *kwargs["position_embeddings"])
        self.views.bind()
        if self.remat is None or not torch.is_grad_enabled():
            return self.layer(hidden, *args, **kwargs)
        return self.remat(lambda h: self.layer(h, *args, **kwargs), hidden)

    def __getattr__(self, name: str) -> Any:
        """What Hugging Face's model reads off its layers (`attention_type`, ...) is the inner layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":
                raise
            return getattr(super().__getattr__("layer"), name)


def _drops(layer: nn.Module) -> bool:
    """Whether the layer draws random numbers, adapters' dropout and the base model's own together."""
    return any(
        (isinstance(m, FrozenLinear) and m.dropout > 0)
        or (isinstance(m, nn.Dropout) and m.p > 0)
        or _positive(getattr(m, "attention_dropout", 0.0))
        for m in layer.modules()
    )


def _positive(probability: Any) -> bool:
    """Of a number; Bloom and Persimmon have a module by that name, which is looked at as one."""
    return isinstance(probability, int | float) and probability > 0
