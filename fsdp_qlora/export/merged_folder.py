"""An adapter merged into its base and saved as a Hugging Face model, file by file, going on where it was stopped."""

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fsdp_qlora.atomic_files import atomic_file
from fsdp_qlora.config.options import ModelOptions
from fsdp_qlora.data.batches import load_tokenizer
from fsdp_qlora.errors import TrainingStopped, UserError, first_line
from fsdp_qlora.export.adapter_folder import SavedAdapter
from fsdp_qlora.export.journal import Journal, Rounding, clear, take
from fsdp_qlora.export.merged import MergeBase, Merged, Piece, reading
from fsdp_qlora.export.peft import ADAPTER, ADAPTER_CONFIG, TokenizerNotSaved, save_tokenizer
from fsdp_qlora.export.tensor_files import Shard, plan_shards, write_index, write_shard
from fsdp_qlora.runtime.files import Claim, check_elsewhere
from fsdp_qlora.units import GIB, as_gib

LEAST_KEPT, MOST_NOISE = 0.97, 0.5  # of what was learnt, below and above which the user is warned
# Of a vision-language model, which other programs want beside its weights.
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Wanted:
    """What the user asked of a merge beside base and adapter."""

    folder: Path
    dtype: str  # "auto" or of DTYPES
    overwrite: bool
    most_shard_bytes: int


@dataclass(frozen=True)
class MergedModel:
    """A merged model on disk, and what it was made from."""

    source: Merged
    journal: Journal
    folder: Path
    dtype: torch.dtype
    files: int
    nbytes: int


def merge(
    adapter: SavedAdapter, base: ModelOptions, merge_base: MergeBase, wanted: Wanted, compares: bool, claim: Claim
) -> MergedModel:
    """Write base + adapter to `wanted.folder`, each file whole or not at all; files of an earlier start stay.

    compares: whether the caller will compare what is written.
    Raises UserError for what can be known before the first weight is read, TrainingStopped for a disk that fails."""
    folder = wanted.folder
    asked = _fingerprint(adapter, base, merge_base, wanted)
    check_elsewhere(folder, (("adapter", adapter.folder), ("base", Path(base.model_name))))
    begun = take(folder, asked, wanted.overwrite, compares, claim)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = Merged(base, adapter, merge_base, device)
    check_elsewhere(folder, (("base", source.folder),))
    dtype = DTYPES.get(wanted.dtype) or source.precision.compute
    source.say_notes()
    journal = begun or Journal(asked)
    shards = plan_shards(source.pieces, dtype, wanted.most_shard_bytes)
    todo = [shard for shard in shards if shard.file not in journal.done or not (folder / shard.file).is_file()]
    _check_space(folder, sum(shard.nbytes for shard in todo))
    if len(todo) < len(shards):
        print(f"resuming  {len(shards) - len(todo)} of {len(shards)} files are there already", flush=True)
    merged = MergedModel(source, journal, folder, dtype, len(shards), sum(shard.nbytes for shard in shards))
    if journal.finished and not todo:
        return merged
    try:
        if begun is None:
            clear(folder)
        journal.finished = False
        journal.save(folder)
        _write(folder, todo, source, dtype, journal)
        write_index(folder, shards)
        _write_tokenizer(folder, adapter, base, source)
        _write_configs(folder, source.folder, dtype)  # last: until then nothing opens the folder as a model
        journal.finished = True
        journal.save(folder)
    except OSError as error:
        raise TrainingStopped(
            f"output_dir: {folder} cannot be written ({error.strerror or error}); free some space there and start the "
            "same command again: it goes on from the last whole file"
        ) from error
    return merged


def rounding_lines(journal: Journal, dtype: torch.dtype) -> list[str]:
    """Return what rounding to `dtype` did to what was learnt, for the user, with a warning where it did harm."""
    sums = journal.rounding()
    name = next(name for name, known in DTYPES.items() if known is dtype)
    kept, noise = sums.share_kept(), sums.share_noise()
    if not sums.learnt:
        return ["warning   the adapter changes nothing: its B matrices are all zero"]
    lines = [
        f"rounding  to {name}: {kept:.1%} of what the adapter learnt is in the saved weights; the rounding's noise is "
        f"{noise:.1%} of its size"
    ]
    if kept < LEAST_KEPT or noise > MOST_NOISE:
        better = "--dtype fp16 or fp32" if dtype is torch.bfloat16 else "--dtype fp32"
        lines.append(
            f"warning   many learnt changes are smaller than half a step of {name} and vanish: merge with {better}, or "
            "serve base and adapter apart"
        )
    return lines


def _write(folder: Path, shards: Sequence[Shard], source: Merged, dtype: torch.dtype, journal: Journal) -> None:
    total = sum(shard.nbytes for shard in shards)
    with tqdm(total=total, desc="merging", unit="B", unit_scale=True, leave=False) as bar:
        for shard in shards:
            sums = Rounding()
            write_shard(folder, shard, _tensors(shard.pieces, source, dtype, sums, bar), dtype)
            journal.done[shard.file] = sums
            journal.save(folder)


def _tensors(
    pieces: Sequence[Piece], source: Merged, dtype: torch.dtype, sums: Rounding, bar: "tqdm[Any]"
) -> Iterator[Tensor]:
    """Yield merged tensors in their order; the base's next one is read meanwhile."""
    with ThreadPoolExecutor(1) as ahead:
        coming = [ahead.submit(source.read, pieces[0])]
        for i, piece in enumerate(pieces):
            read = coming.pop().result()
            if i + 1 < len(pieces):
                coming.append(ahead.submit(source.read, pieces[i + 1]))
            base = source.base(piece, read)
            del read
            exact = source.added(piece, base)
            saved = exact.to(piece.dtype_in(dtype))
            _check_finite(piece, exact, saved)
            if piece.linear is not None:
                sums.add(base, exact, saved)
            del base, exact
            yield saved
            bar.update(saved.nbytes)
            del saved


def _check_finite(piece: Piece, exact: Tensor, saved: Tensor) -> None:
    """Raise UserError where a number does not fit the dtype, and where the adapter holds NaN."""
    if not saved.is_floating_point() or bool(torch.stack(saved.aminmax()).isfinite().all()):
        return
    if bool(torch.stack(exact.aminmax()).isfinite().all()):
        raise UserError(f"dtype: {piece.name} has numbers beyond float16's largest, 65504; use --dtype bf16")
    raise UserError(f"adapter: {piece.name} comes out with NaN or infinity: the adapter or the base is damaged")


def _fingerprint(adapter: SavedAdapter, base: ModelOptions, merge_base: str, wanted: Wanted) -> dict[str, Any]:
    """Return what a folder's files must have been made from to be gone on with."""
    return {
        "adapter": str(adapter.folder.resolve()),
        "adapter_files": _states(adapter.folder, (ADAPTER, ADAPTER_CONFIG)),
        "model_name": base.model_name,
        "base_files": _states(Path(base.model_name), ("config.json", "*.safetensors", "*.bin")),
        "revision": base.revision,
        "merge_base": merge_base,
        "train_type": base.train_type,
        "double_quant": base.double_quant,
        "n_bits": base.n_bits,
        "hqq_group_size": base.hqq_group_size,
        "hqq_axis": base.hqq_axis,
        "hqq_optimize": base.hqq_optimize,
        "precision": base.precision,
        "dtype": wanted.dtype,
        "max_shard_bytes": wanted.most_shard_bytes,
    }


def _states(folder: Path, patterns: Sequence[str]) -> dict[str, list[int]]:
    """Return (bytes, time of the last change in ns) of these files by name; of none where there is no such folder."""
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"output_dir: {folder} has {as_gib(free, 2)} free and the merged model will take {needed / GIB:.2f}; free "
            "some space there, choose another folder, or write a GGUF instead (`gguf`)"
        )


def _write_tokenizer(folder: Path, adapter: SavedAdapter, base: ModelOptions, source: Merged) -> None:
    """Write the tokenizer that the adapter was trained with, its chat template included; else the base's."""
    own = (adapter.folder / "tokenizer_config.json").is_file()
    try:
        tokenizer = load_tokenizer(str(adapter.folder) if own else base.model_name, None if own else base.revision)
    except UserError as error:
        print(f"note      no tokenizer is written: {first_line(error)}", flush=True)
        return
    try:
        save_tokenizer(folder, tokenizer)
    except TokenizerNotSaved as error:
        raise OSError(str(error.__cause__)) from error
    for name in ("tokenizer.model", "vocab.json", "merges.txt"):  # which other programs read
        with suppress(OSError):
            if (source.folder / name).is_file() and not (folder / name).exists():
                shutil.copyfile(source.folder / name, folder / name)


def _write_configs(folder: Path, base: Path, dtype: torch.dtype) -> None:
    """Write the base's own config.json without its quantization, and the files beside it on its use."""
    names = [name for name in ("generation_config.json", *PROCESSORS) if (base / name).is_file()]
    with reading(base):
        config = json.loads((base / "config.json").read_text("utf-8"))
        beside = {name: (base / name).read_bytes() for name in names}
    config.pop("quantization_config", None)
    name = str(dtype).removeprefix("torch.")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for key in ("torch_dtype", "dtype"):
            if key in part or (part is config and key == "dtype" and "torch_dtype" not in part):
                part[key] = name
    for file, data in beside.items():
        with atomic_file(folder / file) as part_file:
            part_file.write_bytes(data)
    with atomic_file(folder / "config.json") as part_file:
        part_file.write_text(json.dumps(config, indent=2) + "\n")
