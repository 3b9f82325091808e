"""Functions of the kernels: tiles of tokens and weights, products, partial sums.

B is the batch, N tokens, C input width, D output width. R and S are the rows and columns of a tile.
ACC is the accumulator type: float32, or float64 for float64 tensors. Tiles are converted to it
right after the load; only `dot` takes operands of the storage type.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b for operands of one storage type."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        # The interpreter multiplies the bit patterns of bfloat16; widening first is exact.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def to_operand(tile, DTYPE: tl.constexpr):
    """The tile as an operand of `dot`. float16 saturates, so that no inf * 0 becomes NaN."""
    if DTYPE == tl.float16:  # noqa: SIM300
        tile = tl.where(tile > 65504.0, 65504.0, tile)
        tile = tl.where(tile < -65504.0, -65504.0, tile)
    return tile.to(DTYPE)


@triton.jit
def token_offsets(rows, cols, stride, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Element offsets of tokens `rows` [R], channels `cols` [S] in a sequence -> [R, S] int64.

    One of the two strides is 1: that of the channels if CHANNELS_LAST, else that of the tokens. The
    other is a multiple of ALIGN. So the compiler can use wide loads, and N needs no recompilation.
    """
    step = tl.multiple_of(stride.to(tl.int64), ALIGN)
    if CHANNELS_LAST:
        return rows[:, None] * step + cols[None, :]
    return rows[:, None] + cols[None, :] * step


@triton.jit
def load_tokens(
    ptr, rows, cols, n_tokens, WIDTH: tl.constexpr, stride,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Tokens `rows`, channels `cols` of a sequence, zero outside -> [R, S] in the storage type."""
    mask = (rows < n_tokens)[:, None] & (cols < WIDTH)[None, :]
    return tl.load(
        ptr + token_offsets(rows, cols, stride, CHANNELS_LAST, ALIGN), mask=mask, other=0.0
    )


@triton.jit
def load_vector(ptr, cols, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """A vector of weights, zero beyond its width -> [S] in ACC."""
    return tl.load(ptr + cols, mask=cols < WIDTH, other=0.0).to(ACC)


@triton.jit
def load_matrix(ptr, rows, cols, N_ROWS: tl.constexpr, N_COLS: tl.constexpr):
    """A tile of a contiguous [N_ROWS, N_COLS] matrix, zero outside -> [R, S]."""
    mask = (rows < N_ROWS)[:, None] & (cols < N_COLS)[None, :]
    return tl.load(ptr + rows[:, None] * N_COLS + cols[None, :], mask=mask, other=0.0)


@triton.jit
def load_transposed(ptr, rows, cols, N_ROWS: tl.constexpr, N_COLS: tl.constexpr):
    """The transpose of a tile of a contiguous [N_ROWS, N_COLS] matrix -> [S, R]."""
    mask = (cols < N_COLS)[:, None] & (rows < N_ROWS)[None, :]
    return tl.load(ptr + rows[None, :] * N_COLS + cols[:, None], mask=mask, other=0.0)


@triton.jit
def sum_partials(
    ptr, cols, num_partials, WIDTH: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr
):
    """Columns `cols` [S] of the sum of `num_partials` rows of WIDTH numbers -> [S].

    The order of the additions is fixed.
    """
    sums = tl.zeros([cols.shape[0]], ACC)
    for s0 in range(0, num_partials, BLOCK_S):
        partials = s0 + tl.arange(0, BLOCK_S)
        mask = (partials < num_partials)[:, None] & (cols < WIDTH)[None, :]
        offsets = partials.to(tl.int64)[:, None] * WIDTH + cols[None, :]
        sums += tl.sum(tl.load(ptr + offsets, mask=mask, other=0.0), 0)
    return sums
