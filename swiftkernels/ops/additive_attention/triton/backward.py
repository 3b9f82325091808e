"""Backward. README.md of the operator derives the formulas.

Up to `MAX_PROJECTED_WIDTH` the forward keeps only the input, G, the statistics and M = Wf Wp. With
z = qn + bp and t = G * kn:

    dG  = sum_n kn_n * (dout_n M)                      1. `_pool_backward_kernel`, pooled like G
    dkn = (dout M) * G                                 2. `_rows_backward_kernel`, local to a token
    dqn = dout Wf + a dG + ds scale w_g
    dx  = dq Wq + dk Wk

The gradients of the weights follow from four second moments over the tokens of the batch:

    dWq = dq^T x,  dWk = dk^T x,  U = dout^T t,  V = dout^T z     (dWp = Wf^T U,  dWf = U Wp^T + V)

Where four E x E accumulators fit on chip (FUSE), launch 2 sums the moments, and
`_finish_backward_kernel` adds the partial sums in a fixed order. Elsewhere launch 2 stores dq, dk,
t and z, and PyTorch's products compute the moments.

Above, products of PyTorch compute dz = dout Wf and dy = dz Wp before, and dx and the gradients of
the weights after two kernels: `_pool_wide_backward_kernel` and `_rows_wide_backward_kernel`.
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
from swiftkernels.ops.additive_attention.triton.pooling import (
    residue_of,
    score_gradients,
    token_weights,
)
from swiftkernels.ops.additive_attention.triton.stages import (
    query_or_key_tile,
    unit_rows,
    unit_rows_backward,
    valid_tokens,
)


@triton.jit
def _times_matrix(
    dout_ptr, w_ptr, rows, n_tokens, dout_stride,
    E: tl.constexpr, D: tl.constexpr,
    DOUT_CHANNELS_LAST: tl.constexpr, DOUT_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dout[rows] W for a [D, E] matrix W -> [BLOCK_N, BLOCK_E]."""
    cols = tl.arange(0, BLOCK_E)
    product = tl.zeros([BLOCK_N, BLOCK_E], ACC)
    for k0 in range(0, D, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        dout_tile = load_tokens(
            dout_ptr, rows, ks, n_tokens, D, dout_stride, DOUT_CHANNELS_LAST, DOUT_ALIGN
        )
        product = dot(dout_tile, load_matrix(w_ptr, ks, cols, D, E), product, PRECISION)
    return product


@triton.jit(
    do_not_specialize=[
        "n_tokens", "num_splits", "tiles_per_split", "stride_b", "stride", "dout_stride_b",
        "dout_stride",
    ]
)  # fmt: skip
def _pool_backward_kernel(
    k_ptr,  # [B, N, C] x if PROJECT, else [B, N, E] keys
    wk_ptr, bk_ptr,  # [E, C], [E] or None; not read unless PROJECT
    m_ptr,  # [D, E]
    dout_ptr,  # [B, N, D]
    grad_g_ptr,  # [B, num_splits, E] in ACC
    n_tokens, num_splits, tiles_per_split,
    stride_b, stride, dout_stride_b, dout_stride,
    C: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
    EPS: tl.constexpr, QK_NORM: tl.constexpr, PROJECT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    DOUT_CHANNELS_LAST: tl.constexpr, DOUT_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The share of dG of a split of the tokens of a batch element."""
    ACC: tl.constexpr = tl.float64 if k_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    batch = (pid // num_splits).to(tl.int64)
    split = pid % num_splits
    k_ptr += batch * tl.multiple_of(stride_b.to(tl.int64), ALIGN)
    dout_ptr += batch * tl.multiple_of(dout_stride_b.to(tl.int64), DOUT_ALIGN)
    cols = tl.arange(0, BLOCK_E)
    grad_g = tl.zeros([BLOCK_E], ACC)
    for tile in range(tiles_per_split):
        row = (split * tiles_per_split + tile).to(tl.int64) * BLOCK_N
        rows = row + tl.arange(0, BLOCK_N)
        k_tile = query_or_key_tile(
            k_ptr, wk_ptr, bk_ptr, rows, n_tokens, stride, C, E, PROJECT, CHANNELS_LAST, ALIGN,
            PRECISION, BLOCK_N, BLOCK_E, BLOCK_K, ACC,
        )  # fmt: skip
        dout_m = _times_matrix(
            dout_ptr, m_ptr, rows, n_tokens, dout_stride, E, D, DOUT_CHANNELS_LAST, DOUT_ALIGN,
            PRECISION, BLOCK_N, BLOCK_E, BLOCK_K, ACC,
        )  # fmt: skip
        # Rows beyond the last token have dout = 0.
        grad_g += tl.sum(unit_rows(k_tile, EPS, QK_NORM) * dout_m, 0)
    part = batch * num_splits + split
    tl.store(grad_g_ptr + part * E + cols, grad_g, mask=cols < E)


@triton.jit(
    do_not_specialize=[
        "n_tokens", "num_splits", "num_groups", "tiles_per_group", "stride_b", "stride",
        "dout_stride_b", "dout_stride", "dx_stride_b", "dx_stride", "operand_stride",
    ]
)  # fmt: skip
def _rows_backward_kernel(
    q_ptr, k_ptr,  # both x [B, N, C] if PROJECT, else queries and keys [B, N, E]
    wq_ptr, bq_ptr, wk_ptr, bk_ptr,  # not read unless PROJECT
    w_g_ptr, mask_ptr, proj_bias_ptr, final_ptr, m_ptr,
    g_ptr, g_stat_ptr, grad_g_ptr,  # [B, E], [B, 2], [B, num_splits, E]
    dout_ptr,  # [B, N, D]
    dx_ptr,  # [B, N, C]; None unless PROJECT and the gradient of x is needed
    dq_ptr, dk_ptr,  # [B, N, E] or None
    tz_ptr,  # t and z, [2, B, N, E], or None
    sums_ptr,  # [B * num_groups (* tiles_per_group unless FUSE), 3, E] in ACC; or None
    moments_ptr,  # [B * num_groups, 2 E (C + D) + D], see `_finish_backward_kernel`; or None
    n_tokens, num_splits, num_groups, tiles_per_group,
    stride_b, stride, dout_stride_b, dout_stride, dx_stride_b, dx_stride, operand_stride,
    C: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, EPS: tl.constexpr, POOLING: tl.constexpr, NORMALISES: tl.constexpr,
    QK_NORM: tl.constexpr,
    PROJECT: tl.constexpr, FUSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    DOUT_CHANNELS_LAST: tl.constexpr, DOUT_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """All that is local to a token, for a group of consecutive token tiles of a batch element."""
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    pid = tl.program_id(0)
    batch = (pid // num_groups).to(tl.int64)
    group = pid % num_groups
    batch_offset = batch * tl.multiple_of(stride_b.to(tl.int64), ALIGN)
    dout_ptr += batch * tl.multiple_of(dout_stride_b.to(tl.int64), DOUT_ALIGN)
    if mask_ptr is not None:
        mask_ptr += batch * n_tokens
    g_stat_ptr += batch * 2

    cols = tl.arange(0, BLOCK_E)
    g_ptr += batch * E
    grad_g = sum_partials(grad_g_ptr + batch * num_splits * E, cols, num_splits, E, BLOCK_S, ACC)
    G_dG = tl.sum((load_vector(g_ptr, cols, E, ACC) * grad_g)[None, :], 1)  # [1]

    sum_w_g = tl.zeros([BLOCK_E], ACC)
    sum_dq = tl.zeros([BLOCK_E], ACC)
    sum_dk = tl.zeros([BLOCK_E], ACC)
    residue = tl.zeros([1], ACC)
    part = batch * num_groups + group
    if FUSE:
        channels = tl.arange(0, BLOCK_C)
        outputs = tl.arange(0, BLOCK_D)
        sum_dout = tl.zeros([BLOCK_D], ACC)
        moment_q = tl.zeros([BLOCK_E, BLOCK_C], ACC)
        moment_k = tl.zeros([BLOCK_E, BLOCK_C], ACC)
        moment_t = tl.zeros([BLOCK_E, BLOCK_D], ACC)
        moment_z = tl.zeros([BLOCK_E, BLOCK_D], ACC)

    for tile in range(tiles_per_group):
        row = (group * tiles_per_group + tile).to(tl.int64) * BLOCK_N
        rows = row + tl.arange(0, BLOCK_N)
        tile_mask = (rows < n_tokens)[:, None] & (cols < E)[None, :]
        operand_offsets = (batch * n_tokens + rows)[:, None] * E + cols[None, :]
        if not FUSE:
            # Sums of one tile are stored at once: those of a group would take too many registers.
            sum_w_g = tl.zeros([BLOCK_E], ACC)
            sum_dq = tl.zeros([BLOCK_E], ACC)
            sum_dk = tl.zeros([BLOCK_E], ACC)
            residue = tl.zeros([1], ACC)

        # Vectors are loaded where they are used, and tiles are stored as soon as they are computed:
        # together they would not fit into registers.
        w_g = load_vector(w_g_ptr, cols, E, ACC)
        q_tile = query_or_key_tile(
            q_ptr + batch_offset, wq_ptr, bq_ptr, rows, n_tokens, stride, C, E, PROJECT,
            CHANNELS_LAST, ALIGN, PRECISION, BLOCK_N, BLOCK_E, BLOCK_K, ACC,
        )  # fmt: skip
        unit = unit_rows(q_tile, EPS, QK_NORM)
        scores = tl.sum(unit * w_g[None, :], 1) * SCALE
        valid = valid_tokens(mask_ptr, rows, n_tokens)
        weights = token_weights(scores, valid, g_stat_ptr, EPS, POOLING)
        grad_weights = tl.sum(unit * grad_g[None, :], 1)
        grad_scores = score_gradients(grad_weights, weights, valid, G_dG, g_stat_ptr, EPS, POOLING)
        sum_w_g += tl.sum(unit * (grad_scores * SCALE)[:, None], 0)
        if NORMALISES:
            residue += residue_of(grad_scores, weights, g_stat_ptr, EPS, POOLING)
        if proj_bias_ptr is not None:
            unit += load_vector(proj_bias_ptr, cols, E, ACC)[None, :]
        z_operand = to_operand(unit, DTYPE)
        if tz_ptr is not None:
            tl.store(tz_ptr + operand_stride + operand_offsets, z_operand, mask=tile_mask)
        grad_unit = _times_matrix(
            dout_ptr, final_ptr, rows, n_tokens, dout_stride, E, D, DOUT_CHANNELS_LAST, DOUT_ALIGN,
            PRECISION, BLOCK_N, BLOCK_E, BLOCK_K, ACC,
        )  # fmt: skip
        grad_unit += weights[:, None] * grad_g[None, :]
        grad_unit += (grad_scores * SCALE)[:, None] * w_g[None, :]
        dq_tile = unit_rows_backward(grad_unit, q_tile, EPS, QK_NORM)
        dq_operand = to_operand(dq_tile, DTYPE)
        if dq_ptr is not None:
            tl.store(dq_ptr + operand_offsets, dq_operand, mask=tile_mask)
        sum_dq += tl.sum(dq_tile, 0)

        k_tile = query_or_key_tile(
            k_ptr + batch_offset, wk_ptr, bk_ptr, rows, n_tokens, stride, C, E, PROJECT,
            CHANNELS_LAST, ALIGN, PRECISION, BLOCK_N, BLOCK_E, BLOCK_K, ACC,
        )  # fmt: skip
        G = load_vector(g_ptr, cols, E, ACC)
        t_operand = to_operand(unit_rows(k_tile, EPS, QK_NORM) * G[None, :], DTYPE)
        if tz_ptr is not None:
            tl.store(tz_ptr + operand_offsets, t_operand, mask=tile_mask)
        grad_unit = _times_matrix(
            dout_ptr, m_ptr, rows, n_tokens, dout_stride, E, D, DOUT_CHANNELS_LAST, DOUT_ALIGN,
            PRECISION, BLOCK_N, BLOCK_E, BLOCK_K, ACC,
        )  # fmt: skip
        dk_tile = unit_rows_backward(grad_unit * G[None, :], k_tile, EPS, QK_NORM)
        dk_operand = to_operand(dk_tile, DTYPE)
        if dq_ptr is not None:
            tl.store(dk_ptr + operand_offsets, dk_operand, mask=tile_mask)
        sum_dk += tl.sum(dk_tile, 0)
        if dx_ptr is not None:
            dx_offset = batch * tl.multiple_of(dx_stride_b.to(tl.int64), ALIGN)
            for j0 in range(0, C, BLOCK_J):
                js = j0 + tl.arange(0, BLOCK_J)
                dx_tile = tl.zeros([BLOCK_N, BLOCK_J], ACC)
                dx_tile = dot(dq_operand, load_matrix(wq_ptr, cols, js, E, C), dx_tile, PRECISION)
                dx_tile = dot(dk_operand, load_matrix(wk_ptr, cols, js, E, C), dx_tile, PRECISION)
                offsets = token_offsets(rows, js, dx_stride, CHANNELS_LAST, ALIGN)
                mask = (rows < n_tokens)[:, None] & (js < C)[None, :]
                tl.store(dx_ptr + dx_offset + offsets, dx_tile.to(DTYPE), mask=mask)
        if FUSE:
            x_tile = load_tokens(
                q_ptr + batch_offset, rows, channels, n_tokens, C, stride, CHANNELS_LAST, ALIGN
            )
            dout_tile = load_tokens(
                dout_ptr, rows, outputs, n_tokens, D, dout_stride, DOUT_CHANNELS_LAST, DOUT_ALIGN
            )
            # Rows beyond the last token add nothing: x and dout are zero there.
            moment_q = dot(tl.trans(dq_operand), x_tile, moment_q, PRECISION)
            moment_k = dot(tl.trans(dk_operand), x_tile, moment_k, PRECISION)
            moment_t = dot(tl.trans(t_operand), dout_tile, moment_t, PRECISION)
            moment_z = dot(tl.trans(z_operand), dout_tile, moment_z, PRECISION)
            sum_dout += tl.sum(dout_tile.to(ACC), 0)

        elif sums_ptr is not None:
            if NORMALISES:
                sum_w_g -= load_vector(g_ptr, cols, E, ACC) * (residue * SCALE)
            _store_sums(sums_ptr, part * tiles_per_group + tile, cols, sum_w_g, sum_dq, sum_dk, E)

    if FUSE:
        if NORMALISES:
            sum_w_g -= load_vector(g_ptr, cols, E, ACC) * (residue * SCALE)
        _store_sums(sums_ptr, part, cols, sum_w_g, sum_dq, sum_dk, E)
        moments_ptr += part * (2 * E * (C + D) + D)
        rows = cols[:, None]
        mask = (rows < E) & (channels < C)[None, :]
        offsets = rows * C + channels[None, :]
        tl.store(moments_ptr + offsets, moment_q, mask=mask)
        tl.store(moments_ptr + E * C + offsets, moment_k, mask=mask)
        mask = (rows < E) & (outputs < D)[None, :]
        offsets = 2 * E * C + rows * D + outputs[None, :]
        tl.store(moments_ptr + offsets, moment_t, mask=mask)
        tl.store(moments_ptr + E * D + offsets, moment_z, mask=mask)
        moments_ptr += 2 * E * (C + D)
        tl.store(moments_ptr + outputs, sum_dout, mask=outputs < D)


@triton.jit
def _store_sums(sums_ptr, part, cols, sum_w_g, sum_dq, sum_dk, E: tl.constexpr):
    """Store three sums of rows as a part of `sums`."""
    sums_ptr += part * 3 * E
    tl.store(sums_ptr + cols, sum_w_g, mask=cols < E)
    tl.store(sums_ptr + E + cols, sum_dq, mask=cols < E)
    tl.store(sums_ptr + 2 * E + cols, sum_dk, mask=cols < E)


@triton.jit(
    do_not_specialize=["n_tokens", "num_splits", "tiles_per_split", "stride_b", "stride"]
)  # fmt: skip
def _pool_wide_backward_kernel(
    k_ptr,  # [B, N, E]
    dy_ptr,  # [B, N, E], contiguous: the gradient of y = G * kn
    grad_g_ptr,  # [B, num_splits, E] in ACC
    n_tokens, num_splits, tiles_per_split, stride_b, stride,
    E: tl.constexpr, EPS: tl.constexpr, QK_NORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The share of dG = sum_n kn_n * dy_n of a split of the tokens of a batch element."""
    ACC: tl.constexpr = tl.float64 if k_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    batch = (pid // num_splits).to(tl.int64)
    split = pid % num_splits
    k_ptr += batch * tl.multiple_of(stride_b.to(tl.int64), ALIGN)
    dy_ptr += batch * n_tokens * E
    cols = tl.arange(0, BLOCK_E)
    grad_g = tl.zeros([BLOCK_E], ACC)
    for tile in range(tiles_per_split):
        row = (split * tiles_per_split + tile).to(tl.int64) * BLOCK_N
        rows = row + tl.arange(0, BLOCK_N)
        k_tile = load_tokens(k_ptr, rows, cols, n_tokens, E, stride, CHANNELS_LAST, ALIGN)
        mask = (rows < n_tokens)[:, None] & (cols < E)[None, :]
        dy_tile = tl.load(dy_ptr + rows[:, None] * E + cols[None, :], mask=mask, other=0.0)
        grad_g += tl.sum(unit_rows(k_tile.to(ACC), EPS, QK_NORM) * dy_tile.to(ACC), 0)
    part = batch * num_splits + split
    tl.store(grad_g_ptr + part * E + cols, grad_g, mask=cols < E)


@triton.jit(
    do_not_specialize=["n_tokens", "num_splits", "num_tiles", "stride_b", "stride"]
)  # fmt: skip
def _rows_wide_backward_kernel(
    q_ptr, k_ptr,  # [B, N, E]
    w_g_ptr, mask_ptr,  # [E], [B, N] or None
    g_ptr, g_stat_ptr, grad_g_ptr,  # [B, E], [B, 2], [B, num_splits, E]
    dz_ptr, dy_ptr,  # [B, N, E], contiguous
    dq_ptr, dk_ptr,  # [B, N, E], contiguous
    sums_ptr,  # [B * num_tiles, 4, E] in ACC: of dw_g, dq, dk and dz
    n_tokens, num_splits, num_tiles, stride_b, stride,
    E: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr, POOLING: tl.constexpr,
    NORMALISES: tl.constexpr, QK_NORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dq and dk of a tile of tokens of a batch element."""
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    pid = tl.program_id(0)
    batch = (pid // num_tiles).to(tl.int64)
    batch_offset = batch * tl.multiple_of(stride_b.to(tl.int64), ALIGN)
    if mask_ptr is not None:
        mask_ptr += batch * n_tokens
    g_stat_ptr += batch * 2
    cols = tl.arange(0, BLOCK_E)
    rows = (pid % num_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = (batch * n_tokens + rows)[:, None] * E + cols[None, :]
    tile_mask = (rows < n_tokens)[:, None] & (cols < E)[None, :]

    G = load_vector(g_ptr + batch * E, cols, E, ACC)
    grad_g = sum_partials(grad_g_ptr + batch * num_splits * E, cols, num_splits, E, BLOCK_S, ACC)
    w_g = load_vector(w_g_ptr, cols, E, ACC)
    q_tile = load_tokens(
        q_ptr + batch_offset, rows, cols, n_tokens, E, stride, CHANNELS_LAST, ALIGN
    ).to(ACC)  # fmt: skip
    unit = unit_rows(q_tile, EPS, QK_NORM)
    scores = tl.sum(unit * w_g[None, :], 1) * SCALE
    valid = valid_tokens(mask_ptr, rows, n_tokens)
    weights = token_weights(scores, valid, g_stat_ptr, EPS, POOLING)
    grad_weights = tl.sum(unit * grad_g[None, :], 1)
    G_dG = tl.sum((G * grad_g)[None, :], 1)
    grad_scores = score_gradients(grad_weights, weights, valid, G_dG, g_stat_ptr, EPS, POOLING)
    sum_w_g = tl.sum(unit * (grad_scores * SCALE)[:, None], 0)
    if NORMALISES:
        residue = residue_of(grad_scores, weights, g_stat_ptr, EPS, POOLING)
        sum_w_g -= G * (residue * SCALE)
    grad_unit = tl.load(dz_ptr + offsets, mask=tile_mask, other=0.0).to(ACC)
    sum_dz = tl.sum(grad_unit, 0)
    grad_unit += weights[:, None] * grad_g[None, :]
    grad_unit += (grad_scores * SCALE)[:, None] * w_g[None, :]
    dq_tile = unit_rows_backward(grad_unit, q_tile, EPS, QK_NORM)
    tl.store(dq_ptr + offsets, to_operand(dq_tile, DTYPE), mask=tile_mask)

    k_tile = load_tokens(
        k_ptr + batch_offset, rows, cols, n_tokens, E, stride, CHANNELS_LAST, ALIGN
    ).to(ACC)  # fmt: skip
    grad_unit = tl.load(dy_ptr + offsets, mask=tile_mask, other=0.0).to(ACC) * G[None, :]
    dk_tile = unit_rows_backward(grad_unit, k_tile, EPS, QK_NORM)
    tl.store(dk_ptr + offsets, to_operand(dk_tile, DTYPE), mask=tile_mask)
    sums_ptr += pid.to(tl.int64) * 4 * E
    tl.store(sums_ptr + cols, sum_w_g, mask=cols < E)
    tl.store(sums_ptr + E + cols, tl.sum(dq_tile, 0), mask=cols < E)
    tl.store(sums_ptr + 2 * E + cols, tl.sum(dk_tile, 0), mask=cols < E)
    tl.store(sums_ptr + 3 * E + cols, sum_dz, mask=cols < E)


@triton.jit
def _store_part(ptr, values, cols, START: tl.constexpr, SIZE: tl.constexpr):
    """Store the values of the columns [START, START + SIZE) to ptr [SIZE], unless it is None."""
    if ptr is not None:
        own = cols - START
        mask = (own >= 0) & (own < SIZE)
        tl.store(ptr + own, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_part_transposed(
    ptr, values, cols, START: tl.constexpr, N_ROWS: tl.constexpr, N_COLS: tl.constexpr
):
    """The same for columns that are a flattened [N_ROWS, N_COLS] matrix; stores its transpose."""
    own = cols - START
    mask = (own >= 0) & (own < N_ROWS * N_COLS)
    offsets = own % N_COLS * N_ROWS + own // N_COLS
    tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_groups"])
def _finish_backward_kernel(
    sums_ptr,  # [num_groups, 3, E] in ACC: dw_g, dbq, dbk
    moments_ptr,  # [num_groups, ...] in ACC: dWq, dWk, U^T, V^T, dbf
    dw_g_ptr,  # [E]
    dwq_ptr, dwk_ptr,  # [E, C]
    u_ptr, v_ptr,  # [D, E]
    dbq_ptr, dbk_ptr, dbf_ptr,  # [E], [E], [D], or None
    num_groups,
    C: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Add all partial sums of BLOCK_J columns of the sums or of the moments; store them rounded."""
    ACC: tl.constexpr = moments_ptr.dtype.element_ty
    sums_programs: tl.constexpr = (3 * E + BLOCK_J - 1) // BLOCK_J
    pid = tl.program_id(0)
    if pid < sums_programs:
        cols = pid * BLOCK_J + tl.arange(0, BLOCK_J)
        values = sum_partials(sums_ptr, cols, num_groups, 3 * E, BLOCK_S, ACC)
        _store_part(dw_g_ptr, values, cols, 0, E)
        _store_part(dbq_ptr, values, cols, E, E)
        _store_part(dbk_ptr, values, cols, 2 * E, E)
    else:
        cols = (pid - sums_programs) * BLOCK_J + tl.arange(0, BLOCK_J)
        u_start: tl.constexpr = 2 * E * C
        bias: tl.constexpr = u_start + 2 * E * D
        values = sum_partials(moments_ptr, cols, num_groups, bias + D, BLOCK_S, ACC)
        _store_part(dwq_ptr, values, cols, 0, E * C)
        _store_part(dwk_ptr, values, cols, E * C, E * C)
        _store_part_transposed(u_ptr, values, cols, u_start, E, D)
        _store_part_transposed(v_ptr, values, cols, u_start + E * D, E, D)
        _store_part(dbf_ptr, values, cols, bias, D)
