"""Protocols of codecs: a weight's form in storage, and the families by which options and checkpoints choose one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fsdp_qlora.config.options import ModelOptions
from fsdp_qlora.kernels.dora import RowsDecoder

Parts = dict[str, Tensor]
Stored = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Decoder = RowsDecoder
CodecOf = Callable[[str], "Codec"]


class Codec(Protocol):
    """A weight's form in storage, a small frozen value. Equal codecs compare equal and hash alike."""

    @property
    def name(self) -> str: ...

    @property
    def quantizes(self) -> bool:
        """Return whether numbers become codes, behind which NaN and infinity would look like any other number."""
        ...

    @property
    def encoder(self) -> str:
        """Return the package whose functions `encode` calls beside torch's, '' if none: its version decides bytes."""
        ...

    def parts(self, shape: tuple[int, ...]) -> Stored:
        """Return what is stored for a weight of `shape`: part name -> (dtype, shape), in storage order.

        It needs no weight, so a layout is computed before any is read."""
        ...

    def encode_scratch_bytes(self, shape: tuple[int, ...], itemsize: int, on_device: bool = False) -> int:
        """Return the most bytes that `encode` takes on the device of `out`, beside `out`.

        itemsize: bytes of a number of the weight. on_device: whether the whole weight is on that device, which is not
        counted. Parts that a checkpoint publishes take no more either, on their way to where they stay."""
        ...

    def encode(self, weight: Tensor, out: Parts | None = None) -> Parts:
        """Return the parts of a floating-point weight, contiguous.

        out: written and returned if given, on any device, which encodes; else they are made on the weight's device.
        Raises NotFinite where codes would hide that a number is NaN or infinite."""
        ...

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """Return the weight, of `shape` and `dtype`, on the parts' device.

        out: written and returned if given; contiguous, except that a matrix's row stride may exceed its width.
        """
        ...

    def rows_decoder(self, stored: Sequence[Mapping[str, Tensor]], rows: Sequence[int], width: int) -> Decoder:
        """Return a function that decodes several matrices of this codec into one, concatenated along the rows.

        stored: each matrix's parts. rows: each matrix's number of rows. The function writes to its argument
        [sum of rows, width], as `decode` to `out`, and multiplies the rows by `factor` where that is given: as
        `kernels.dora.scale_rows_` does, or to the same bits. It is valid while the parts stay at their addresses."""
        ...


class CheckpointCodec(Codec, Protocol):
    """A codec in which checkpoints are published: their parts are copied, not encoded again."""

    def from_checkpoint(self, weight: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Parts:
        """Return the parts of a quantized weight, bit for bit as the checkpoint has them.

        weight: its full name. tensors: the checkpoint's tensors of this weight by their names there, companions
        included. Raises UserError if one is missing, or if the weight was quantized in another way than this codec's.
        """
        ...


@runtime_checkable
class FewRowsCodec(Codec, Protocol):
    """A codec by whose codes a few rows can be multiplied as they are. A matrix of another is decoded for them."""

    def takes_few_rows(self, like: Tensor, in_features: int) -> bool:
        """Return whether `few_rows` runs on like's device, in its dtype, for matrices of that width."""
        ...

    def few_rows(
        self, x: Tensor, parts: Mapping[str, Tensor], out: Tensor, bias: Tensor | None, xa: Tensor | None,
        b: Tensor | None,
    ) -> None:  # fmt: skip
        """Write x W^T + bias + xa b^T to out: [M, O]. x: [M, I]. parts: of W [O, I]. xa, b: [M, R] and [O, R]."""
        ...


class CodecFamily(ABC):
    """The codecs of one kind. The defaults are for a kind in which no checkpoints are published."""

    @abstractmethod
    def named(self, name: str) -> Codec | None:
        """Return the codec of this family whose `name` this is, None if it has none. For plans, which are numbers."""

    @abstractmethod
    def from_options(self, options: ModelOptions, compute_dtype: torch.dtype) -> Codec:
        """Return the codec of linears that the checkpoint has unquantized."""

    def from_hf_config(self, quantization_config: Mapping[str, Any], compute_dtype: torch.dtype) -> CodecOf | None:
        """Return what a checkpoint's config.json declares as the codec of each quantized weight, by the weight's name.

        None if it is not of this family."""
        return None

    def described(self, weight: str, tensors: Mapping[str, Tensor], compute_dtype: torch.dtype) -> Codec | None:
        """Return the codec in which a run keeps a weight whose form a checkpoint's tensors alone tell.

        tensors: those of its `telling` that the checkpoint has. None if it is not of this family, or not told so."""
        return None

    def telling(self, weight: str) -> tuple[str, ...]:
        """Return the names of the tensors that tell a weight's form, of a few numbers each."""
        return ()

    def weight_of(self, name: str) -> str | None:
        """Return the weight whose codes a checkpoint has under another name, None if `name` is of no such kind."""
        return None

    def companions(self, weight: str) -> tuple[str, ...]:
        """Return the names of the tensors that a checkpoint may have for a quantized weight, itself excluded."""
        return ()

    def is_quantized(self, weight: str, names: Set[str]) -> bool:
        """Return whether a checkpoint with tensors of these names holds a weight in a codec of this family."""
        return False

    def stored_codec(self, weight: str, tensors: Mapping[str, Tensor]) -> CheckpointCodec | None:
        """Return the codec in which a checkpoint's tensors hold a weight, None if it is not of this family."""
        return None
