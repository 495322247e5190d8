"""Every kernel compiles for a real card, on a machine without one; decoders fuse no product and sum in one rounding."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

# A process of its own: where TRITON_INTERPRET is set kernels are Python functions and cannot be compiled.
PROLOGUE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fsdp_qlora.kernels import (
    cached_attention, cross_entropy, dora, dropout, embedding, few_rows, glu, glu_lora, hqq, hqq_few_rows, lora_wide,
    nf4, nf4_few_rows, rms_norm, rope,
)


def built(kernel, capability, types, **constants):
    # types: a letter for each argument that is no constant
    full = {"b": "*bf16", "f": "*fp32", "h": "*fp16", "u": "*u8", "l": "*i64", "i": "i32", "F": "fp32", "I": "i64"}
    full |= {"w": "*i32", "s": "*i16"}
    names = [name for name in kernel.arg_names if name not in constants]
    given = {name: full[letter] for name, letter in zip(names, types, strict=True)}
    signature = {name: given.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places)
    fused = not kernel.__name__.startswith(("_dequantize", "_few_rows"))
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 4, "enable_fp_fusion": fused})


def compiled(*args, **constants):
    return built(*args, **constants).asm["ptx"]


words = {8: "u", 4: "w", 3: "s", 2: "s", 1: "u"}
"""
BLOCKS = """
for out, nested, apart in (("b", True, 0), ("h", False, 8), ("f", True, 1)):
    for width in (72, 76):
        tiling = {"NESTED": nested, "ROWS": 64, "APART": apart, "I": width, "FACTOR": out != "h"}
        types = "u" + ("u" if nested else "f") + "fff" + out + "f" + "iii"
        ptx = compiled(nf4._dequantize_kernel, 90, types, **tiling)
        assert "mul" in ptx and "fma.rn.f32" not in ptx, (out, nested)
        types = "uuu" + ("uuu" if nested else "fff") + "fff" + "fff" + "f" + out * 3 + "fff" + "i" * 9
        for count in (2, 3):
            ptx = compiled(nf4._dequantize_rows_kernel, 90, types, COUNT=count, **tiling)
            assert "mul" in ptx and "fma.rn.f32" not in ptx, (out, nested, count)
for bits, floats, out, lines, apart in (
    (8, "b", "b", 0, 0), (4, "b", "b", 0, 8), (3, "h", "f", 0, 1), (2, "f", "f", 8, 0), (1, "b", "h", 8, 8),
    (3, "b", "b", 8, 8),
):
    tiling = {"BITS": bits, "GROUP": 64, "LINES": lines, "ROWS": 256, "APART": apart, "I": 72, "FACTOR": bits < 4}
    ptx = compiled(hqq._dequantize_kernel, 90, words[bits] + "u" + floats * 2 + out + "fii", **tiling)
    assert "mul" in ptx and "fma.rn.f32" not in ptx, bits
    types = words[bits] * 3 + "uuu" + floats * 6 + out * 3 + "fff" + "i" * 6
    for count in (2, 3):
        ptx = compiled(hqq._dequantize_rows_kernel, 90, types, COUNT=count, **tiling)
        assert "mul" in ptx and "fma.rn.f32" not in ptx, (bits, count)
# What --precision fp16_autocast runs on cards before Ampere.
whole = {"APART": 0, "I": 1, "FACTOR": False}
compiled(nf4._dequantize_kernel, 75, "uu" + "fff" + "hf" + "iii", NESTED=True, ROWS=256, **whole)
for bits, lines in ((8, 0), (4, 8), (3, 0)):
    tiling = {"BITS": bits, "GROUP": 64, "LINES": lines, "ROWS": 128}
    compiled(hqq._dequantize_kernel, 75, words[bits] + "u" + "hhh" + "fii", **tiling, **whole)
compiled(cross_entropy._row_kernel, 75, "hlfiiFFF", VOCABULARY=300, SOFTCAP=True, GRADIENT=True, TILE=128)
compiled(embedding._gather_kernel, 75, "flfii", H=5000, TILES=2, TILE=4096)
for softcap, gradient in ((True, True), (False, False)):
    head = {"VOCABULARY": 300, "SOFTCAP": softcap, "GRADIENT": gradient, "TILE": 128}
    compiled(cross_entropy._row_kernel, 86, "blfiiFFF", **head)
compiled(rms_norm._forward_kernel, 86, "bbbbbiiiFF", H=100, HEADS=0, RESIDUAL=True, ROWS=2, COLUMNS=128)
compiled(rms_norm._backward_kernel, 86, "bbbbbiiiiiFF", H=100, HEADS=8, SKIP=True, ROWS=2, COLUMNS=128)
tiles = {"HALF": 24, "HALF_TILE": 32, "HEADS": 4, "Q_GROUPS": 2, "GROUPS": 3, "POSITIONS": True, "BACKWARD": True}
for rest in (0, 12):
    tiles |= {"REST": rest, "REST_TILE": 16 if rest else 1, "INVERSE": not rest}
    compiled(rope._rope_kernel, 86, "bbbbffl" + "i" * 14, n_k=1, **tiles)
for activation in glu.ACTIVATIONS:
    compiled(glu._backward_kernel, 86, "bbbiii", I=300, TILES=3, TILE=128, ACTIVATION=activation)
compiled(glu._forward_kernel, 86, "bbbiii", I=300, TILES=3, TILE=128, ACTIVATION="silu")
for down in (0, 12):
    ranks = {"R_GATE": 8, "R_UP": 0, "R_DOWN": down, "R": 16, "ROWS": 32, "COLUMNS": 64, "STAGES": 3}
    ranks |= {"DOTS": down > 0, "BIAS": down > 0, "KEEPS_H": down == 0, "ACTIVATION": "silu", "PRECISION": "tf32"}
    compiled(glu_lora._glu_lora_kernel, 86, "b" * 9 + "fb" + "i" * 7, I=300, **ranks)
compiled(embedding._gather_kernel, 86, "blbii", H=5000, TILES=2, TILE=4096)
for count in "iI":
    compiled(dropout._dropout_kernel, 86, f"bb{count}FFI", ADD=True, TILE=128)
widths = {"O": 96, "H": 200, "R": 24, "RANK": 7, "ROWS": 32, "COLUMNS": 32, "TILES": 2, "TILE": 128}
for count in (1, 2, 3):
    compiled(lora_wide._lay_kernel, 86, "b" * 7 + "i" * 8, COUNT=count, **widths)
for window, capped, is_float in ((0, False, False), (64, True, True)):
    shape = {"C": 300, "K": 2, "G": 4, "D": 96, "PARTS": 3, "TILES": 2, "TILE": 64, "G_TILE": 16, "D_TILE": 128}
    letter = "f" if is_float else "b"
    types = letter * 3 + "l" + "fff" + "FF" + "ii"
    compiled(cached_attention._part_kernel, 86, types, WINDOW=window, SOFTCAP=capped, FLOAT=is_float, **shape)
compiled(cached_attention._join_kernel, 86, "fffb", G=4, D=96, PARTS=3, P_TILE=4, D_TILE=128, TOGETHER=2)
tiling = {"R": 24, "COLUMNS": 32, "ROWS": 16}
compiled(dora._factors_kernel, 86, "bbfbfiiFi", **tiling)
compiled(dora._finish_kernel, 86, "bbffbiii", **tiling)
compiled(dora._scale_kernel, 86, "bfi", H=200, TILES=2, TILE=128)
compiled(dora._dots_kernel, 86, "bbbfiiii", O=300, BIAS=True, ROWS=32, COLUMNS=128)
"""
FEW_ROWS = """
from fsdp_qlora.weights.codecs import HQQ, NF4

HQQ3 = HQQ(3, 64, 1, torch.bfloat16, optimize=False)
for out, nested, rank, rows, splits in (
    ("b", True, 24, 8, 8), ("h", False, 0, 16, 1), ("b", False, 16, 64, 2), ("f", True, 8, 8, 2),
):
    tiling = {"R": rank, "R_TILE": 32 if rank > 16 else 16, "ROWS": rows, "OUTPUTS": 64, "BLOCKS": 2, "STEPS": 4}
    tiling |= {"SPLITS": splits, "BIAS": rank > 0, "NESTED": nested, "I": 4096}
    types = out + "u" + ("u" if nested else "f") + "fff" + out * 4 + "fw" + "iiii"
    for capability in (86, 90):
        ptx = compiled(nf4_few_rows._few_rows_kernel, capability, types, **tiling)
        assert out == "f" or "fma.rn.f32" not in ptx, (out, nested, rank)
for bits, group in ((8, 64), (4, 64), (3, 128), (2, 256), (1, 32)):
    tiling = {"R": 24, "R_TILE": 32, "ROWS": 8, "OUTPUTS": 64, "STEPS": 4, "SPLITS": 8, "BIAS": True, "I": 4096}
    tiling |= {"BITS": bits, "GROUP": group, "GROUPS": max(1, 128 // group), "WORDS": 16}
    types = "b" + words[bits] + "u" + "bb" + "bbbb" + "fw" + "iiii"
    ptx = compiled(hqq_few_rows._few_rows_kernel, 86 if bits % 2 else 90, types, **tiling)
    assert "fma.rn.f32" not in ptx, (bits, group)
launched = []
few_rows.launch = lambda kernel, grid, *args, **options: launched.append((kernel, options))
for rows, rank, codec in ((8, 64, NF4(False)), (32, 64, NF4(False)), (32, 1024, NF4(False)), (32, 1024, HQQ3)):
    x, out, xa, b = (
        torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        for shape in ((rows, 4096), (rows, 128), (rows, rank), (128, rank))
    )
    parts = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (dtype, shape) in codec.parts((128, 4096)).items()
    }
    codec.few_rows(x, parts, out, None, xa, b)
    kernel, options = launched.pop()
    tiling = {name: value for name, value in options.items() if name.isupper()}
    types = "bsubb" if codec is HQQ3 else "buffff"
    shared = built(kernel, 86, types + "bbbbfwiiii", **tiling).metadata.shared
    assert shared <= 99 << 10, (rows, rank, shared)  # a gaming card has no more
"""

SHARED_MEMORY = """
from fsdp_qlora.kernels import device
from fsdp_qlora.kernels.attention_math import Masking

launched = []
device.count_launch = lambda *launch: launched.append(launch)
letters = {torch.bfloat16: "b", torch.float32: "f", torch.float16: "h", torch.int64: "l", int: "i", float: "F"}


def empty(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


for capability, half, most in ((75, torch.float16, 64 << 10), (86, torch.bfloat16, 99 << 10)):
    for dtype in (half, torch.float32):
        for rank in (32, 64):
            x = empty(512, 256, dtype=dtype)
            beside = empty(512, rank, dtype=dtype), empty(256, rank, dtype=dtype)
            of_down = empty(512, rank, dtype=dtype), empty(rank, 256, dtype=dtype)
            dots, bias = empty(1, 512, dtype=torch.float32), empty(512, dtype=dtype)
            glu_lora.glu_backward_lora_(x, x, x, "gelu_tanh", beside, beside, of_down, dots=dots, bias=bias)
        for heads, size in ((32, 256), (8, 128)):
            q, kept = empty(1, heads, size, dtype=dtype), empty(1, 4096, 1, size, dtype=dtype)
            cached_attention.attend_cached(q, kept, kept, empty(1, dtype=torch.int64), Masking(0.1, 512, 50.0))
    while launched:
        kernel, args, options = launched.pop()
        types = "".join(letters[arg.dtype if isinstance(arg, torch.Tensor) else type(arg)] for arg in args)
        tiling = {name: value for name, value in options.items() if name.isupper()}
        shared = built(kernel, capability, types, **tiling).metadata.shared
        assert shared <= most, (capability, kernel.__name__, types, tiling, shared)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [BLOCKS, FEW_ROWS, SHARED_MEMORY], ids=["blocks", "few rows", "shared memory of small cards"]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels' own tests compile them on a GPU")
def test_every_kernel_compiles_and_decoders_are_not_fused(script, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", PROLOGUE + script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
