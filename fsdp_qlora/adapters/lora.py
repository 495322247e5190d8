"""LoRA: two matrices per linear, B A x scaled, with PEFT's names, first values and config file."""

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Generator, Tensor

from fsdp_qlora.config.options import AdapterOptions
from fsdp_qlora.errors import UserError

PEFT_NAME = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")
# What other programs' LoRA may have and this one does not: setting of adapter_config.json -> its values that mean no.
ABSENT: dict[str, tuple[object, ...]] = {
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "lora_ga_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    # Other first values (pissa, olora, loftq, corda) are taken out of the base, which the adapter then belongs to.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


def lora_scale(options: AdapterOptions) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv:2312.03732)."""
    return options.lora_alpha / (math.sqrt(options.lora_rank) if options.use_rslora else options.lora_rank)


def lora_shapes(out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `lora_A` [R, I] and `lora_B` [O, R]."""
    return {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}


class LoRA:
    """Low-rank adapters (arXiv:2106.09685)."""

    label = "LoRA"
    peft_settings: Mapping[str, object] = {}  # of `LoraConfig`, beside the options
    reads_norms = False

    def parameters(self, out_features: int, in_features: int, options: AdapterOptions) -> dict[str, tuple[int, ...]]:
        return lora_shapes(out_features, in_features, options.lora_rank)

    def initialize(self, values: Tensor, path: str, parameter: str, seed: int, norms: Tensor | None = None) -> None:
        """Draw `lora_A` as PEFT does, Kaiming-uniform with a = sqrt(5). `lora_B` stays zero.

        Each linear has a generator of its own."""
        if parameter == "lora_A":
            generator = Generator().manual_seed(linear_seed(seed, path))
            # kaiming_uniform_(a=sqrt(5)): gain sqrt(1/3), bound gain * sqrt(3 / fan_in)
            bound = 1 / math.sqrt(values.shape[1])
            values.uniform_(-bound, bound, generator=generator)

    def peft_name(self, path: str, parameter: str) -> str:
        return f"base_model.model.{path}.{parameter}.weight"

    def peft_config(
        self, options: AdapterOptions, base_model: str, revision: str | None, targets: list[str]
    ) -> dict[str, object]:
        from peft import LoraConfig  # 2 s of import, which only the end of a run needs

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
            **self.peft_settings,
        ).to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}

    def from_peft_name(self, name: str) -> tuple[str, str] | None:
        found = PEFT_NAME.fullmatch(name)
        return (found[1], found[2]) if found else None

    def from_peft_config(self, settings: Mapping[str, Any]) -> AdapterOptions | None:
        return None if settings.get("use_dora") else self._options(settings)

    def _options(self, settings: Mapping[str, Any]) -> AdapterOptions | None:
        """Return what adapter_config.json says of rank and scale, None if its two matrices are not LoRA's."""
        if settings.get("peft_type") != "LORA":
            return None
        for name, no in ABSENT.items():
            if settings.get(name) not in no:
                raise UserError(f"adapter: it has {name} {settings[name]}, which is not done here; merge it with PEFT")
        return AdapterOptions(
            lora_rank=int(settings["r"]),
            lora_alpha=float(settings["lora_alpha"]),
            use_rslora=bool(settings.get("use_rslora", False)),
        )

    def merged(self, weight: Tensor, values: Mapping[str, Tensor], options: AdapterOptions) -> Tensor:
        a, b = (values[name].to(weight.device).float() for name in ("lora_A", "lora_B"))
        summed = weight.to(a.dtype, copy=True)
        return summed.addmm_(b, a, alpha=lora_scale(options))


def linear_seed(seed: int, path: str) -> int:
    """Return a linear's 63-bit seed. Python's own hash() of a string differs between processes."""
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
