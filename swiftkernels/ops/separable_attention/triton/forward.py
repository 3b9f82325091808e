"""Forward: three launches from x to the output.

1. `_pool_forward_kernel` reads the tokens once. For every split of a sequence it stores the sum of
   the tokens, weighted with exp(score - highest), and the statistics of the scores.
2. `_context_forward_kernel` combines the splits to the pooled token p, and computes the context
   Wk p + bk. No key is computed.
3. `_output_forward_kernel` reads the tokens again and writes the output,
   (relu(x Wv^T + bv) * context) Wp^T + bp. It is the only result of the size of the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from swiftkernels.backends.triton.tiles import (
    dot,
    load_tokens,
    load_transposed,
    load_vector,
    to_operand,
    token_offsets,
)


@triton.jit
def sequence_offset(sequence, groups, stride_b, stride_g, ALIGN: tl.constexpr):
    """Element offset of a sequence (int64) among `groups` sequences for each batch element."""
    batch_offset = (sequence // groups) * tl.multiple_of(stride_b.to(tl.int64), ALIGN)
    return batch_offset + (sequence % groups) * tl.multiple_of(stride_g.to(tl.int64), ALIGN)


@triton.jit
def aligned(n_tokens, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """n_tokens, declared as a multiple of ALIGN where tokens are adjacent.

    Then all tokens of a wide load or store are inside or outside together.
    """
    return n_tokens if CHANNELS_LAST else tl.multiple_of(n_tokens.to(tl.int64), ALIGN)


@triton.jit
def load_rows(ptr, rows, cols, num_rows, WIDTH: tl.constexpr):
    """Rows of a contiguous [num_rows, WIDTH] matrix, zero outside -> [R, S]; rows are int64."""
    mask = (rows < num_rows)[:, None] & (cols < WIDTH)[None, :]
    return tl.load(ptr + rows[:, None] * WIDTH + cols[None, :], mask=mask, other=0.0)


@triton.jit
def value_tile(
    x_ptr, qkv_ptr, qkv_bias_ptr, rows, n_tokens, stride,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x[rows] Wv^T + bv of a sequence -> [BLOCK_N, BLOCK_C] in ACC."""
    cols = tl.arange(0, BLOCK_C)
    values = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for k0 in range(0, C, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        x_tile = load_tokens(x_ptr, rows, ks, n_tokens, C, stride, CHANNELS_LAST, ALIGN)
        w_tile = load_transposed(qkv_ptr + (C + 1) * C, cols, ks, C, C)  # [BLOCK_K, BLOCK_C]
        values = dot(x_tile, w_tile, values, PRECISION)
    if qkv_bias_ptr is not None:
        values += load_vector(qkv_bias_ptr + C + 1, cols, C, ACC)[None, :]
    return values


@triton.jit
def scores_of(x_tile, qkv_ptr, C: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """Scores of the rows of x, [R, BLOCK_C] in ACC -> [R]. Their bias cancels in the softmax."""
    return tl.sum(x_tile * load_vector(qkv_ptr, tl.arange(0, BLOCK_C), C, ACC)[None, :], 1)


@triton.jit(
    do_not_specialize=[
        "n_tokens", "num_splits", "tiles_per_split", "groups", "stride_b", "stride_g", "stride",
    ]
)  # fmt: skip
def _pool_forward_kernel(
    x_ptr,  # [B, N, C]
    qkv_ptr,  # [1 + 2 C, C]
    pooled_ptr, stat_ptr,  # [B, num_splits, C], [B, num_splits, 2] in ACC
    n_tokens, num_splits, tiles_per_split, groups, stride_b, stride_g, stride,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Pool a split of a sequence."""
    ACC: tl.constexpr = pooled_ptr.dtype.element_ty
    n_tokens = aligned(n_tokens, CHANNELS_LAST, ALIGN)
    pid = tl.program_id(0)
    sequence = (pid // num_splits).to(tl.int64)
    split = pid % num_splits
    x_ptr += sequence_offset(sequence, groups, stride_b, stride_g, ALIGN)
    cols = tl.arange(0, BLOCK_C)
    pooled = tl.zeros([BLOCK_C], ACC)
    running_max = tl.full([1], float("-inf"), ACC)
    running_sum = tl.zeros([1], ACC)
    for tile in range(tiles_per_split):
        row = (split * tiles_per_split + tile).to(tl.int64) * BLOCK_N
        rows = row + tl.arange(0, BLOCK_N)
        x_tile = load_tokens(x_ptr, rows, cols, n_tokens, C, stride, CHANNELS_LAST, ALIGN).to(ACC)
        scores = scores_of(x_tile, qkv_ptr, C, BLOCK_C, ACC)
        scores = tl.where(rows < n_tokens, scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores[None, :], 1))
        # The last tiles of the last split may be empty: keep exp() away from inf - inf.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp(running_max - safe_max)
        weights = tl.exp(scores - safe_max)
        running_sum = running_sum * rescale + tl.sum(weights[None, :], 1)
        pooled = pooled * rescale + tl.sum(x_tile * weights[:, None], 0)
        running_max = new_max
    part = sequence * num_splits + split
    tl.store(pooled_ptr + part * C + cols, pooled, mask=cols < C)
    one = tl.arange(0, 1)
    tl.store(stat_ptr + part * 2 + one, running_max)
    tl.store(stat_ptr + part * 2 + 1 + one, running_sum)


@triton.jit(do_not_specialize=["num_sequences", "num_splits"])
def _context_forward_kernel(
    part_ptr, part_stat_ptr,  # [B, num_splits, C], [B, num_splits, 2]: from the first launch
    qkv_ptr, qkv_bias_ptr,  # [1 + 2 C, C], [1 + 2 C] or None
    context_ptr, pooled_ptr, softmax_ptr,  # [B, C], [B, C], [B, 2] in ACC
    num_sequences, num_splits,
    C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """BLOCK_J columns of the context for BLOCK_B sequences."""
    ACC: tl.constexpr = context_ptr.dtype.element_ty
    across: tl.constexpr = (C + BLOCK_J - 1) // BLOCK_J
    pid = tl.program_id(0)
    sequences = (pid // across).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    valid = sequences < num_sequences
    js = (pid % across) * BLOCK_J + tl.arange(0, BLOCK_J)
    parts = sequences * num_splits

    highest = tl.full([BLOCK_B], float("-inf"), ACC)
    for split in range(num_splits):
        part_max = tl.load(part_stat_ptr + (parts + split) * 2, mask=valid, other=0.0)
        highest = tl.maximum(highest, part_max)
    total = tl.zeros([BLOCK_B], ACC)
    for split in range(num_splits):
        part_max = tl.load(part_stat_ptr + (parts + split) * 2, mask=valid, other=0.0)
        part_sum = tl.load(part_stat_ptr + (parts + split) * 2 + 1, mask=valid, other=1.0)
        total += part_sum * tl.exp(part_max - highest)

    context = tl.zeros([BLOCK_B, BLOCK_J], ACC)
    for k0 in range(0, C, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        mask = valid[:, None] & (ks < C)[None, :]
        pooled = tl.zeros([BLOCK_B, BLOCK_K], ACC)
        for split in range(num_splits):
            part_max = tl.load(part_stat_ptr + (parts + split) * 2, mask=valid, other=0.0)
            offsets = (parts + split)[:, None] * C + ks[None, :]
            part = tl.load(part_ptr + offsets, mask=mask, other=0.0)
            pooled += part * tl.exp(part_max - highest)[:, None]
        pooled = pooled / total[:, None]
        if pid % across == 0:
            tl.store(pooled_ptr + sequences[:, None] * C + ks[None, :], pooled, mask=mask)
        key_tile = load_transposed(qkv_ptr + C, js, ks, C, C)  # [BLOCK_K, BLOCK_J]
        # In ACC, so that p is not rounded: with few rows the product costs little.
        context = dot(pooled, key_tile.to(ACC), context, PRECISION)
    if qkv_bias_ptr is not None:
        context += load_vector(qkv_bias_ptr + 1, js, C, ACC)[None, :]
    mask = valid[:, None] & (js < C)[None, :]
    tl.store(context_ptr + sequences[:, None] * C + js[None, :], context, mask=mask)
    if pid % across == 0:
        tl.store(softmax_ptr + sequences * 2, highest, mask=valid)
        tl.store(softmax_ptr + sequences * 2 + 1, total, mask=valid)


@triton.jit(
    do_not_specialize=[
        "n_tokens", "num_tiles", "groups", "stride_b", "stride_g", "stride", "out_stride_b",
        "out_stride_g", "out_stride",
    ]
)  # fmt: skip
def _output_forward_kernel(
    x_ptr,  # [B, N, C]
    qkv_ptr, qkv_bias_ptr,  # [1 + 2 C, C], [1 + 2 C] or None
    proj_ptr, proj_bias_ptr,  # [D, C], [D] or None
    context_ptr,  # [B, C] in ACC
    out_ptr,  # [B, N, D]
    n_tokens, num_tiles, groups,
    stride_b, stride_g, stride, out_stride_b, out_stride_g, out_stride,
    C: tl.constexpr, D: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    OUT_CHANNELS_LAST: tl.constexpr, OUT_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """A tile of tokens of a sequence, from x to the output."""
    ACC: tl.constexpr = context_ptr.dtype.element_ty
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    n_tokens = aligned(n_tokens, CHANNELS_LAST, ALIGN)
    pid = tl.program_id(0)
    sequence = (pid // num_tiles).to(tl.int64)
    tile = pid % num_tiles
    x_ptr += sequence_offset(sequence, groups, stride_b, stride_g, ALIGN)
    out_ptr += sequence_offset(sequence, groups, out_stride_b, out_stride_g, OUT_ALIGN)
    rows = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_C)
    values = value_tile(
        x_ptr, qkv_ptr, qkv_bias_ptr, rows, n_tokens, stride, C, CHANNELS_LAST, ALIGN, PRECISION,
        BLOCK_N, BLOCK_C, BLOCK_K, ACC,
    )  # fmt: skip
    context = load_vector(context_ptr + sequence * C, cols, C, ACC)
    gated = tl.where(values < 0.0, 0.0, values) * context[None, :]  # NaN stays NaN
    operand = to_operand(gated, DTYPE)
    for j0 in range(0, D, BLOCK_J):
        js = j0 + tl.arange(0, BLOCK_J)
        out_tile = tl.zeros([BLOCK_N, BLOCK_J], ACC)
        out_tile = dot(operand, load_transposed(proj_ptr, js, cols, D, C), out_tile, PRECISION)
        if proj_bias_ptr is not None:
            out_tile += load_vector(proj_bias_ptr, js, D, ACC)[None, :]
        offsets = token_offsets(rows, js, out_stride, OUT_CHANNELS_LAST, OUT_ALIGN)
        mask = (rows < n_tokens)[:, None] & (js < D)[None, :]
        tl.store(out_ptr + offsets, out_tile.to(DTYPE), mask=mask)
