"""A run's result: an adapter that `PeftModel.from_pretrained` opens, and its tokenizer."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.adapters.table import choose_adapter
from fsdp_qlora.adapters.targets import peft_targets
from fsdp_qlora.atomic_files import atomic_file
from fsdp_qlora.config.options import Config
from fsdp_qlora.errors import TrainingStopped, UserError
from fsdp_qlora.units import GIB, as_gib, count_of

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


class TokenizerNotSaved(TrainingStopped):
    """The adapter is saved, but not its tokenizer."""


def check_space(folder: Path, adapter_bytes: int, checkpoint_bytes: int = 0, checkpoints: int = 0) -> None:
    """Raise UserError if the disk of `folder` has less free space than the adapter and the checkpoints take."""
    needed, free = adapter_bytes + checkpoints * checkpoint_bytes, shutil.disk_usage(folder).free
    if needed > free:
        what, limit = "the adapter", ""
        if checkpoints:
            what = f"the adapter with {count_of(checkpoints, 'checkpoint')} of {as_gib(checkpoint_bytes, 2)}"
            limit = "set or lower save_total_limit, " * (checkpoints > 1)
        raise UserError(
            f"output_dir: {folder} has {as_gib(free, 2)} free and {what} will take {needed / GIB:.2f}; "
            f"free some space there, choose another folder, {limit}or lower lora_rank"
        )


def save_adapter_somewhere(
    folder: Path,
    tensors: dict[str, Tensor],
    linears: list[str],
    config: Config,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Save as `save_adapter`; if that fails, in the system's temporary folder, so that hours of work are not lost.

    Raises TrainingStopped in that case too, with the folder that the adapter is in."""
    try:
        save_adapter(folder, tensors, linears, config, tokenizer)
    except TokenizerNotSaved:
        raise
    except TrainingStopped as stopped:
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix="fsdp_qlora_adapter_"))
        except OSError:  # a temporary folder that is full, read-only or not there
            raise stopped from None
        try:
            save_adapter(elsewhere, tensors, linears, config, tokenizer)
        except TrainingStopped:
            shutil.rmtree(elsewhere, ignore_errors=True)
            raise stopped from None
        raise TrainingStopped(f"{stopped}. It is in {elsewhere} instead: move it from there") from stopped


def save_adapter(
    folder: Path,
    tensors: dict[str, Tensor],
    linears: list[str],
    config: Config,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Path:
    """Write the adapter (float32, PEFT's names), its config and the tokenizer to `folder`; return the adapter's path.

    tensors: `path.lora_A` and `path.lora_B` by path in the Hugging Face model. linears: the paths of all linears.
    Each file appears whole or not at all. Raises TrainingStopped if the disk is full or gone.
    """
    named = {peft_name(name, config): tensor.contiguous() for name, tensor in tensors.items()}
    settings = adapter_settings(tensors, linears, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / ADAPTER) as part:
            save_file(named, part, metadata={"format": "pt"})
        with atomic_file(folder / ADAPTER_CONFIG) as part:
            part.write_text(settings_text(settings))
    except Exception as error:  # safetensors raises its own kind for a full disk
        raise TrainingStopped(
            f"output_dir: the adapter could not be saved in {folder} ({error}); free some space there"
        ) from error
    if tokenizer is not None:
        save_tokenizer(folder, tokenizer)
    return folder / ADAPTER


def peft_name(name: str, config: Config) -> str:
    """Return the name in PEFT's file of a parameter `path.lora_A`."""
    path, _, parameter = name.rpartition(".")
    return choose_adapter(config.model.train_type).peft_name(path, parameter)


def adapter_settings(names: Iterable[str], linears: list[str], config: Config) -> dict[str, Any]:
    """Return PEFT's config of an adapter. names: of its parameters. linears: the paths of all linears."""
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    kind, model = choose_adapter(config.model.train_type), config.model
    return kind.peft_config(config.adapter, model.model_name, model.revision, peft_targets(paths, linears))


def settings_text(settings: dict[str, Any]) -> str:
    """Return PEFT's config as its file has it."""
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer's files, each whole or not at all. Raises TokenizerNotSaved on any failure."""
    part = folder / f".tokenizer.{os.getpid()}"
    try:
        shutil.rmtree(part, ignore_errors=True)
        tokenizer.save_pretrained(part)
        for file in sorted(part.rglob("*")):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        for file in sorted(part.rglob("*")):  # all of them are complete
            if file.is_file():
                (folder / file.relative_to(part)).parent.mkdir(parents=True, exist_ok=True)
                file.replace(folder / file.relative_to(part))
    except Exception as error:  # the tokenizers library raises its own kind for a full disk
        raise TokenizerNotSaved(
            f"output_dir: the adapter is saved in {folder}, but its tokenizer could not be ({error}); the model's own "
            "tokenizer does as well"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def saved_since(folder: Path, moment: float) -> bool:
    """Return whether an adapter in `folder` was saved, or begun to be, since `moment` (of time.time)."""
    for file in folder.glob(f"*{ADAPTER}*"):
        with suppress(
            FileNotFoundError
        ):  # renamed meanwhile: it is in this list, or in the next one, under its new name
            if file.stat().st_mtime >= moment:
                return True
    return (folder / ADAPTER).exists() and (folder / ADAPTER).stat().st_mtime >= moment
