"""Frozen weights as operators: linears that share an input as one projection, and norms."""

import torch
from torch import Tensor

from fsdp_qlora.kernels.lora import Adapter, Projection
from fsdp_qlora.kernels.lora_wide import extra, lay, wide
from fsdp_qlora.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from fsdp_qlora.models.fused.scratch import WeightScratch
from fsdp_qlora.models.fused.spec import Norm
from fsdp_qlora.models.generic_block import FrozenLinear
from fsdp_qlora.weights.frozen_bytes import decode_rows


class Linears:
    """Linears of one input, multiplied as one: their rows one below the other."""

    def __init__(self, linears: tuple[FrozenLinear, ...], scratch: WeightScratch) -> None:
        self.linears, self.scratch = linears, scratch
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        self._bare: Projection | None = None  # without biases, made when it is first used: adapters get values late

    def projection(self) -> Projection:
        """Return them as the kernels take them, biases decoded."""
        biases = [linear.bias.decode(self.scratch.dtype) for linear in self.linears if linear.bias is not None]
        if not biases:
            return self.bare()
        assert len(biases) == len(self.linears), "linears of one input have biases all or none"
        return self.bare()._replace(bias=biases[0] if len(biases) == 1 else torch.cat(biases))

    def bare(self) -> Projection:
        """Return the projection without biases."""
        if self._bare is None:
            self._bare = self._make()
        return self._bare

    @property
    def padding(self) -> int:
        """R, the columns that the adapters need after the input."""
        return extra(self.bare())

    def lay(self, projection: Projection) -> Tensor:
        """Return [O + R, H + R] in scratch: the weights and the adapters' matrices (`lora_wide.lay`)."""
        return lay(projection, self.out_features, self.in_features, self.scratch.room)

    def _make(self) -> Projection:
        adapters, weights, start = [], [linear.weight for linear in self.linears], 0
        for linear in self.linears:
            a, b = linear.lora_A, linear.lora_B
            if a is not None and b is not None:
                adapters.append(Adapter(a.detach(), b.detach(), linear.scale, start))
            start += linear.out_features
        rows, columns, scratch = self.out_features, self.in_features, self.scratch  # not self, which holds the function

        def weight(out: Tensor | None = None) -> Tensor:
            out = scratch.room(rows, columns) if out is None else out
            decode_rows(weights, out)
            return out

        return Projection(weight, None, tuple(adapters))


def norm_forward(x: Tensor, norm: Norm, **options: Tensor | None) -> Tensor:
    """Return x normalised; options as of `rms_norm_forward`."""
    return rms_norm_forward(x, norm.weight.decode(x.dtype), norm.eps, norm.shift, **options)


def norm_backward(d_y: Tensor, x: Tensor | None, norm: Norm, **options: Tensor | None) -> Tensor:
    """Return the gradient of a norm's input x; options as of `rms_norm_backward`."""
    assert x is not None
    return rms_norm_backward(d_y, x, norm.weight.decode(x.dtype), norm.eps, norm.shift, **options)


def normed_wide(x: Tensor, norm: Norm, padding: int, **options: Tensor | None) -> Tensor:
    """Return [T, H + padding]: x [T, H] normalised, and free columns for the adapters of the linears that read it."""
    rows, features = x.shape
    normed = wide(rows, features + padding, x)
    norm_forward(x, norm, out=normed[:, :features], **options)
    return normed
