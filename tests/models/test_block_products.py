"""Which matrices a fused block multiplies: the same ones, laid out alike, whatever it keeps and wherever that waits."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.models.fused.block import FusedBlock
from fsdp_qlora.plan import costs
from fsdp_qlora.plan.shape import Shape, block_of
from fsdp_qlora.runtime.determinism import deterministic_algorithms


@pytest.fixture
def strict() -> Iterator[None]:
    with deterministic_algorithms(True):
        yield


class Products(TorchDispatchMode):
    """How often matrices of which shapes, strides and alignment are multiplied, and attended."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(func) or "attention" in str(func):
            tensors = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
            layout = [(x.shape, x.stride(), x.storage_offset() * x.element_size() % 256) for x in tensors]
            self.seen[(str(func), *layout)] += 1
        return func(*args, **(kwargs or {}))


class Elsewhere:
    """Stands for host memory: gives back tensors of the shapes that it was given."""

    def offload(self, tensors: list[Tensor], tokens: int) -> list[Tensor]:
        assert all(tensor.is_contiguous() for tensor in tensors), "what the copy engines can move"
        return [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors]

    def restore(self, offloaded: list[Tensor]) -> list[Tensor]:
        return offloaded

    def prefetch(self) -> None:
        pass


def products(block: FusedBlock) -> tuple[Counter[tuple[Any, ...]], Counter[tuple[Any, ...]]]:
    """Of a block's forward and of its backward, on the meta device."""
    forward, backward = Products(), Products()
    with costs.metered(block, 512) as meter:
        h, tables = costs.pass_inputs(block, 2, 256, meter)
        with forward:
            out = block(h, *tables)
        d_out = costs.output_gradient(block, out)
        with backward:
            out.backward(d_out[:, : h.shape[-1]].view(out.shape))
        costs.release(block)
    return forward.seen, backward.seen


@pytest.mark.parametrize(("dropout", "adapter"), [(0.0, "lora"), (0.1, "lora"), (0.0, "dora")])
@pytest.mark.parametrize("rank", [20, 64])
def test_what_a_block_keeps_and_where_changes_no_matrix_that_it_multiplies(
    strict: None, rank: int, dropout: float, adapter: str
) -> None:
    """Backward multiplies the same matrices, laid out alike, and beside them some of forward's once more: whichever
    kernels cuBLAS takes, they are the same. Rank 20 leaves rows that are no whole cache lines."""
    block = block_of(Shape(1024, 3584, 16, 4, 64, 3, 2, rank, "", False, False, "nf4", 2, dropout, "flash", 0, adapter))
    products(block)  # what is multiplied once a step, for magnitudes
    forward, least = products(replace(block, keep=Keep.ALL))
    assert sum(least.values()) > 10
    for keep in Keep:
        for away in (False, True):
            offload: Any = Elsewhere() if away else None
            ours, backward = products(replace(block, keep=keep, offload=offload, offloads=away))
            assert ours == forward, (keep, away)
            assert not least - backward, (keep, away)
            assert not (backward - least) - forward, (keep, away)
