"""Safetensors files written tensor by tensor: the header first, from shapes alone, so that none waits in memory.

safetensors' own `save_file` takes all tensors of a file at once: 5 GB of a shard where one tensor of it is 0.5.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fsdp_qlora.atomic_files import atomic_file
from fsdp_qlora.export.merged import Piece

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The format's names of dtypes (github.com/huggingface/safetensors, README: Format).
NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """One file of a model and the pieces in it, in the order in which they are written."""

    file: str
    pieces: tuple[Piece, ...]
    nbytes: int


def plan_shards(pieces: Sequence[Piece], dtype: torch.dtype, most_bytes: int) -> list[Shard]:
    """Divide pieces among files of at most so many bytes, in order; a larger piece has a file of its own."""
    groups: list[list[Piece]] = [[]]
    room = most_bytes
    for piece in pieces:
        nbytes = piece_bytes(piece, dtype)
        if groups[-1] and nbytes > room:
            groups.append([])
            room = most_bytes
        groups[-1].append(piece)
        room -= nbytes
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return [
        # Wider numbers first, so that each tensor begins at a multiple of its own size.
        Shard(
            name,
            tuple(sorted(group, key=lambda p: -p.dtype_in(dtype).itemsize)),
            sum(piece_bytes(p, dtype) for p in group),
        )
        for name, group in zip(names, groups, strict=True)
    ]


def piece_bytes(piece: Piece, dtype: torch.dtype) -> int:
    return math.prod(piece.shape) * piece.dtype_in(dtype).itemsize


def write_shard(folder: Path, shard: Shard, tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Write a file, whole or not at all. tensors: those of its pieces, in order, taken one by one."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in shard.pieces:
        end = offset + piece_bytes(piece, dtype)
        header[piece.stored] = {
            "dtype": NAMES[piece.dtype_in(dtype)], "shape": list(piece.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(folder / shard.file) as part, part.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for piece, tensor in zip(shard.pieces, tensors, strict=True):
            assert tensor.dtype == piece.dtype_in(dtype)
            assert tuple(tensor.shape) == piece.shape
            out.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the list of a model's files, where it has several."""
    if len(shards) == 1:
        return
    names = {piece.stored: shard.file for shard in shards for piece in shard.pieces}
    total = sum(shard.nbytes for shard in shards)
    with atomic_file(folder / INDEX) as part:
        part.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2) + "\n")
