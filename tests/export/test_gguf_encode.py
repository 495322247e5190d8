"""Tensors encoded in pieces by threads: in order, the bytes of the whole, and never more of them than is stated."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
pytest.importorskip("libggml")

from gguf import GGMLQuantizationType as Type  # noqa: E402

from fsdp_qlora.errors import UserError  # noqa: E402
from fsdp_qlora.export.gguf import encode  # noqa: E402
from fsdp_qlora.export.gguf.encode import Numbers, encoded  # noqa: E402
from fsdp_qlora.export.gguf.quantize import nbytes_of  # noqa: E402


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PIECE_NUMBERS", 3 * 256 + 5)  # three rows of 256


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as threads:
        yield threads


def numbers(rows: int) -> Numbers:
    return np.random.default_rng(rows).standard_normal((rows, 256), dtype=np.float32)


@pytest.mark.parametrize(
    "kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_K, Type.Q6_K], ids=lambda kind: kind.name
)
def test_pieces_of_all_matrices_are_the_bytes_of_the_whole(kind, threads):
    matrices = [numbers(rows) for rows in (7, 1, 12)]
    pieces = list(encoded(iter(matrices), kind, threads, "x", "model_name"))
    assert [len(piece) for piece in pieces] == [3, 3, 1, 1, 3, 3, 3, 3]
    whole = np.concatenate(matrices)
    if kind in (Type.Q4_K, Type.Q6_K):
        wanted = np.empty(nbytes_of(kind, whole.shape), dtype=np.uint8)
        encode.ggml_quantizer()(int(kind), whole.ctypes.data, wanted.ctypes.data, 0, *whole.shape, None)
    else:
        wanted = gguf.quants.quantize(whole, kind).view(np.uint8).reshape(-1)
    assert np.concatenate([piece.reshape(-1) for piece in pieces]).tobytes() == wanted.tobytes()


def test_later_pieces_are_encoded_while_the_first_is_used_and_no_more_than_so_many(threads, monkeypatch):
    monkeypatch.setattr(encode, "MOST_WAITING", 4)
    one, begun = encode._encode, threading.Semaphore(0)

    def noted(*given):
        begun.release()
        return one(*given)

    monkeypatch.setattr(encode, "_encode", noted)
    taken = []
    matrices = (taken.append(i) or numbers(3) for i in range(20))
    pieces = encoded(matrices, Type.F16, threads, "x", "model_name")
    next(pieces)
    assert len(taken) == 5
    assert all(begun.acquire(timeout=10) for _ in range(5))
    assert not begun.acquire(timeout=0.05)
    assert len(list(pieces)) == 19


@pytest.mark.parametrize(
    ("kind", "wrong", "says"),
    [
        (Type.Q8_0, np.nan, "model_name: blk.0 holds NaN or infinity"),
        (Type.F32, -np.inf, "model_name: blk.0 holds NaN or infinity"),
        (Type.F16, 7e4, "quantization: blk.0 has numbers beyond float16's largest, 65504; use --quantization bf16"),
    ],
)
def test_a_number_that_cannot_be_stored_is_told_wherever_it_is(kind, wrong, says, threads):
    matrices = [numbers(7), numbers(8)]
    matrices[1][-1, -1] = wrong
    with pytest.raises(UserError, match=says):
        list(encoded(matrices, kind, threads, "blk.0", "model_name"))
