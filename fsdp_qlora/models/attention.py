"""Which attention runs: transformers' implementation in the skeleton, and the kernels' backend in fused blocks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels.attention import Masking
from fsdp_qlora.models.fused.spec import AttentionSpec
from fsdp_qlora.models.precision import Precision
from fsdp_qlora.models.skeleton import model_class, text_config
from fsdp_qlora.runtime.libraries import installed

Chooser = Callable[[torch.device, torch.dtype, tuple[int, int, int, int, int], Masking], str]  # as `fastest`
BACKEND_OF = {"flash_attention_2": "flash_attn"}  # `attention` options that ask for one backend of fused blocks


@dataclass(frozen=True)
class Attention:
    """An attention implementation of transformers, and why it was chosen."""

    name: str
    reason: str


def choose_attention(wanted: str, config: PretrainedConfig, precision: Precision, device: torch.device) -> Attention:
    """`auto` is FlashAttention-2 where flash-attn is installed and card and dtype allow it, else sdpa where it can."""
    able = device.type == "cuda" and precision.compute is not torch.float32
    has_flash_attn = installed("flash_attn")
    sdpa_can = _runs_on_sdpa(config)
    if wanted == "auto":
        if able and has_flash_attn and torch.cuda.get_device_capability(device) >= (8, 0):
            return Attention("flash_attention_2", "flash-attn is installed")
        if not sdpa_can:
            return Attention(
                "eager", f"sdpa cannot do what {config.model_type} does, flash-attn can; memory is quadratic"
            )
        return Attention("sdpa", "flash-attn is not installed" if able else "flash-attn is for 16-bit compute on a GPU")
    if wanted == "flash_attention_2" and not (able and has_flash_attn):
        why = "is not installed (pip install flash-attn)" if able else "needs a GPU and 16-bit compute"
        raise UserError(f"attention: flash_attention_2 {why}; use --attention auto or sdpa")
    if wanted == "sdpa" and not sdpa_can:
        raise UserError(
            f"attention: sdpa cannot do what {config.model_type} does (a softcap); use --attention auto or eager"
        )
    return Attention(wanted, "as asked")


def _runs_on_sdpa(config: PretrainedConfig) -> bool:
    """Whether the model's class says so and its scores have no softcap, which PyTorch's attention cannot apply: the
    Gemma 2 of transformers 5.17 says that it can, and leaves the softcap out."""
    if getattr(text_config(config), "attn_logit_softcapping", None) is not None:
        return False
    return bool(getattr(model_class(config), "_supports_sdpa", True))  # of none, `build` says what is wrong with it


def choose_backend(
    wanted: str,
    precision: Precision,
    spec: AttentionSpec,
    shape: tuple[int, int],
    device: torch.device,
    choose: Chooser,
) -> str:
    """Return the backend of a fused block for micro-batches of shape (B, S): the one that is asked for, else what
    `choose` finds."""
    if wanted in BACKEND_OF:
        return BACKEND_OF[wanted]
    return choose(device, precision.compute, (*shape, spec.heads, spec.kv_heads, spec.head_dim), spec.masking)
