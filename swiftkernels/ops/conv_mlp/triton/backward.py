"""Backward of a block without depthwise convolution: at most three launches.

The forward keeps x only. Both kernels compute the hidden channels again, block by block:

    z = x W1^T + b1,  h = act(z),  dz = act'(z) (dout W2)

1. `_input_backward_kernel` computes dx = dz W1, plus dout with a residual, for a tile of pixels.
2. `_weights_backward_kernel` computes dW1 = dz^T x, dW2 = dout^T h and the sums of dz and dout, for
   a block of hidden channels over a split of the pixels of the batch.
3. `_finish_backward_kernel` adds the partial sums of the splits in a fixed order. With one split
   launch 2 stores the gradients, and there is no launch 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from swiftkernels.backends.triton.activations import activate, activation_backward
from swiftkernels.backends.triton.tiles import (
    dot,
    load_matrix,
    load_tokens,
    load_transposed,
    load_vector,
    sum_partials,
    to_operand,
    token_offsets,
)


@triton.jit
def hidden_tiles(
    x_ptr, dout_ptr, w1_ptr, b1_ptr, w2_ptr, rows, hs, n_pixels, stride, dout_stride,
    C: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    DOUT_CHANNELS_LAST: tl.constexpr, DOUT_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """z, and the gradient of act(z), for pixels `rows` and hidden channels `hs` -> [R, S], [R, S].

    Rows beyond the last pixel have a gradient of zero.
    """
    hidden = tl.zeros([rows.shape[0], hs.shape[0]], ACC)
    for k0 in range(0, C, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        x_tile = load_tokens(x_ptr, rows, ks, n_pixels, C, stride, CHANNELS_LAST, ALIGN)
        hidden = dot(x_tile, load_transposed(w1_ptr, hs, ks, H, C), hidden, PRECISION)
    if b1_ptr is not None:
        hidden += load_vector(b1_ptr, hs, H, ACC)[None, :]
    grad = tl.zeros([rows.shape[0], hs.shape[0]], ACC)
    for k0 in range(0, D, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        dout_tile = load_tokens(
            dout_ptr, rows, ks, n_pixels, D, dout_stride, DOUT_CHANNELS_LAST, DOUT_ALIGN
        )
        grad = dot(dout_tile, load_matrix(w2_ptr, ks, hs, D, H), grad, PRECISION)
    return hidden, grad


@triton.jit(
    do_not_specialize=[
        "n_pixels", "num_tiles", "stride_b", "stride", "dout_stride_b", "dout_stride",
        "dx_stride_b", "dx_stride",
    ]
)  # fmt: skip
def _input_backward_kernel(
    x_ptr, dout_ptr,  # [B, N, C], [B, N, D]
    w1_ptr, b1_ptr, w2_ptr,  # [H, C], [H] or None, [D, H]
    dx_ptr,  # [B, N, C]
    n_pixels, num_tiles,
    stride_b, stride, dout_stride_b, dout_stride, dx_stride_b, dx_stride,
    C: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    DOUT_CHANNELS_LAST: tl.constexpr, DOUT_ALIGN: tl.constexpr,
    DX_CHANNELS_LAST: tl.constexpr, DX_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of dx for BLOCK_N pixels."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    across: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    tile = pid // across
    batch = (tile // num_tiles).to(tl.int64)
    rows = (tile % num_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += batch * tl.multiple_of(stride_b.to(tl.int64), ALIGN)
    dout_ptr += batch * tl.multiple_of(dout_stride_b.to(tl.int64), DOUT_ALIGN)
    dx_ptr += batch * tl.multiple_of(dx_stride_b.to(tl.int64), DX_ALIGN)
    cs = pid % across * BLOCK_C + tl.arange(0, BLOCK_C)

    dx = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for h0 in range(0, H, BLOCK_H):
        hs = h0 + tl.arange(0, BLOCK_H)
        hidden, grad = hidden_tiles(
            x_ptr, dout_ptr, w1_ptr, b1_ptr, w2_ptr, rows, hs, n_pixels, stride, dout_stride, C, H,
            D, CHANNELS_LAST, ALIGN, DOUT_CHANNELS_LAST, DOUT_ALIGN, PRECISION, BLOCK_K, ACC,
        )  # fmt: skip
        operand = to_operand(activation_backward(grad, hidden, ACTIVATION, DTYPE), DTYPE)
        dx = dot(operand, load_matrix(w1_ptr, hs, cs, H, C), dx, PRECISION)
    if RESIDUAL:
        dx += load_tokens(
            dout_ptr, rows, cs, n_pixels, C, dout_stride, DOUT_CHANNELS_LAST, DOUT_ALIGN
        ).to(ACC)
    offsets = token_offsets(rows, cs, dx_stride, DX_CHANNELS_LAST, DX_ALIGN)
    mask = (rows < n_pixels)[:, None] & (cs < C)[None, :]
    tl.store(dx_ptr + offsets, dx.to(DTYPE), mask=mask)


@triton.jit(
    do_not_specialize=[
        "n_pixels", "num_tiles", "tiles_per_split", "tiles_per_sequence", "part_stride", "stride_b",
        "stride", "dout_stride_b", "dout_stride",
    ]
)  # fmt: skip
def _weights_backward_kernel(
    x_ptr, dout_ptr,  # [B, N, C], [B, N, D]
    w1_ptr, b1_ptr, w2_ptr,  # [H, C], [H] or None, [D, H]
    dw1_ptr, dw2_ptr,  # [num_splits, H C], [num_splits, D H]
    db1_ptr, db2_ptr,  # [num_splits, H] or None, [num_splits, D] or None
    n_pixels, num_tiles, tiles_per_split, tiles_per_sequence, part_stride,
    stride_b, stride, dout_stride_b, dout_stride,
    C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    DOUT_CHANNELS_LAST: tl.constexpr, DOUT_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of hidden channels, over a split of the pixels of the batch.

    Of dW1 it computes BLOCK_J columns, and of dW2 as many rows. The splits are `part_stride` apart.
    num_tiles counts the tiles of the batch; each is within one of the sequences of n_pixels.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    down: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    across: tl.constexpr = (max(C, D) + BLOCK_J - 1) // BLOCK_J
    pid = tl.program_id(0)
    split = pid // (down * across)
    block = pid // across % down
    part = pid % across
    hs = block * BLOCK_H + tl.arange(0, BLOCK_H)
    js = part * BLOCK_J + tl.arange(0, BLOCK_J)

    dw1 = tl.zeros([BLOCK_H, BLOCK_J], ACC)
    dw2 = tl.zeros([BLOCK_H, BLOCK_J], ACC)  # transposed
    db1 = tl.zeros([BLOCK_H], ACC)
    db2 = tl.zeros([BLOCK_J], ACC)
    for tile in range(split * tiles_per_split, min((split + 1) * tiles_per_split, num_tiles)):
        sequence = (tile // tiles_per_sequence).to(tl.int64)
        rows = tile % tiles_per_sequence * BLOCK_N + tl.arange(0, BLOCK_N)
        x_tokens = x_ptr + sequence * tl.multiple_of(stride_b.to(tl.int64), ALIGN)
        dout_tokens = dout_ptr + sequence * tl.multiple_of(dout_stride_b.to(tl.int64), DOUT_ALIGN)
        hidden, grad = hidden_tiles(
            x_tokens, dout_tokens, w1_ptr, b1_ptr, w2_ptr, rows, hs, n_pixels, stride, dout_stride,
            C, H, D, CHANNELS_LAST, ALIGN, DOUT_CHANNELS_LAST, DOUT_ALIGN, PRECISION, BLOCK_K, ACC,
        )  # fmt: skip
        # Rows beyond the last pixel add nothing: x and dout are zero there.
        dout_tile = load_tokens(
            dout_tokens, rows, js, n_pixels, D, dout_stride, DOUT_CHANNELS_LAST, DOUT_ALIGN
        )
        activated = to_operand(activate(hidden, ACTIVATION, DTYPE), DTYPE)
        dw2 = dot(tl.trans(activated), dout_tile, dw2, PRECISION)
        dz = activation_backward(grad, hidden, ACTIVATION, DTYPE)
        x_tile = load_tokens(x_tokens, rows, js, n_pixels, C, stride, CHANNELS_LAST, ALIGN)
        dw1 = dot(tl.trans(to_operand(dz, DTYPE)), x_tile, dw1, PRECISION)
        if db1_ptr is not None:
            db1 += tl.sum(dz, 0)
        if db2_ptr is not None:
            db2 += tl.sum(dout_tile.to(ACC), 0)

    OUT: tl.constexpr = dw1_ptr.dtype.element_ty
    offset = split.to(tl.int64) * part_stride
    mask = (hs < H)[:, None] & (js < C)[None, :]
    tl.store(dw1_ptr + offset + hs[:, None] * C + js[None, :], dw1.to(OUT), mask=mask)
    mask = (hs < H)[:, None] & (js < D)[None, :]
    tl.store(dw2_ptr + offset + hs[:, None] + js[None, :] * H, dw2.to(OUT), mask=mask)
    if db1_ptr is not None:
        tl.store(db1_ptr + offset + hs, db1.to(OUT), mask=(hs < H) & (part == 0))
    if db2_ptr is not None:
        tl.store(db2_ptr + offset + js, db2.to(OUT), mask=(js < D) & (block == 0))


@triton.jit
def _store_part(ptr, sums, cols, WIDTH: tl.constexpr):
    """Store those of the sums whose columns [S] are of a tensor of WIDTH numbers."""
    mask = (cols >= 0) & (cols < WIDTH)
    tl.store(ptr + cols, sums.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_partials"])
def _finish_backward_kernel(
    part_ptr,  # [num_partials, H C + D H + H + D] in ACC: dW1, dW2, db1, db2
    dw1_ptr, dw2_ptr,  # [H, C], [D, H]
    db1_ptr, db2_ptr,  # [H] or None, [D] or None
    num_partials,
    C: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Add all partial sums of BLOCK_J columns; store them rounded."""
    WIDTH: tl.constexpr = H * (C + D) + H + D
    cols = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    sums = sum_partials(part_ptr, cols, num_partials, WIDTH, BLOCK_S, part_ptr.dtype.element_ty)
    _store_part(dw1_ptr, sums, cols, H * C)
    _store_part(dw2_ptr, sums, cols - H * C, D * H)
    if db1_ptr is not None:
        _store_part(db1_ptr, sums, cols - H * (C + D), H)
    if db2_ptr is not None:
        _store_part(db2_ptr, sums, cols - (H * (C + D) + H), D)
