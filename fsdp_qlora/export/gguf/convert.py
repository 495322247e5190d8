"""A GGUF file from what the user named to what the user is told of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.atomic_files import sweep
from fsdp_qlora.config.options import ModelOptions
from fsdp_qlora.data.batches import load_tokenizer
from fsdp_qlora.errors import TrainingStopped, UserError
from fsdp_qlora.export.adapter_folder import SavedAdapter, base_options, read_adapter
from fsdp_qlora.export.gguf.families import family_of
from fsdp_qlora.export.gguf.lora_file import write_lora
from fsdp_qlora.export.gguf.model_file import write_model
from fsdp_qlora.export.gguf.modelfile import modelfile_of, write_adapter_modelfile, write_modelfile
from fsdp_qlora.export.gguf.quantize import QUANTIZATIONS, check_installed
from fsdp_qlora.export.gguf.vocabulary import read_vocabulary
from fsdp_qlora.export.merged import MergeBase, Merged, check_adapter, check_head
from fsdp_qlora.models.precision import Precision
from fsdp_qlora.models.skeleton import build, read_config, text_config
from fsdp_qlora.runtime.files import writing_to
from fsdp_qlora.runtime.launcher import usable_cores
from fsdp_qlora.units import as_gib


@dataclass(frozen=True)
class Wanted:
    """What the user asked of a file. quantization: of QUANTIZATIONS."""

    folder: Path
    quantization: str
    overwrite: bool
    threads: int  # -1: the machine's cores


def convert(adapter: Path | None, given: Mapping[str, Any], merge_base: MergeBase, wanted: Wanted) -> None:
    """Write a model as GGUF: base + adapter, or without an adapter the folder `given` names."""
    quantization = QUANTIZATIONS[wanted.quantization]
    check_installed(quantization)
    saved = None if adapter is None else read_adapter(adapter)
    if saved is None:
        base = ModelOptions(
            model_name=given["model_name"], revision=given["revision"], train_type="qlora"
        )  # or as it is published
    else:
        base = base_options(saved, given, stored=merge_base == "trained")
    hf_config = read_config(base.model_name, base.revision)
    tokenizer = _tokenizer(saved, base)
    config = text_config(hf_config)
    family_of(config)
    read_vocabulary(tokenizer, config.vocab_size, None)  # a mistake is told before weights are fetched
    name = _name_of(base)
    target = _target(wanted, f"{name}-{wanted.quantization.upper()}.gguf")
    source = Merged(base, saved, merge_base, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    source.say_notes()
    threads = wanted.threads if wanted.threads > 0 else usable_cores(None)
    try:
        nbytes, errors = write_model(target, source, tokenizer, quantization, name, threads)
        modelfile = write_modelfile(target, tokenizer)
    except OSError as error:
        raise _stopped(target, error) from error
    print(f"errors    root mean square over that of the weights: {', '.join(errors.lines())}")
    print(f"written   {target}: {as_gib(nbytes, 2)}, read back as it was written; {modelfile.name} for `ollama create`")


def convert_lora(adapter: Path, given: Mapping[str, Any], wanted: Wanted) -> None:
    """Write an adapter alone as GGUF. Of its base only config.json is read."""
    saved = read_adapter(adapter)
    base = base_options(saved, given, stored=False)
    name = _name_of(base)
    target = _target(wanted, f"{name}-lora-{wanted.quantization.upper()}.gguf")
    precision = Precision(torch.float32, torch.float32)
    model = build(read_config(base.model_name, base.revision), precision, "eager")
    check_adapter(saved, model, base.model_name)
    check_head(saved, model)
    try:
        nbytes = write_lora(target, saved, model, QUANTIZATIONS[wanted.quantization], name)
        modelfile = write_adapter_modelfile(target, base.model_name)
    except OSError as error:
        raise _stopped(target, error) from error
    print(f"written   {target}: {as_gib(nbytes, 2)}, for llama.cpp's --lora; {modelfile.name} for `ollama create`")


def _name_of(base: ModelOptions) -> str:
    """Return what a base's files are named after: its folder's name, wherever it is named from, or its hub id's."""
    local = Path(base.model_name)
    return local.resolve().name if local.is_dir() else base.model_name.rstrip("/").split("/")[-1]


def _target(wanted: Wanted, name: str) -> Path:
    target = wanted.folder / name
    files = (target, modelfile_of(target))
    with writing_to(wanted.folder, "output_dir"):
        sweep(wanted.folder, lambda found: found in [file.name for file in files], dead_only=True)
        there = next((file for file in files if file.exists()), None)
        if there is not None and not wanted.overwrite:
            raise UserError(
                f"output_dir: {there} is there already; choose another folder, or --overwrite_output_dir true to "
                "replace it"
            )
    return target


def _tokenizer(adapter: SavedAdapter | None, base: ModelOptions) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the adapter was trained with; else the base's."""
    if adapter is not None and (adapter.folder / "tokenizer_config.json").is_file():
        return load_tokenizer(str(adapter.folder))
    return load_tokenizer(base.model_name, base.revision)


def _stopped(target: Path, error: OSError) -> TrainingStopped:
    return TrainingStopped(
        f"output_dir: {target} could not be written ({error.strerror or error}); nothing of it is left: free some "
        "space there and start again"
    )
