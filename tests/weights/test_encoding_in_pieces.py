"""Weights encoded in pieces: the same bytes as whole, in no more memory than is stated."""

import threading
import time

import bitsandbytes.functional as bnb
import pytest
import torch
from hqq.core.quantize import Quantizer, hqq_base_quant_config
from torch import Tensor

from fsdp_qlora.kernels.hqq_format import BITS, pack
from fsdp_qlora.weights.codecs import HQQ, NF4, Codec, NotFinite, Parts, Plain, hqq_groups, nf4, pieces
from tests.support.metered import Meter, encode_on_meta
from tests.support.tiers import some_slow
from tests.weights.test_codecs import weight_of

CPU, META = torch.device("cpu"), torch.device("meta")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows that divide into pieces and that do not, an odd count, rows that end inside a block of 64, one row, one number.
SHAPES = [(64, 64), (65, 192), (7, 130), (3, 333), (300, 1000), (1, 5000), (1, 1)]
# 8B's largest, and one whose pieces are no whole rows.
LARGE = [(14336, 4096), (4097, 4160)]


def bytes_of(parts: Parts) -> dict[str, bytes]:
    return {name: part.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes() for name, part in parts.items()}


def nf4_by_bitsandbytes(weight: Tensor, double_quant: bool) -> Parts:
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    if not double_quant:
        return {"codes": codes, "absmax": state.absmax}
    nested = {"nested_absmax": state.state2.absmax, "offset": state.offset}
    return {"codes": codes, "absmax_q": state.absmax, **nested}


def hqq_by_hqq(weight: Tensor, codec: HQQ) -> Parts:
    asked = hqq_base_quant_config(codec.bits, codec.group, axis=codec.axis)["weight_quant_params"]
    asked |= {"optimize": codec.optimize}
    codes, found = Quantizer.quantize(weight, bitpack=False, device=weight.device, **asked)
    return pack(codes, codec.bits) | {name: found[name].to(codec.dtype) for name in ("scale", "zero")}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", some_slow(SHAPES, 2), ids=str)
@pytest.mark.parametrize("numbers", some_slow([64, 3 * 64, 64 * 256 * 2], 2))
def test_nf4_of_pieces_is_bitsandbytes_of_the_whole(numbers, shape, dtype, double_quant, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", numbers * dtype.itemsize)
    weight = weight_of(shape, dtype) if shape != (1, 1) else torch.full(shape, 0.3).to(dtype)
    assert bytes_of(NF4(double_quant).encode(weight)) == bytes_of(nf4_by_bitsandbytes(weight, double_quant))


def test_pieces_on_a_cpu_are_quantized_by_all_its_threads_and_leave_their_number(monkeypatch):
    monkeypatch.setattr(pieces, "CPU_PIECE", 64 * 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    seen, quantize = set(), nf4.quantize_blocks

    def noted(*given: Tensor) -> None:
        seen.add(threading.get_ident())
        time.sleep(0.002)
        quantize(*given)

    monkeypatch.setattr(nf4, "quantize_blocks", noted)
    weight = weight_of((16, 64), torch.float32)
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    assert bytes_of(NF4().encode(weight)) == bytes_of(nf4_by_bitsandbytes(weight, True))
    assert len(seen) == 3
    assert told == [1, 1, 1, 3]
    weight[7, 7] = torch.nan
    told.clear()
    with pytest.raises(NotFinite):
        NF4().encode(weight)
    assert told[-1] == 3


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", some_slow(BITS, 2))
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("numbers", [64, 1000, 128 * 100])
def test_hqq_of_pieces_is_hqqs_of_the_whole(numbers, group, bits, axis, optimize, monkeypatch):
    """Along axis 1 in pieces of one or two groups, of some that do not divide the weight, and of half of it."""
    monkeypatch.setattr(hqq_groups, "MOST", numbers)
    weight = weight_of((192, 128), torch.bfloat16)
    codec = HQQ(bits, group, axis, torch.bfloat16, optimize)
    assert bytes_of(codec.encode(weight)) == bytes_of(hqq_by_hqq(weight, codec))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (40,), ()], ids=str)
def test_plain_numbers_of_pieces_are_rounded_as_the_whole(shape, dtype, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 24)
    weight, codec = torch.randn(shape), Plain(dtype)
    out = pieces.new_parts(codec.parts(shape), CPU)
    assert codec.encode(weight, out) is out
    assert torch.equal(out["values"], weight.to(dtype))


@pytest.mark.parametrize("total", [1, 64, 65, 1000, 4096])
@pytest.mark.parametrize(("most", "multiple"), [(64, 64), (192, 64), (7, 1), (4096, 64)])
def test_spans_follow_each_other_and_none_is_too_long(total, most, multiple):
    found = list(pieces.spans(total, most, multiple))
    assert [first for first, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == total
    assert all(0 < end - first <= most and first % multiple == 0 for first, end in found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("codec", [NF4(), HQQ(4, 64, 1, torch.float32)], ids=lambda codec: codec.name)
def test_a_number_that_is_none_is_met_in_any_piece(codec, bad, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 4 * 64)
    weight = weight_of((8, 64), torch.float32)
    codec.encode(weight)
    weight[7, 63] = bad
    with pytest.raises(NotFinite):
        codec.encode(weight)


@pytest.mark.parametrize("piece", [1 << 20, 64 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("codec", [NF4(True), NF4(False), Plain(torch.bfloat16)], ids=lambda codec: codec.name)
def test_encoding_takes_what_is_stated(codec, dtype, piece, monkeypatch):
    """The weight on the host, its parts elsewhere; in four or eight pieces, and in one."""
    monkeypatch.setattr(pieces, "PIECE", piece)
    encode_on_meta(monkeypatch)
    taken, stated = metered(codec, torch.zeros(2048, 1024, dtype=dtype), META)
    assert 0.9 * stated < taken <= stated


@pytest.mark.parametrize("most", [1 << 16, 1 << 23])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("optimize", [True, False])
def test_hqq_takes_what_is_stated(optimize, axis, bits, most, monkeypatch):
    """Beside the weight. In float16, as the optimizer computes on a GPU."""
    monkeypatch.setattr(hqq_groups, "MOST", most)
    monkeypatch.setattr(hqq_groups, "optimizer_dtype", lambda device: torch.float16)
    taken, stated = metered(HQQ(bits, 64, axis, torch.bfloat16, optimize), torch.randn(512, 1024).bfloat16(), CPU)
    assert 0.8 * stated < taken <= stated


def metered(codec: Codec, weight: Tensor, device: torch.device) -> tuple[int, int]:
    """Return the bytes that encoding takes on a device beside the parts, and what is stated of them."""
    shape = tuple(weight.shape)
    out = pieces.new_parts(codec.parts(shape), device)
    meter = Meter(on=device.type)
    with meter:
        for tensor in (weight, *out.values()):
            meter.add(tensor)
        before = meter.mark()
        codec.encode(weight, out)
    return meter.peak - before, codec.encode_scratch_bytes(shape, weight.itemsize, on_device=device == weight.device)


def test_what_is_stated_hardly_grows_with_the_weight():
    """70B's largest matrix, which is 448 MiB itself."""
    large = (28672, 8192)
    for codec, most in ((NF4(), 120), (NF4(False), 128), (Plain(torch.bfloat16), 64)):
        assert codec.encode_scratch_bytes(large, 2) <= most << 20
    hqq = HQQ(4, 64, 1, torch.bfloat16)
    assert hqq.encode_scratch_bytes(large, 2) < 4.7 * 28672 * 8192


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_on_a_gpu_nf4_of_pieces_is_bitsandbytes_of_the_whole(shape, dtype, double_quant, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 10 << 20)
    codec, weight = NF4(double_quant), weight_of(shape, dtype)
    out = pieces.new_parts(codec.parts(shape), torch.device("cuda"))
    assert bytes_of(codec.encode(weight, out)) == bytes_of(nf4_by_bitsandbytes(weight.cuda(), double_quant))


@pytest.mark.gpu
@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_on_a_gpu_hqq_of_pieces_is_hqqs_of_the_whole(bits, group, dtype, optimize, monkeypatch):
    monkeypatch.setattr(hqq_groups, "MOST", 1 << 20)
    for shape in ((4096, 4096), (1025, 1408)):
        codec, weight = HQQ(bits, group, 1, dtype, optimize), weight_of(shape, dtype).cuda()
        assert bytes_of(codec.encode(weight)) == bytes_of(hqq_by_hqq(weight, codec)), shape


@pytest.mark.gpu
@pytest.mark.parametrize(
    "codec",
    [NF4(True), NF4(False), Plain(torch.bfloat16), HQQ(4, 64, 1, torch.bfloat16), HQQ(2, 64, 0, torch.bfloat16)],
    ids=lambda codec: codec.name,
)
def test_on_a_gpu_encoding_takes_what_is_stated(codec):
    shape = (14336, 4096)
    weight, out = weight_of(shape, torch.bfloat16), pieces.new_parts(codec.parts(shape), torch.device("cuda"))
    codec.encode(weight, out)  # cuBLAS and tables of the library
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    codec.encode(weight, out)
    taken, stated = torch.cuda.max_memory_allocated() - before, codec.encode_scratch_bytes(shape, weight.itemsize)
    assert 0.8 * stated < taken <= stated + (2 << 20)
