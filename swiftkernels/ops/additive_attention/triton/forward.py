"""Forward: two launches from x (or q and k) to the output.

1. `_pool_forward_kernel` reads the tokens once. For every split of the tokens of a batch element it
   stores the weighted sum of the queries and the statistics of the scores. More programs of the
   same launch compute the product of the two output matrices, M = Wf Wp.
2. `_output_forward_kernel` combines the splits to the global query G, reads the tokens again and
   writes the output. It is the only result of size N x D:

       out = (G * kn) M^T + (qn + bp) Wf^T + bf

   In inference it may add a residual branch: x + scale * out.

Wide layers have no M in the first launch, and `_operands_kernel` instead of the second: it writes
z = qn + bp and y = G * kn, from which products compute the output (`wide.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from swiftkernels.backends.triton.tiles import (
    dot,
    load_matrix,
    load_tokens,
    load_transposed,
    load_vector,
    to_operand,
)
from swiftkernels.ops.additive_attention.triton.pooling import (
    combine_splits,
    first_statistic,
    pool_tile,
)
from swiftkernels.ops.additive_attention.triton.stages import (
    query_or_key_tile,
    unit_rows,
    valid_tokens,
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
    m_ptr,  # [D, E]; None for wide layers
    n_tokens, num_splits, tiles_per_split, num_pool_programs,
    stride_b, stride,
    C: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, EPS: tl.constexpr, POOLING: tl.constexpr, QK_NORM: tl.constexpr,
    PROJECT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The first num_pool_programs programs pool one split each; the others compute a tile of M."""
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    if pid < num_pool_programs:
        batch = (pid // num_splits).to(tl.int64)
        split = pid % num_splits
        q_ptr += batch * tl.multiple_of(stride_b.to(tl.int64), ALIGN)
        if mask_ptr is not None:
            mask_ptr += batch * n_tokens
        cols = tl.arange(0, BLOCK_E)
        w_g = load_vector(w_g_ptr, cols, E, ACC)
        pooled = tl.zeros([BLOCK_E], ACC)
        running_max = tl.full([1], float("-inf"), ACC)
        running_sum = tl.zeros([1], ACC)
        for tile in range(tiles_per_split):
            row = (split * tiles_per_split + tile).to(tl.int64) * BLOCK_N
            rows = row + tl.arange(0, BLOCK_N)
            q_tile = query_or_key_tile(
                q_ptr, wq_ptr, bq_ptr, rows, n_tokens, stride, C, E, PROJECT, CHANNELS_LAST, ALIGN,
                PRECISION, BLOCK_N, BLOCK_E, BLOCK_K, ACC,
            )  # fmt: skip
            q_tile = unit_rows(q_tile, EPS, QK_NORM)
            scores = tl.sum(q_tile * w_g[None, :], 1) * SCALE
            valid = valid_tokens(mask_ptr, rows, n_tokens)
            pooled, running_max, running_sum = pool_tile(
                q_tile, scores, valid, pooled, running_max, running_sum, POOLING
            )
        part = batch * num_splits + split
        tl.store(pooled_ptr + part * E + cols, pooled, mask=cols < E)
        one = tl.arange(0, 1)
        tl.store(stat_ptr + part * 2 + one, first_statistic(running_max, running_sum, POOLING))
        tl.store(stat_ptr + part * 2 + 1 + one, running_sum)
    elif m_ptr is not None:
        m_program = pid - num_pool_programs
        tiles_across: tl.constexpr = (E + BLOCK_M - 1) // BLOCK_M
        out_rows = (m_program // tiles_across) * BLOCK_M + tl.arange(0, BLOCK_M)
        out_cols = (m_program % tiles_across) * BLOCK_M + tl.arange(0, BLOCK_M)
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
def global_query(
    pooled_ptr, stat_ptr, g_ptr, g_stat_ptr, batch, tile, num_splits,
    E: tl.constexpr, EPS: tl.constexpr, POOLING: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """G of a batch element [BLOCK_E]; tile 0 stores it with the statistics."""
    G, first_stat, second_stat = combine_splits(
        pooled_ptr + batch * num_splits * E, stat_ptr + batch * num_splits * 2, num_splits,
        E, EPS, POOLING, BLOCK_S, BLOCK_E, ACC,
    )  # fmt: skip
    if tile == 0:
        cols = tl.arange(0, BLOCK_E)
        one = tl.arange(0, 1)
        tl.store(g_ptr + batch * E + cols, G, mask=cols < E)
        tl.store(g_stat_ptr + batch * 2 + one, first_stat)
        tl.store(g_stat_ptr + batch * 2 + 1 + one, second_stat)
    return G


@triton.jit(
    do_not_specialize=["n_tokens", "num_splits", "num_tiles", "stride_b", "stride"]
)  # fmt: skip
def _output_forward_kernel(
    q_ptr, k_ptr,  # both x [B, N, C] if PROJECT, else queries and keys [B, N, E]
    wq_ptr, bq_ptr, wk_ptr, bk_ptr,  # not read unless PROJECT
    proj_bias_ptr,  # [E] or None
    final_ptr, final_bias_ptr,  # [D, E], [D] or None
    residual_ptr, scale_ptr,  # x [B, N, D], contiguous, and [D], or both None
    m_ptr, pooled_ptr, stat_ptr,  # from the first launch
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
    """A tile of tokens of a batch element: from x, or q and k, to the output."""
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    pid = tl.program_id(0)
    batch = (pid // num_tiles).to(tl.int64)
    tile = pid % num_tiles
    cols = tl.arange(0, BLOCK_E)
    G = global_query(
        pooled_ptr, stat_ptr, g_ptr, g_stat_ptr, batch, tile, num_splits, E, EPS, POOLING, BLOCK_S,
        BLOCK_E, ACC,
    )  # fmt: skip

    batch_offset = batch * tl.multiple_of(stride_b.to(tl.int64), ALIGN)
    rows = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    q_tile = query_or_key_tile(
        q_ptr + batch_offset, wq_ptr, bq_ptr, rows, n_tokens, stride, C, E, PROJECT, CHANNELS_LAST,
        ALIGN, PRECISION, BLOCK_N, BLOCK_E, BLOCK_K, ACC,
    )  # fmt: skip
    q_tile = unit_rows(q_tile, EPS, QK_NORM)
    if proj_bias_ptr is not None:
        # bp enters before Wf, as the query does: one product serves both.
        q_tile += load_vector(proj_bias_ptr, cols, E, ACC)[None, :]
    q_operand = to_operand(q_tile, DTYPE)
    k_tile = query_or_key_tile(
        k_ptr + batch_offset, wk_ptr, bk_ptr, rows, n_tokens, stride, C, E, PROJECT, CHANNELS_LAST,
        ALIGN, PRECISION, BLOCK_N, BLOCK_E, BLOCK_K, ACC,
    )  # fmt: skip
    k_operand = to_operand(unit_rows(k_tile, EPS, QK_NORM) * G[None, :], DTYPE)

    out_ptr += batch * n_tokens * D
    for j0 in range(0, D, BLOCK_J):
        js = j0 + tl.arange(0, BLOCK_J)
        out_tile = tl.zeros([BLOCK_N, BLOCK_J], ACC)
        out_tile = dot(k_operand, load_transposed(m_ptr, js, cols, D, E), out_tile, PRECISION)
        out_tile = dot(q_operand, load_transposed(final_ptr, js, cols, D, E), out_tile, PRECISION)
        if final_bias_ptr is not None:
            out_tile += load_vector(final_bias_ptr, js, D, ACC)[None, :]
        mask = (rows < n_tokens)[:, None] & (js < D)[None, :]
        offsets = rows[:, None] * D + js[None, :]
        if residual_ptr is not None:
            x_tile = tl.load(residual_ptr + batch * n_tokens * D + offsets, mask=mask, other=0.0)
            out_tile = x_tile.to(ACC) + out_tile * load_vector(scale_ptr, js, D, ACC)[None, :]
        tl.store(out_ptr + offsets, out_tile.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["n_tokens", "num_splits", "num_tiles", "stride_b", "stride"])
def _operands_kernel(
    q_ptr, k_ptr,  # [B, N, E]
    proj_bias_ptr,  # [E] or None
    pooled_ptr, stat_ptr,  # from the first launch
    operands_ptr,  # [B, N, 2 E], contiguous
    g_ptr, g_stat_ptr,  # [B, E], [B, 2] in ACC: kept for the backward
    n_tokens, num_splits, num_tiles, stride_b, stride,
    E: tl.constexpr, EPS: tl.constexpr, POOLING: tl.constexpr, QK_NORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """qn + bp and G * kn of a tile of tokens of a batch element, side by side."""
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    DTYPE: tl.constexpr = operands_ptr.dtype.element_ty
    pid = tl.program_id(0)
    batch = (pid // num_tiles).to(tl.int64)
    tile = pid % num_tiles
    cols = tl.arange(0, BLOCK_E)
    G = global_query(
        pooled_ptr, stat_ptr, g_ptr, g_stat_ptr, batch, tile, num_splits, E, EPS, POOLING, BLOCK_S,
        BLOCK_E, ACC,
    )  # fmt: skip
    batch_offset = batch * tl.multiple_of(stride_b.to(tl.int64), ALIGN)
    rows = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    q_tile = load_tokens(
        q_ptr + batch_offset, rows, cols, n_tokens, E, stride, CHANNELS_LAST, ALIGN
    )
    k_tile = load_tokens(
        k_ptr + batch_offset, rows, cols, n_tokens, E, stride, CHANNELS_LAST, ALIGN
    )
    q_tile = unit_rows(q_tile.to(ACC), EPS, QK_NORM)
    if proj_bias_ptr is not None:
        q_tile += load_vector(proj_bias_ptr, cols, E, ACC)[None, :]
    k_tile = unit_rows(k_tile.to(ACC), EPS, QK_NORM) * G[None, :]
    offsets = (batch * n_tokens + rows)[:, None] * (2 * E) + cols[None, :]
    mask = (rows < n_tokens)[:, None] & (cols < E)[None, :]
    tl.store(operands_ptr + offsets, to_operand(q_tile, DTYPE), mask=mask)
    tl.store(operands_ptr + offsets + E, to_operand(k_tile, DTYPE), mask=mask)
