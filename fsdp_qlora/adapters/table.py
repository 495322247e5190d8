"""The kinds of adapters by name."""

from fsdp_qlora.adapters.base import AdapterKind
from fsdp_qlora.adapters.lora import LoRA
from fsdp_qlora.config.train_types import TRAIN_TYPES

ADAPTERS: dict[str, AdapterKind] = {"lora": LoRA()}


def choose_adapter(train_type: str) -> AdapterKind:
    return ADAPTERS[TRAIN_TYPES[train_type].adapter]
