"""Optimizers over the float32 slices that each rank owns, in a table."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import SGD, Adadelta, Adam, AdamW, Optimizer

from fsdp_qlora.config.options import TrainingOptions
from fsdp_qlora.errors import UserError, first_line

SMALLEST_PAGED = 100_000  # values of a slice; bitsandbytes leaves the state of smaller ones on the GPU
MOMENTS_32BIT, MOMENTS_8BIT = 8, 2  # bytes per parameter of two moments
SCALES_8BIT = 2 * 4 / 256  # bytes per parameter: a float32 scale for each 256 values of a moment

# Makes one for (parameters, lr and weight_decay, device).
Make = Callable[[list[nn.Parameter], dict[str, object], torch.device], Optimizer]


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer as the plan and the step know it."""

    make: Make
    state_bytes: float  # of state in GPU memory per adapter parameter; pages give way, so they count as none
    host_bytes: int = 0  # of state in pages per adapter parameter, which wait in host memory where a GPU is full
    # Whether its step divides gradients by a tensor `grad_scale` and does nothing where a tensor `found_inf` is 1, as
    # PyTorch's fused kernels do: the host need not know the numbers when it launches the step.
    takes_device_scale: Callable[[torch.device], bool] = lambda device: False
    is_blockwise: bool = False  # its state has scales of several values: it cannot be cut anew for other ranks
    library: str | None = None  # that it comes from, where that is not PyTorch: it may not run on every device


def make_optimizer(options: TrainingOptions, parameters: Iterable[nn.Parameter], device: torch.device) -> Optimizer:
    """Make the optimizer of `--optimizer`."""
    settings: dict[str, object] = {"lr": options.lr, "weight_decay": options.wd}
    return OPTIMIZERS[options.optimizer].make(list(parameters), settings, device)


def check_optimizer(options: TrainingOptions, device: torch.device) -> None:
    """Raise UserError where a library cannot do on `device` what `--optimizer` asks of it: tried on one slice."""
    library = OPTIMIZERS[options.optimizer].library
    if library is None:
        return
    slice_ = nn.Parameter(torch.zeros(SMALLEST_PAGED, device=device))
    slice_.grad = torch.ones_like(slice_)
    try:
        make_optimizer(options, [slice_], device).step()
    except (ImportError, RuntimeError, AttributeError, OSError, NotImplementedError) as error:
        raise UserError(
            f"optimizer: {options.optimizer} does not run on {device.type} with the {library} that is installed "
            f"({first_line(error)}); see `python -m {library}`, or take adamw, which needs no {library}"
        ) from error


def state_bytes(optimizer: str, device: str = "cuda") -> float:
    """Return the bytes of optimizer state in a device's memory per adapter parameter, by `--optimizer`.

    On a GPU pages count as none: they take what memory is free there while they are used, and wait in host memory
    otherwise. On a CPU nothing is paged."""
    spec = OPTIMIZERS[optimizer]
    return spec.state_bytes + (0 if device == "cuda" else spec.host_bytes)


def paged_bytes(optimizer: str) -> int:
    """Return the bytes of optimizer state in host memory per adapter parameter, on a GPU without memory for it."""
    return OPTIMIZERS[optimizer].host_bytes


def _on_gpus(device: torch.device) -> bool:
    return device.type == "cuda"


def _everywhere(device: torch.device) -> bool:
    return True


def _adam(kind: type[Adam] | type[AdamW], is_fused: Callable[[torch.device], bool]) -> OptimizerSpec:
    """Return the spec of an Adam. is_fused: by device, whether PyTorch's fused kernel is used."""

    def make(parameters: list[nn.Parameter], settings: dict[str, object], device: torch.device) -> Optimizer:
        return kind(parameters, **settings, fused=is_fused(device))  # type: ignore[arg-type]

    return OptimizerSpec(make, MOMENTS_32BIT, takes_device_scale=is_fused)


def _foreach(kind: Callable[..., Optimizer]) -> Make:
    return lambda parameters, settings, device: kind(parameters, **settings, foreach=True)


def _bitsandbytes(is_paged: bool = False, **more: object) -> Make:
    """Return the maker of its AdamW. In 8 bits, slices of less than 4,096 values are kept in 32 all the same."""

    def make(parameters: list[nn.Parameter], settings: dict[str, object], device: torch.device) -> Optimizer:
        from bitsandbytes import optim as bitsandbytes  # takes seconds to import

        made: Optimizer = bitsandbytes.AdamW(
            parameters, **settings, **more, is_paged=is_paged and device.type == "cuda"
        )
        return made

    return make


# By `--optimizer`.
OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": _adam(AdamW, _on_gpus),
    "adam": _adam(Adam, _on_gpus),
    "fused_adam": _adam(Adam, _everywhere),
    "fused_adamw": _adam(AdamW, _everywhere),
    "adamw_8bit": OptimizerSpec(
        _bitsandbytes(optim_bits=8), MOMENTS_8BIT + SCALES_8BIT, is_blockwise=True, library="bitsandbytes"
    ),
    "paged_adamw": OptimizerSpec(_bitsandbytes(is_paged=True), 0.0, MOMENTS_32BIT, library="bitsandbytes"),
    "paged_adamw_8bit": OptimizerSpec(
        _bitsandbytes(is_paged=True, optim_bits=8),
        SCALES_8BIT,
        MOMENTS_8BIT,
        is_blockwise=True,
        library="bitsandbytes",
    ),
    "sgd": OptimizerSpec(_foreach(SGD), 0.0),
    "adadelta": OptimizerSpec(_foreach(Adadelta), MOMENTS_32BIT),
}
