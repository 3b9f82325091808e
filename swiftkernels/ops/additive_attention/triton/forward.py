"""Forward: two launches from x (or q and k) to the output.

1. `_pool_forward_kernel` reads the tokens once and leaves, for every split of an item's tokens, the
   weighted sum of its queries and the statistics of its scores. Further programs of the same launch
   multiply the two output matrices, M = Wf Wp.
2. `_output_forward_kernel` combines the splits to the global query G, reads the tokens again and
   writes out = (G * kn) M^T + (qn + bp) Wf^T + bf. Nothing of size N x E is written but the output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from swiftkernels.backends.triton.tiles import (
    at_least_eps,
    dot,
    live_tokens,
    load_matrix,
    load_transposed,
    load_vector,
    query_or_key_tile,
    sum_partials,
    to_operand,
    unit_rows,
)


@triton.jit(
    do_not_specialize=[
        "n_tokens", "num_splits", "tiles_per_split", "num_pool_programs", "stride_b", "stride",
    ]
)  # fmt: skip
def _pool_forward_kernel(
    q_ptr,  # [B, N, C] x if PROJECT, else [B, N, E] queries
    wq_ptr, bq_ptr,  # [E, C], [E] or None; not read unless PROJECT
    w_g_ptr,  # [E]
    mask_ptr,  # [B, N] uint8 or None
    proj_ptr, final_ptr,  # [E, E], [D, E]
    pooled_ptr, stat_ptr,  # [B, num_splits, E], [B, num_splits, 2] in ACC
    m_ptr,  # [D, E]
    n_tokens, num_splits, tiles_per_split, num_pool_programs,
    stride_b, stride,
    C: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, EPS: tl.constexpr, POOLING: tl.constexpr, QK_NORM: tl.constexpr,
    PROJECT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Programs below num_pool_programs pool one split of an item; the others make a tile of M."""
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    if pid < num_pool_programs:
        item = (pid // num_splits).to(tl.int64)
        split = pid % num_splits
        q_ptr += item * tl.multiple_of(stride_b.to(tl.int64), ALIGN)
        if mask_ptr is not None:
            mask_ptr += item * n_tokens
        cols = tl.arange(0, BLOCK_E)
        w_g = load_vector(w_g_ptr, cols, E, ACC)
        pooled = tl.zeros([BLOCK_E], ACC)
        # The statistics: softmax keeps (max, sum of exponentials), l2 the sum of squares.
        top = tl.full([1], float("-inf"), ACC)
        total = tl.zeros([1], ACC)
        for tile in range(tiles_per_split):
            row = (split * tiles_per_split + tile).to(tl.int64) * BLOCK_N
            rows = row + tl.arange(0, BLOCK_N)
            q_tile = query_or_key_tile(
                q_ptr, wq_ptr, bq_ptr, rows, n_tokens, stride, C, E, PROJECT, CHANNELS_LAST, ALIGN,
                PRECISION, BLOCK_N, BLOCK_E, BLOCK_K, ACC,
            )  # fmt: skip
            q_tile = unit_rows(q_tile, EPS, QK_NORM)
            scores = tl.sum(q_tile * w_g[None, :], 1) * SCALE
            live = live_tokens(mask_ptr, rows, n_tokens)
            if POOLING == "softmax":
                scores = tl.where(live, scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores[None, :], 1))
                # A split may hold no live token yet: keep exp() away from inf - inf.
                safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
                decay = tl.exp(top - safe_top)
                weights = tl.exp(scores - safe_top)
                total = total * decay + tl.sum(weights[None, :], 1)
                pooled = pooled * decay
                top = new_top
            elif POOLING == "sum":
                weights = tl.where(live, scores * 0.0 + 1.0, 0.0)
            else:
                weights = tl.where(live, scores, 0.0)
                if POOLING == "l2":
                    total += tl.sum((weights * weights)[None, :], 1)
            pooled += tl.sum(q_tile * weights[:, None], 0)
        part = item * num_splits + split
        tl.store(pooled_ptr + part * E + cols, pooled, mask=cols < E)
        one = tl.arange(0, 1)
        tl.store(stat_ptr + part * 2 + one, top if POOLING == "softmax" else total)
        tl.store(stat_ptr + part * 2 + 1 + one, total)
    else:
        fold = pid - num_pool_programs
        tiles_across: tl.constexpr = (E + BLOCK_M - 1) // BLOCK_M
        out_rows = (fold // tiles_across) * BLOCK_M + tl.arange(0, BLOCK_M)
        out_cols = (fold % tiles_across) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_tile = tl.zeros([BLOCK_M, BLOCK_M], ACC)
        for k0 in range(0, E, 32):
            ks = k0 + tl.arange(0, 32)
            final_tile = load_matrix(final_ptr, out_rows, ks, D, E)
            proj_tile = load_matrix(proj_ptr, ks, out_cols, E, E)
            m_tile = dot(final_tile, proj_tile, m_tile, PRECISION)
        mask = (out_rows < D)[:, None] & (out_cols < E)[None, :]
        offsets = out_rows[:, None] * E + out_cols[None, :]
        tl.store(m_ptr + offsets, to_operand(m_tile, m_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine_splits(
    pooled_ptr, stat_ptr, num_splits,
    E: tl.constexpr, EPS: tl.constexpr, POOLING: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """G and the two pooling statistics of one item from its splits -> [BLOCK_E], [1], [1]."""
    top = tl.full([1], float("-inf"), ACC)
    total = tl.zeros([1], ACC)
    cols = tl.arange(0, BLOCK_E)
    if POOLING == "softmax":
        G = tl.zeros([BLOCK_E], ACC)
        for s0 in range(0, num_splits, BLOCK_S):
            splits = s0 + tl.arange(0, BLOCK_S)
            known = splits < num_splits
            tops = tl.load(stat_ptr + splits * 2, mask=known, other=float("-inf"))
            totals = tl.load(stat_ptr + splits * 2 + 1, mask=known, other=0.0)
            mask = known[:, None] & (cols < E)[None, :]
            part = tl.load(pooled_ptr + splits[:, None] * E + cols[None, :], mask=mask, other=0.0)
            new_top = tl.maximum(top, tl.max(tops[None, :], 1))
            safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
            decay = tl.exp(top - safe_top)
            scale = tl.exp(tops - safe_top)
            total = total * decay + tl.sum((totals * scale)[None, :], 1)
            G = G * decay + tl.sum(part * scale[:, None], 0)
            top = new_top
        # Without any live token G is 0.
        G = G / tl.where(total > 0.0, total, 1.0)
        top = tl.where(total > 0.0, top, 0.0)
    else:
        G = sum_partials(pooled_ptr, cols, num_splits, E, BLOCK_S, ACC)
        if POOLING == "l2":
            for s0 in range(0, num_splits, BLOCK_S):
                splits = s0 + tl.arange(0, BLOCK_S)
                squares = tl.load(stat_ptr + splits * 2, mask=splits < num_splits, other=0.0)
                total += tl.sum(squares[None, :], 1)
            top = tl.sqrt(total)
            G = G / at_least_eps(top, EPS)
        else:
            top = total
    return G, top, total


@triton.jit(
    do_not_specialize=["n_tokens", "num_splits", "num_tiles", "stride_b", "stride"]
)  # fmt: skip
def _output_forward_kernel(
    q_ptr, k_ptr,  # both x [B, N, C] if PROJECT, else queries and keys [B, N, E]
    wq_ptr, bq_ptr, wk_ptr, bk_ptr,  # not read unless PROJECT
    proj_bias_ptr,  # [E] or None
    final_ptr, final_bias_ptr,  # [D, E], [D] or None
    m_ptr, pooled_ptr, stat_ptr,  # what the first launch made
    out_ptr,  # [B, N, D], contiguous
    g_ptr, g_stat_ptr,  # [B, E], [B, 2] in ACC: kept for the backward
    n_tokens, num_splits, num_tiles,
    stride_b, stride,
    C: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
    EPS: tl.constexpr, POOLING: tl.constexpr, QK_NORM: tl.constexpr,
    PROJECT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One tile of tokens of one item, through all the rest of the layer."""
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    pid = tl.program_id(0)
    item = (pid // num_tiles).to(tl.int64)
    tile = pid % num_tiles
    cols = tl.arange(0, BLOCK_E)
    G, stat, total = _combine_splits(
        pooled_ptr + item * num_splits * E, stat_ptr + item * num_splits * 2, num_splits,
        E, EPS, POOLING, BLOCK_S, BLOCK_E, ACC,
    )  # fmt: skip
    if tile == 0:
        tl.store(g_ptr + item * E + cols, G, mask=cols < E)
        one = tl.arange(0, 1)
        tl.store(g_stat_ptr + item * 2 + one, stat)
        tl.store(g_stat_ptr + item * 2 + 1 + one, total)

    item_offset = item * tl.multiple_of(stride_b.to(tl.int64), ALIGN)
    rows = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    q_tile = query_or_key_tile(
        q_ptr + item_offset, wq_ptr, bq_ptr, rows, n_tokens, stride, C, E, PROJECT, CHANNELS_LAST,
        ALIGN, PRECISION, BLOCK_N, BLOCK_E, BLOCK_K, ACC,
    )  # fmt: skip
    q_tile = unit_rows(q_tile, EPS, QK_NORM)
    if proj_bias_ptr is not None:
        # bp enters before Wf, so it travels with the query: no folded bias is needed.
        q_tile += load_vector(proj_bias_ptr, cols, E, ACC)[None, :]
    q_operand = to_operand(q_tile, DTYPE)
    k_tile = query_or_key_tile(
        k_ptr + item_offset, wk_ptr, bk_ptr, rows, n_tokens, stride, C, E, PROJECT, CHANNELS_LAST,
        ALIGN, PRECISION, BLOCK_N, BLOCK_E, BLOCK_K, ACC,
    )  # fmt: skip
    k_operand = to_operand(unit_rows(k_tile, EPS, QK_NORM) * G[None, :], DTYPE)

    out_ptr += item * n_tokens * D
    for j0 in range(0, D, BLOCK_J):
        js = j0 + tl.arange(0, BLOCK_J)
        out_tile = tl.zeros([BLOCK_N, BLOCK_J], ACC)
        out_tile = dot(k_operand, load_transposed(m_ptr, js, cols, D, E), out_tile, PRECISION)
        out_tile = dot(q_operand, load_transposed(final_ptr, js, cols, D, E), out_tile, PRECISION)
        if final_bias_ptr is not None:
            out_tile += load_vector(final_bias_ptr, js, D, ACC)[None, :]
        mask = (rows < n_tokens)[:, None] & (js < D)[None, :]
        tl.store(out_ptr + rows[:, None] * D + js[None, :], out_tile.to(DTYPE), mask=mask)
