"""LoRA adapters: which linears get one, their names and first values as PEFT has them, and their config file."""

import hashlib
import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from fsdp_qlora.config.options import AdapterOptions
from fsdp_qlora.errors import UserError

# What fsdp_qlora's `--lora_target_modules default` adapts.
DEFAULT_TARGETS = ("k_proj", "q_proj", "v_proj", "up_proj", "down_proj", "gate_proj")


def lora_scale(options: AdapterOptions) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv:2312.03732)."""
    return options.lora_alpha / (math.sqrt(options.lora_rank) if options.use_rslora else options.lora_rank)


def choose_targets(wanted: list[str], linears: Iterable[str]) -> list[str]:
    """The full names, out of `linears`, that `wanted` selects: `all`, `default`, or names and patterns as in PEFT.

    A name selects the linear of that path or with that ending (`q_proj`, `mlp.up_proj`); anything else is a regular
    expression for the whole path. Raises UserError naming each entry that selects nothing, with what there is.
    """
    linears = list(linears)
    wanted = [name for w in wanted for name in (DEFAULT_TARGETS if w == "default" else (w,))]
    if "all" in wanted:
        return linears
    chosen: set[str] = set()
    empty = []
    for want in wanted:
        hits = {name for name in linears if name == want or name.endswith(f".{want}") or _matches(want, name)}
        chosen |= hits
        if not hits:
            empty.append(want)
    if empty:
        raise UserError(
            f"lora_target_modules: {', '.join(empty)} matches no linear of this model; there are: "
            f"{', '.join(leaf_names(linears))} (or all, default, a full path, a regular expression of one)"
        )
    return [name for name in linears if name in chosen]


def leaf_names(linears: Iterable[str]) -> list[str]:
    """`self_attn.q_proj` of any layer -> `q_proj`; each once, in order."""
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linears))


def peft_targets(chosen: list[str], linears: Iterable[str]) -> list[str]:
    """`target_modules` for adapter_config.json: leaf names where they select exactly `chosen`, else full paths."""
    leaves = leaf_names(chosen)
    selected = {name for name in linears if name.rsplit(".", 1)[-1] in leaves}
    return leaves if selected == set(chosen) else chosen


def initial_values(name: str, out_features: int, in_features: int, rank: int, seed: int) -> dict[str, Tensor]:
    """Return new float32 CPU tensors `lora_A` [R, I] and `lora_B` [O, R], as PEFT draws them."""
    values = {"lora_A": torch.zeros(rank, in_features), "lora_B": torch.zeros(out_features, rank)}
    draw_(values["lora_A"], name, seed)
    return values


def draw_(a_RI: Tensor, name: str, seed: int) -> None:
    """Give a linear's `lora_A`, float32 on the CPU, its first values as PEFT draws them; its `lora_B` is zero.

    That is Kaiming-uniform with a = sqrt(5). Each linear has its own generator, seeded by `seed` and its name: the
    values depend neither on the number of ranks nor on which other linears are adapted.
    """
    generator = torch.Generator().manual_seed(_mix(seed, name))
    bound = 1 / math.sqrt(a_RI.shape[1])  # kaiming_uniform_(a=sqrt(5)): gain sqrt(1/3), bound gain * sqrt(3 / fan_in)
    a_RI.uniform_(-bound, bound, generator=generator)


def peft_key(linear: str, matrix: str) -> str:
    """The name in adapter_model.safetensors of `lora_A` or `lora_B` of a linear, given by its Hugging Face path."""
    return f"base_model.model.{linear}.{matrix}.weight"


def peft_config(
    options: AdapterOptions, base_model: str, revision: str | None, targets: list[str]
) -> dict[str, object]:
    """adapter_config.json: what `PeftModel.from_pretrained` needs to rebuild these adapters."""
    from peft import LoraConfig  # 2 s of import that only the end of a run needs

    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,  # PEFT says int and takes any number
        lora_dropout=options.lora_dropout,
        use_rslora=options.use_rslora,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        revision=revision,
        inference_mode=True,
    ).to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _mix(seed: int, name: str) -> int:
    """A 63-bit seed from a seed and a name; Python's own hash() of a string differs between processes."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
