"""A LoRA adapter alone as GGUF, which `llama.cpp --lora` and Ollama's ADAPTER add to a base of any quantization."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
from transformers import PreTrainedModel

from fsdp_qlora.adapters.lora import lora_scale
from fsdp_qlora.atomic_files import atomic_file
from fsdp_qlora.errors import UserError
from fsdp_qlora.export.adapter_folder import SavedAdapter
from fsdp_qlora.export.gguf.encode import Bytes, encoded
from fsdp_qlora.export.gguf.families import Family, family_of, heads_permuted, permuted
from fsdp_qlora.export.gguf.names import Names
from fsdp_qlora.export.gguf.quantize import Quantization
from fsdp_qlora.export.gguf.tensor_data import Entry, check_file, check_room, write_file
from fsdp_qlora.models.skeleton import text_config

SUFFIXES = {"lora_A": "lora_a", "lora_B": "lora_b"}


def write_lora(
    target: Path, adapter: SavedAdapter, model: PreTrainedModel, quantization: Quantization, name: str
) -> int:
    """Write an adapter's file, whole or not at all; return its bytes. model: the base, on the meta device.

    llama.cpp scales an adapter by alpha / rank. rsLoRA scales by alpha / sqrt(rank), so alpha sqrt(rank) is told."""
    if adapter.kind.reads_norms:
        raise UserError(
            f"lora_only: {adapter.folder} is {adapter.kind.label}, which llama.cpp has not; omit lora_only to write it "
            "merged with its base"
        )
    config = text_config(model.config)
    family = family_of(config)
    names = Names(model, config, family)
    kind, rank = quantization.main, adapter.options.lora_rank
    found_of: dict[str, str] = {}
    for path in adapter.linears:
        found = names(f"{path}.weight")
        if found is None or (found == "output.weight" and family.tied):
            raise UserError(f"adapter: {path} is no part of llama.cpp's form of this model")
        found_of[path] = found
    entries = [
        Entry(f"{found}.{suffix}", adapter.shapes_of(path)[parameter], kind)
        for path, found in found_of.items()
        for parameter, suffix in SUFFIXES.items()
    ]
    total = check_room(target, entries, "--quantization f16")
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.arch]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora_scale(adapter.options) * rank)
    writer.add_name(name)
    writer.add_file_type(quantization.file_type)
    with atomic_file(target) as part, ThreadPoolExecutor(1) as threads:
        data = _data(adapter, config, family, found_of, kind, threads)
        check_file(part, entries, write_file(writer, part, entries, data))
    return total


def _data(
    adapter: SavedAdapter,
    config: Any,
    family: Family,
    found_of: Mapping[str, str],
    kind: gguf.GGMLQuantizationType,
    threads: ThreadPoolExecutor,
) -> Iterator[Iterator[Bytes]]:
    """Yield the bytes of each matrix, in the order of the entries, one linear in memory at a time."""
    for path, found in found_of.items():
        heads = heads_permuted(f"{path}.weight", family, config)
        values = adapter.values(path)
        for parameter, suffix in SUFFIXES.items():
            tensor = values[parameter].float()
            tensor = permuted(tensor, heads) if heads and parameter == "lora_B" else tensor
            yield encoded([tensor.contiguous().numpy()], kind, threads, f"{found}.{suffix}", "adapter")
