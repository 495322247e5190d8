"""The frozen bytes of a block: a layout computed from shapes alone, and one flat buffer for every frozen tensor.

A frozen tensor has no gradient and no optimizer state, so it is kept as bytes at a known offset and not as a parameter
with metadata hanging off it. One buffer a block means one copy, one all-gather, one pinned range, one file record.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fsdp_qlora.weights.codecs import Codec, Decoder

ALIGN = 256  # bytes; every part starts here, so that a kernel may load 16 bytes at a time from any of them
MOST_PLACES = 8  # tensors in which one unit's bytes are found by turns that are remembered


@dataclass(frozen=True)
class Part:
    """One stored tensor (codes, scales, ...) of an entry. offset and nbytes in bytes from the start of the buffer."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Entry:
    """One frozen tensor: how it is coded, its shape when decoded, and where its parts lie."""

    codec: Codec
    shape: tuple[int, ...]
    parts: dict[str, Part]


class Layout:
    """name -> Entry for one block. The same on every rank without communication: it depends on codecs and shapes only.

    nbytes is the buffer's length, a multiple of ALIGN * multiple_of so that `multiple_of` ranks can hold equal shards.
    """

    def __init__(self, tensors: Mapping[str, tuple[Codec, tuple[int, ...]]], multiple_of: int = 1) -> None:
        self.entries: dict[str, Entry] = {}
        offset = 0
        for name, (codec, shape) in tensors.items():
            parts = {}
            for part, (dtype, part_shape) in codec.parts(shape).items():
                nbytes = torch.Size(part_shape).numel() * dtype.itemsize
                parts[part] = Part(dtype, tuple(part_shape), offset, nbytes)
                offset += _round_up(nbytes, ALIGN)
            self.entries[name] = Entry(codec, tuple(shape), parts)
        self.nbytes = _round_up(max(offset, 1), ALIGN * multiple_of)

    def write(self, buffer: Tensor, name: str, parts: Mapping[str, Tensor]) -> None:
        """Copy the encoded `parts` of `name` to their places in `buffer` (uint8 [nbytes], any device)."""
        entry = self.entries[name]
        assert parts.keys() == entry.parts.keys(), f"{name}: parts {list(parts)} are not {list(entry.parts)}"
        for part, where in entry.parts.items():
            _view(buffer, where).copy_(parts[part].reshape(where.shape))

    def views(self, buffer: Tensor) -> dict[str, dict[str, Tensor]]:
        """name -> part -> a view into `buffer` (uint8 [nbytes])."""
        return {
            name: {part: _view(buffer, where) for part, where in entry.parts.items()}
            for name, entry in self.entries.items()
        }


@dataclass(frozen=True)
class Place:
    """Where a unit's bytes are: the tensor that they are in, the stored parts of each entry as views into it, and what
    decodes some entries together, made when it is first asked for."""

    flat: Tensor
    views: dict[str, dict[str, Tensor]]
    decoders: dict[tuple[str, ...], Decoder] = field(default_factory=dict)


class FrozenBytes(nn.Module):
    """The buffer of one block, as ONE flat parameter that FSDP2 can shard: float32 is only the wrapping of the bytes.

    FSDP2 of torch 2.11 refuses uint8 parameters, and on a GPU its gather rewrites every bfloat16 NaN to 0x7fff, which
    are codes and scales here. float32 words pass through unchanged. So that no version, backend or driver can change
    weights silently, the bytes are compared with what was encoded the first time they are read.

    `flat` starts on the meta device; the placement puts the real thing there (whole, or this rank's shard).
    bring: where the placement moves bytes only as they are needed, it is told of each need in advance: called before
    they are read, with whether a backward reads them. They stay until the next unit's are asked for.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        words = torch.empty(layout.nbytes // 4, dtype=torch.float32, device="meta")
        self.flat = nn.Parameter(words, requires_grad=False)
        self.expected: int | None = None  # checksum of the whole buffer as it was encoded, until it has been compared
        self.bring: Callable[[bool], None] | None = None
        self._places: list[Place] = []

    def leave(self) -> None:
        """Forget where the bytes are, and let go of them: the placement puts them somewhere else."""
        self._parameters["flat"] = nn.Parameter(torch.empty_like(self.flat, device="meta"), requires_grad=False)
        self._places = []

    def parts(self, name: str) -> dict[str, Tensor]:
        """The stored parts of `name`, as views. Valid while the block is gathered. Raises as `place`."""
        return self.place().views[name]

    def place(self) -> Place:
        """Where the bytes are. Valid while the block is gathered.

        Raises RuntimeError where the bytes are not those that were encoded.
        """
        flat = self.flat
        for place in self._places:  # FSDP2 gathers into the same tensor, streaming into one of a few
            if place.flat is flat:
                return place
        assert not isinstance(flat, DTensor), "frozen bytes are read while they are not gathered"
        buffer = flat.detach().view(torch.uint8)
        if self.expected is not None and checksum(buffer) != self.expected:
            raise RuntimeError(
                "frozen bytes were changed on their way (gather, copy or memory): the weights would be wrong. "
                "Please report this with your versions of torch, NCCL and the driver"
            )
        self.expected = None
        self._places = [*self._places[1 - MOST_PLACES :], Place(flat, self.layout.views(buffer))]
        return self._places[-1]

    @contextmanager
    def on_meta(self) -> Iterator[None]:
        """Inside, the bytes are on the meta device and nothing brings them."""
        before = self.flat, self.bring, self.expected, self._places
        self.flat = nn.Parameter(torch.empty(before[0].shape, dtype=before[0].dtype, device="meta"), False)
        self.bring, self.expected, self._places = None, None, []
        try:
            yield
        finally:
            self.flat, self.bring, self.expected, self._places = before

    def decode(self, name: str, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The tensor `name` in `dtype`, decoded on the device where the bytes are, into `out` if that is given."""
        entry = self.layout.entries[name]
        return entry.codec.decode(self.parts(name), entry.shape, dtype, out)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Bytes readable inside: gathers and frees them where this module was sharded on its own (embedding, head)."""
        if self.bring is not None:
            self.bring(False)
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
    """A handle on one entry of a block: what a layer holds in place of a parameter."""

    home: FrozenBytes
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.home.layout.entries[self.name].shape

    def decode(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return self.home.decode(self.name, dtype, out)


def decode_rows(tensors: Sequence[FrozenTensor], out: Tensor) -> None:
    """Matrices of one width and one unit, decoded one below the other into `out`: of one codec in one launch, if it can
    do that."""
    home, names = tensors[0].home, tuple(t.name for t in tensors)
    place = home.place()
    if names not in place.decoders:
        place.decoders[names] = _rows_decoder([home.layout.entries[name] for name in names], place, names)
    place.decoders[names](out)


def _rows_decoder(entries: Sequence[Entry], place: Place, names: Sequence[str]) -> Decoder:
    rows, (width,) = [entry.shape[0] for entry in entries], {entry.shape[1] for entry in entries}
    stored = [place.views[name] for name in names]
    if len({entry.codec for entry in entries}) == 1:
        return entries[0].codec.rows_decoder(stored, rows, width)

    def decode(out: Tensor) -> None:
        for entry, parts, piece in zip(entries, stored, out.split(rows), strict=True):
            entry.codec.decode(parts, entry.shape, out.dtype, piece)

    return decode


def checksum(buffer: Tensor) -> int:
    """Of uint8 [n], n a multiple of 8: the sum of its 64-bit words, modulo 2^64."""
    return int(buffer.view(torch.int64).sum())


def _view(buffer: Tensor, part: Part) -> Tensor:
    return buffer[part.offset : part.offset + part.nbytes].view(part.dtype).view(part.shape)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
