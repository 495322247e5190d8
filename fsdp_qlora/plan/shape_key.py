"""All of a model and its options that a rehearsal's requests depend on, as JSON has it: shapes and kinds, no values."""

from dataclasses import asdict, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fsdp_qlora.config.options import Config
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.fused.block import FusedBlock
from fsdp_qlora.models.generic_block import FrozenLinear
from fsdp_qlora.weights.frozen_bytes import FrozenBytes, FrozenTensor

# Options that decide how long a run is, what numbers it computes and what it may take: a rehearsal asks for the same
# whatever they are. All others count, those that come to be included.
NO_SHAPE = {
    "training": ("num_epochs", "max_steps", "lr", "lr_scheduler", "warmup_ratio", "wd", "grad_norm", "seed"),
    "memory": ("plan_only", "plan_for", "link_gbps", "gpu_memory_gib", "host_memory_gib"),
}
CHANGING = ("version", "expected")  # numbers of modules that count what happened to them


def model_key(model: CausalModel) -> list[Any]:
    """Return the modules, the layouts of their bytes, and what blocks are fused from."""
    units = [[unit.name, unit.home, _layout(unit.frozen)] for unit in model.units]
    blocks = [[path, _fused(block.fused)] for path, block in model.blocks.items()]
    modules = [_module(module) for module in model.modules()]
    config = repr(model.backbone.config.to_dict())  # whose keys and values may be what JSON has not
    return [config, _described(model.precision), units, blocks, modules]


def options_key(config: Config) -> dict[str, Any]:
    """Return the options of the groups that make a model and its step."""
    groups = {name: asdict(getattr(config, name)) for name in ("model", "adapter", "training", "memory")}
    for group, names in NO_SHAPE.items():
        for name in names:
            del groups[group][name]
    return groups


def _fused(fused: object) -> list[Any]:
    if not isinstance(fused, FusedBlock):
        return [_name(fused)]
    return [_described(fused.spec), fused.backend, fused.copies_input, str(fused.dtype)]


def _described(thing: object) -> Any:
    if isinstance(thing, FrozenTensor):
        return [thing.name, thing.shape]
    if isinstance(thing, FrozenLinear):
        return [_described(thing.weight), _described(thing.bias), _described(thing.norms), _module(thing)]
    if is_dataclass(thing) and not isinstance(thing, type):
        return [_name(thing), [_described(getattr(thing, field.name)) for field in fields(thing)]]
    if isinstance(thing, tuple | list):
        return [_described(one) for one in thing]
    return _plain(thing) if _is_plain(thing) else _name(thing)


def _module(module: nn.Module) -> list[Any]:
    """Return its class, its tensors and the plain values that it has."""
    tensors = {**module._parameters, **module._buffers}
    values = {name: _plain(value) for name, value in vars(module).items() if _is_plain(value) and name not in CHANGING}
    return [_name(module), {name: _tensor(t) for name, t in tensors.items() if t is not None}, values]


def _tensor(tensor: Tensor) -> list[Any]:
    return [*tensor.shape, str(tensor.dtype), tensor.requires_grad]


def _layout(frozen: FrozenBytes) -> list[Any]:
    return [[name, repr(entry.codec), entry.shape] for name, entry in frozen.layout.entries.items()]


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _plain(value: object) -> Any:
    return str(value) if isinstance(value, torch.dtype) else value


def _name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
