"""A LoRA adapter alone as GGUF, which `llama.cpp --lora` and Ollama's ADAPTER add to a base of any quantization."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
from transformers import PreTrainedModel

from fsdp_qlora.adapters.lora import lora_scale
from fsdp_qlora.atomic_files import atomic_file
from fsdp_qlora.errors import UserError
from fsdp_qlora.export.adapter_folder import SavedAdapter
from fsdp_qlora.export.gguf.families import family_of, heads_permuted, permuted
from fsdp_qlora.export.gguf.names import Names
from fsdp_qlora.export.gguf.quantize import Quantization, quantize
from fsdp_qlora.export.gguf.tensor_data import Entry, check_file, write_file
from fsdp_qlora.models.skeleton import text_config


def write_lora(
    target: Path, adapter: SavedAdapter, model: PreTrainedModel, quantization: Quantization, name: str
) -> int:
    """Write an adapter's file, whole or not at all; return its bytes. model: the base, on the meta device.

    llama.cpp scales an adapter by alpha / rank. rsLoRA scales by alpha / sqrt(rank), so alpha sqrt(rank) is told."""
    config = text_config(model.config)
    family = family_of(config)
    names = Names(model, config, family)
    kind, rank = quantization.main, adapter.options.lora_rank
    entries, data = [], []
    with ThreadPoolExecutor(1) as threads:
        for path in adapter.linears:
            found = names(f"{path}.weight")
            if found is None or (found == "output.weight" and family.tied):
                raise UserError(f"adapter: {path} is no part of llama.cpp's form of this model")
            heads = heads_permuted(f"{path}.weight", family, config)
            values = adapter.values(path)
            a, b = (values[parameter].float() for parameter in ("lora_A", "lora_B"))
            b = permuted(b, heads) if heads else b
            for suffix, tensor in (("lora_a", a), ("lora_b", b)):
                entries.append(Entry(f"{found}.{suffix}", tuple(tensor.shape), kind))
                data.append(iter([quantize(tensor.contiguous().numpy(), kind, threads)]))
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.arch]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora_scale(adapter.options) * rank)
    writer.add_name(name)
    writer.add_file_type(quantization.file_type)
    with atomic_file(target) as part:
        check_file(part, entries, write_file(writer, part, entries, data))
    return sum(entry.nbytes for entry in entries)
