"""Stages that forward and backward have in common: rows of q and k, and their norms."""

from __future__ import annotations

import triton
import triton.language as tl

from swiftkernels.backends.triton.tiles import dot, load_tokens, load_transposed, load_vector


@triton.jit
def query_or_key_tile(
    ptr, w_ptr, b_ptr, rows, n_tokens, stride,
    C: tl.constexpr, E: tl.constexpr, PROJECT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows of q (or k) of a sequence -> [BLOCK_N, BLOCK_E] in ACC.

    If PROJECT, `ptr` is x [N, C] and the rows are x W^T + b. Otherwise `ptr` is q (or k) [N, E].
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
    """max(norms, eps) in the type of the norms: Triton would round a bare constant to float32."""
    return tl.maximum(norms, tl.full(norms.shape, EPS, norms.dtype))


@triton.jit
def unit_rows(tile, EPS: tl.constexpr, QK_NORM: tl.constexpr):
    """The rows divided by max(norm, eps); without QK_NORM, the tile itself."""
    if QK_NORM:
        tile = tile * (1.0 / at_least_eps(row_norms(tile), EPS))[:, None]
    return tile


@triton.jit
def unit_rows_backward(grad, tile, EPS: tl.constexpr, QK_NORM: tl.constexpr):
    """Gradient of `unit_rows` at `tile`. Below eps the divisor is a constant: no projection."""
    if QK_NORM:
        norms = row_norms(tile)
        inverse = 1.0 / at_least_eps(norms, EPS)
        unit = tile * inverse[:, None]
        projection = tl.where(norms >= EPS, tl.sum(unit * grad, 1), 0.0)
        grad = (grad - unit * projection[:, None]) * inverse[:, None]
    return grad


@triton.jit
def valid_tokens(mask_ptr, rows, n_tokens):
    """Which of the tokens `rows` of a sequence take part in the pooling -> [R] bool."""
    valid = rows < n_tokens
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + rows, mask=valid, other=0) != 0)
    return valid
