"""All options of a training run: the groups joined, every option by its name; and what commands make theirs of."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fsdp_qlora.config.groups.adapter import AdapterOptions
from fsdp_qlora.config.groups.data import DataOptions
from fsdp_qlora.config.groups.evaluation import EvaluationOptions
from fsdp_qlora.config.groups.launch import LaunchOptions
from fsdp_qlora.config.groups.memory import MemoryOptions
from fsdp_qlora.config.groups.model import ModelOptions
from fsdp_qlora.config.groups.output import OutputOptions
from fsdp_qlora.config.groups.profile import ProfileOptions
from fsdp_qlora.config.groups.training import TrainingOptions
from fsdp_qlora.config.option import REQUIRED, Option, as_in, option, options_of, show
from fsdp_qlora.config.program import Asked, Conflict, Needs, Program, command

__all__ = [
    "GROUPS",
    "OPTIONS",
    "REQUIRED",
    "AdapterOptions",
    "Asked",
    "Config",
    "Conflict",
    "DataOptions",
    "EvaluationOptions",
    "LaunchOptions",
    "MemoryOptions",
    "ModelOptions",
    "Needs",
    "OutputOptions",
    "ProfileOptions",
    "Program",
    "TrainingOptions",
    "as_in",
    "command",
    "option",
    "show",
]


@dataclass
class Config:
    """All options of a run, in groups. In files and as flags they are flat: every name is unique."""

    model: ModelOptions
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    data: DataOptions = field(default_factory=DataOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    profile: ProfileOptions = field(default_factory=ProfileOptions)
    launch: LaunchOptions = field(default_factory=LaunchOptions)

    def to_flat(self) -> dict[str, Any]:
        """Return {option name: value} in the order of the groups; lists are copied."""
        values = {name: getattr(getattr(self, item.group), name) for name, item in OPTIONS.items()}
        return {name: list(value) if isinstance(value, list) else value for name, value in values.items()}

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> "Config":
        """Return the Config with these options and defaults for the rest; values are taken as they are, unchecked."""
        groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        for name, value in values.items():
            groups[OPTIONS[name].group][name] = value
        return cls(**{group: GROUPS[group](**chosen) for group, chosen in groups.items()})


GROUPS: dict[str, type] = {item.name: item.type for item in dataclasses.fields(Config) if isinstance(item.type, type)}
OPTIONS: dict[str, Option] = {item.name: item for group, kind in GROUPS.items() for item in options_of(group, kind)}
