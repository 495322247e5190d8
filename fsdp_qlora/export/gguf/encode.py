"""Rows of numbers in a type of GGUF, encoded by threads, piece by piece.

K types are encoded by upstream ggml's own code, out of the package libggml-python: `gguf` has them for reading only.
"""

import ctypes
import importlib.util
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from fsdp_qlora.errors import UserError
from fsdp_qlora.export.gguf.quantize import nbytes_of
from fsdp_qlora.runtime.libraries import installed

Numbers = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

PIECE_NUMBERS = 1 << 20  # that a thread encodes at a time: 4 MiB of float32
MOST_WAITING = 64  # pieces that are handed to the threads before the first of them is taken


def encoded(
    matrices: Iterable[Numbers], kind: Type, threads: ThreadPoolExecutor, name: str, option: str
) -> Iterator[Bytes]:
    """Yield the bytes of float32 [rows, width] in a type, as uint8 [rows, bytes of one], in order and in pieces.

    matrices: one below the other. While a piece is used the next ones are encoded. name: of the tensor. option: whose
    value it comes from. Raises UserError for numbers that are none, or that the type does not have."""
    waiting: deque[Future[Bytes]] = deque()
    for rows in matrices:
        step = max(1, PIECE_NUMBERS // rows.shape[1])
        for start in range(0, rows.shape[0], step):
            waiting.append(threads.submit(_encode, rows[start : start + step], kind, name, option))
            if len(waiting) > MOST_WAITING:
                yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _encode(rows: Numbers, kind: Type, name: str, option: str) -> Bytes:
    if not (np.isfinite(rows.min()) and np.isfinite(rows.max())):  # both are NaN where a number is
        raise UserError(f"{option}: {name} holds NaN or infinity: the model or its adapter is damaged")
    if kind is Type.F32:
        return rows.view(np.uint8)
    if kind in (Type.F16, Type.BF16) or not installed("libggml"):
        with np.errstate(over="ignore"):  # told below
            data = gguf.quants.quantize(rows, kind).view(np.uint8)
        if kind is Type.F16 and not np.isfinite(data.view(np.float16)).all():
            raise UserError(
                f"quantization: {name} has numbers beyond float16's largest, 65504; use --quantization bf16"
            )
        return data
    data = np.empty((rows.shape[0], nbytes_of(kind, (rows.shape[1],))), dtype=np.uint8)
    written = ggml_quantizer()(int(kind), rows.ctypes.data, data.ctypes.data, 0, *rows.shape, None)
    assert written == data.nbytes
    return data


@cache
def ggml_quantizer() -> Callable[..., int]:
    """Return ggml's quantizer: (type, float32 rows, out, first number, rows, width, importance) -> bytes written."""
    spec = importlib.util.find_spec("libggml")
    assert spec is not None
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    found = [
        file
        for folder in folders
        for file in folder.glob("lib*/libggml-base.*")
        if ".so" in file.name or ".dylib" in file.name
    ]
    if not found:
        raise UserError("quantization: libggml-python holds no libggml-base; install it again")
    function = ctypes.CDLL(str(min(found, key=lambda file: len(file.name)))).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    ]  # fmt: skip
    found_function: Callable[..., int] = function
    return found_function
