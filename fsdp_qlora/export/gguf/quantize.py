"""Numbers as GGUF stores them: which type each tensor gets in a quantization.

The mixes are those of llama.cpp's `llama-quantize` without an importance matrix (src/llama-quant.cpp,
`llama_tensor_get_type_impl`, October 2026).
"""

from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from fsdp_qlora.errors import UserError
from fsdp_qlora.runtime.libraries import installed

# Types of 256 numbers a block -> the type for rows that are no multiple of it.
SMALLER_BLOCKS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
K_TYPES = frozenset(SMALLER_BLOCKS)


@dataclass(frozen=True)
class Quantization:
    """main: the type of most matrices. mixes: whether attention's v and the MLP's down get Q6_K in some layers."""

    main: Type
    file_type: int
    mixes: bool = False


QUANTIZATIONS = {
    "f32": Quantization(Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": Quantization(Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": Quantization(Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": Quantization(Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q6_k": Quantization(Type.Q6_K, gguf.LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": Quantization(Type.Q5_K, gguf.LlamaFileType.MOSTLY_Q5_K_M, mixes=True),
    "q4_k_m": Quantization(Type.Q4_K, gguf.LlamaFileType.MOSTLY_Q4_K_M, mixes=True),
}


@dataclass(frozen=True)
class Model:
    """What of a model the mixes depend on. arch: as in `gguf.MODEL_ARCH`. tied: there is no output.weight."""

    arch: str
    layers: int
    tied: bool


def type_of(name: str, shape: tuple[int, ...], quantization: Quantization, model: Model) -> Type:
    """Return the type of a tensor of that name in GGUF."""
    main = quantization.main
    if len(shape) < 2 or "_norm" in name or not name.endswith(".weight") or name.startswith("rope_"):
        return Type.F32
    if main in (Type.F32, Type.F16, Type.BF16):
        return main
    chosen = main
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    if name == "output.weight" or (model.tied and name == "token_embd.weight"):
        chosen = Type.Q6_K if main is not Type.Q8_0 and shape[-1] % gguf.QK_K == 0 else Type.Q8_0
    elif "attn_v." in name or "attn_qkv." in name:
        if quantization.mixes and _gets_more_bits(layer, model.layers):
            chosen = Type.Q6_K
        elif (
            main is Type.Q4_K and model.arch in ("LLAMA", "QWEN2") and model.layers == 80
        ):  # 70B: eight heads share one
            chosen = Type.Q5_K
    elif "ffn_down." in name and quantization.mixes and _gets_more_bits(layer, model.layers):
        chosen = Type.Q6_K
    return _fitting(chosen, shape[-1])


def nbytes_of(kind: Type, shape: tuple[int, ...]) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def check_installed(quantization: Quantization) -> None:
    """Raise UserError where a package is missing, with the command that installs it."""
    if quantization.main in K_TYPES and not installed("libggml"):
        raise UserError(
            "quantization: K types are encoded by the package libggml-python, which is not installed; "
            "pip install 'libggml-python>=0.20.2', or use --quantization q8_0"
        )


def _gets_more_bits(layer: int, layers: int) -> bool:
    """Tell whether a layer's sensitive matrices get Q6_K in a mix: first and last eighth, each third between."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def _fitting(kind: Type, width: int) -> Type:
    """Return the type, or that which llama.cpp takes for rows that are no multiple of its block."""
    if width % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = SMALLER_BLOCKS.get(kind, Type.F16)
    return Type.F16 if width % gguf.GGML_QUANT_SIZES[kind][0] else kind
