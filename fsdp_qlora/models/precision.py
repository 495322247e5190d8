"""What each `--precision` mode means: the dtype of the residual stream, of the matmuls, of stored frozen tensors."""

from dataclasses import dataclass

import torch

from fsdp_qlora.errors import UserError


@dataclass(frozen=True)
class Precision:
    """dtypes of a run; in all of them the adapters' master weights, gradient sums and optimizer state are float32.

    stream: the residual stream, and the frozen embedding, norms and head as they are stored.
    compute: matmuls, attention and the adapters' working copy.
    autocast: whether `torch.autocast` bridges the two (they differ, or the mode's name says so).
    scale_loss: whether the loss is scaled dynamically so that float16 gradients do not underflow.
    """

    stream: torch.dtype
    compute: torch.dtype
    autocast: bool = False
    scale_loss: bool = False

    @property
    def wider(self) -> str:
        """The mode to advise where numbers were not finite; '' where there is none wider."""
        if self.stream is torch.bfloat16:
            return "bf16_autocast (float32 residual stream)"
        return "" if self.compute is torch.float32 else "fp32 (many times slower)"


MODES = {
    "fp32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.bfloat16, torch.bfloat16),
    "fp16_autocast": Precision(torch.float32, torch.float16, autocast=True, scale_loss=True),
    "bf16_autocast": Precision(torch.float32, torch.bfloat16, autocast=True),
    "bf16_buffers_autocast": Precision(torch.bfloat16, torch.bfloat16, autocast=True),
}


def precision_of(mode: str, device: torch.device) -> Precision:
    """The dtypes of `mode`. Raises UserError where the card has no bfloat16 (before Ampere)."""
    precision = MODES[mode]
    if device.type == "cuda" and needs_bf16(mode) and torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(
            f"precision: {mode} needs bfloat16, which {torch.cuda.get_device_name(device)} does not have; "
            "use --precision fp16_autocast or --precision fp32"
        )
    return precision


def needs_bf16(mode: str) -> bool:
    return MODES[mode].compute is torch.bfloat16
