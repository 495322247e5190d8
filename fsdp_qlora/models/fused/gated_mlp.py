"""The gated MLP half of a fused block: h + down(activation(gate(n)) * up(n)), n = norm(h).

T tokens (B*S), H hidden, I intermediate, R the columns of adapters that read an input.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.kernels.device import empty, empty_like
from fsdp_qlora.kernels.glu import glu_backward_, glu_forward
from fsdp_qlora.kernels.glu_lora import glu_backward_dots_
from fsdp_qlora.kernels.lora import Gradients, Projection
from fsdp_qlora.kernels.lora_wide import (
    adapt_,
    add_adapters_,
    fits_glu,
    glu_backward_wide_,
    gradient_of_input_beside,
    gradient_of_input_wide,
    gradient_of_xa_wide,
    gradients_of_a_wide,
    gradients_of_b_wide,
    pays_beside,
    products_of_b,
    project_wide,
    wide,
)
from fsdp_qlora.models.fused.copies import as_saved, own
from fsdp_qlora.models.fused.half import DropoutSite, PassContext, ResidualStream
from fsdp_qlora.models.fused.projection import Linears, norm_backward, norm_forward, normed_wide
from fsdp_qlora.models.fused.scratch import WeightScratch
from fsdp_qlora.models.fused.spec import GatedMlpSpec


@dataclass
class GatedMlpSaved:
    """What the MLP half holds between its passes. None: to be recomputed."""

    OFFLOADED: ClassVar = ("gate_up", "projected")  # at least H numbers per token each

    gate_up: Tensor | None = None  # [T, 2 I + R]: gate, up, and in backward the gradient of x A^T
    xs: Tensor | None = None  # see kernels/lora_wide.py
    hs: Tensor | None = None  # xs of down
    projected: Tensor | None = None  # down's output, where a norm follows it or its adapter has a magnitude


class GatedMlpHalf:
    """The passes of a gated MLP half (`half.Half`)."""

    def __init__(self, spec: GatedMlpSpec, scratch: WeightScratch) -> None:
        self.spec = spec
        self.gate_up, self.down = Linears(spec.gate_up, scratch), Linears((spec.down,), scratch)

    @property
    def padding(self) -> int:
        """Columns for down's adapter."""
        return self.down.padding

    def forward(self, x: ResidualStream, context: PassContext) -> tuple[ResidualStream, GatedMlpSaved]:
        """Return (the stream after this half, everything that backward can use)."""
        spec, saved, gate_up = self.spec, GatedMlpSaved(), self.gate_up.projection()
        n_wide = x.normed(spec.norm, self.gate_up.padding)
        y = empty(
            (*context.shape, x.hidden.shape[-1]), n_wide
        )  # no view: FSDP2 hangs its hook on it, and warns of views
        h_TH, y_TH = x.rows, y.view(-1, y.shape[-1])
        self._project_gate_up(saved, n_wide, gate_up, context)
        down, inner = self.down.projection(), self.down.in_features
        middle = wide(n_wide.shape[0], inner + self.down.padding, n_wide)
        glu_forward(*self._gate_and_up(saved), spec.activation, out=middle[:, :inner])
        laid = self.down.lay(down)
        saved.hs = own(adapt_(middle, down, laid, **context.dropout.at(DropoutSite.DOWN)))
        if spec.out_norm is not None or self.down.has_magnitudes:
            saved.projected = empty_like(h_TH)
            project_wide(middle, down, laid, saved.projected)
            if spec.out_norm is not None:
                norm_forward(saved.projected, spec.out_norm, out=y_TH).add_(h_TH)
            else:
                torch.add(saved.projected, h_TH, out=y_TH)
        elif down.bias is not None:
            project_wide(middle, down, laid, y_TH)
            y_TH.add_(h_TH)
        else:
            project_wide(middle, down, laid, y_TH, plus=h_TH)
        return ResidualStream(y), saved

    def keep(self, saved: GatedMlpSaved, level: Keep) -> GatedMlpSaved:
        """Release what `level` does not save, and what saved tensors are only views of."""
        saved.gate_up, saved.xs = (saved.gate_up, own(saved.xs)) if level >= Keep.ALL else (None, None)
        return saved

    def backward(
        self, d_y: Tensor, x_TH: Tensor, saved: GatedMlpSaved, context: PassContext, padding: int | None
    ) -> tuple[Tensor | None, Gradients]:
        """Return (d_x, gradients of gate's, up's and down's adapters) from d_y [T, H], or [T, H + R] with R free
        columns for down's adapter.

        down first: gate and up, if they are recomputed, are then decoded once for that and for their gradients."""
        spec, features, dropout, down = self.spec, x_TH.shape[1], context.dropout, self.down.bare()
        middle, d_ha, d_b, down_dots = self._through_down(d_y, saved, context)
        gate_up = self.gate_up.projection()
        n_wide = normed_wide(x_TH, spec.norm, self.gate_up.padding)
        laid = self._recompute(saved, n_wide, gate_up, context)
        assert saved.gate_up is not None
        assert saved.xs is not None
        d_gate_up = saved.gate_up[:, : self.gate_up.out_features]  # what gate and up become
        dots = self.gate_up.room_for_dots(middle)
        if not dropout.p and fits_glu(gate_up, down):
            d_bs, d_a = glu_backward_wide_(middle, d_gate_up, spec.activation, saved.xs, gate_up, d_ha, down, dots)
            del middle, d_ha
        else:  # middle: the inner activations again
            if dots is None:
                glu_backward_(middle, *self._gate_and_up(saved), spec.activation)
            else:
                glu_backward_dots_(middle, *self._gate_and_up(saved), spec.activation, dots, gate_up.bias)
            d_a = gradients_of_a_wide(d_ha, middle, down, **dropout.at(DropoutSite.DOWN))
            del middle, d_ha
            d_bs = products_of_b(d_gate_up, saved.xs, gate_up)
        d_n, d_as = self._through_gate_up(saved.gate_up, n_wide[:, :features], gate_up, laid, context)
        del n_wide, d_gate_up
        saved.gate_up = saved.xs = None
        gradients = [*self.gate_up.gradients(d_as, d_bs, dots), *self.down.gradients(d_a, d_b, down_dots)]
        if padding is None:
            return None, gradients
        d_x = wide(x_TH.shape[0], features + padding, x_TH)
        norm_backward(d_n, x_TH, spec.norm, skip=d_y[:, :features], out=d_x[:, :features])
        return d_x, gradients

    # ---- pieces of backward

    def _through_down(
        self, d_y: Tensor, saved: GatedMlpSaved, context: PassContext
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
        """Return (the gradient of down's input [T, I], that of its x A^T [T, R], [d_b of down], `Linears.dots` of
        down)."""
        spec, down, columns = self.spec, self.down.bare(), self.down.out_features + self.down.padding
        features = self.down.out_features
        d_rows, is_padded = d_y[:, :features], spec.out_norm is None and d_y.shape[1] == columns
        d_wide = d_y if is_padded else wide(d_y.shape[0], columns, d_y)
        if spec.out_norm is not None:
            norm_backward(d_rows, saved.projected, spec.out_norm, out=d_wide[:, :features])
        elif not is_padded:
            d_wide[:, :features] = d_rows
        dots = self.down.dots(d_wide[:, :features], saved.projected)
        saved.projected = None
        laid, d_ha = self.down.lay(down), d_wide[:, features:]
        assert saved.hs is not None
        d_b = gradients_of_b_wide(d_wide[:, :features], d_ha, saved.hs, down, laid)
        middle = gradient_of_input_wide(d_wide, down, laid, **context.dropout.at(DropoutSite.DOWN))
        return middle, as_saved(d_ha) if is_padded else own(d_ha), d_b, dots

    def _recompute(self, saved: GatedMlpSaved, n_wide: Tensor, gate_up: Projection, context: PassContext) -> Tensor:
        """Return the weights as `lay` has them; fills in what `saved` lacks."""
        if saved.gate_up is not None:
            return self.gate_up.lay(gate_up)
        laid = self._project_gate_up(saved, n_wide, gate_up, context)
        saved.xs = as_saved(saved.xs)
        return laid

    def _through_gate_up(
        self, d_wide: Tensor, n_TH: Tensor, gate_up: Projection, laid: Tensor, context: PassContext
    ) -> tuple[Tensor, list[Tensor]]:
        """Return (the gradient of the norm's output [T, H], [d_a of gate and up]), from d_wide [T, 2 I + R], whose last
        columns are free."""
        outputs, features, draw = self.gate_up.out_features, n_TH.shape[1], context.dropout.at(DropoutSite.GATE_UP)
        if pays_beside(gate_up, outputs, features) and not draw["p"]:
            d_n, d_xa = gradient_of_input_beside(d_wide[:, :outputs], gate_up, laid)
            d_as = gradients_of_a_wide(d_xa, n_TH, gate_up, **draw)
            add_adapters_(d_n, d_xa, laid)
        else:
            d_xa = d_wide[:, outputs:]
            gradient_of_xa_wide(d_wide[:, :outputs], d_xa, gate_up, laid)
            d_as = gradients_of_a_wide(d_xa, n_TH, gate_up, **draw)
            d_n = gradient_of_input_wide(d_wide, gate_up, laid, **draw)
        return d_n, d_as

    # ---- pieces of both passes

    def _project_gate_up(
        self, saved: GatedMlpSaved, n_wide: Tensor, gate_up: Projection, context: PassContext
    ) -> Tensor:
        """Fill in saved.gate_up and saved.xs; return the weights as `lay` has them."""
        laid = self.gate_up.lay(gate_up)
        saved.xs = adapt_(n_wide, gate_up, laid, **context.dropout.at(DropoutSite.GATE_UP))
        outputs = self.gate_up.out_features
        saved.gate_up = wide(n_wide.shape[0], outputs + self.gate_up.padding, n_wide)
        project_wide(n_wide, gate_up, laid, saved.gate_up[:, :outputs])
        return laid

    def _gate_and_up(self, saved: GatedMlpSaved) -> tuple[Tensor, Tensor]:
        """Return views of gate and up [T, I]."""
        assert saved.gate_up is not None
        inner = self.down.in_features
        return saved.gate_up[:, :inner], saved.gate_up[:, inner : 2 * inner]
