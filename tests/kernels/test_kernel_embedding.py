"""Rows gathered from a table, on the host's side of the link too: the same bits, and nothing read outside the table."""

import pytest
import torch

from fsdp_qlora.kernels.embedding import gather_rows
from tests.support.truth import DEVICE

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# V, H, ids' shape: one number a row; no power of two; several tiles with a rest; no ids
CASES = [(5, 1, (3,)), (37, 100, (2, 7)), (11, 4096 + 72, (2, 1, 3)), (7, 64, (0,)), (7, 64, ())]


def table_and_ids(vocabulary, hidden, shape, dtype, device="cpu"):
    table = torch.randn(vocabulary, hidden).to(dtype)
    ids = torch.randint(vocabulary, shape)
    ids.view(-1)[:2] = torch.tensor([0, vocabulary - 1])[: ids.numel()]
    return table.to(device), ids.to(device)


@pytest.mark.parametrize("form", ["plain", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_the_tables(case, dtype, form, request):
    device = "cpu" if form == "plain" else request.getfixturevalue("triton_device")
    table, ids = table_and_ids(*case, dtype, device)
    rows = gather_rows(table, ids)
    assert rows.shape == (*ids.shape, case[1])
    assert torch.equal(rows, table[ids])
    # every other row of a larger table, ids not contiguous
    spread = torch.full((2 * case[0], case[1] + 8), float("nan"), dtype=dtype, device=device)[::2, : case[1]]
    spread.copy_(table)
    apart = torch.stack([ids, ids], dim=-1)[..., 0]
    assert torch.equal(gather_rows(spread, apart), rows)


def test_an_id_outside_the_table_reads_nothing(triton_device):
    table, ids = table_and_ids(9, 100, (6,), torch.float16, triton_device)
    ids[1], ids[3], ids[4] = 9, -1, 1 << 60
    rows = gather_rows(table, ids)
    assert rows.isnan().all(dim=1).tolist() == [False, True, False, True, True, False]
    kept = torch.tensor([0, 2, 5], device=triton_device)
    assert torch.equal(rows[kept], table[ids[kept]])


def test_an_id_outside_the_table_is_an_error_on_a_cpu():
    table, ids = table_and_ids(9, 100, (6,), torch.float16)
    ids[1] = 9
    with pytest.raises(IndexError):
        gather_rows(table, ids)


def test_wrong_inputs_are_refused():
    table, ids = table_and_ids(9, 10, (6,), torch.float32)
    with pytest.raises(ValueError, match="ids must be int64"):
        gather_rows(table, ids.int())
    with pytest.raises(ValueError, match="requires a gradient"):
        gather_rows(table.requires_grad_(), ids)
    with pytest.raises(ValueError, match="stride 1 along H"):
        gather_rows(torch.randn(10, 9).t(), ids)
    with pytest.raises(ValueError, match="float64"):
        gather_rows(torch.randn(10, 9).double(), ids)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_reads_pinned_host_memory(dtype):
    table, ids = table_and_ids(1000, 5000, (3, 200), dtype)
    ids[2, 100] = 1000
    for pinned in (table.pin_memory(), table.pin_memory()[100:]):  # the second begins inside of what was allocated
        before = torch.cuda.memory_allocated()
        rows = gather_rows(pinned, ids.to(DEVICE).sub_(1000 - pinned.shape[0]))
        assert torch.cuda.memory_allocated() - before < 1.1 * rows.nbytes + 8192, "the table came along"
        ours, inside = rows.cpu(), (ids >= 1000 - pinned.shape[0]) & (ids < 1000)
        assert torch.equal(ours[inside], table[ids[inside]])
        assert ours[~inside].isnan().all()


@pytest.mark.gpu
def test_a_gpu_reads_registered_host_memory_and_refuses_any_other():
    table, ids = table_and_ids(1000, 512, (200,), torch.bfloat16)
    with pytest.raises(ValueError, match="pinned"):
        gather_rows(table, ids.to(DEVICE))
    runtime = torch.cuda.cudart()
    assert int(runtime.cudaHostRegister(table.data_ptr(), table.nbytes, 0)) == 0
    try:
        assert torch.equal(gather_rows(table, ids.to(DEVICE)).cpu(), table[ids])
    finally:
        torch.cuda.synchronize()
        runtime.cudaHostUnregister(table.data_ptr())
