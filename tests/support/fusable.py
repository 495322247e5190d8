"""One small model three ways: our blocks, plain Hugging Face layers in the same dtype, and these in true float64.

All three hold the same numbers: what our frozen bytes decode to and the same adapters. Compared is the stack of
decoder layers, without embedding, final norm and head, from a random input and for a random gradient of its output.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from fsdp_qlora.adapters.table import ADAPTERS
from fsdp_qlora.config.options import AdapterOptions
from fsdp_qlora.config.parse import parse
from fsdp_qlora.models.assemble import Fuse, Recipe, assemble
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.fused.fuse import Fusion, fuse
from fsdp_qlora.models.precision import Precision
from fsdp_qlora.models.skeleton import build, decoder_layers
from fsdp_qlora.placement.load import encode
from fsdp_qlora.placement.replicated import Replicated
from fsdp_qlora.plan.plan import BlockPlan
from fsdp_qlora.plan.planning import keep_activations, wishes_of
from fsdp_qlora.weights.codecs import NF4, Codec
from tests.support.runs import Options, flags

Results = dict[str, Tensor]  # out, d_h, and the gradient of each adapter matrix by its name


@dataclass
class Subject:
    """Our model, of generic blocks at first, with the config that its Hugging Face counterpart is made from."""

    model: CausalModel
    hf_config: PretrainedConfig
    weights: dict[str, Tensor]  # name in the checkpoint -> what the frozen bytes decode to, in compute dtype
    make: Callable[[Fuse | None], tuple[CausalModel, Fusion]]  # the model anew, with the same weights, without adapters

    def fuse(self, **options: object) -> Fusion:
        """Make the model anew, as `--option value` would have it, with the same weights and adapters."""
        given: Options = {"model_name": "none", "context_length": 64} | options
        device = next(iter(self.weights.values())).device
        config, adapters = parse(flags(given)), self.adapters
        self.model, fusion = self.make(partial(fuse, config, device))
        set_adapters(self.model, adapters)
        self.model.backbone.to(device)
        wishes = wishes_of(config.memory, 1)
        kept = BlockPlan(True, wishes.keep or "input", bool(wishes.offload))
        keep_activations(self.model, [kept] * len(self.model.blocks), 64, device)
        return fusion

    def set_backend(self, backend: str) -> None:
        for block in self.model.blocks.values():
            block.fused = replace(block.fused, backend=backend)

    @property
    def adapters(self) -> dict[str, nn.Parameter]:
        return {
            f"{path}.{name}": parameter
            for path, linear in self.model.linears().items()
            for name, parameter in linear.adapter_parameters().items()
        }

    def run(self, h: Tensor, d_out: Tensor) -> Results:
        self.model.rest.bind()
        return run(self.model.backbone, self.adapters, h, d_out)

    def forward(self, h: Tensor) -> Tensor:
        self.model.rest.bind()
        return self.model.backbone(inputs_embeds=h, use_cache=False)[0]

    def reference(self, dtype: torch.dtype) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """(Hugging Face's layers with eager attention, their adapters), in `dtype`."""
        config = copy.deepcopy(self.hf_config)
        device = next(iter(self.weights.values())).device
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).to(device)
        assert not model.load_state_dict(self.weights, strict=False).unexpected_keys
        adapters = {}
        for path, linear in self.model.linears().items():
            if linear.lora_A is not None and linear.lora_B is not None:
                magnitude = linear.lora_magnitude_vector
                lora = LoraLinear(model.get_submodule(path), linear.lora_A, linear.lora_B, magnitude, linear.scale)
                model.set_submodule(path, lora)
                adapters |= {f"{path}.lora_A": lora.a, f"{path}.lora_B": lora.b}
                if lora.magnitude is not None:
                    adapters[f"{path}.lora_magnitude_vector"] = lora.magnitude
        model.base_model.norm = nn.Identity()
        return model.base_model, adapters

    def plain(self, h: Tensor, d_out: Tensor) -> Results:
        backbone, adapters = self.reference(h.dtype)
        return run(backbone, adapters, h, d_out)

    def truth(self, h: Tensor, d_out: Tensor) -> Results:
        backbone, adapters = self.reference(torch.float64)
        with TrueFloat64():
            return run(backbone, adapters, h.double(), d_out.double())


class LoraLinear(nn.Module):
    """LoRA as its paper has it; with a magnitude DoRA, its steps as in PEFT's `DoraLinearLayer`."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, magnitude: Tensor | None, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a, self.b, self.magnitude = (
            None if m is None else nn.Parameter(m.detach().to(base.weight.dtype)) for m in (a, b, magnitude)
        )

    def forward(self, x: Tensor) -> Tensor:
        result, lora = self.base(x), F.linear(F.linear(x, self.a), self.b)
        if self.magnitude is None:
            return result + lora * self.scale
        weight = self.base.weight + self.scale * (self.b @ self.a).detach()
        factor = self.magnitude / torch.linalg.norm(weight, dim=1).to(weight.dtype)
        base = result if self.base.bias is None else result - self.base.bias
        return result + (factor - 1) * base + factor * lora * self.scale


class TrueFloat64(TorchFunctionMode):
    """Keeps Hugging Face's norms and softmaxes from rounding float64 to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def run(backbone: nn.Module, adapters: Mapping[str, nn.Parameter], h: Tensor, d_out: Tensor) -> Results:
    h = h.detach().requires_grad_()
    out = backbone(inputs_embeds=h, use_cache=False)[0]
    grads = torch.autograd.grad(out, [h, *adapters.values()], d_out)
    return dict(zip(("out", "d_h", *adapters), (out.detach(), *grads), strict=True))


def subject(
    hf_config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    codec: Codec | None = None,
    adapter: AdapterOptions | None = None,
    kind: str = "lora",
    precision: Precision | None = None,
    change: Callable[[nn.Module], None] = lambda layer: None,
) -> Subject:
    """A random model of that config. codec: of its linears; default: NF4, double-quantized. kind: of its adapters.

    precision: default: `dtype` throughout. change: called with each decoder layer of the skeleton."""
    codec = codec or NF4(double_quant=True)
    adapter = adapter or AdapterOptions(lora_rank=4, lora_alpha=6.0)
    torch.manual_seed(0)
    state = AutoModelForCausalLM.from_config(copy.deepcopy(hf_config), dtype=torch.float32).state_dict()
    for value in state.values():
        if value.ndim == 1:  # norms and biases start as ones and zeros, which hide a mix-up
            value += torch.randn_like(value) * 0.1
    precision = precision or Precision(dtype, dtype)
    recipe = Recipe(precision, lambda name: codec, remat=None, shards=1, adapter=ADAPTERS[kind])

    def make(fuse: Fuse | None = None) -> tuple[CausalModel, Fusion]:
        skeleton, placement = build(hf_config, precision, "eager"), Replicated()
        for layer in decoder_layers(skeleton)[1]:
            change(layer)
        model, fusion = assemble(skeleton, recipe, adapter, fuse)
        placement.prepare(model)
        for unit in model.units:
            placement.store(unit, encode(unit, state, device))
        model.backbone.norm = model.final_norm = nn.Identity()
        return model, fusion

    model, _ = make()
    weights = {
        source: unit.frozen.decode(entry, dtype).clone()
        for unit in model.units
        for entry, source in unit.sources.items()
    }
    for linear in model.linears().values():
        if linear.lora_A is not None and linear.lora_B is not None:
            for name in ("lora_A", "lora_B"):
                matrix = getattr(linear, name)
                values = torch.randn(matrix.shape) / matrix.shape[1] ** 0.5 * 0.5
                setattr(linear, name, nn.Parameter(values.to(device, dtype)))
            if linear.norms is not None:
                magnitude = linear.norms.decode(dtype) * (0.5 + torch.rand(linear.out_features, device=device))
                linear.lora_magnitude_vector = nn.Parameter(magnitude.to(dtype))
            linear.values_change()
    model.backbone.to(device)
    return Subject(model, hf_config, weights, make)


def set_adapters(model: CausalModel, adapters: Mapping[str, nn.Parameter]) -> None:
    """Give a model these very parameters, by `Subject.adapters`' names."""
    for path, linear in model.linears().items():
        for name in linear.adapter_parameters():
            setattr(linear, name, adapters[f"{path}.{name}"])
        linear.values_change()


def inputs(config: PretrainedConfig, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """[h, d_out], random [B, S, H]."""
    make = torch.Generator().manual_seed(shape[1])
    return [torch.randn(*shape, config.hidden_size, generator=make).to(device, dtype) for _ in range(2)]
