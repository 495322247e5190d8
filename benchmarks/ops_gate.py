"""The correctness gate of the op benchmark: bit-equality with bitsandbytes, and errors beside plain PyTorch's."""

from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F

from fsdp_qlora.kernels.cross_entropy import linear_cross_entropy
from fsdp_qlora.kernels.embedding import gather_rows
from fsdp_qlora.kernels.glu import glu
from fsdp_qlora.kernels.hqq_format import BITS
from fsdp_qlora.kernels.rms_norm import rms_norm
from fsdp_qlora.kernels.rope import rope, rope_tables
from fsdp_qlora.weights.codecs import HQQ, NF4, FewRowsCodec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
BF16 = torch.bfloat16


def size(n: int) -> int:
    """A length of a real shape, or a small one where there is no GPU."""
    return n if ON_GPU else max(64, n // 128 // 64 * 64)


def random(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def gate() -> list[str]:
    """What is wrong; empty if nothing is."""
    wrong = []
    for shape in [(size(4096), size(4096)), (63, 1000), (257, 128), (3, 333)]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for double_quant in (False, True):
                weight = random(*shape, dtype=dtype)
                codes, state = bnb.quantize_4bit(weight, compress_statistics=double_quant, quant_type="nf4")
                ours = NF4(double_quant).decode(NF4(double_quant).encode(weight), shape, dtype)
                if not torch.equal(ours, bnb.dequantize_4bit(codes, state)):
                    wrong.append(f"dequantize {shape} {dtype} double_quant={double_quant} differs from bitsandbytes")
                part = random(shape[0], shape[1] + 16, dtype=dtype)[:, : shape[1]]
                NF4(double_quant).decode(NF4(double_quant).encode(weight), shape, dtype, part)
                if not torch.equal(part, ours):
                    wrong.append(f"dequantize {shape} {dtype} double_quant={double_quant} differs in a wider matrix")
    wrong += few_rows_gate() if ON_GPU else []
    table, ids = torch.randn(300, 1000, pin_memory=ON_GPU), torch.randint(300, (2, 500))
    if not torch.equal(gather_rows(table, ids.to(DEVICE)).cpu(), table[ids]):
        wrong.append("embedding: rows gathered from pinned host memory differ from the table's")
    for name, (op, plain, inputs) in _checked_ops().items():
        got, theirs = _values(op, inputs), _values(plain, inputs)
        truth = _values(plain, [t.double() for t in inputs])
        for i, (a, b, t) in enumerate(zip(got, theirs, truth, strict=True)):
            error, allowed = (a - t).abs().max().item(), 2 * (b - t).abs().max().item()
            if not error <= allowed + 1e-6 * t.abs().max().item():
                wrong.append(f"{name}, result {i}: error {error:.2e}, plain PyTorch's is {allowed / 2:.2e}")
    return wrong


FEW_ROWS_CODECS: list[FewRowsCodec] = [NF4(True), *(HQQ(bits, 64, 1, BF16, optimize=False) for bits in BITS)]


def few_rows_gate() -> list[str]:
    """What is wrong with products of few rows by the codes; the kernel is Triton's alone."""
    wrong = []
    for outputs, inputs, rows in [
        (4096, 4096, 1),
        (100, 4096, 8),
        (4096, 14336, 16),
        (1024, 704, 33),
        (28672, 8192, 65),
    ]:
        for codec in FEW_ROWS_CODECS:
            x, out = random(rows, inputs), random(rows, outputs)
            parts = codec.encode(random(outputs, inputs))
            weight = codec.decode(parts, (outputs, inputs), BF16)
            truth = x.double() @ weight.double().T
            for _ in range(2):  # the second finds what the first left behind
                codec.few_rows(x, parts, out, None, None, None)
                error, allowed = (out - truth).abs().max().item(), 2 * (x @ weight.T - truth).abs().max().item()
                if not error <= allowed:
                    what = f"{codec.name}, {rows} rows of {outputs}x{inputs}"
                    wrong.append(f"{what}: error {error:.2e}, cuBLAS' is {allowed / 2:.2e}")
    return wrong


def _values(op: Callable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    outs = op(*leaves)
    torch.manual_seed(1)
    d_outs = [torch.randn(o.shape, device=DEVICE).to(BF16).to(o.dtype) if o.ndim else torch.ones_like(o) for o in outs]
    return [o.detach().double() for o in (*outs, *torch.autograd.grad(outs, leaves, d_outs))]


def _checked_ops() -> dict[str, tuple[Callable, Callable, list[torch.Tensor]]]:
    """name -> (ours, plain, inputs); both take the inputs and return a tuple."""
    n = size(1000)
    frozen = (1 + random(n) / 8).detach()
    cos, sin = rope_tables(1e4 ** -(torch.arange(0, 64, device=DEVICE) / 64), 63)
    labels = torch.randint(n + 13, (63,), device=DEVICE)

    def wide(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def plain_norm(x):
        return ((wide(x) * torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + 1e-5)) * wide(frozen)).to(x.dtype)

    def plain_rope(x, cos, sin):
        first, second = wide(x).chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

    def plain_loss(h, w):
        return (F.cross_entropy(wide(h @ w.T), labels, reduction="sum") / 64,)

    def plain_rope_both(q, k):
        return plain_rope(q, cos[:, None], sin[:, None]), plain_rope(k, cos[:, None], sin[:, None])

    return {
        "rms_norm": (lambda x: (rms_norm(x, frozen, 1e-5),), lambda x: (plain_norm(x),), [random(63, n)]),
        "rope": (
            lambda q, k: rope(q, k, cos, sin),
            plain_rope_both,
            [random(2, 63, 8, 128), random(2, 63, 2, 128)],
        ),
        "glu": (
            lambda g, u: (glu(g, u, "silu"),),
            lambda g, u: ((F.silu(wide(g)) * wide(u)).to(g.dtype),),
            [random(63, n), random(63, n)],
        ),
        "cross_entropy": (
            lambda h, w: (linear_cross_entropy(h, w, labels, divisor=64, chunk=32),),
            plain_loss,
            [random(63, 128), random(n + 13, 128) / 8],
        ),
    }
