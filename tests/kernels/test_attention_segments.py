"""Documents one after the other in a row: attention over each as if it were alone, whatever lies beside it."""

import sys
from types import ModuleType

import pytest
import torch

from fsdp_qlora.kernels.attention import Masking, attend, attend_backward, for_segments, possible
from fsdp_qlora.kernels.segments import PADDED_ROWS, padded_rows, segments_of
from tests.kernels.test_kernel_attention import differentiated, draw, eager, flash_attn_func, plain
from tests.support.truth import DEVICE, assert_as_good_as_plain

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (63, 1, 17, 17, 130, 8)
MANY = (10,) * 40  # more than one group
CASES = {"plain": Masking(0.3), "window": Masking(0.3, 9), "softcap": Masking(0.3, None, 2.0)}


def both(q, k, v, d_out, masking, backend, segments=None):
    out, stats = attend(q, k, v, masking, backend, segments)
    return [out, *attend_backward(d_out, q, k, v, out, stats, masking, backend, segments)]


def apart(given, lengths, function):
    """Return the results of each document alone, put together."""
    pieces = zip(*(x.split(list(lengths), 1) for x in given), strict=True)
    return [torch.cat(parts, 1) for parts in zip(*(function(*piece) for piece in pieces), strict=True)]


def test_bounds():
    segments = segments_of(LENGTHS)
    assert segments.positions.shape == (1, sum(LENGTHS))
    assert segments.positions[0].tolist() == [i for n in LENGTHS for i in range(n)]
    assert [part.stop - part.start for part in segments.documents] == list(LENGTHS)
    for bad in ((), (3, 0)):
        with pytest.raises(ValueError, match="at least one token"):
            segments_of(bad)


@pytest.mark.parametrize("lengths", [LENGTHS, MANY, (1,) * 300, (4096,), (2000, 3) * 5], ids=str)
def test_groups_hold_every_document_once_and_keep_flash_attentions_sums_small(lengths):
    groups = segments_of(lengths).groups
    found = [int(n) for group in groups for n in group.starts.diff()]
    assert found == list(lengths)
    assert [g.tokens.start for g in groups] + [sum(lengths)] == [0] + [g.tokens.stop for g in groups]
    for group in groups:
        documents = len(group.starts) - 1
        assert group.longest == int(group.starts.diff().max())
        assert group.tokens.stop - group.tokens.start + PADDED_ROWS * documents <= padded_rows(sum(lengths), 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lengths", [LENGTHS, MANY, (77,)], ids=["mixed", "many", "one"])
def test_documents_are_as_alone_to_the_last_bit(lengths, case):
    given = draw((1, sum(lengths), 4, 2, 16), torch.float32, "cpu")
    masking = CASES[case]
    backend = possible(torch.device("cpu"), torch.float32, max(lengths), 16, masking)[0]
    together = both(*given, masking, backend, segments_of(lengths))
    alone = apart(given, lengths, lambda *piece: both(*piece, masking, backend))
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.any()
        assert torch.equal(ours, theirs)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    """Stands where the flash-attn package (2.8) is not: its signature, and what its docstring says it means."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) == max_seqlen_q == max_seqlen_k
    assert sum(lengths) == q.shape[0]
    pieces = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([flash_attn_func(*(x[None] for x in piece), **options)[0] for piece in pieces])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lengths", [LENGTHS, MANY], ids=["mixed", "many"])
def test_the_flash_attn_package_is_asked_for_what_math_computes(lengths, case, monkeypatch):
    package = ModuleType("flash_attn")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    given = draw((1, sum(lengths), 4, 2, 16), torch.float64, "cpu")
    with torch.no_grad():
        ours, true = (both(*given, CASES[case], name, segments_of(lengths)) for name in ("flash_attn", "math"))
    for mine, theirs in zip(ours, true, strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_a_backend_for_rows_of_one_length_has_another_beside_it():
    heads = ("cuda", torch.bfloat16, 64)
    assert for_segments("cudnn", *heads, Masking(0.1)) == "flash"
    assert for_segments("flash_attn", *heads, Masking(0.1)) == "flash_attn"
    assert for_segments("math", *heads, Masking(0.1, None, 2.0)) == "math"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lengths", [LENGTHS, MANY, (2000, 3, 600)], ids=["mixed", "many", "long"])
@pytest.mark.parametrize("backend", ["flash", "flash_attn", "cudnn", "math"])
def test_fused_backends(backend, lengths, case, dtype):
    masking = CASES[case]
    if backend not in possible(DEVICE, dtype, max(lengths), 64, masking):
        pytest.skip(f"{backend} is not possible here")
    given = draw((1, sum(lengths), 8, 2, 64), dtype)
    ours = both(*given, masking, backend, segments_of(lengths).to(DEVICE))
    theirs = apart(given, lengths, lambda *piece: differentiated(plain, *piece, masking))
    wide = [x.double() for x in given]
    truth = apart(wide, lengths, lambda *piece: differentiated(eager, *piece, masking))
    for name, *values in zip(("out", "d_q", "d_k", "d_v"), ours, theirs, truth, strict=True):
        assert_as_good_as_plain(*values, name)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash", "flash_attn"])
def test_on_a_gpu_another_document_changes_no_bit(backend):
    if backend not in possible(DEVICE, torch.bfloat16, 600, 64, Masking(0.1)):
        pytest.skip(f"{backend} is not possible here")
    lengths = (300, 17, 600)
    given = draw((1, sum(lengths), 8, 2, 64), torch.bfloat16)
    changed = [x.clone() for x in given]
    for x in changed:
        x[:, 300:317] *= -2
    first, second = (both(*x, Masking(0.1), backend, segments_of(lengths).to(DEVICE)) for x in (given, changed))
    for name, a, b in zip(("out", "d_k", "d_v"), (first[0], *first[2:]), (second[0], *second[2:]), strict=True):
        assert torch.equal(a[:, :300], b[:, :300]), name
        assert torch.equal(a[:, 317:], b[:, 317:]), name
        assert not torch.equal(a, b), name
