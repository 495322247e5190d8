"""The frozen bytes of a block: one flat buffer for every frozen tensor.

A frozen tensor has no gradient and no optimizer state, so it is bytes at a known offset instead of a parameter with
metadata. One buffer per block means one copy, one all-gather, one pinned range, one file record.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fsdp_qlora.kernels.dora import scale_rows_
from fsdp_qlora.weights.codecs import Decoder
from fsdp_qlora.weights.layout import Entry, Layout

MAX_LOCATIONS = 8  # of one unit, for which views and decoders are remembered


@dataclass(frozen=True)
class Location:
    """A tensor that a unit's bytes are in, and what is derived from its address once."""

    flat: Tensor
    views: dict[str, dict[str, Tensor]]  # entry -> stored part -> a view into `flat`
    decoders: dict[tuple[str, ...], Decoder] = field(default_factory=dict)  # by the entries that are decoded together


class FrozenBytes(nn.Module):
    """The buffer of one block, as ONE flat parameter that FSDP2 can shard: float32 words only wrap the bytes.

    FSDP2 of torch 2.11 refuses uint8 parameters, and on a GPU its gather rewrites every bfloat16 NaN to 0x7fff, which
    are codes and scales here. float32 words pass through unchanged. So that no version, backend or driver can change
    weights silently, the bytes are compared with what was encoded the first time they are read.

    `flat` starts on the meta device; the placement replaces it by the bytes (whole, or this rank's shard).
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        words = torch.empty(layout.nbytes // 4, dtype=torch.float32, device="meta")
        self.flat = nn.Parameter(words, requires_grad=False)
        self.expected: int | None = None  # checksum of the whole buffer as it was encoded, until it has been compared
        self.origin = ""  # folder of the base cache that the bytes were read from, '' if they were encoded in this run
        # Set by a placement that streams: called before each use, with whether a backward reads the bytes. They stay
        # readable until the next unit is acquired.
        self.acquire: Callable[[bool], None] | None = None
        self._locations: list[Location] = []

    def release(self) -> None:
        """Drop the bytes: the placement has them elsewhere."""
        self._parameters["flat"] = nn.Parameter(torch.empty_like(self.flat, device="meta"), requires_grad=False)
        self._locations = []

    def parts(self, name: str) -> dict[str, Tensor]:
        """Return the stored parts of `name`, as views. Valid while the block is gathered. Raises as `location`."""
        return self.location().views[name]

    def location(self) -> Location:
        """Return the location of the bytes. Valid while the block is gathered.

        Raises RuntimeError if the bytes are not those that were encoded.
        """
        flat = self.flat
        for location in self._locations:  # FSDP2 gathers into the same tensor, streaming into one of a few
            if location.flat is flat:
                return location
        assert not isinstance(flat, DTensor), "frozen bytes are read while they are not gathered"
        buffer = flat.detach().view(torch.uint8)
        if self.expected is not None and checksum(buffer) != self.expected:
            raise RuntimeError(
                "frozen bytes were changed on their way (gather, copy or memory): the weights would be wrong. "
                "Please report this with your versions of torch, NCCL and the driver"
                + (f". They came from the base cache, {self.origin}: try --base_cache null" if self.origin else "")
            )
        self.expected = None
        self._locations = [*self._locations[1 - MAX_LOCATIONS :], Location(flat, self.layout.views(buffer))]
        return self._locations[-1]

    @contextmanager
    def on_meta(self) -> Iterator[None]:
        """Put the bytes on the meta device inside; nothing moves them there."""
        before = self.flat, self.acquire, self.expected, self._locations
        self.flat = nn.Parameter(torch.empty(before[0].shape, dtype=before[0].dtype, device="meta"), False)
        self.acquire, self.expected, self._locations = None, None, []
        try:
            yield
        finally:
            self.flat, self.acquire, self.expected, self._locations = before

    def decode(self, name: str, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the tensor `name` in `dtype`, decoded on the device of the bytes, into `out` if that is given."""
        entry = self.layout.entries[name]
        return entry.codec.decode(self.parts(name), entry.shape, dtype, out)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the bytes readable inside: gathered and freed if this module is sharded on its own (embedding, head)."""
        if self.acquire is not None:
            self.acquire(False)
        if not isinstance(self, FSDPModule):
            yield
            return
        self.unshard()
        try:
            yield
        finally:
            self.reshard()


@dataclass(frozen=True)
class FrozenTensor:
    """A handle on one entry of a block, which a layer has in place of a parameter."""

    home: FrozenBytes
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.home.layout.entries[self.name].shape

    def decode(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return self.home.decode(self.name, dtype, out)


def decode_rows(tensors: Sequence[FrozenTensor], out: Tensor, factor: Tensor | None = None) -> None:
    """Decode matrices of one width and one unit into `out`, concatenated along the rows, times `factor` by rows.

    Those of one codec take one launch, if the codec can do that. factor: float32 [rows] (float64 for float64) or None;
    numbers are rounded to out's dtype before and after they are multiplied by it."""
    home, names = tensors[0].home, tuple(t.name for t in tensors)
    location = home.location()
    if names not in location.decoders:
        location.decoders[names] = _rows_decoder([home.layout.entries[name] for name in names], location, names)
    location.decoders[names](out, factor)


def _rows_decoder(entries: Sequence[Entry], location: Location, names: Sequence[str]) -> Decoder:
    rows, (width,) = [entry.shape[0] for entry in entries], {entry.shape[1] for entry in entries}
    stored = [location.views[name] for name in names]
    if len({entry.codec for entry in entries}) == 1:
        return entries[0].codec.rows_decoder(stored, rows, width)

    def decode(out: Tensor, factor: Tensor | None = None) -> None:
        for entry, parts, piece in zip(entries, stored, out.split(rows), strict=True):
            entry.codec.decode(parts, entry.shape, out.dtype, piece)
        if factor is not None:
            scale_rows_(out, factor)

    return decode


def checksum(buffer: Tensor) -> int:
    """Return the sum, modulo 2^64, of the 64-bit words of uint8 [n], n a multiple of 8."""
    return int(buffer.view(torch.int64).sum())
