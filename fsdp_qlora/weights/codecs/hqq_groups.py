"""Scales, zeros and codes of HQQ's groups: hqq's own `Quantizer.quantize`, in pieces of a weight.

hqq computes all groups of a weight at once, in 23 bytes a number on a GPU. Along axis 1 a group is a run of numbers.
Groups know nothing of each other but for the optimizer's end: where the mean error of the whole weight shrinks no more.
So pieces take turns in each step and write their errors to one tensor, whose mean is hqq's, to the last bit. Along axis
0 a group is spread over all of the weight, which stays one piece.

    scale, zero = (2^bits - 1) / (max - min), -min scale                of each group; of 4 bits zero is rounded
    zero = hqq's step, up to 20 times                                   where it is asked for
    code = clamp(round(w scale + zero), 0, 2^bits - 1)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fsdp_qlora.weights.codecs.pieces import spans
from fsdp_qlora.weights.codecs.quantizers import hqq_step

# Numbers at a time. A step on so many is some twenty launches, of 15 us or more each by the rate of an H100's memory.
MOST = 8 << 20
# Of hqq's optimizer, by its defaults.
STEPS, BETA, NORM = 20, 10.0, 0.7
WHOLE_ZEROS = 4  # bits of the codes whose first zeros are whole numbers
FLATTEST, LARGEST_SCALE = 1e-4, 2e4  # range of a group below which its scale is 1; most that a scale may be

Floats = tuple[Tensor, Tensor]


class Groups:
    """A weight's groups. axis 1: [groups, numbers of one]; axis 0: [numbers of one, groups], always one piece."""

    def __init__(self, weight: Tensor, bits: int, group: int, axis: int) -> None:
        """weight: on the device that encodes; not copied where its groups are runs of numbers."""
        self.weight = weight.reshape((-1, group) if axis == 1 else (group, -1))
        self.bits, self.axis, self.largest = bits, axis, 2**bits - 1
        lines = self.weight.shape[0]
        self.pieces: Sequence[slice] = [slice(0, lines)]
        if axis == 1:
            self.pieces = [slice(*span) for span in spans(lines, MOST // group)]

    def floats(self, optimize: bool) -> Floats:
        """Return scale and zero, [groups, 1] or [1, groups]: what codes are made with, before the scale is inverted."""
        shape = list(self.weight.shape)
        shape[self.axis] = 1
        exact = optimizer_dtype(self.weight.device) if optimize else torch.float32
        scale, zero = (self.weight.new_empty(shape, dtype=exact) for _ in range(2))
        for piece in self.pieces:
            self._guess(piece, scale, zero)
        if optimize:
            self._optimize(scale, zero)
        return scale, zero

    def codes(self, piece: slice, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the codes of a piece, as whole float32 numbers."""
        numbers = self.weight[piece].float()
        return (numbers * self._of(piece, scale) + self._of(piece, zero)).round_().clamp_(0, self.largest)

    def _of(self, piece: slice, floats: Tensor) -> Tensor:
        return floats[piece] if self.axis == 1 else floats

    def _guess(self, piece: slice, scale: Tensor, zero: Tensor) -> None:
        """Write the scales and zeros that map each group's least and greatest number to the ends of the codes."""
        numbers = self.weight[piece].float()
        least, most = numbers.min(self.axis, keepdim=True).values, numbers.max(self.axis, keepdim=True).values
        width = most - least
        found = torch.where(width.abs() <= FLATTEST, torch.ones_like(width), self.largest / width)
        found = found.clamp(max=LARGEST_SCALE)
        self._of(piece, scale).copy_(found)
        middle = -least * found
        self._of(piece, zero).copy_(middle.round_() if self.bits == WHOLE_ZEROS else middle)

    def _optimize(self, scale: Tensor, zero: Tensor) -> None:
        """Fit the zeros to the weight, in place."""
        error = torch.empty(self.weight.shape, dtype=scale.dtype, device=scale.device)
        best = float("inf")
        for _ in range(STEPS):
            for piece in self.pieces:
                self._step(piece, scale, zero, error[piece])
            mean = float(error.mean())
            if not mean < best:
                return
            best = mean

    def _step(self, piece: slice, scale: Tensor, zero: Tensor, error: Tensor) -> None:
        numbers, own = self.weight[piece].to(scale.dtype), self._of(piece, zero)
        near, _, found, _ = hqq_step()(numbers, self._of(piece, scale), own, [0, self.largest], BETA, NORM, self.axis)
        own.copy_(found)
        torch.sub(numbers, near, out=error).abs_()


def largest_piece(numel: int, axis: int) -> int:
    """Return the most numbers of a weight of `numel` that are worked on at a time."""
    return min(numel, MOST) if axis == 1 else numel


def optimizer_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that hqq's optimizer computes in."""
    return torch.float16 if device.type == "cuda" else torch.float32
