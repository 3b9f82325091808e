"""Backward: five kernels, and one small GEMM for the gradient of Wk.

With r = relu(x Wv^T + bv), u = r * context and du = dout Wp:

1. `_rows_backward_kernel` stores u and dv = du * context (0 where r is 0). For every split of the
   tokens it stores its share of dcontext = sum_n du_n * r_n.
2. `_context_backward_kernel` adds these shares, and computes dp = Wk^T dcontext, the gradient of
   the pooled token p.
3. `_tokens_backward_kernel` computes dx_n = dv_n Wv + a_n dp + ds_n query, with the gradient of the
   score ds_n = a_n dp . (x_n - p). For every split of the tokens it stores its share of
   dquery = sum_n ds_n (x_n - p). Subtracting p changes nothing, because sum_n ds_n = 0.
4. `_weights_backward_kernel` computes partial sums of dWv = dv^T x, dWp = dout^T u and the biases.
5. `_sum_partials_kernel` adds partial sums in a fixed order: once for dquery, once for the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from swiftkernels.backends.triton.tiles import (
    dot,
    load_matrix,
    load_tokens,
    load_vector,
    sum_partials,
    to_operand,
    token_offsets,
)
from swiftkernels.ops.separable_attention.triton.forward import (
    aligned,
    load_rows,
    scores_of,
    sequence_offset,
    value_tile,
)


@triton.jit(
    do_not_specialize=[
        "n_tokens", "num_splits", "tiles_per_split", "groups", "stride_b", "stride_g", "stride",
        "dout_stride_b", "dout_stride_g", "dout_stride",
    ]
)  # fmt: skip
def _rows_backward_kernel(
    x_ptr,  # [B, N, C]
    qkv_ptr, qkv_bias_ptr,  # [1 + 2 C, C], [1 + 2 C] or None
    proj_ptr,  # [D, C]
    context_ptr,  # [B, C] in ACC
    dout_ptr,  # [B, N, D]
    dv_ptr, u_ptr,  # [B, N, C], contiguous; u is None if weights need no gradients
    dcontext_ptr,  # [B, num_splits, C] in ACC
    n_tokens, num_splits, tiles_per_split, groups,
    stride_b, stride_g, stride, dout_stride_b, dout_stride_g, dout_stride,
    C: tl.constexpr, D: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    DOUT_CHANNELS_LAST: tl.constexpr, DOUT_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All that does not depend on dp, for a split of the tokens of a sequence."""
    ACC: tl.constexpr = context_ptr.dtype.element_ty
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n_tokens = aligned(n_tokens, CHANNELS_LAST, ALIGN)
    pid = tl.program_id(0)
    sequence = (pid // num_splits).to(tl.int64)
    split = pid % num_splits
    x_ptr += sequence_offset(sequence, groups, stride_b, stride_g, ALIGN)
    dout_ptr += sequence_offset(sequence, groups, dout_stride_b, dout_stride_g, DOUT_ALIGN)
    cols = tl.arange(0, BLOCK_C)
    dcontext = tl.zeros([BLOCK_C], ACC)
    for tile in range(tiles_per_split):
        row = (split * tiles_per_split + tile).to(tl.int64) * BLOCK_N
        rows = row + tl.arange(0, BLOCK_N)
        du = tl.zeros([BLOCK_N, BLOCK_C], ACC)
        for k0 in range(0, D, BLOCK_K):
            ks = k0 + tl.arange(0, BLOCK_K)
            dout_tile = load_tokens(
                dout_ptr, rows, ks, n_tokens, D, dout_stride, DOUT_CHANNELS_LAST, DOUT_ALIGN
            )
            du = dot(dout_tile, load_matrix(proj_ptr, ks, cols, D, C), du, PRECISION)
        values = value_tile(
            x_ptr, qkv_ptr, qkv_bias_ptr, rows, n_tokens, stride, C, CHANNELS_LAST, ALIGN,
            PRECISION, BLOCK_N, BLOCK_C, BLOCK_K, ACC,
        )  # fmt: skip
        gated = tl.where(values < 0.0, 0.0, values)
        # Rows beyond the last token have du = 0.
        dcontext += tl.sum(du * gated, 0)
        context = load_vector(context_ptr + sequence * C, cols, C, ACC)[None, :]
        offsets = (sequence * n_tokens + rows)[:, None] * C + cols[None, :]
        mask = (rows < n_tokens)[:, None] & (cols < C)[None, :]
        dv = tl.where(values <= 0.0, 0.0, du * context)
        tl.store(dv_ptr + offsets, to_operand(dv, DTYPE), mask=mask)
        if u_ptr is not None:
            tl.store(u_ptr + offsets, to_operand(gated * context, DTYPE), mask=mask)
    part_offset = (sequence * num_splits + split) * C
    tl.store(dcontext_ptr + part_offset + cols, dcontext, mask=cols < C)


@triton.jit(do_not_specialize=["num_sequences", "num_splits"])
def _context_backward_kernel(
    part_ptr,  # [B, num_splits, C]: shares of dcontext
    qkv_ptr,  # [1 + 2 C, C]
    dcontext_ptr, dpooled_ptr,  # [B, C] in ACC
    num_sequences, num_splits,
    C: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """BLOCK_J columns of dp for BLOCK_B sequences."""
    ACC: tl.constexpr = dpooled_ptr.dtype.element_ty
    across: tl.constexpr = (C + BLOCK_J - 1) // BLOCK_J
    pid = tl.program_id(0)
    sequences = (pid // across).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    valid = sequences < num_sequences
    js = (pid % across) * BLOCK_J + tl.arange(0, BLOCK_J)
    dpooled = tl.zeros([BLOCK_B, BLOCK_J], ACC)
    for k0 in range(0, C, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        mask = valid[:, None] & (ks < C)[None, :]
        dcontext = tl.zeros([BLOCK_B, BLOCK_K], ACC)
        for split in range(num_splits):
            offsets = (sequences * num_splits + split)[:, None] * C + ks[None, :]
            dcontext += tl.load(part_ptr + offsets, mask=mask, other=0.0)
        if pid % across == 0:
            tl.store(dcontext_ptr + sequences[:, None] * C + ks[None, :], dcontext, mask=mask)
        key_tile = load_matrix(qkv_ptr + C, ks, js, C, C)  # [BLOCK_K, BLOCK_J]
        dpooled = dot(dcontext, key_tile.to(ACC), dpooled, PRECISION)
    mask = valid[:, None] & (js < C)[None, :]
    tl.store(dpooled_ptr + sequences[:, None] * C + js[None, :], dpooled, mask=mask)


@triton.jit(
    do_not_specialize=[
        "n_tokens", "num_splits", "tiles_per_split", "groups", "stride_b", "stride_g", "stride",
        "dx_stride_b", "dx_stride_g", "dx_stride",
    ]
)  # fmt: skip
def _tokens_backward_kernel(
    x_ptr,  # [B, N, C]
    qkv_ptr,  # [1 + 2 C, C]
    pooled_ptr, softmax_ptr, dpooled_ptr,  # [B, C], [B, 2], [B, C] in ACC
    dv_ptr,  # [B, N, C], contiguous
    dx_ptr,  # [B, N, C] or None
    dquery_ptr,  # [B, num_splits, C] in ACC, or None
    n_tokens, num_splits, tiles_per_split, groups,
    stride_b, stride_g, stride, dx_stride_b, dx_stride_g, dx_stride,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    DX_CHANNELS_LAST: tl.constexpr, DX_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """dx, and a share of dquery, for a split of the tokens of a sequence."""
    ACC: tl.constexpr = pooled_ptr.dtype.element_ty
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n_tokens = aligned(n_tokens, CHANNELS_LAST, ALIGN)
    pid = tl.program_id(0)
    sequence = (pid // num_splits).to(tl.int64)
    split = pid % num_splits
    x_ptr += sequence_offset(sequence, groups, stride_b, stride_g, ALIGN)
    cols = tl.arange(0, BLOCK_C)
    one = tl.arange(0, 1)
    highest = tl.load(softmax_ptr + sequence * 2 + one)
    total = tl.load(softmax_ptr + sequence * 2 + 1 + one)
    dquery = tl.zeros([BLOCK_C], ACC)
    for tile in range(tiles_per_split):
        row = (split * tiles_per_split + tile).to(tl.int64) * BLOCK_N
        rows = row + tl.arange(0, BLOCK_N)
        valid = rows < n_tokens
        x_tile = load_tokens(x_ptr, rows, cols, n_tokens, C, stride, CHANNELS_LAST, ALIGN).to(ACC)
        scores = scores_of(x_tile, qkv_ptr, C, BLOCK_C, ACC)
        weights = tl.where(valid, tl.exp(tl.where(valid, scores - highest, 0.0)) / total, 0.0)
        centred = x_tile - load_vector(pooled_ptr + sequence * C, cols, C, ACC)[None, :]
        dpooled = load_vector(dpooled_ptr + sequence * C, cols, C, ACC)
        dscores = weights * tl.sum(centred * dpooled[None, :], 1)
        dquery += tl.sum(centred * dscores[:, None], 0)
        if dx_ptr is not None:
            dx_offset = sequence_offset(sequence, groups, dx_stride_b, dx_stride_g, DX_ALIGN)
            dv = load_rows(dv_ptr + sequence * n_tokens * C, rows, cols, n_tokens, C)
            for j0 in range(0, C, BLOCK_J):
                js = j0 + tl.arange(0, BLOCK_J)
                dp = load_vector(dpooled_ptr + sequence * C, js, C, ACC)
                query = load_vector(qkv_ptr, js, C, ACC)
                dx_tile = weights[:, None] * dp[None, :] + dscores[:, None] * query[None, :]
                value_rows = load_matrix(qkv_ptr + (C + 1) * C, cols, js, C, C)
                dx_tile = dot(dv, value_rows, dx_tile, PRECISION)
                offsets = token_offsets(rows, js, dx_stride, DX_CHANNELS_LAST, DX_ALIGN)
                mask = valid[:, None] & (js < C)[None, :]
                tl.store(dx_ptr + dx_offset + offsets, dx_tile.to(DTYPE), mask=mask)
    if dquery_ptr is not None:
        part_offset = (sequence * num_splits + split) * C
        tl.store(dquery_ptr + part_offset + cols, dquery, mask=cols < C)


@triton.jit(
    do_not_specialize=[
        "n_tokens", "num_tiles", "num_splits", "tiles_per_split", "operand_stride", "groups",
        "stride_b", "stride_g", "stride", "dout_stride_b", "dout_stride_g", "dout_stride",
    ]
)  # fmt: skip
def _weights_backward_kernel(
    x_ptr, dout_ptr,  # [B, N, C], [B, N, D]
    operands_ptr,  # dv and u: [2, B, N, C]
    sums_ptr,  # [num_splits, C C + C D + C + D] in ACC: dWv, dWp^T, dbv, dbp
    n_tokens, num_tiles, num_splits, tiles_per_split, operand_stride, groups,
    stride_b, stride_g, stride, dout_stride_b, dout_stride_g, dout_stride,
    C: tl.constexpr, D: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    DOUT_CHANNELS_LAST: tl.constexpr, DOUT_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of dWv or dWp^T over a split of the tokens of all sequences.

    Programs at the left edge of dWv also sum dv, and those at the top edge of dWp^T also sum dout,
    for the biases. num_tiles counts the token tiles of all sequences; each is within one sequence.
    """
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    down: tl.constexpr = (C + BLOCK_R - 1) // BLOCK_R
    x_across: tl.constexpr = (C + BLOCK_J - 1) // BLOCK_J
    dout_across: tl.constexpr = (D + BLOCK_J - 1) // BLOCK_J
    x_programs: tl.constexpr = down * x_across
    programs: tl.constexpr = x_programs + down * dout_across
    n_tokens = aligned(n_tokens, CHANNELS_LAST, ALIGN)
    pid = tl.program_id(0)
    split = pid // programs
    job = pid % programs
    of_x = job < x_programs
    across = tl.where(of_x, x_across, dout_across)
    job = tl.where(of_x, job, job - x_programs)
    left_cols = job // across * BLOCK_R + tl.arange(0, BLOCK_R)
    js = job % across * BLOCK_J + tl.arange(0, BLOCK_J)
    operands_ptr += tl.where(of_x, 0, 1).to(tl.int64) * operand_stride
    tiles_per_sequence = (n_tokens + BLOCK_N - 1) // BLOCK_N

    left_edge = of_x & (job % across == 0)
    top_edge = (job < dout_across) & (of_x == 0)
    sums = tl.zeros([BLOCK_R, BLOCK_J], ACC)
    left_sums = tl.zeros([BLOCK_R], ACC)
    top_sums = tl.zeros([BLOCK_J], ACC)
    for tile in range(split * tiles_per_split, min((split + 1) * tiles_per_split, num_tiles)):
        sequence = (tile // tiles_per_sequence).to(tl.int64)
        rows = (tile % tiles_per_sequence).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (left_cols < C)[:, None] & (rows < n_tokens)[None, :]
        offsets = (sequence * n_tokens + rows)[None, :] * C + left_cols[:, None]
        left = tl.load(operands_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_N]
        if of_x:
            offset = sequence_offset(sequence, groups, stride_b, stride_g, ALIGN)
            right = load_tokens(x_ptr + offset, rows, js, n_tokens, C, stride, CHANNELS_LAST, ALIGN)
        else:
            offset = sequence_offset(sequence, groups, dout_stride_b, dout_stride_g, DOUT_ALIGN)
            right = load_tokens(
                dout_ptr + offset, rows, js, n_tokens, D, dout_stride, DOUT_CHANNELS_LAST,
                DOUT_ALIGN,
            )  # fmt: skip
        sums = dot(left, right, sums, PRECISION)
        if left_edge:
            left_sums += tl.sum(left.to(ACC), 1)
        if top_edge:
            top_sums += tl.sum(right.to(ACC), 0)

    width = tl.where(of_x, C, D)
    sums_ptr += split.to(tl.int64) * (C * C + C * D + C + D)
    start = tl.where(of_x, 0, C * C)
    mask = (left_cols < C)[:, None] & (js < width)[None, :]
    tl.store(sums_ptr + start + left_cols[:, None] * width + js[None, :], sums, mask=mask)
    biases_ptr = sums_ptr + C * C + C * D
    if left_edge:
        tl.store(biases_ptr + left_cols, left_sums, mask=left_cols < C)
    if top_edge:
        tl.store(biases_ptr + C + js, top_sums, mask=js < D)


@triton.jit(do_not_specialize=["num_partials"])
def _sum_partials_kernel(
    part_ptr,  # [num_partials, WIDTH] in ACC
    sum_ptr,  # [WIDTH]
    num_partials,
    WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Add all partial sums of BLOCK_J columns; store them rounded."""
    cols = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    sums = sum_partials(part_ptr, cols, num_partials, WIDTH, BLOCK_S, part_ptr.dtype.element_ty)
    tl.store(sum_ptr + cols, sums.to(sum_ptr.dtype.element_ty), mask=cols < WIDTH)
