"""Optimizers and learning-rate schedules, over the float32 slices that each rank owns."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import SGD, Adadelta, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fsdp_qlora.config.options import TrainingOptions
from fsdp_qlora.errors import UserError, first_line

# How bitsandbytes' AdamW keeps its state. In 8 bits: with a float32 scale for each 256 values, and slices of less than
# 4,096 values in 32 bits all the same. Paged: in unified memory, slices of less than 100,000 values on the GPU.
BITSANDBYTES: dict[str, dict[str, object]] = {
    "adamw_8bit": {"optim_bits": 8},
    "paged_adamw": {"is_paged": True},
    "paged_adamw_8bit": {"optim_bits": 8, "is_paged": True},
}
SMALLEST_PAGED = 100_000


def make_optimizer(options: TrainingOptions, parameters: Iterable[nn.Parameter], device: torch.device) -> Optimizer:
    """The optimizer of `--optimizer`. adam and adamw use PyTorch's fused kernel on a GPU; fused_* everywhere.

    On a CPU the paged ones page nothing: their state lies in its memory anyway."""
    parameters = list(parameters)
    settings: dict[str, object] = {"lr": options.lr, "weight_decay": options.wd}
    if options.optimizer in BITSANDBYTES:
        # It takes seconds to import: this is its one door for optimizers.
        from bitsandbytes import optim as bitsandbytes

        settings |= BITSANDBYTES[options.optimizer]
        settings["is_paged"] = settings.get("is_paged", False) and device.type == "cuda"
        made: Optimizer = bitsandbytes.AdamW(parameters, **settings)
        return made
    makers: dict[str, Callable[..., Optimizer]] = {"adamw": AdamW, "adam": Adam, "sgd": SGD, "adadelta": Adadelta}
    kind = options.optimizer.removeprefix("fused_")
    if kind in ("adam", "adamw"):
        settings["fused"] = options.optimizer.startswith("fused_") or device.type == "cuda"
    else:
        settings["foreach"] = True
    return makers[kind](parameters, **settings)


def scales_and_skips(optimizer: Optimizer) -> bool:
    """Whether its step divides gradients by a tensor `grad_scale` and does nothing where a tensor `found_inf` is 1, as
    PyTorch's fused kernels do: nobody need know the numbers when it is launched."""
    return isinstance(optimizer, Adam | AdamW) and bool(optimizer.defaults.get("fused"))


def check_optimizer(options: TrainingOptions, device: torch.device) -> None:
    """Raises UserError where bitsandbytes cannot do on `device` what `--optimizer` asks of it: tried on one slice."""
    if options.optimizer not in BITSANDBYTES:
        return
    slice_ = nn.Parameter(torch.zeros(SMALLEST_PAGED, device=device))
    slice_.grad = torch.ones_like(slice_)
    try:
        make_optimizer(options, [slice_], device).step()
    except (ImportError, RuntimeError, AttributeError, OSError, NotImplementedError) as error:
        raise UserError(
            f"optimizer: {options.optimizer} does not run on {device.type} with the bitsandbytes that is installed "
            f"({first_line(error)}); see `python -m bitsandbytes`, or take adamw, which needs no bitsandbytes"
        ) from error


def state_bytes(optimizer: str, device: str = "cuda") -> float:
    """Bytes of optimizer state in a device's memory per adapter parameter, by `--optimizer`.

    On a GPU the moments of the paged ones count as none, since they give way: they take what memory is free there while
    they are used, and wait in host memory otherwise."""
    kind = optimizer.removeprefix("fused_")
    if kind == "sgd":
        return 0.0
    paged = kind.startswith("paged_") and device == "cuda"
    if kind.endswith("_8bit"):
        return 2 * ((0 if paged else 1) + 4 / 256)
    return 0.0 if paged else 8.0


def paged_bytes(optimizer: str) -> int:
    """Bytes of optimizer state in host memory per adapter parameter, on a GPU that has no room for it."""
    if not optimizer.startswith("paged_"):
        return 0
    return 2 if optimizer.endswith("_8bit") else 8


def make_schedule(options: TrainingOptions, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Warm-up over `warmup_ratio` of the steps, then cosine or linear to zero; constant has no warm-up.

    Step i (from 0) of w warm-up steps takes i/w of `lr`, so the first of them takes 0; the fall begins with the whole
    `lr` at step w, and zero is reached after the last step, which still learns. As transformers' `get_scheduler`, whose
    import brings PEFT and bitsandbytes along: a quarter of the time of all imports, on every rank."""
    warm_up = round(options.warmup_ratio * total_steps)

    def share(step: int) -> float:
        if options.lr_scheduler == "constant":
            return 1.0
        if step < warm_up:
            return step / warm_up
        falling = max(1, total_steps - warm_up)
        if options.lr_scheduler == "linear":
            return max(0.0, (total_steps - step) / falling)
        return (1 + math.cos(math.pi * min(1.0, (step - warm_up) / falling))) / 2

    return LambdaLR(optimizer, share)
