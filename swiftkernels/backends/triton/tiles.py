"""What the kernels share: tiles of tokens and weights, dot products, row norms, scores, combining.

Throughout: B batch, N tokens, C input width, D output width, E width of queries and keys.
"ACC" is the accumulator type, float32 (float64 for float64 tensors); tiles are converted to it
right after the load, and only `dot` takes operands of the storage type.
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
    """The tile as an operand of `dot`; float16 saturates, so that inf * 0 cannot make a NaN."""
    if DTYPE == tl.float16:  # noqa: SIM300
        tile = tl.where(tile > 65504.0, 65504.0, tile)
        tile = tl.where(tile < -65504.0, -65504.0, tile)
    return tile.to(DTYPE)


@triton.jit
def token_offsets(rows, cols, stride, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Element offsets of tokens `rows` [R], channels `cols` [S] in one item -> [R, S] int64.

    One of the two strides is 1: that of the channels if CHANNELS_LAST, else that of the tokens. The
    other is a multiple of ALIGN, which lets the compiler use wide loads without a recompilation per
    N.
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
    """Tokens `rows`, channels `cols` of one item, zero outside -> [R, S] in the storage type."""
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
def query_or_key_tile(
    ptr, w_ptr, b_ptr, rows, n_tokens, stride,
    C: tl.constexpr, E: tl.constexpr, PROJECT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows of q (or k) of one item -> [BLOCK_N, BLOCK_E] in ACC.

    PROJECT: `ptr` is x [N, C] and the rows are x W^T + b. Otherwise `ptr` is q (or k) [N, E]
    itself.
    """
    cols = tl.arange(0, BLOCK_E)
    if PROJECT:
        tile = tl.zeros([BLOCK_N, BLOCK_E], ACC)
        for k0 in range(0, C, BLOCK_K):
            ks = k0 + tl.arange(0, BLOCK_K)
            x_tile = load_tokens(ptr, rows, ks, n_tokens, C, stride, CHANNELS_LAST, ALIGN)
            w_tile = load_transposed(w_ptr, cols, ks, E, C)  # [BLOCK_K, BLOCK_E]
            tile = dot(x_tile, w_tile, tile, PRECISION)
        if b_ptr is not None:
            tile += load_vector(b_ptr, cols, E, ACC)[None, :]
    else:
        tile = load_tokens(ptr, rows, cols, n_tokens, E, stride, CHANNELS_LAST, ALIGN).to(ACC)
    return tile


@triton.jit
def row_norms(tile):
    """L2 norms of the rows, [R, S] -> [R]."""
    return tl.sqrt(tl.sum(tile * tile, 1))


@triton.jit
def at_least_eps(norms, EPS: tl.constexpr):
    """max(norms, eps) in the type of the norms: a bare constant would be rounded to float32."""
    return tl.maximum(norms, tl.full(norms.shape, EPS, norms.dtype))


@triton.jit
def unit_rows(tile, EPS: tl.constexpr, QK_NORM: tl.constexpr):
    """tile / max(norm, eps) by rows, or the tile itself without QK_NORM."""
    if QK_NORM:
        tile = tile * (1.0 / at_least_eps(row_norms(tile), EPS))[:, None]
    return tile


@triton.jit
def unit_rows_backward(grad, tile, EPS: tl.constexpr, QK_NORM: tl.constexpr):
    """Gradient of `unit_rows` at `tile`; below eps the clamp is constant and has none."""
    if QK_NORM:
        norms = row_norms(tile)
        inverse = 1.0 / at_least_eps(norms, EPS)
        unit = tile * inverse[:, None]
        along = tl.where(norms >= EPS, tl.sum(unit * grad, 1), 0.0)
        grad = (grad - unit * along[:, None]) * inverse[:, None]
    return grad


@triton.jit
def live_tokens(mask_ptr, rows, n_tokens):
    """Which of the tokens `rows` of one item take part in the pooling, [R] bool."""
    live = rows < n_tokens
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + rows, mask=live, other=0) != 0)
    return live


@triton.jit
def pool_tokens(scores, live, stat_ptr, EPS: tl.constexpr, POOLING: tl.constexpr):
    """Weights a over the tokens from scores [R] and the item's two pooling statistics -> [R]."""
    one = tl.arange(0, 1)
    if POOLING == "softmax":
        top = tl.load(stat_ptr + one)
        total = tl.load(stat_ptr + 1 + one)
        # A token that is not live may score above `top`; its exponential must not overflow.
        weights = tl.exp(tl.where(live, scores - top, 0.0)) / tl.where(total > 0.0, total, 1.0)
    elif POOLING == "l2":
        weights = scores / at_least_eps(tl.load(stat_ptr + one), EPS)
    elif POOLING == "sum":
        weights = scores * 0.0 + 1.0
    else:
        weights = scores
    return tl.where(live, weights, 0.0)


@triton.jit
def sum_partials(
    ptr, cols, num_partials, WIDTH: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr
):
    """Sum of `num_partials` rows of WIDTH numbers, in fixed order, at columns `cols` [S] -> [S]."""
    total = tl.zeros([cols.shape[0]], ACC)
    for s0 in range(0, num_partials, BLOCK_S):
        partials = s0 + tl.arange(0, BLOCK_S)
        mask = (partials < num_partials)[:, None] & (cols < WIDTH)[None, :]
        offsets = partials.to(tl.int64)[:, None] * WIDTH + cols[None, :]
        total += tl.sum(tl.load(ptr + offsets, mask=mask, other=0.0), 0)
    return total
