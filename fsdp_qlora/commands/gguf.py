"""The command gguf: a model, or an adapter alone, in llama.cpp's format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fsdp_qlora.commands.base import Command, ready_for_hub
from fsdp_qlora.commands.merge import BaseOptions
from fsdp_qlora.config.options import Conflict, Needs, command, option
from fsdp_qlora.config.train_types import TRAIN_TYPES
from fsdp_qlora.errors import UserError
from fsdp_qlora.runtime.libraries import installed

FLOATS = ("f32", "f16", "bf16")


@dataclass
class GgufOptions(BaseOptions):
    """GGUF: which model or adapter, in which quantization."""

    adapter: str | None = option(  # type: ignore[assignment]  # required by the other commands
        None,
        "Folder of the adapter to be merged, or with lora_only to be written alone. null: the model alone is written.",
        "a merged folder is given as model_name",
        is_path=True,
        known_as=("adapter_name_or_path", "adapter_path", "peft_model", "lora_model_dir", "lora"),
    )
    lora_only: bool = option(
        False,
        "Write the adapter alone: llama.cpp's --lora and Ollama's ADAPTER add it to a GGUF file of the base.",
        "one file that needs no other is simpler to serve",
        "1.7 GB at 70B and rank 64 in place of 40; served, it costs two more small matmuls for each linear",
        known_as=("adapter_only",),
    )
    quantization: Literal["auto", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"] = option(
        "auto",
        """Type of the weights. f32, f16, bf16: floating point. q8_0, q6_k: 8.5 and 6.6 bits a weight. q5_k_m, q4_k_m:
        llama.cpp's mixes of 5.7 and 4.8 bits, more of them where it matters. auto: q4_k_m, and f16 for lora_only.""",
        "q4_k_m is what most programs serve: the smallest that answers nearly as 16 bits do",
        "K types need the package libggml-python (pip install 'fsdp-qlora[gguf]')",
        aliases={name.upper(): name for name in ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")},
        known_as=("outtype", "quantization_method", "quant", "quantization_type"),
    )
    output_dir: str = option(
        "gguf",
        "Folder for the file, which is named after model and quantization, and for an Ollama Modelfile.",
        "under the current folder; several quantizations go into one folder",
        is_path=True,
        known_as=("outfile", "save_directory"),
    )
    overwrite_output_dir: bool = option(
        False,
        "Replace a file of the same name.",
        "an earlier file is not lost by accident",
    )
    quantization_workers: int = option(
        -1,
        "Threads that quantize.",
        "the machine's cores",
        unit="threads",
        at_least=1,
        special={-1: "automatic"},
    )


NEEDS = (
    Needs[GgufOptions](
        ("lora_only",), "adapter", lambda asked: asked.adapter is not None, "set adapter to the adapter's folder"
    ),
    Needs[GgufOptions](
        ("merge_base", "train_type", "double_quant", "precision"),
        "adapter",
        lambda asked: asked.adapter is not None,
        "set adapter to the adapter's folder",
    ),
    Needs[GgufOptions](
        ("double_quant",),
        "train_type",
        lambda asked: asked.train_type is None or TRAIN_TYPES[asked.train_type].is_nf4,
        "set train_type to one over NF4, as qlora",
    ),
    Needs[GgufOptions](
        ("merge_base", "train_type", "double_quant", "precision", "quantization_workers"),
        "lora_only",
        lambda asked: not asked.lora_only,
        "set lora_only to false",
    ),
)
CONFLICTS = (
    Conflict[GgufOptions](
        ("adapter", "model_name"),
        lambda asked: asked.adapter is None and asked.model_name is None,
        "there is nothing to write; set adapter to a run's output_dir, or model_name to a merged folder",
    ),
    Conflict[GgufOptions](
        ("lora_only", "quantization"),
        lambda asked: asked.lora_only and asked.quantization not in ("auto", *FLOATS),
        f"an adapter is small and stays in floating point; take {', '.join(FLOATS)}, or omit quantization",
    ),
)


def run(asked: GgufOptions) -> None:
    """Write the file and say what it is."""
    if not installed("gguf"):
        raise UserError("gguf: the package gguf is not installed; pip install 'fsdp-qlora[gguf]'")
    ready_for_hub(asked.adapter or "", asked.model_name)
    from fsdp_qlora.export.gguf.convert import Wanted, convert, convert_lora  # torch takes seconds to import

    chosen = ("f16" if asked.lora_only else "q4_k_m") if asked.quantization == "auto" else asked.quantization
    wanted = Wanted(Path(asked.output_dir), chosen, asked.overwrite_output_dir, asked.quantization_workers)
    adapter = None if asked.adapter is None else Path(asked.adapter)
    if asked.lora_only and adapter is not None:
        convert_lora(adapter, asked.recorded(), wanted)
    else:
        convert(adapter, asked.recorded(), asked.merge_base, wanted)


GGUF = Command(
    "base + adapter, a merged model or an adapter alone for llama.cpp and Ollama",
    command(
        "python -m fsdp_qlora gguf --adapter FOLDER [--quantization TYPE] [--lora_only] [--option value ...]",
        """Writes a GGUF file, which llama.cpp, Ollama and LM Studio open: of an adapter and its base, of a merged model
        (--model_name FOLDER), or with --lora_only of the adapter alone. Tokenizer and chat template are inside.""",
        GgufOptions,
        NEEDS,
        CONFLICTS,
    ),
    run,
    interrupted="no part of a file is left, and the same command starts anew",
)
