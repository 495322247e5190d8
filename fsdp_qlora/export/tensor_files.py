"""A model's safetensors files, written tensor by tensor, so that none waits in memory (`safetensors_header`)."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fsdp_qlora.atomic_files import atomic_file
from fsdp_qlora.export.merged import Piece
from fsdp_qlora.safetensors_header import Form, header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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
    return Form(piece.dtype_in(dtype), piece.shape).nbytes


def write_shard(folder: Path, shard: Shard, tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Write a file, whole or not at all. tensors: those of its pieces, in order, taken one by one."""
    forms = {piece.stored: Form(piece.dtype_in(dtype), piece.shape) for piece in shard.pieces}
    with atomic_file(folder / shard.file) as part, part.open("wb") as out:
        out.write(header(forms))
        for form, tensor in zip(forms.values(), tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == form
            out.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the list of a model's files, where it has several."""
    if len(shards) == 1:
        return
    names = {piece.stored: shard.file for shard in shards for piece in shard.pieces}
    total = sum(shard.nbytes for shard in shards)
    with atomic_file(folder / INDEX) as part:
        part.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=2) + "\n")
