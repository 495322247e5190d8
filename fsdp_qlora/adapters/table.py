"""The kinds of adapters by name."""

from collections.abc import Mapping
from typing import Any

from fsdp_qlora.adapters.base import AdapterKind
from fsdp_qlora.adapters.dora import DoRA
from fsdp_qlora.adapters.lora import LoRA
from fsdp_qlora.config.options import AdapterOptions
from fsdp_qlora.config.train_types import TRAIN_TYPES
from fsdp_qlora.errors import UserError

ADAPTERS: dict[str, AdapterKind] = {"lora": LoRA(), "dora": DoRA()}


def choose_adapter(train_type: str) -> AdapterKind:
    return ADAPTERS[TRAIN_TYPES[train_type].adapter]


def train_type_of(train_type: str, kind: AdapterKind) -> str:
    """Return the train type over the codec of that one whose adapters are of `kind`."""
    codec = TRAIN_TYPES[train_type].codec
    return next(name for name, one in TRAIN_TYPES.items() if one.codec == codec and ADAPTERS[one.adapter] is kind)


def saved_kind(settings: Mapping[str, Any]) -> tuple[AdapterKind, AdapterOptions]:
    """Return the kind and the options that adapter_config.json tells. Raises UserError for no kind here."""
    for kind in ADAPTERS.values():
        options = kind.from_peft_config(settings)
        if options is not None:
            return kind, options
    raise UserError(
        f"adapter: it is of the kind {settings.get('peft_type')}; only {', '.join(ADAPTERS)} is known here: merge it "
        "with PEFT"
    )
