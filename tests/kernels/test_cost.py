"""What kernels cost on the meta device: bytes and launches from the arguments that they are launched with."""

import ast
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fsdp_qlora.kernels.cost import Cost, count, listening
from fsdp_qlora.kernels.dropout import dropout, dropout_add_
from fsdp_qlora.kernels.embedding import gather_rows
from fsdp_qlora.kernels.glu import glu_backward_, glu_forward
from fsdp_qlora.kernels.glu_lora import BANDWIDTH, glu_backward_lora_
from fsdp_qlora.kernels.hqq import dequantize_hqq, hqq_rows
from fsdp_qlora.kernels.hqq_format import Form, HqqParts, planes
from fsdp_qlora.kernels.masters import join
from fsdp_qlora.kernels.nf4 import dequantize_nf4
from fsdp_qlora.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from fsdp_qlora.kernels.rope import rope_
from tests.support.torchrun import ROOT

T, H = 64, 256
ROW = T * H * 2  # bytes of a [T, H] in bfloat16


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def heard(call: Callable[[], object]) -> Cost:
    costs: list[Cost] = []
    with listening(costs.append):
        call()
    return sum(costs, Cost())


X, W = on_meta(T, H), on_meta(H)


def hqq(bits: int) -> HqqParts:
    found = {name: on_meta(*shape, dtype=dtype) for name, (dtype, shape) in planes(bits, T * H).items()}
    return HqqParts(found["codes"], found.get("high"), on_meta(T * H // 64), on_meta(T * H // 64))


SKINNY = (on_meta(T, 16), on_meta(H, 16))
HEADS = on_meta(2, 32, 4, 64)
TABLE = on_meta(32, 32, dtype=torch.float32)
CALLS: dict[str, tuple[Callable[[], object], Cost]] = {
    "norm": (lambda: rms_norm_forward(X, W, 1e-5), Cost(bytes=2 * ROW)),
    "norm of a sum": (lambda: rms_norm_forward(X, W, 1e-5, residual=X, sum_out=X), Cost(bytes=4 * ROW)),
    "norm backward": (lambda: rms_norm_backward(X, X, W, 1e-5), Cost(bytes=3 * ROW)),
    "norm backward, added": (lambda: rms_norm_backward(X, X, W, 1e-5, skip=X), Cost(bytes=4 * ROW)),
    "rope": (lambda: rope_(HEADS, HEADS, TABLE, TABLE), Cost(bytes=4 * HEADS.nbytes)),
    "glu": (lambda: glu_forward(X, X, "silu"), Cost(bytes=3 * ROW)),
    "glu backward": (lambda: glu_backward_(X, X, X, "silu"), Cost(bytes=6 * ROW)),
    "glu backward, adapters": (
        lambda: glu_backward_lora_(X, X, X, "silu", SKINNY, None, None), Cost(bytes=5 * ROW / BANDWIDTH)
    ),
    "dropout": (lambda: dropout(X, 0.1, 0), Cost(bytes=2 * ROW)),
    "dropout, added": (lambda: dropout_add_(X, X, 0.1, 0), Cost(bytes=3 * ROW)),
    "embedding": (lambda: gather_rows(X, on_meta(8, dtype=torch.int64)), Cost(bytes=2 * 8 * H * 2)),
    "masters": (lambda: join(X, on_meta(T, H, dtype=torch.int16)), Cost(bytes=4 * ROW)),
    "dequantize": (
        lambda: dequantize_nf4(
            on_meta(T * H // 2, dtype=torch.uint8), on_meta(T * H // 64, dtype=torch.float32), (T, H), torch.bfloat16
        ),
        Cost(dequantized=T * H // 2 + T * H // 16 + ROW),
    ),
    **{
        f"dequantize hqq, {bits} bits": (
            lambda bits=bits: dequantize_hqq(hqq(bits), Form(bits, 64, 1), (T, H), torch.bfloat16),
            Cost(dequantized=T * H * bits // 8 + 2 * 2 * T * H // 64 + ROW),
        )
        for bits in (8, 4, 3, 2, 1)
    },
    **{
        f"dequantize hqq, rows of {count} in {bits} bits": (
            lambda bits=bits, count=count: hqq_rows([hqq(bits)] * count, Form(bits, 64, 0), [T] * count, H)(
                on_meta(count * T, H)
            ),
            Cost(dequantized=count * (T * H * bits // 8 + 2 * 2 * T * H // 64 + ROW)),
        )
        for bits, count in ((3, 2), (3, 3), (4, 2), (4, 3))
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_costs_the_bytes_that_it_moves(name: str) -> None:
    call, cost = CALLS[name]
    assert heard(call) == cost + Cost(launches=1)


def test_without_a_listener_nothing_is_counted() -> None:
    count(Cost(bytes=1))
    rms_norm_forward(X, W, 1e-5)
    outer: list[Cost] = []
    with listening(outer.append):
        assert heard(lambda: count(Cost(bytes=2))) == Cost(bytes=2)
        count(Cost(bytes=3))
    count(Cost(bytes=4))
    assert outer == [Cost(bytes=3)]


def test_every_kernel_that_is_started_has_a_cost() -> None:
    """One that only other kernels call is not named so."""
    for file in sorted((ROOT / "kernels").glob("*.py")):
        tree = ast.parse(file.read_text())
        decorators = {
            f.name: [ast.unparse(d) for d in f.decorator_list] for f in tree.body if isinstance(f, ast.FunctionDef)
        }
        kernels = {name for name, marks in decorators.items() if "triton.jit" in marks and name.endswith("_kernel")}
        calls = [call for call in ast.walk(tree) if isinstance(call, ast.Call) and ast.unparse(call.func) == "cost_of"]
        counted = {ast.unparse(arg) for call in calls for arg in call.args}
        assert kernels <= counted, file.name
