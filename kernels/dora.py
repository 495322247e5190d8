"""DoRA's magnitude (arXiv:2402.09353, as PEFT has it) as a factor of a weight's rows, and the magnitude's gradient.

    y = c * (W x + s B A x) + b,    c = m / n,    n = |W + s B A| by rows, which counts as a constant

The factor goes into the weight. W is decoded into scratch before each use and B laid beside it (`lora_wide.py`), so
their rows are written times c, rounded once more, and [cW | cB] multiplies as [W | B] does without: no pass over tokens
is added, in forward or for the input's gradient. From the output's gradient d_y come d_(cB), which times c is d_B, and

    d_m = sum over tokens of d_y * (y - b) / m

one pass over d_y and y. gate, up, q, k and v are there in backward at each keep level, saved or recomputed; for gate
and up the pass is that of `glu_lora.py`. The outputs of o and down are never recomputed (their products are a third of
a forward) and must be saved: T H numbers each, for which the plan has to find room. They cannot be told from the sums
of the residual stream, which are rounded as the far larger numbers that they are.

No full-size delta is ever made for n. With X = A A^T, R columns and |W|^2, which is stored with the frozen bytes,

    n^2 = |W|^2 + 2 s B (W A^T)^T + s^2 B X B^T = |W|^2 + 2 s sum over R of B * [W | B] [A | s/2 X]^T

which is one skinny product over what `lay` has laid, X in the corner that it leaves free. An adapter changes once a
step, so this is done once a step: a weight is decoded and read once more, R/T of its product's arithmetic.

Sums, n and c are float32 (float64 for float64): |W|^2 is the largest term by far, so what the product loses by being
rounded to the compute dtype is a small part of what rounding W + s B A would lose, as PEFT does. At B = 0 the square
root of a square is exact, and c is m / |W|, 1 for the first m. A row of zeros has c = 0 and stays one.

T tokens, H in features, O out features, R the columns of the adapters.
"""

from typing import Any, Protocol

import torch

from fsdp_qlora.kernels.cost import Cost, cost_of
from fsdp_qlora.kernels.device import cdiv, empty, launch, next_power_of_2, on_triton, tl, triton


class RowsDecoder(Protocol):
    """A function that decodes stored weights, one below the other, into out [O, H]. Rows times factor [O], if given, as
    `scale_rows_` has it."""

    def __call__(self, out: torch.Tensor, factor: torch.Tensor | None = None) -> None: ...


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of norms, factors and sums beside numbers of `dtype`: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)


def row_norms(weight: torch.Tensor) -> torch.Tensor:
    """Return |W| by rows, of W [O, H] as it is multiplied: float32 [O], float64 for float64."""
    norms: torch.Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=exact_dtype(weight.dtype))
    return norms


def norm_products(laid: torch.Tensor, out_features: int, in_features: int, scale: float) -> torch.Tensor:
    """Return [W | B] [A | s/2 A A^T]^T, [O, R], from `lora_wide.lay`'s weights without a factor; fills in their corner.

    In memory of PyTorch's allocator: it is asked for once a step and not in each micro-batch."""
    a_RH, corner = laid[out_features:, :in_features], laid[out_features:, in_features:]
    torch.addmm(corner, a_RH, a_RH.t(), beta=0, alpha=scale / 2, out=corner)
    return torch.mm(laid[:out_features], laid[out_features:].t())


def row_factors(
    norms: torch.Tensor,
    magnitude: torch.Tensor,
    products: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write c = m / n to out [O], of some rows of a projection.

    norms: |W| [O] of out's dtype. magnitude: m [O]. products: [O, R] of `norm_products`; b: B [O, R] with zeros where
    another adapter's columns are; both of one dtype, stride 1 along R."""
    assert products.stride(1) == b.stride(1) == 1, f"strides {products.stride()} and {b.stride()}"
    _check_vectors(out.shape[0], norms=norms, magnitude=magnitude, out=out)
    if on_triton(products):
        rank = products.shape[1]
        launch(
            _factors_kernel, (cdiv(out.shape[0], 16),),
            products, b, norms, magnitude, out, products.stride(0), b.stride(0), 2 * scale, out.shape[0],
            R=rank, COLUMNS=next_power_of_2(rank), ROWS=16, num_warps=4,
        )  # fmt: skip
        return out
    norm = whole_norms(norms, products, b, scale)
    return out.copy_(torch.where(norm == 0, 0, magnitude / norm))


def whole_norms(norms: torch.Tensor, products: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return |W + s B A| by rows [O], as `row_factors` has it, in plain PyTorch."""
    return torch.addcmul((products.to(norms.dtype) * b).sum(1) * (2 * scale), norms, norms).sqrt_()


def scale_rows_(matrix: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """matrix [O, H] * factor [O], in place: the product in the factor's dtype, rounded once. Stride 1 along H."""
    rows, width = matrix.shape
    assert matrix.stride(1) == 1, f"strides {matrix.stride()}"
    _check_vectors(rows, factor=factor)
    if not on_triton(matrix):
        return matrix.copy_(matrix * factor[:, None])
    tile = min(1024, next_power_of_2(width))
    tiles = cdiv(width, tile)
    if matrix.numel():
        launch(
            _scale_kernel, (rows * tiles,),
            matrix, factor, matrix.stride(0), H=width, TILES=tiles, TILE=tile, num_warps=4,
        )  # fmt: skip
    return matrix


def column_dots(d_y: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return sum over tokens of d_y * (y - bias), in pieces that are to be added up: [pieces, O].

    d_y, y: [T, O] with stride 1 along O. bias: [O] or None."""
    assert d_y.stride(1) == y.stride(1) == 1, f"strides {d_y.stride()} and {y.stride()}"
    if bias is not None:
        _check_vectors(y.shape[1], bias=bias)
    if not on_triton(y):
        wide = exact_dtype(y.dtype)
        free = y.to(wide) if bias is None else y.to(wide) - bias
        return torch.sum(d_y * free, 0, keepdim=True, out=empty((1, y.shape[1]), y, wide))
    (tokens, width), pieces = y.shape, piece_count(y.shape[0])
    dots = empty((pieces, width), y, torch.float32)
    launch(
        _dots_kernel, (cdiv(width, COLUMNS), pieces),
        d_y, y, y if bias is None else bias, dots, d_y.stride(0), y.stride(0), tokens, cdiv(cdiv(tokens, pieces), ROWS),
        O=width, BIAS=bias is not None, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return dots


def finish_gradients(
    dots: torch.Tensor, factor: torch.Tensor, magnitude: torch.Tensor, d_b: torch.Tensor
) -> torch.Tensor:
    """Return d_m [O], of m's dtype, from `column_dots` [pieces, O]; turn d_(cB) [O, R] into d_B in place.

    dots may be some columns of a wider tensor. d_b: contiguous."""
    assert d_b.is_contiguous(), f"strides {d_b.stride()}"
    assert dots.stride(1) == 1, f"strides {dots.stride()}"
    _check_vectors(d_b.shape[0], factor=factor, magnitude=magnitude)
    d_m = empty(magnitude.shape, magnitude)
    if not on_triton(d_b):
        d_b.mul_(factor[:, None])
        exact = magnitude.to(dots.dtype)
        return d_m.copy_(torch.where(exact == 0, 0, dots.sum(0) / exact))
    rows, rank = d_b.shape
    launch(
        _finish_kernel, (cdiv(rows, 16),),
        d_b, d_m, dots, factor, magnitude, dots.stride(0), dots.shape[0], rows,
        R=rank, COLUMNS=next_power_of_2(rank), ROWS=16, num_warps=4,
    )  # fmt: skip
    return d_m


def _check_vectors(length: int, **vectors: torch.Tensor) -> None:
    for name, vector in vectors.items():
        assert vector.shape == (length,), f"{name} {tuple(vector.shape)}"
        assert vector.is_contiguous(), f"{name} with strides {vector.stride()}"


ROWS, COLUMNS = 32, 128  # tokens and outputs that a program of `column_dots` reads at a time
MOST_PIECES, PIECE = 16, 256  # a piece has at least so many tokens: 512 programs at 4,096 outputs and 4,096 tokens


def piece_count(tokens: int) -> int:
    """Return in how many pieces `column_dots` divides the tokens: a width alone makes too few programs for a GPU."""
    return max(1, min(MOST_PIECES, tokens // PIECE))


# ---- Triton


@triton.jit
def _factors_kernel(
    products_ptr, b_ptr, norms_ptr, magnitude_ptr, out_ptr, products_stride, b_stride, twice_scale, n_rows,
    R: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    live = row < n_rows
    both = live[:, None] & (column < R)[None, :]
    at = row.to(tl.int64)
    product = tl.load(products_ptr + at[:, None] * products_stride + column[None, :], mask=both, other=0.0)
    b = tl.load(b_ptr + at[:, None] * b_stride + column[None, :], mask=both, other=0.0)
    total = tl.sum(product.to(tl.float32) * b.to(tl.float32), 1)
    norm = tl.load(norms_ptr + row, mask=live, other=1.0)
    norm = tl.sqrt_rn(total * twice_scale + norm * norm)
    magnitude = tl.load(magnitude_ptr + row, mask=live, other=0.0).to(tl.float32)
    factor = tl.where(norm == 0, 0.0, tl.div_rn(magnitude, tl.where(norm == 0, 1.0, norm)))
    tl.store(out_ptr + row, factor, mask=live)


@triton.jit
def _scale_kernel(matrix_ptr, factor_ptr, stride, H: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr):
    row = (tl.program_id(0) // TILES).to(tl.int64)
    column = (tl.program_id(0) % TILES) * TILE + tl.arange(0, TILE)
    live = column < H
    at = matrix_ptr + row * stride + column
    scaled = tl.load(at, mask=live, other=0.0).to(tl.float32) * tl.load(factor_ptr + row)
    tl.store(at, scaled.to(matrix_ptr.dtype.element_ty), mask=live)


@triton.jit
def _dots_kernel(
    d_y_ptr, y_ptr, bias_ptr, out_ptr, d_y_stride, y_stride, tokens, steps,
    O: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    live = column < O
    bias = tl.zeros((COLUMNS,), tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=live, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(1) * steps * ROWS
    for step in range(0, steps):
        row = (first + step * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        both = (row < tokens)[:, None] & live[None, :]
        d_y = tl.load(d_y_ptr + row[:, None] * d_y_stride + column[None, :], mask=both, other=0.0)
        y = tl.load(y_ptr + row[:, None] * y_stride + column[None, :], mask=both, other=0.0)
        total += d_y.to(tl.float32) * (y.to(tl.float32) - bias[None, :])
    tl.store(out_ptr + tl.program_id(1) * O + column, tl.sum(total, 0), mask=live)


@triton.jit
def _finish_kernel(
    d_b_ptr, d_m_ptr, dots_ptr, factor_ptr, magnitude_ptr, dots_stride, pieces, n_rows,
    R: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    live = row < n_rows
    total = tl.zeros((ROWS,), tl.float32)
    for piece in range(0, pieces):
        total += tl.load(dots_ptr + piece * dots_stride + row, mask=live, other=0.0)
    magnitude = tl.load(magnitude_ptr + row, mask=live, other=1.0).to(tl.float32)
    d_m = tl.where(magnitude == 0, 0.0, total / tl.where(magnitude == 0, 1.0, magnitude))
    tl.store(d_m_ptr + row, d_m.to(d_m_ptr.dtype.element_ty), mask=live)
    factor = tl.load(factor_ptr + row, mask=live, other=0.0)
    at = d_b_ptr + row.to(tl.int64)[:, None] * R + column[None, :]
    both = live[:, None] & (column < R)[None, :]
    d_b = tl.load(at, mask=both, other=0.0).to(tl.float32) * factor[:, None]
    tl.store(at, d_b.to(d_b_ptr.dtype.element_ty), mask=both)


@cost_of(_factors_kernel)
def _factors_cost(products: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> Cost:
    return Cost(bytes=products.nbytes + b.nbytes)


@cost_of(_scale_kernel)
def _scale_cost(matrix: torch.Tensor, *_: Any, **__: Any) -> Cost:
    return Cost(bytes=2 * matrix.nbytes)


@cost_of(_dots_kernel)
def _dots_cost(d_y: torch.Tensor, y: torch.Tensor, *_: Any, **__: Any) -> Cost:
    return Cost(bytes=d_y.nbytes + y.nbytes)


@cost_of(_finish_kernel)
def _finish_cost(d_b: torch.Tensor, *_: Any, **__: Any) -> Cost:
    return Cost(bytes=2 * d_b.nbytes)
