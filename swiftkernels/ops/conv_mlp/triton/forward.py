"""Forward: one launch from x to the output, or up to three for wide layers.

`_forward_kernel`: a program computes the output of BLOCK_N pixels. It makes their tile u =
norm(depthwise(x)) from x, where pixels outside of the image are masked. Then it takes the hidden
channels in blocks: a product with W1, the activation, and a product with W2, which is added to the
output. Only x is read, and only the output is written; the hidden channels stay on chip.

Every program reads all weights, and the tile of its output has all channels. For wide layers that
takes longer than to write and read the hidden channels: `_input_kernel` writes u, and each of the
two products is a launch of its own, `backends/triton/linear.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from swiftkernels.backends.triton.activations import activate
from swiftkernels.backends.triton.tiles import (
    dot,
    load_tokens,
    load_transposed,
    load_vector,
    to_operand,
    token_offsets,
)


@triton.jit
def depthwise_tile(
    x_ptr, w_ptr, b_ptr, rows, cols, n_pixels, height, width, stride,
    C: tl.constexpr, KERNEL: tl.constexpr, TAPS_FIRST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The depthwise convolution at pixels `rows`, for channels `cols` -> [R, S] in ACC.

    The pixels may be those of several images, one after the other. Neighbours in another row or
    image of the batch are outside. The weights are [k, k, C] in memory if TAPS_FIRST, else
    [C, k, k].
    """
    REACH: tl.constexpr = KERNEL // 2
    column = rows % width
    line = rows // width % height
    tile = tl.zeros([rows.shape[0], cols.shape[0]], ACC)
    for i in range(KERNEL):
        inside_lines = (rows < n_pixels) & (line + i >= REACH) & (line + i < height + REACH)
        for j in tl.static_range(KERNEL):
            inside = inside_lines & (column + j >= REACH) & (column + j < width + REACH)
            mask = inside[:, None] & (cols < C)[None, :]
            neighbours = rows + (i - REACH) * width + (j - REACH)
            offsets = token_offsets(neighbours, cols, stride, CHANNELS_LAST, ALIGN)
            x_tile = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
            if TAPS_FIRST:
                taps = w_ptr + (i * KERNEL + j) * C + cols
            else:
                taps = w_ptr + cols * (KERNEL * KERNEL) + (i * KERNEL + j)
            tile += x_tile * tl.load(taps, mask=cols < C, other=0.0).to(ACC)[None, :]
    if b_ptr is not None:
        tile += load_vector(b_ptr, cols, C, ACC)[None, :]
    return tile


@triton.jit
def normalised(
    tile, weight_ptr, bias_ptr, mean_ptr, var_ptr, cols,
    C: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The BatchNorm in evaluation of channels `cols`; columns beyond C stay zero."""
    variance = tl.load(var_ptr + cols, mask=cols < C, other=1.0).to(ACC)
    factor = 1.0 / tl.sqrt(variance + EPS)
    if weight_ptr is not None:
        factor = factor * load_vector(weight_ptr, cols, C, ACC)
    tile = (tile - load_vector(mean_ptr, cols, C, ACC)[None, :]) * factor[None, :]
    if bias_ptr is not None:
        tile += load_vector(bias_ptr, cols, C, ACC)[None, :]
    return tile


@triton.jit
def input_tile(
    x_ptr, depthwise_ptr, depthwise_bias_ptr,
    norm_weight_ptr, norm_bias_ptr, norm_mean_ptr, norm_var_ptr,
    rows, cols, n_pixels, height, width, stride,
    C: tl.constexpr, KERNEL: tl.constexpr, TAPS_FIRST: tl.constexpr, EPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """norm(depthwise(x)) at pixels `rows`, channels `cols`, as an operand of `dot` -> [R, S]."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    if KERNEL:
        tile = depthwise_tile(
            x_ptr, depthwise_ptr, depthwise_bias_ptr, rows, cols, n_pixels, height, width, stride,
            C, KERNEL, TAPS_FIRST, CHANNELS_LAST, ALIGN, ACC,
        )  # fmt: skip
    else:
        tile = load_tokens(x_ptr, rows, cols, n_pixels, C, stride, CHANNELS_LAST, ALIGN)
    if norm_mean_ptr is not None:
        tile = normalised(
            tile.to(ACC), norm_weight_ptr, norm_bias_ptr, norm_mean_ptr, norm_var_ptr, cols, C, EPS,
            ACC,
        )  # fmt: skip
    return to_operand(tile, DTYPE)


@triton.jit(do_not_specialize=["n_pixels", "num_tiles", "height", "width", "stride_b", "stride"])
def _forward_kernel(
    x_ptr,  # [B, N, C]
    depthwise_ptr, depthwise_bias_ptr,  # [C, 1, k, k], [C] or None; not read unless KERNEL
    norm_weight_ptr, norm_bias_ptr, norm_mean_ptr, norm_var_ptr,  # [C] or None
    w1_ptr, b1_ptr, w2_ptr, b2_ptr,  # [H, C], [H] or None, [D, H], [D] or None
    scale_ptr,  # [D] or None
    out_ptr,  # [B, N, D], contiguous
    n_pixels, num_tiles, height, width, stride_b, stride,
    C: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    KERNEL: tl.constexpr, TAPS_FIRST: tl.constexpr, EPS: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_D channels of the output for BLOCK_N pixels.

    If BLOCK_K >= C, the input tile is made once; else it is made in parts for every block of hidden
    channels, which takes fewer registers.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    across: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    tile = pid // across
    batch = (tile // num_tiles).to(tl.int64)
    rows = (tile % num_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += batch * tl.multiple_of(stride_b.to(tl.int64), ALIGN)
    ds = pid % across * BLOCK_D + tl.arange(0, BLOCK_D)

    if BLOCK_K >= C:
        cols = tl.arange(0, BLOCK_K)
        operand = input_tile(
            x_ptr, depthwise_ptr, depthwise_bias_ptr, norm_weight_ptr, norm_bias_ptr,
            norm_mean_ptr, norm_var_ptr, rows, cols, n_pixels, height, width, stride, C, KERNEL,
            TAPS_FIRST, EPS, CHANNELS_LAST, ALIGN, ACC,
        )  # fmt: skip
    out = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for h0 in range(0, H, BLOCK_H):
        hs = h0 + tl.arange(0, BLOCK_H)
        hidden = tl.zeros([BLOCK_N, BLOCK_H], ACC)
        if BLOCK_K >= C:
            hidden = dot(operand, load_transposed(w1_ptr, hs, cols, H, C), hidden, PRECISION)
        else:
            for k0 in range(0, C, BLOCK_K):
                ks = k0 + tl.arange(0, BLOCK_K)
                part = input_tile(
                    x_ptr, depthwise_ptr, depthwise_bias_ptr, norm_weight_ptr, norm_bias_ptr,
                    norm_mean_ptr, norm_var_ptr, rows, ks, n_pixels, height, width, stride, C,
                    KERNEL, TAPS_FIRST, EPS, CHANNELS_LAST, ALIGN, ACC,
                )  # fmt: skip
                hidden = dot(part, load_transposed(w1_ptr, hs, ks, H, C), hidden, PRECISION)
        if b1_ptr is not None:
            hidden += load_vector(b1_ptr, hs, H, ACC)[None, :]
        activated = to_operand(activate(hidden, ACTIVATION, DTYPE), DTYPE)
        out = dot(activated, load_transposed(w2_ptr, ds, hs, D, H), out, PRECISION)

    if b2_ptr is not None:
        out += load_vector(b2_ptr, ds, D, ACC)[None, :]
    if scale_ptr is not None:
        out = out * load_vector(scale_ptr, ds, D, ACC)[None, :]
    if RESIDUAL:
        out += load_tokens(x_ptr, rows, ds, n_pixels, D, stride, CHANNELS_LAST, ALIGN).to(ACC)
    offsets = (batch * n_pixels + rows)[:, None] * D + ds[None, :]
    mask = (rows < n_pixels)[:, None] & (ds < D)[None, :]
    tl.store(out_ptr + offsets, out.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["n_pixels", "num_tiles", "height", "width", "stride_b", "stride"])
def _input_kernel(
    x_ptr,  # [B, N, C]
    depthwise_ptr, depthwise_bias_ptr,  # [C, 1, k, k], [C] or None; not read unless KERNEL
    norm_weight_ptr, norm_bias_ptr, norm_mean_ptr, norm_var_ptr,  # [C] or None
    out_ptr,  # [B, N, C], contiguous
    n_pixels, num_tiles, height, width, stride_b, stride,
    C: tl.constexpr, KERNEL: tl.constexpr, TAPS_FIRST: tl.constexpr, EPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """norm(depthwise(x)) of BLOCK_C channels of BLOCK_N pixels."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    across: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    tile = pid // across
    batch = (tile // num_tiles).to(tl.int64)
    rows = (tile % num_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = pid % across * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += batch * tl.multiple_of(stride_b.to(tl.int64), ALIGN)
    out = input_tile(
        x_ptr, depthwise_ptr, depthwise_bias_ptr, norm_weight_ptr, norm_bias_ptr, norm_mean_ptr,
        norm_var_ptr, rows, cols, n_pixels, height, width, stride, C, KERNEL, TAPS_FIRST, EPS,
        CHANNELS_LAST, ALIGN, ACC,
    )  # fmt: skip
    offsets = (batch * n_pixels + rows)[:, None] * C + cols[None, :]
    tl.store(out_ptr + offsets, out, mask=(rows < n_pixels)[:, None] & (cols < C)[None, :])
