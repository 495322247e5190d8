"""Optimizers and learning-rate schedules, over the float32 slices that each rank owns."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import SGD, Adadelta, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from fsdp_qlora.config import TrainingOptions


def make_optimizer(options: TrainingOptions, parameters: Iterable[nn.Parameter], device: torch.device) -> Optimizer:
    """The optimizer of `--optimizer`. adam and adamw use PyTorch's fused kernel on a GPU; fused_* everywhere."""
    parameters = list(parameters)
    makers: dict[str, Callable[..., Optimizer]] = {"adamw": AdamW, "adam": Adam, "sgd": SGD, "adadelta": Adadelta}
    kind = options.optimizer.removeprefix("fused_")
    settings: dict[str, object] = {"lr": options.lr, "weight_decay": options.wd}
    if kind in ("adam", "adamw"):
        settings["fused"] = options.optimizer.startswith("fused_") or device.type == "cuda"
    else:
        settings["foreach"] = True
    return makers[kind](parameters, **settings)


def make_schedule(options: TrainingOptions, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Hugging Face's: warm-up over `warmup_ratio` of the steps, then cosine or linear to zero; constant has no warm-up.

    Step i (from 0) of w warm-up steps takes i/w of `lr`, so the first of them takes 0; the fall begins with the whole
    `lr` at step w, and zero is reached after the last step, which still learns.
    """
    return get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=round(options.warmup_ratio * total_steps),
        num_training_steps=total_steps,
    )
