"""Every op of kernels/ on the shapes of Llama-3-8B and Llama-2-70B: first whether it is right, then how fast it is.

    python -m benchmarks.ops results.json [--only dequantize,rms_norm,...]

Nothing is timed if a result is wrong: decoders must equal bitsandbytes and hqq bit for bit, every other op must be at
most twice as far from float64 as plain PyTorch in bf16. Rows show milliseconds, GB/s or TFLOP/s, that as a share of
this device's measured copy bandwidth or matmul rate, and the same work by PyTorch's own ops, bitsandbytes, and Liger
where it is installed. Without a GPU tiny shapes run, to see that the script does; those numbers mean nothing.
"""

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F

from benchmarks.ops_gate import BF16, DEVICE, FEW_ROWS_CODECS, ON_GPU, gate, random, size
from benchmarks.ops_hqq import DECODED, ENCODED, dequantize_hqq, encode_hqq, hqq_gate
from benchmarks.timing import copies, copy_bandwidth, environment, matmul_rate, milliseconds
from fsdp_qlora.kernels.cross_entropy import linear_cross_entropy
from fsdp_qlora.kernels.embedding import gather_rows
from fsdp_qlora.kernels.glu import glu_backward_, glu_forward
from fsdp_qlora.kernels.lora import Adapter, Projection, project, project_backward
from fsdp_qlora.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from fsdp_qlora.kernels.rope import rope_, rope_tables
from fsdp_qlora.weights.codecs import NF4, FewRowsCodec


class Table:
    """Collects rows; a row is one op at one shape: ours beside others, and the floor."""

    def __init__(self) -> None:
        self.copy, self.matmul = copy_bandwidth(DEVICE), matmul_rate(DEVICE)
        self.rows: list[dict] = []
        print(f"copy {self.copy:,.0f} GB/s, bf16 matmul {self.matmul:,.0f} TFLOP/s")

    def memory(self, op: str, shape: str, n_bytes: float, ms: dict[str, float]) -> None:
        self.add(op, shape, ms, n_bytes / ms["ours"] / 1e6, "GB/s", self.copy)

    def arithmetic(self, op: str, shape: str, flops: float, ms: dict[str, float]) -> None:
        self.add(op, shape, ms, flops / ms["ours"] / 1e9, "TFLOP/s", self.matmul)

    def add(self, op: str, shape: str, ms: dict[str, float], rate: float, unit: str, floor: float) -> None:
        self.rows.append({"op": op, "shape": shape, "ms": ms, "rate": rate, "unit": unit, "of_floor": rate / floor})
        others = "  ".join(f"{name} {value:.3f}" for name, value in ms.items() if name != "ours")
        print(
            f"{op:<22}{shape:<26}{ms['ours']:8.3f} ms{rate:8,.0f} {unit:<8}{rate / floor:5.0%}   {others}", flush=True
        )


def peer(module: str, name: str) -> Any:
    """Another library's op, or None where it is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return None


# ---- the timings: each a function of the table and one case


def dequantize(table: Table, out_features: int, in_features: int, double_quant: bool) -> None:
    shape = size(out_features), size(in_features)
    n, codec = shape[0] * shape[1], NF4(double_quant)
    n_bytes = 2 * n + n / 2 + (n / 64 if double_quant else n / 16)
    ours, theirs, wide = [], [], []
    for _ in range(copies(int(n_bytes))):
        weight = random(*shape)
        codes, state = bnb.quantize_4bit(weight, compress_statistics=double_quant, quant_type="nf4")
        parts, columns = codec.encode(weight), random(shape[0], shape[1] + 64)[:, : shape[1]]
        ours.append(partial(codec.decode, parts, shape, BF16, weight))
        wide.append(partial(codec.decode, parts, shape, BF16, columns))
        out = {"out": weight} if ON_GPU else {}  # bitsandbytes has no such form on a CPU
        theirs.append(partial(bnb.dequantize_4bit, codes, state, **out))
    ms = {"ours": milliseconds(ours), "in a wider": milliseconds(wide), "bitsandbytes": milliseconds(theirs)}
    table.memory("dequantize", f"{shape[0]}x{shape[1]}{' double' if double_quant else ''}", n_bytes, ms)


def few_rows(table: Table, out_features: int, in_features: int, rows: int, codec: FewRowsCodec) -> None:
    """Multiply a few rows: by the codes, by a decoded copy, and by one that is decoded for it."""
    shape = size(out_features), size(in_features)
    n_bytes = sum(dtype.itemsize * math.prod(sizes) for dtype, sizes in codec.parts(shape).values())
    if not ON_GPU:  # the kernel is Triton's alone
        return
    ours, kept, decoded, x, out = [], [], [], random(rows, shape[1]), random(rows, shape[0])
    for _ in range(copies(int(n_bytes))):
        weight = random(*shape)
        parts = codec.encode(weight)
        ours.append(partial(codec.few_rows, x, parts, out, None, None, None))
        kept.append(partial(torch.mm, x, weight.t(), out=out))
        decoded.append(partial(_decode_and_multiply, codec, parts, weight, x, out))
    ms = {"ours": milliseconds(ours), "copy kept": milliseconds(kept), "decoded": milliseconds(decoded)}
    table.memory(f"{codec.name} x {rows} rows", f"{shape[0]}x{shape[1]}", n_bytes, ms)


def _decode_and_multiply(
    codec: FewRowsCodec, parts: dict[str, torch.Tensor], weight: torch.Tensor, x: torch.Tensor, out: torch.Tensor
) -> None:
    torch.mm(x, codec.decode(parts, tuple(weight.shape), BF16, weight).t(), out=out)


def norm(table: Table, tokens: int, hidden: int) -> None:
    tokens, hidden = size(tokens), size(hidden)
    n, name, weight = tokens * hidden, f"{tokens}x{hidden}", random(hidden)
    sets = [(random(tokens, hidden), random(tokens, hidden)) for _ in range(copies(4 * n))]

    def both(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x + y
        return h, F.rms_norm(h, (hidden,), weight, 1e-5)

    ms = {
        "ours": milliseconds([partial(rms_norm_forward, x, weight, 1e-5, out=y) for x, y in sets]),
        "torch": milliseconds([partial(F.rms_norm, x, (hidden,), weight, 1e-5) for x, _ in sets]),
    }
    liger = peer("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    if liger is not None:
        ms["liger"] = milliseconds([partial(liger.apply, x, weight, 1e-5) for x, _ in sets])
    table.memory("rms_norm forward", name, 4 * n, ms)
    ms = {
        "ours": milliseconds(
            [partial(rms_norm_forward, x, weight, 1e-5, residual=y, sum_out=y, out=x) for x, y in sets]
        ),
        "torch": milliseconds([partial(both, x, y) for x, y in sets]),
    }
    table.memory("add + rms_norm", name, 8 * n, ms)
    back = [partial(rms_norm_backward, y, x, weight, 1e-5, skip=y, out=y) for x, y in sets]
    table.memory("rms_norm backward", name, 6 * n, {"ours": milliseconds(back)})


def rotary(table: Table, tokens: int, n_q: int, n_k: int) -> None:
    sequence = size(tokens) // 4
    cos, sin = rope_tables(5e5 ** -(torch.arange(0, 64, device=DEVICE) / 64), sequence)
    wide_cos, wide_sin = (torch.cat([t, t], -1)[:, None].to(BF16) for t in (cos, sin))
    q, k = random(4, sequence, n_q, 128), random(4, sequence, n_k, 128)

    def eager() -> list[torch.Tensor]:
        return [x * wide_cos + torch.cat([-x[..., 64:], x[..., :64]], -1) * wide_sin for x in (q, k)]

    ms = {"ours": milliseconds([partial(rope_, q, k, cos, sin)]), "torch": milliseconds([eager])}
    table.memory("rope in place", f"{4 * sequence}x({n_q}+{n_k})x128", 4 * (q.numel() + k.numel()), ms)


def gated(table: Table, tokens: int, width: int) -> None:
    tokens, width = size(tokens), size(width)
    n, name = tokens * width, f"{tokens}x{width}"
    gate, up, d_h = (random(tokens, width) for _ in range(3))
    ms = {
        "ours": milliseconds([partial(glu_forward, gate, up, "silu", out=torch.empty_like(gate))]),
        "torch": milliseconds([lambda: F.silu(gate) * up]),
    }
    liger = peer("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
    if liger is not None:
        ms["liger"] = milliseconds([partial(liger.apply, gate, up)])
    table.memory("swiglu forward", name, 6 * n, ms)
    table.memory(
        "swiglu backward", name, 12 * n, {"ours": milliseconds([lambda: glu_backward_(d_h, gate, up, "silu")])}
    )


def lora(table: Table, tokens: int, hidden: int, n_kv: int, rank: int) -> None:
    """q, k, v of one input: what the adapters cost over the base products, and the forms not taken."""
    tokens, hidden, n_kv = size(tokens), size(hidden), size(n_kv)
    outs, total = (hidden, n_kv, n_kv), hidden + 2 * n_kv
    x, weight, d_y = random(tokens, hidden), random(total, hidden) / 64, random(tokens, total)
    weights, d_ys = weight.split(outs), d_y.split(outs, dim=1)
    matrices = [(random(rank, hidden) / 64, random(out, rank)) for out in outs]
    starts = (0, hidden, hidden + n_kv)
    joined = tuple(Adapter(a, b, 0.5, start) for (a, b), start in zip(matrices, starts, strict=True))
    together = [Projection(lambda: weight, None, joined)]
    apart = [
        Projection(lambda w=w: w, None, (adapter._replace(start=0),))
        for w, adapter in zip(weights, joined, strict=True)
    ]

    def separate_ops() -> list[torch.Tensor]:
        return [F.linear(x, w) + (x @ a.T) @ b.T * 0.5 for w, (a, b) in zip(weights, matrices, strict=True)]

    # The rank as more columns of one product, [x | xA] @ [W | sB], and backward as more rows, [dy | d_xa] @ [W; A].
    ranks = 3 * rank
    stacked = torch.cat([a for a, _ in matrices])
    long_x, long_w = random(tokens, hidden + ranks), random(total, hidden + ranks)
    long_d, tall_w = random(tokens, total + ranks), random(total + ranks, hidden)

    def columns() -> torch.Tensor:
        torch.mm(x, stacked.t(), out=long_x[:, hidden:])
        return long_x @ long_w.t()

    name, flops = f"{tokens}x{hidden}->{total} rank {rank}", 2 * tokens * hidden * total
    ms = {
        "ours": milliseconds([partial(project, x, together)]),
        "3 products": milliseconds([partial(project, x, apart)]),
        "as columns": milliseconds([columns]),
        "separate ops": milliseconds([separate_ops]),
        "base alone": milliseconds([lambda: x @ weight.t()]),
    }
    table.arithmetic("lora qkv forward", name, flops, ms)
    _, xa = project(x, together)
    ms = {
        "ours": milliseconds([partial(project_backward, [d_y], x, xa, together)]),
        "3 products": milliseconds([partial(project_backward, d_ys, x, xa, apart)]),
        "dX as rows": milliseconds([lambda: long_d @ tall_w]),
        "dX of base alone": milliseconds([lambda: d_y @ weight]),
    }
    table.arithmetic("lora qkv backward", name, flops, ms)


def cross_entropy(table: Table, tokens: int, hidden: int, vocabulary: int) -> None:
    tokens, hidden, vocabulary = size(tokens), size(hidden), size(vocabulary)
    h, w = random(tokens, hidden).requires_grad_(), random(vocabulary, hidden) / 64
    labels = torch.randint(vocabulary, (tokens,), device=DEVICE)

    def plain() -> object:
        return torch.autograd.grad(F.cross_entropy((h @ w.t()).float(), labels, reduction="sum"), h)

    ms = {"ours": milliseconds([partial(linear_cross_entropy, h, w, labels)], 6)}
    for chunk in (512, 1024, 2048):
        ms[f"chunk {chunk}"] = milliseconds([partial(linear_cross_entropy, h, w, labels, chunk=chunk)], 6)
    ms["torch"] = milliseconds([plain], 6)
    ms["2 products"] = milliseconds([lambda: (h.detach() @ w.t()) @ w], 6)
    liger = peer("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    if liger is not None:
        ms["liger"] = milliseconds([partial(liger.apply, h, w, labels)], 6)
    flops = 4 * tokens * hidden * vocabulary
    table.arithmetic("head + cross-entropy", f"{tokens}x{hidden}->{vocabulary}", flops, ms)


def embedding(table: Table, tokens: int, hidden: int, vocabulary: int) -> None:
    """Rows of a table in pinned host memory; the floor is a copy over the link of as many bytes."""
    tokens, hidden, vocabulary = size(tokens), size(hidden), size(vocabulary)
    rows, host = (torch.zeros(n, hidden, dtype=BF16, pin_memory=ON_GPU) for n in (vocabulary, tokens))
    target, draws = random(tokens, hidden), [torch.randint(vocabulary, (tokens,), device=DEVICE) for _ in range(4)]
    copied = milliseconds([lambda: target.copy_(host, non_blocking=True)], capture=False)
    ms = {"ours": milliseconds([partial(gather_rows, rows, ids) for ids in draws]), "copy": copied}
    megabytes = 2 * tokens * hidden / 1e6
    name = f"{tokens} of {vocabulary}x{hidden}"
    table.add("embedding from host", name, ms, megabytes / ms["ours"], "GB/s", megabytes / copied)


MATRICES = [(4096, 4096), (14336, 4096), (1024, 8192), (8192, 8192), (28672, 8192)]
FEW = [(1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192)]
FEW_ROWS: list[tuple] = [(*shape, rows, NF4(True)) for shape in FEW for rows in (1, 2, 8, 16, 32, 64)]
FEW_ROWS += [(*FEW[2], rows, codec) for codec in FEW_ROWS_CODECS[1:] for rows in (1, 8, 32)]
SECTIONS: dict[str, tuple[Callable[..., None], list[tuple]]] = {
    "dequantize": (dequantize, [(*shape, double) for double in (True, False) for shape in MATRICES]),
    "few_rows": (few_rows, FEW_ROWS),
    "dequantize_hqq": (dequantize_hqq, DECODED),
    "encode_hqq": (encode_hqq, ENCODED),
    "rms_norm": (norm, [(8192, 4096), (4096, 8192), (8192 * 32, 128)]),
    "rope": (rotary, [(8192, 32, 8), (4096, 64, 8)]),
    "glu": (gated, [(8192, 14336), (4096, 28672)]),
    "lora": (lora, [(8192, 4096, 1024, 16), (4096, 8192, 1024, 64), (1024, 8192, 1024, 64)]),
    "embedding": (embedding, [(8192, 4096, 128256), (4096, 8192, 32000)]),
    "cross_entropy": (cross_entropy, [(4096, 4096, 128256), (4096, 8192, 32000)]),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file to write")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"comma list of {', '.join(SECTIONS)}")
    options = parser.parse_args()
    torch.manual_seed(0)
    about = environment()
    print("  ".join(f"{name} {value}" for name, value in about.items()))
    wrong = [*gate(), *hqq_gate()]
    for line in wrong:
        print(f"WRONG: {line}")
    table = Table() if not wrong else None
    if table is not None:
        for section in options.only.split(","):
            measure, cases = SECTIONS[section]
            for case in cases:
                measure(table, *case)
    found: dict[str, Any] = {"environment": about, "wrong": wrong}
    if table is not None:
        found |= {"copy_gb_s": table.copy, "matmul_tflop_s": table.matmul, "rows": table.rows}
    options.results.write_text(json.dumps(found, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
