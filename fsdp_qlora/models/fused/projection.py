"""Frozen weights as operators: linears that share an input as one projection, and norms."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fsdp_qlora.kernels.device import empty
from fsdp_qlora.kernels.dora import column_dots, exact_dtype, finish_gradients, norm_products, row_factors
from fsdp_qlora.kernels.lora import Adapter, Gradients, Projection
from fsdp_qlora.kernels.lora_wide import lay, room_for, wide
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
        self.adapted = [linear for linear in linears if linear.lora_A is not None]
        self.has_magnitudes = any(linear.lora_magnitude_vector is not None for linear in linears)
        self._bare: Projection | None = None  # without biases, made when it is first used: adapters get values late
        self._factor: Tensor | None = None  # of each output, where there are magnitudes
        self._versions: list[int] | None = None  # of the adapters that the factor is of

    def projection(self) -> Projection:
        """Return them as the kernels take them, biases decoded, for the adapters' values as they are now."""
        self._refresh()
        biases = [linear.bias.decode(self.scratch.dtype) for linear in self.linears if linear.bias is not None]
        if not biases:
            return self.bare()
        assert len(biases) == len(self.linears), "linears of one input have biases all or none"
        return self.bare()._replace(bias=biases[0] if len(biases) == 1 else torch.cat(biases))

    def bare(self) -> Projection:
        """Return the projection without biases, as it was when `projection` was called last."""
        if self._bare is None:
            assert self._factor is not None or not self.has_magnitudes, "`projection` comes first"
            self._bare = self._make()
        return self._bare

    @property
    def padding(self) -> int:
        """R, the columns that the adapters need after the input."""
        return room_for([linear.lora_A.shape[0] for linear in self.adapted if linear.lora_A is not None])

    def lay(self, projection: Projection) -> Tensor:
        """Return [O + R, H + R] in scratch: the weights and the adapters' matrices (`lora_wide.lay`)."""
        return lay(projection, self.out_features, self.in_features, self.scratch.room)

    def gradients(self, d_as: Sequence[Tensor], d_bs: Sequence[Tensor], dots: Tensor | None) -> Gradients:
        """Return the gradients of each adapter. dots: `column_dots` of their outputs, None without magnitudes."""
        pairs = list(zip(d_as, d_bs, strict=True))
        if dots is None:
            return list[tuple[Tensor, ...]](pairs)
        factor = self.bare().factor
        assert factor is not None
        found: Gradients = []
        for (d_a, d_b), adapter, linear in zip(pairs, self.bare().adapters, self.adapted, strict=True):
            magnitude, rows = linear.lora_magnitude_vector, adapter.rows
            assert magnitude is not None
            found.append((d_a, d_b, finish_gradients(dots[:, rows], factor[rows], magnitude.detach(), d_b)))
        return found

    def dots(self, d_y: Tensor, y: Tensor | None) -> Tensor | None:
        """Return what `gradients` needs of the outputs y [T, O] and their gradient, None without magnitudes."""
        if not self.has_magnitudes:
            return None
        assert y is not None
        return column_dots(d_y, y, self.projection().bias)

    def room_for_dots(self, like: Tensor) -> Tensor | None:
        """Return where a kernel that has both writes `dots` to, [1, O], None without magnitudes."""
        return empty((1, self.out_features), like, exact_dtype(like.dtype)) if self.has_magnitudes else None

    def _make(self) -> Projection:
        adapters, weights, start = [], [linear.weight for linear in self.linears], 0
        for linear in self.linears:
            a, b = linear.lora_A, linear.lora_B
            if a is not None and b is not None:
                adapters.append(Adapter(a.detach(), b.detach(), linear.scale, start))
            start += linear.out_features
        rows, columns, scratch = self.out_features, self.in_features, self.scratch  # not self, which holds the function
        factor = self._factor

        def weight(out: Tensor | None = None) -> Tensor:
            out = scratch.room(rows, columns) if out is None else out
            decode_rows(weights, out, factor)
            return out

        return Projection(weight, None, tuple(adapters), factor)

    def _refresh(self) -> None:
        """Compute the factors that the magnitudes come to, where adapters have changed: once a step.

        Uses the scratch."""
        if not self.has_magnitudes:
            return
        versions = [linear.version for linear in self.adapted]
        if versions == self._versions:
            return
        if self._factor is None:
            exact, device = exact_dtype(self.scratch.dtype), self.scratch.buffer.device
            self._factor = torch.ones(self.out_features, dtype=exact, device=device)  # 1: of linears without an adapter
        bare, weights = self.bare(), [linear.weight for linear in self.linears]

        def unscaled(out: Tensor) -> Tensor:
            decode_rows(weights, out)
            return out

        laid, scale = self.lay(Projection(unscaled, None, bare.adapters)), self.adapted[0].scale
        products = norm_products(laid, self.out_features, self.in_features, scale)
        for adapter, linear in zip(bare.adapters, self.adapted, strict=True):
            norms, magnitude, rows = linear.norms, linear.lora_magnitude_vector, adapter.rows
            if linear.is_base:
                self._factor[rows] = 1
                continue
            assert norms is not None
            assert magnitude is not None
            row_factors(
                norms.decode(self._factor.dtype), magnitude.detach(), products[rows], laid[rows, self.in_features :],
                scale, self._factor[rows],
            )  # fmt: skip
        self._versions = versions


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
