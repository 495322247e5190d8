"""Adapters as a run leaves them, without the run: random values of a size that changes every logit."""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from fsdp_qlora.adapters.dora import MAGNITUDE
from fsdp_qlora.adapters.table import choose_adapter
from fsdp_qlora.adapters.targets import choose_targets
from fsdp_qlora.config.files import save
from fsdp_qlora.config.parse import parse
from fsdp_qlora.data.batches import load_tokenizer
from fsdp_qlora.export.peft import save_adapter
from fsdp_qlora.models.skeleton import decoder_layers, is_linear
from tests.support.runs import Options, flags


def save_random_adapter(folder: Path, options: Options, size: float = 0.02) -> Path:
    """Write what train.py with these options would: adapter, tokenizer and config.yaml; the folder."""
    config = parse(flags({"lora_rank": 4} | options))
    hf_config = AutoConfig.from_pretrained(config.model.model_name)
    causal = "ConditionalGeneration" not in str(hf_config.architectures)
    with init_empty_weights():
        model = (AutoModelForCausalLM if causal else AutoModelForImageTextToText).from_config(hf_config)
    path, _ = decoder_layers(model)
    linears = {name: m for name, m in model.named_modules() if is_linear(m)}
    inside = [name for name in linears if name.startswith(f"{path}.")]
    draw = torch.Generator().manual_seed(1)
    tensors, kind = {}, choose_adapter(config.model.train_type)
    for name in choose_targets(config.adapter.lora_target_modules, inside):
        rows, width = linears[name].weight.shape
        for parameter, shape in kind.parameters(rows, width, config.adapter).items():
            if parameter == MAGNITUDE:  # near the norms of a new model's rows
                tensors[f"{name}.{parameter}"] = 0.02 * width**0.5 * (0.5 + torch.rand(shape, generator=draw))
            else:
                tensors[f"{name}.{parameter}"] = size**0.5 * torch.randn(shape, generator=draw)
    folder.mkdir(parents=True, exist_ok=True)
    save(config, folder / "config.yaml")
    save_adapter(folder, tensors, list(linears), config, load_tokenizer(config.model.model_name))
    return folder
