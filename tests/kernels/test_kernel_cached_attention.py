"""Attention of one token over kept keys: equal to float64, of whatever lengths, windows, softcaps and groups."""

import mmap

import pytest
import torch

from fsdp_qlora.kernels import cached_attention
from fsdp_qlora.kernels.attention_math import Masking, math_forward
from fsdp_qlora.kernels.cached_attention import attend_cached
from tests.support.truth import KERNEL_DTYPES, assert_as_good_as_plain

CASES = {
    "grouped": ((3, 150, 8, 2, 16), Masking(0.25)),
    "window": ((2, 200, 4, 4, 24), Masking(0.2, window=70)),
    "softcap": ((2, 130, 6, 2, 32), Masking(0.3, softcap=2.0)),
    "softcap-far-above-scores": ((2, 130, 7, 1, 80), Masking(0.05, softcap=50.0)),
    "all": ((4, 70, 4, 1, 20), Masking(0.2, window=3, softcap=1.5)),
    "one-key": ((2, 5, 2, 2, 16), Masking(0.25)),
}


def inputs(shape, dtype, device):
    rows, places, heads, kv_heads, size = shape
    make = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(rows, n, h, size, generator=make) for n, h in
               ((1, heads), (places, kv_heads), (places, kv_heads)))  # fmt: skip
    seen = torch.randint(1, places + 1, (rows,), generator=make)
    seen[0] = 1 if places < 10 else places
    return q[:, 0].to(device, dtype), k.to(device, dtype), v.to(device, dtype), seen.to(device)


def by_rows(q, k, v, seen, masking, dtype):
    """Of each row alone, by the attention of training in `dtype`, on the CPU."""
    outs = []
    for row, count in enumerate(seen.tolist()):
        queries = torch.zeros(1, count, *q.shape[1:], dtype=dtype)
        queries[0, -1] = q[row].cpu().to(dtype)
        keys, values = (x[row : row + 1, :count].cpu().to(dtype) for x in (k, v))
        outs.append(math_forward(queries, keys, values, masking)[0][0, -1])
    return torch.stack(outs)


FORMS = [("plain", torch.float32), ("plain", torch.bfloat16), *(("triton", dtype) for dtype in KERNEL_DTYPES)]


@pytest.mark.parametrize(("form", "dtype"), FORMS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_output_is_that_of_the_row_alone(case, form, dtype, request):
    device = request.getfixturevalue("triton_device") if form == "triton" else torch.device("cpu")
    shape, masking = CASES[case]
    q, k, v, seen = inputs(shape, dtype, device)
    out = attend_cached(q, k, v, seen, masking)
    plain, truth = (by_rows(q, k, v, seen, masking, kind) for kind in (dtype, torch.float64))
    assert_as_good_as_plain(out, plain, truth, case)


@pytest.mark.parametrize("joined", [1, 64])
def test_parts_are_joined_a_few_at_a_time(joined, triton_device, monkeypatch):
    shape, masking = CASES["grouped"]
    given = inputs(shape, torch.float32, triton_device)
    together = attend_cached(*given, masking)
    monkeypatch.setattr(cached_attention, "JOINED", joined)
    torch.testing.assert_close(attend_cached(*given, masking), together)


def test_places_that_no_token_has_yet_change_nothing(triton_device):
    shape, masking = CASES["window"]
    q, k, v, seen = inputs(shape, torch.float32, triton_device)
    before = attend_cached(q, k, v, seen, masking)
    for row, count in enumerate(seen.tolist()):
        k[row, count:], v[row, count:] = 1e4, 1e4
        k[row, : max(0, count - 70)], v[row, : max(0, count - 70)] = 1e4, 1e4
    assert torch.equal(attend_cached(q, k, v, seen, masking), before)


def test_what_does_not_fit_is_refused():
    q, k, v, seen = inputs(CASES["grouped"][0], torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="dividing"):
        attend_cached(q[:, :7], k, v, seen, Masking(1.0))
    with pytest.raises(ValueError, match="seen"):
        attend_cached(q, k, v, seen[:1], Masking(1.0))
    with pytest.raises(ValueError, match=r"bfloat16"):
        attend_cached(q, k.bfloat16(), v.bfloat16(), seen, Masking(1.0))
    for apart in (
        (q, k, v, seen.repeat_interleave(2)[::2]),
        (q, k.transpose(1, 2).contiguous().transpose(1, 2), v, seen),
        (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, seen),
    ):
        with pytest.raises(ValueError, match="contiguous"):
            attend_cached(*apart, Masking(1.0))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="8.6 GB, of which a CPU's memory holds the pages that are read")
def test_keys_beyond_31_bits_of_numbers_are_found(triton_device, monkeypatch):
    monkeypatch.setattr(cached_attention, "PROGRAMS", 1)
    last, size = 24, 16_384
    places = (1 << 31) // size + last
    masking, make = Masking(size**-0.5, window=20), torch.Generator().manual_seed(1)
    q, *some = (torch.randn(1, n, 1, size, generator=make).half() for n in (1, last, last))
    kept = [torch.frombuffer(mmap.mmap(-1, 2 * places * size), dtype=torch.float16) for _ in some]
    kept = [x.view(1, places, 1, size) for x in kept]
    for whole, few in zip(kept, some, strict=True):
        whole[:, -last:] = few
    found, wanted = (
        attend_cached(q[:, 0], *keys_and_values, torch.tensor([keys_and_values[0].shape[1]]), masking)
        for keys_and_values in (kept, some)
    )
    assert torch.equal(found, wanted)
