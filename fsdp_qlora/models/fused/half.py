"""The seam between a fused block and its halves: the residual stream, what a pass carries, what a half must do.

T tokens (B*S), H hidden, R the columns of adapters that read an input (`kernels/lora_wide.py`).
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol, TypedDict, TypeVar

from torch import Tensor

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.kernels.device import empty_like
from fsdp_qlora.kernels.lora import Gradients
from fsdp_qlora.kernels.segments import Segments
from fsdp_qlora.models.fused.projection import normed_wide
from fsdp_qlora.models.fused.spec import Norm

Tables = tuple[Tensor, Tensor]  # float32 cos and sin [S, D/2], a line for each token of a row


class DropoutSite(IntEnum):
    """The inputs of a block's adapters that dropout is drawn for, each with a seed of its own: the pass's plus this."""

    QKV = 0
    O = 1
    GATE_UP = 2
    DOWN = 3


class Draw(TypedDict):
    """Arguments of kernels that drop numbers."""

    p: float
    seed: int


class Dropout(NamedTuple):
    """Dropout of the adapters' inputs in one pass of a block. Backward draws what forward drew."""

    p: float  # 0: none
    seed: int  # of this pass

    def at(self, site: DropoutSite) -> Draw:
        return {"p": self.p, "seed": self.seed + site}


@dataclass(frozen=True)
class PassContext:
    """What forward and backward of one pass share besides activations."""

    shape: tuple[int, int]  # B, S
    rotary: Tables
    dropout: Dropout
    segments: Segments | None  # of the documents that one row (B = 1) consists of; None: a row is a document


@dataclass
class ResidualStream:
    """The hidden states between two halves, and what the half before has not added to them yet.

    The norm that reads them adds it in the same kernel."""

    hidden: Tensor  # [T, H] or [B, S, H]
    addend: Tensor | None = None  # [T, H]

    @property
    def rows(self) -> Tensor:
        """[T, H]."""
        return self.hidden.reshape(-1, self.hidden.shape[-1])

    def normed(self, norm: Norm, padding: int) -> Tensor:
        """Return [T, H + padding], the sum normalised with free columns after it; hidden becomes the sum."""
        if self.addend is None:
            return normed_wide(self.rows, norm, padding)
        total = empty_like(self.rows)
        n_wide = normed_wide(self.addend, norm, padding, residual=self.rows, sum_out=total)
        self.hidden, self.addend = total, None
        return n_wide


Saved = TypeVar("Saved")


class Half(Protocol[Saved]):
    """One half of a decoder block, x + f(norm(x)): attention, or an MLP."""

    @property
    def padding(self) -> int:
        """Free columns that backward can use after the gradient of its output."""

    def forward(self, x: ResidualStream, context: PassContext) -> tuple[ResidualStream, Saved]:
        """Return (the stream after this half, everything that backward can use); x then holds no addend."""

    def backward(
        self, d_y: Tensor, x_TH: Tensor, saved: Saved, context: PassContext, padding: int | None
    ) -> tuple[Tensor | None, Gradients]:
        """Return (d_x [T, H + padding] with its last columns free, the adapters' gradients).

        d_y: [T, H], or [T, H + self.padding] whose last columns may be written to. saved: is used up. padding: None
        where d_x is not wanted."""

    def keep(self, saved: Saved, level: Keep) -> Saved | None:
        """Release what `level` does not save, in place; None if that is all. The one statement of what it saves."""
