"""Launching: allocate, describe strides, choose tiles, start the kernels.

Four entry points, forward and backward from x and from given queries and keys, with the signatures
that `swiftkernels.aten` has too. Nothing here is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftkernels.common import accumulator, pack_projections
from swiftkernels.compat import allow_tf32, device_guard
from swiftkernels.reference import Options
from swiftkernels.triton import config
from swiftkernels.triton.backward import (
    _finish_backward_kernel,
    _pool_backward_kernel,
    _rows_backward_kernel,
    _weights_backward_kernel,
)
from swiftkernels.triton.forward import _output_forward_kernel, _pool_forward_kernel


class _Tokens(NamedTuple):
    """A [B, N, C] tensor of which one of the last two strides is 1."""

    data: Tensor
    stride_b: int
    stride: int
    channels_last: bool
    align: int


def _tokens(t: Tensor) -> _Tokens:
    """Describe t by its strides; copy it only where neither tokens nor channels are adjacent."""
    batch_stride, token_stride, channel_stride = t.stride()
    if channel_stride == 1 or t.shape[2] == 1:
        stride, channels_last = token_stride, True
    elif token_stride == 1 or t.shape[1] == 1:
        stride, channels_last = channel_stride, False
    else:
        return _tokens(t.contiguous())
    align = 16
    while stride % align or batch_stride % align:
        align //= 2
    return _Tokens(t, batch_stride, stride, channels_last, align)


def _empty_tokens_like(tokens: _Tokens) -> Tensor:
    """An uninitialised tensor of that shape and order of axes, without gaps."""
    batch, n_tokens, width = tokens.data.shape
    if tokens.channels_last:
        return tokens.data.new_empty(batch, n_tokens, width)
    return tokens.data.new_empty(batch, width, n_tokens).transpose(1, 2)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and allow_tf32() else "ieee"


def _mask_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _split_tokens(n_tokens: int, block_n: int) -> tuple[int, int]:
    """(splits, tiles in each) of an item's tokens for the pooling kernels: a function of N only."""
    tiles = _cdiv(n_tokens, block_n)
    tiles_per_split = _cdiv(tiles, config.MAX_SPLITS)
    return _cdiv(tiles, tiles_per_split), tiles_per_split


def _queries_and_keys(
    x: Tensor, wq: Tensor, bq: Tensor | None, wk: Tensor, bk: Tensor | None
) -> tuple[Tensor, ...]:
    """Queries and keys [B, N, E] of a wide layer by one GEMM; views of one buffer."""
    return torch.nn.functional.linear(x, *pack_projections(wq, bq, wk, bk)).chunk(2, dim=2)


def additive_self_attention_forward(
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    w_g: Tensor,
    wp: Tensor,
    bp: Tensor | None,
    wf: Tensor,
    bf: Tensor | None,
    mask: Tensor | None,
    options: Options,
    keep: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B, N, D], and for the backward G [B, E], pooling statistics [B, 2], M = Wf Wp [D, E].

    `keep` means something to the CPU kernels only.
    """
    if wq.shape[0] > config.MAX_PROJECTED_WIDTH:
        with device_guard(x):
            q, k = _queries_and_keys(x, wq, bq, wk, bk)
        return additive_attention_forward(q, k, w_g, wp, bp, wf, bf, mask, options)
    return _forward(x, x, (wq, bq, wk, bk), w_g, wp, bp, wf, bf, mask, options)


def additive_attention_forward(
    q: Tensor,
    k: Tensor,
    w_g: Tensor,
    wp: Tensor,
    bp: Tensor | None,
    wf: Tensor,
    bf: Tensor | None,
    mask: Tensor | None,
    options: Options,
    keep: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `additive_self_attention_forward`, from queries and keys [B, N, E]."""
    if q.stride() != k.stride():
        q, k = q.contiguous(), k.contiguous()
    return _forward(q, k, None, w_g, wp, bp, wf, bf, mask, options)


def _forward(
    q: Tensor,
    k: Tensor,
    projections: Sequence[Tensor | None] | None,
    w_g: Tensor,
    wp: Tensor,
    bp: Tensor | None,
    wf: Tensor,
    bf: Tensor | None,
    mask: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n_tokens, in_dims = q.shape
    token_dim, width = wf.shape
    acc = accumulator(q.dtype)
    out = q.new_empty(batch, n_tokens, token_dim)
    global_query = q.new_empty(batch, width, dtype=acc)
    statistics = q.new_empty(batch, 2, dtype=acc)
    folded = q.new_empty(token_dim, width)
    cfg = config.choose_config(width, q.dtype, config.architecture(q.device))
    # Without tokens there is nothing to pool, but a backward may still ask for M, G and statistics.
    splits, tiles_per_split = _split_tokens(max(n_tokens, 1), cfg.block_n)
    pooled = q.new_empty(batch, splits, width, dtype=acc)
    split_statistics = q.new_empty(batch, splits, 2, dtype=acc)
    view = _tokens(q)
    key_view = view if k is q else _tokens(k)
    wq, bq, wk, bk = _contiguous(*(projections or (None,) * 4))
    w_g, wp, bp, wf, bf = _contiguous(w_g, wp, bp, wf, bf)
    block_m = 32 if width <= 64 else 64
    fold_programs = _cdiv(token_dim, block_m) * _cdiv(width, block_m)
    shared: dict[str, Any] = {
        "C": in_dims,
        "E": width,
        "D": token_dim,
        "EPS": options.eps,
        "POOLING": options.pooling,
        "QK_NORM": options.qk_norm,
        "PROJECT": projections is not None,
        "CHANNELS_LAST": view.channels_last,
        "ALIGN": view.align,
        "PRECISION": _precision(q.dtype),
        "BLOCK_N": cfg.block_n,
        "BLOCK_E": config.next_power_of_two(width),
        "BLOCK_K": cfg.block_k,
        "num_warps": cfg.num_warps,
    }
    tiles = _cdiv(n_tokens, cfg.block_n)
    with device_guard(q):
        _pool_forward_kernel[(batch * splits + fold_programs,)](
            view.data, wq, bq, w_g, _mask_bytes(mask), wp, wf, pooled, split_statistics, folded,
            n_tokens, splits, tiles_per_split, batch * splits, view.stride_b, view.stride,
            SCALE=options.scale, BLOCK_M=block_m, num_stages=cfg.num_stages, **shared,
        )  # fmt: skip
        if batch * tiles:
            _output_forward_kernel[(batch * tiles,)](
                view.data, key_view.data, wq, bq, wk, bk, bp, wf, bf, folded, pooled,
                split_statistics, out, global_query, statistics,
                n_tokens, splits, tiles, view.stride_b, view.stride,
                BLOCK_J=cfg.block_j, BLOCK_S=config.BLOCK_S, num_stages=cfg.output_num_stages,
                **shared,
            )  # fmt: skip
    return out, global_query, statistics, folded


class _Backward:
    """One backward call: what its kernels share, and a method for each of its two stages.

    `projections` are (wq, bq, wk, bk) if the kernels project x themselves; else None, and `q` and
    `k` describe queries and keys.
    """

    def __init__(
        self,
        dout: Tensor,
        q: _Tokens,
        k: _Tokens,
        projections: Sequence[Tensor | None] | None,
        w_g: Tensor,
        wp: Tensor,
        bp: Tensor | None,
        wf: Tensor,
        mask: Tensor | None,
        saved: tuple[Tensor, Tensor, Tensor],
        options: Options,
    ) -> None:
        self.q, self.k, self.dout = q, k, _tokens(dout)
        self.projections = _contiguous(*(projections or (None,) * 4))
        self.w_g, self.wp, self.bp, self.wf = _contiguous(w_g, wp, bp, wf)
        self.mask = _mask_bytes(mask)
        self.saved = saved
        self.options = options
        self.batch, self.n_tokens, self.in_dims = q.data.shape
        self.token_dim, self.width = wf.shape
        self.acc = accumulator(wf.dtype)
        self.config = config.choose_config(self.width, wf.dtype, config.architecture(wf.device))
        self.shared: dict[str, Any] = {
            "E": self.width,
            "D": self.token_dim,
            "CHANNELS_LAST": q.channels_last,
            "ALIGN": q.align,
            "DOUT_CHANNELS_LAST": self.dout.channels_last,
            "DOUT_ALIGN": self.dout.align,
            "PRECISION": _precision(wf.dtype),
        }
        self.by_rows: dict[str, Any] = {
            "C": self.in_dims,
            "EPS": options.eps,
            "QK_NORM": options.qk_norm,
            "PROJECT": projections is not None,
            "BLOCK_E": config.next_power_of_two(self.width),
            "BLOCK_K": self.config.block_k,
        }

    def rows(
        self,
        dx: Tensor | None,
        dq: Tensor | None,
        dk: Tensor | None,
        sides: Tensor | None,
        needs_weights: bool,
        fuse: bool,
    ) -> tuple[Tensor, Tensor]:
        """Fill dx, dq, dk and sides (t, z) where given.

        Returns, by groups of tokens, dw_g [groups, E] and with `fuse` the moments; else nothing in
        them.
        """
        wq, bq, wk, bk = self.projections
        global_query, statistics, folded = self.saved
        cfg, n_tokens = self.config, self.n_tokens
        splits, tiles_per_split = _split_tokens(n_tokens, cfg.block_n)
        grad_g = self.wf.new_empty(self.batch, splits, self.width, dtype=self.acc)
        _pool_backward_kernel[(self.batch * splits,)](
            self.k.data, wk, bk, folded, self.dout.data, grad_g,
            n_tokens, splits, tiles_per_split,
            self.k.stride_b, self.k.stride, self.dout.stride_b, self.dout.stride,
            BLOCK_N=cfg.block_n, num_warps=cfg.num_warps, num_stages=cfg.num_stages,
            **self.shared, **self.by_rows,
        )  # fmt: skip
        block_n = cfg.rows_block_n
        tiles = _cdiv(n_tokens, block_n)
        # Fused, a program leaves a set of moments; else only a few sums, and may be short.
        tokens = config.FUSED_GROUP_TOKENS if fuse else config.GROUP_TOKENS
        tiles_per_group = min(tiles, tokens // block_n)
        groups = _cdiv(tiles, tiles_per_group)
        programs = self.batch * groups
        new, acc = self.wf.new_empty, self.acc
        dw_g = new(programs, self.width if needs_weights else 0, dtype=acc)
        moments = new(programs, self.moment_width(2, self.in_dims) if fuse else 0, dtype=acc)
        dx_view = self.q if dx is None else _tokens(dx)
        # The kernel takes one alignment for x and dx, whose strides differ where x has gaps.
        shared = self.shared | {"ALIGN": min(self.q.align, dx_view.align)}
        _rows_backward_kernel[(programs,)](
            self.q.data, self.k.data, wq, bq, wk, bk, self.w_g, self.mask, self.bp, self.wf, folded,
            global_query, statistics, grad_g, self.dout.data, dx, dq, dk, sides,
            dw_g if needs_weights else None, moments if fuse else None,
            n_tokens, splits, groups, tiles_per_group,
            self.q.stride_b, self.q.stride, self.dout.stride_b, self.dout.stride,
            dx_view.stride_b, dx_view.stride, self.batch * n_tokens * self.width,
            SCALE=self.options.scale, POOLING=self.options.pooling, FUSE=fuse,
            BLOCK_J=cfg.block_j, BLOCK_C=config.next_power_of_two(self.in_dims) if fuse else 16,
            BLOCK_D=config.next_power_of_two(self.token_dim) if fuse else 16,
            BLOCK_N=block_n, BLOCK_S=config.BLOCK_S,
            num_warps=cfg.rows_num_warps, num_stages=cfg.rows_num_stages,
            **shared, **self.by_rows,
        )  # fmt: skip
        return dw_g, moments

    def moment_width(self, x_planes: int, in_dims: int) -> int:
        """Numbers in a set of moments: (dq, dk)^T x, (t, z)^T dout, and the sums for biases."""
        width, token_dim = self.width, self.token_dim
        return x_planes * width * (in_dims + 1) + (2 * width + 1) * token_dim

    def moments(self, x: _Tokens | None, planes: Tensor) -> Tensor:
        """Moments of planes [2 or 4, B, N, E]: dq and dk (if four) with x, t and z with dout."""
        x_planes = 0 if x is None else 2
        x = x or self.dout
        in_dims = x.data.shape[2]
        block = 64
        tiles = self.batch * _cdiv(self.n_tokens, block)
        down = _cdiv(self.width, block)
        jobs = down * (x_planes * _cdiv(in_dims, block) + 2 * _cdiv(self.token_dim, block))
        tiles_per_split = _cdiv(tiles, config.moment_splits(jobs, tiles))
        splits = _cdiv(tiles, tiles_per_split)
        moment_width = self.moment_width(x_planes, in_dims)
        moments = self.wf.new_empty(splits, moment_width, dtype=self.acc)
        shared = self.shared | {"CHANNELS_LAST": x.channels_last, "ALIGN": x.align}
        _weights_backward_kernel[(jobs * splits,)](
            x.data, self.dout.data, planes, moments,
            self.n_tokens, tiles, splits, tiles_per_split, planes.stride(0),
            x.stride_b, x.stride, self.dout.stride_b, self.dout.stride,
            C=in_dims, X_PLANES=x_planes, BLOCK_R=block, BLOCK_J=block, BLOCK_N=block,
            num_warps=4 if self.wf.dtype in config.HALVES else 8, num_stages=2, **shared,
        )  # fmt: skip
        return moments

    def weight_gradients(
        self, dw_g_parts: Tensor, moments: Tensor, in_dims: int, biases: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """dWq, dbq, dWk, dbk (None if in_dims is 0), dw_g, dWp, dbp, dWf, dbf."""
        width, token_dim, new = self.width, self.token_dim, self.wf.new_empty
        bq, bk, bp, bf = biases
        dwq, dwk = (new(width, in_dims), new(width, in_dims)) if in_dims else (None, None)
        dw_g = new(width)
        dbq, dbk = (None if bias is None else new(width) for bias in (bq, bk))
        dbf = None if bp is None and bf is None else new(token_dim)
        # U and V are rounded to the storage type, as eager rounds the operands of its GEMMs.
        U, V = new(token_dim, width), new(token_dim, width)
        block, partials = config.finish_blocks(moments.shape[1])
        programs = _cdiv(width, block) + _cdiv(moments.shape[1], block)
        _finish_backward_kernel[(programs,)](
            dw_g_parts, moments, dw_g, dwq, dwk, U, V, dbq, dbk, dbf,
            dw_g_parts.shape[0], moments.shape[0],
            C=in_dims, E=width, D=token_dim, X_PLANES=2 if in_dims else 0,
            BLOCK_J=block, BLOCK_S=partials, num_warps=8, num_stages=2,
        )  # fmt: skip
        wf_t = self.wf.t()
        dwp = wf_t @ U
        dbp = None if bp is None else wf_t @ dbf
        # In place: out of place, addmm would copy V first.
        dwf = V.addmm_(U, self.wp.t())
        return [dwq, dbq, dwk, dbk, dw_g, dwp, dbp, dwf, None if bf is None else dbf]


def additive_self_attention_backward(
    dout: Tensor,
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    w_g: Tensor,
    wp: Tensor,
    bp: Tensor | None,
    wf: Tensor,
    bf: Tensor | None,
    mask: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor],
    options: Options,
    needs_tokens: bool,
    needs_weights: bool,
) -> list[Tensor | None]:
    """Gradients of x and the nine weights; None where not asked for or without bias."""
    batch, n_tokens, in_dims = x.shape
    width = wq.shape[0]
    project = width <= config.MAX_PROJECTED_WIDTH
    with device_guard(x):
        view = _tokens(x)
        q = k = view
        if not project:
            q, k = map(_tokens, _queries_and_keys(x, wq, bq, wk, bk))
        projections = (wq, bq, wk, bk) if project else None
        call = _Backward(dout, q, k, projections, w_g, wp, bp, wf, mask, saved, options)
        fuse = needs_weights and project and max(in_dims, *wf.shape) <= config.MAX_FUSED_WIDTH
        planes = dq = dk = sides = None
        if not project or (needs_weights and not fuse):
            planes = x.new_empty(4 if needs_weights else 2, batch, n_tokens, width)
            dq, dk, sides = planes[0], planes[1], planes[2:] if needs_weights else None
        dx = _empty_tokens_like(view) if needs_tokens and project else None
        dw_g_parts, moments = call.rows(dx, dq, dk, sides, needs_weights, fuse)
        if needs_tokens and not project:
            assert dq is not None
            assert dk is not None
            dx = torch.mm(dq.view(-1, width), wq).addmm_(dk.view(-1, width), wk).view(x.shape)
        if dx is not None and dx.stride() != x.stride():
            # The strides that an operator promises: those of the input where it is dense.
            dx = torch.empty_like(x).copy_(dx)
        if not needs_weights:
            return [dx, *[None] * 9]
        if planes is not None:
            moments = call.moments(view, planes)
        return [dx, *call.weight_gradients(dw_g_parts, moments, in_dims, (bq, bk, bp, bf))]


def additive_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    w_g: Tensor,
    wp: Tensor,
    bp: Tensor | None,
    wf: Tensor,
    bf: Tensor | None,
    mask: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor],
    options: Options,
    needs_tokens: bool,
    needs_weights: bool,
) -> list[Tensor | None]:
    """Gradients of q, k and the five weights; None where not asked for or without bias."""
    with device_guard(q):
        if q.stride() != k.stride():
            q, k = q.contiguous(), k.contiguous()
        call = _Backward(dout, _tokens(q), _tokens(k), None, w_g, wp, bp, wf, mask, saved, options)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk = torch.empty_like(dq)
        sides = q.new_empty(2, *q.shape) if needs_weights else None
        dw_g_parts, _ = call.rows(None, dq, dk, sides, needs_weights, fuse=False)
        grads: list[Tensor | None] = [dq, dk] if needs_tokens else [None, None]
        if sides is None:
            return [*grads, *[None] * 5]
        moments = call.moments(None, sides)
        weights = call.weight_gradients(dw_g_parts, moments, 0, (None, None, bp, bf))
        return [*grads, *weights[4:]]
