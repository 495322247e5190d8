"""A whole model as GGUF: base + adapter, or a merged folder, quantized tensor by tensor."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.atomic_files import atomic_file
from fsdp_qlora.errors import UserError
from fsdp_qlora.export.gguf.encode import Bytes, Numbers, encoded
from fsdp_qlora.export.gguf.families import Family, family_of, heads_permuted, permuted
from fsdp_qlora.export.gguf.metadata import add_metadata, general_name
from fsdp_qlora.export.gguf.names import Names
from fsdp_qlora.export.gguf.quantize import K_TYPES, Model, Quantization, type_of
from fsdp_qlora.export.gguf.rope import rope_of
from fsdp_qlora.export.gguf.tensor_data import Entry, check_file, check_room, write_file
from fsdp_qlora.export.gguf.vocabulary import add_vocabulary, read_vocabulary
from fsdp_qlora.export.merged import Merged
from fsdp_qlora.models.skeleton import text_config
from fsdp_qlora.runtime.background import torch_threads
from fsdp_qlora.weights.checkpoint_files import some

CHUNK_NUMBERS = 1 << 25  # of a tensor in float32 at a time: 128 MiB
# Cores that encode K types while one sums base and adapter: 65 ns a number of Q4_K, and 11 (70B's width, an AMD EPYC).
# PyTorch has no more of them, since its threads wait for one another.
CORES_THAT_ONE_FEEDS = 6
SAMPLED_ROWS = 64  # of each tensor, by which the error of its type is told


@dataclass
class Errors:
    """By type: sums of squares of numbers and of their errors, over some rows of each tensor."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, kind: gguf.GGMLQuantizationType, rows: Numbers, data: Bytes) -> None:
        count = min(len(rows), len(data))
        decoded = gguf.quants.dequantize(data[:count], kind).reshape(-1, rows.shape[-1])
        exact = rows[:count].astype(np.float64)
        size, error = self.sums.get(kind.name, (0.0, 0.0))
        self.sums[kind.name] = size + float((exact**2).sum()), error + float(((decoded - exact) ** 2).sum())

    def lines(self) -> list[str]:
        """Return the root mean square error of each type over that of its numbers."""
        return [f"{kind} {math.sqrt(error / size):.2%}" for kind, (size, error) in self.sums.items() if size]


@dataclass(frozen=True)
class Part:
    """A tensor of the file: its entry, the name in the model or the tensor itself, and what is done to its rows."""

    entry: Entry
    source: str | Tensor
    change: Callable[[Tensor], Tensor]


def write_model(
    target: Path,
    source: Merged,
    tokenizer: PreTrainedTokenizerBase,
    quantization: Quantization,
    name: str,
    threads: int,
) -> tuple[int, Errors]:
    """Write a model's file, whole or not at all; return its bytes and the errors of its types.

    Raises UserError, before a weight is read, for a family or a tokenizer that llama.cpp does not have."""
    config = text_config(source.hf_config)
    family = family_of(config)
    parts = _parts(source, config, family, quantization)
    spm = source.folder / "tokenizer.model"
    vocabulary = read_vocabulary(tokenizer, config.vocab_size, spm if spm.is_file() else None)
    if vocabulary.dropped:
        print(
            f"note      tokens without a row in the embedding are left out: {some(list(vocabulary.dropped))}",
            flush=True,
        )
    if vocabulary.chat_template is None:
        print(
            "note      the tokenizer has no chat template: programs that serve the file will not know how to ask",
            flush=True,
        )
    window = getattr(config, "sliding_window", None)
    if family.arch in ("LLAMA", "PHI3") and window and window < config.max_position_embeddings:
        print(
            f"note      llama.cpp has no sliding window here: beyond {window} tokens it sees more than the model did",
            flush=True,
        )
    rope = rope_of(config)
    if rope.get("rope_type") == "longrope":
        context = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        print(
            f"note      where its context is above {context} tokens llama.cpp takes the long factors of longrope for "
            f"all prompts, and the model for longer ones alone: serve short ones with --ctx-size {context}",
            flush=True,
        )
    entries = [part.entry for part in parts]
    narrow = [entry.kind.name for entry in entries if len(entry.shape) > 1 and entry.shape[-1] % gguf.QK_K]
    if quantization.main in K_TYPES and narrow:
        print(
            f"note      {len(narrow):,} matrices have rows of no multiple of {gguf.QK_K} numbers, which K types need: "
            f"they are stored as {', '.join(sorted(set(narrow)))}, as llama.cpp would",
            flush=True,
        )
    total = check_room(target, entries, "a smaller --quantization")
    errors = Errors()
    cores = torch.get_num_threads()
    if quantization.main in K_TYPES:
        cores = max(1, cores - threads, cores // CORES_THAT_ONE_FEEDS)
    with (
        atomic_file(target) as part_file,
        ThreadPoolExecutor(threads) as pool,
        torch_threads(1, cores) as ahead,
    ):
        writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.arch]])
        add_metadata(writer, config, family, general_name(name, vocabulary.strips), quantization.file_type)
        add_vocabulary(writer, vocabulary)
        with tqdm(total=total, desc="quantizing", unit="B", unit_scale=True, leave=False) as bar:
            sums = write_file(writer, part_file, entries, _data(parts, source, pool, ahead, errors, bar))
        check_file(part_file, entries, sums)
    return total, errors


def _parts(source: Merged, config: Any, family: Family, quantization: Quantization) -> list[Part]:
    names = Names(source.skeleton, config, family)
    tied = family.tied or (names.head in source.skeleton.all_tied_weights_keys and not source.own_head)
    if family.tied and source.own_head:
        raise UserError("model_name: llama.cpp ties this model's head to its embedding, and it has one of its own")
    model = Model(family.arch, config.num_hidden_layers, tied)
    parts = []
    for name in source.names():
        found = None if tied and name == names.head else names(name)
        if found is not None:
            shape = source.piece(name).shape
            entry = Entry(found, shape, type_of(found, shape, quantization, model))
            parts.append(Part(entry, name, _change(name, family, config)))
    for found, tensor in family.extra(config).items():
        shape = tuple(tensor.shape)
        parts.append(Part(Entry(found, shape, type_of(found, shape, quantization, model)), tensor, lambda rows: rows))
    return parts


def _change(name: str, family: Family, config: Any) -> Callable[[Tensor], Tensor]:
    heads = heads_permuted(name, family, config)
    if heads:
        return lambda rows: permuted(rows, heads)
    if family.norm_shift and name.endswith("norm.weight"):
        return lambda rows: rows.float() + family.norm_shift
    return lambda rows: rows


def _data(
    parts: Sequence[Part],
    source: Merged,
    threads: ThreadPoolExecutor,
    ahead: ThreadPoolExecutor,
    errors: Errors,
    bar: "tqdm[Any]",
) -> Iterator[Iterator[Bytes]]:
    """Yield each part's bytes in pieces; the next part's sum of base and adapter is made meanwhile, by `ahead`."""

    def summed(part: Part) -> Tensor:
        if isinstance(part.source, Tensor):
            return part.source
        piece = source.piece(part.source)
        return part.change(source.added(piece, source.base(piece)))

    coming = [ahead.submit(summed, parts[0])]
    for i, part in enumerate(parts):
        tensor = coming.pop().result()
        if i + 1 < len(parts):
            coming.append(ahead.submit(summed, parts[i + 1]))
        yield _encoded(part, tensor, threads, errors, bar)
        del tensor


def _encoded(
    part: Part, tensor: Tensor, threads: ThreadPoolExecutor, errors: Errors, bar: "tqdm[Any]"
) -> Iterator[Bytes]:
    rows = tensor.reshape(-1, tensor.shape[-1])
    chunks = map(_numbers, rows.split(max(1, CHUNK_NUMBERS // rows.shape[1])))
    for first, data in enumerate(encoded(chunks, part.entry.kind, threads, part.entry.name, "model_name")):
        if not first and len(part.entry.shape) > 1:
            errors.add(part.entry.kind, _numbers(rows[:SAMPLED_ROWS]), data)
        yield data
        bar.update(data.nbytes)


def _numbers(rows: Tensor) -> Numbers:
    numbers: Numbers = rows.float().cpu().contiguous().numpy()
    return numbers
