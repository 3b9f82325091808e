"""Launching: allocate, describe strides, choose tiles, start the kernels.

Four entry points, forward and backward from x and from given queries and keys, with the signatures
that `swiftkernels.ops.additive_attention.eager` has too. Nothing here is differentiable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftkernels.backends.layouts import (
    accumulator,
    as_image,
    as_tokens,
    output_like,
    pack_projections,
    tokens_of,
)
from swiftkernels.backends.torch_state import allow_tf32, device_guard, fits_kernels
from swiftkernels.backends.triton.prepared import Pointer, Prepared
from swiftkernels.ops.additive_attention.reference import Options
from swiftkernels.ops.additive_attention.triton import config
from swiftkernels.ops.additive_attention.triton.backward import (
    _finish_backward_kernel,
    _pool_backward_kernel,
    _rows_backward_kernel,
    _weights_backward_kernel,
)
from swiftkernels.ops.additive_attention.triton.forward import (
    _output_forward_kernel,
    _pool_forward_kernel,
)


class Layout(NamedTuple):
    """How tokens [B, N, C] lie in memory; one of the last two strides is 1."""

    stride_b: int
    stride: int
    channels_last: bool
    align: int


@functools.lru_cache(maxsize=1024)
def layout(
    stride_b: int, token_stride: int, channel_stride: int, n_tokens: int, width: int
) -> Layout | None:
    """The layout of tokens with these strides; None: neither tokens nor channels are adjacent."""
    if channel_stride == 1 or width == 1:
        stride, channels_last = token_stride, True
    elif token_stride == 1 or n_tokens == 1:
        stride, channels_last = channel_stride, False
    else:
        return None
    align = 16
    while stride % align or stride_b % align:
        align //= 2
    return Layout(stride_b, stride, channels_last, align)


class _Tokens(NamedTuple):
    """Tokens, or an image, that the kernels can read as [B, N, C]."""

    data: Tensor
    batch: int
    n_tokens: int
    width: int
    layout: Layout


def _tokens(t: Tensor) -> _Tokens:
    """t [B, N, C] or [B, C, H, W], or a copy of it where the kernels cannot read its strides."""
    tokens = tokens_of(t.shape, t.stride())
    if tokens is not None:
        batch, n_tokens, width, strides = tokens
        found = layout(*strides, n_tokens, width)
        if found is not None:
            return _Tokens(t, batch, n_tokens, width, found)
    # Not `contiguous`, which gives back what lies anyhow along axes of one element.
    return _tokens(t.new_empty(t.shape).copy_(t))


def _empty_like(tokens: _Tokens) -> _Tokens:
    """Uninitialised tokens in that order of axes, without gaps."""
    data = tokens.data
    if data.dim() == 3 and not tokens.layout.channels_last:
        return _tokens(data.new_empty(data.mT.shape).mT)
    contiguous = data.dim() == 3 or not tokens.layout.channels_last
    memory_format = torch.contiguous_format if contiguous else torch.channels_last
    return _tokens(torch.empty_like(data, memory_format=memory_format))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and allow_tf32() else "ieee"


def _mask_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _reusable(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a launch for these fits others of their kind."""
    for t in tensors:  # noqa: SIM110 - a generator takes twice as long
        if t is not None and not fits_kernels(t):
            return False
    return True


def _missing(inputs: Sequence[object]) -> tuple[bool, ...]:
    return tuple([t is None for t in inputs])


def _lay_out(sizes: Sequence[int]) -> tuple[int, list[int]]:
    """(bytes in all, offsets) of pieces of that many bytes, each at a multiple of 16."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += _cdiv(size, 16) * 16
    return end, offsets


def _split_tokens(n_tokens: int, block_n: int) -> tuple[int, int]:
    """(splits, tiles in each) of an item's tokens for the pooling kernels: a function of N only."""
    tiles = _cdiv(n_tokens, block_n)
    tiles_per_split = _cdiv(tiles, config.MAX_SPLITS)
    return _cdiv(tiles, tiles_per_split), tiles_per_split


def _queries_and_keys(
    x: Tensor, wq: Tensor, bq: Tensor | None, wk: Tensor, bk: Tensor | None
) -> tuple[Tensor, ...]:
    """Queries and keys [B, N, E] of a wide layer by one GEMM; views of one buffer."""
    x = x if x.dim() == 3 else as_tokens(x)
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
    """out, and for the backward G [B, E], pooling statistics [B, 2], M = Wf Wp [D, E].

    x may be an image [B, C, H, W]; then out is one, in the order of channels_last. w_g may be
    [E, 1]. `keep` means something to the CPU kernels only.
    """
    if wq.shape[0] > config.MAX_PROJECTED_WIDTH:
        with device_guard(x):
            q, k = _queries_and_keys(x, wq, bq, wk, bk)
        return _forward(q, k, None, w_g, wp, bp, wf, bf, mask, options, x)
    return _forward(x, x, (wq, bq, wk, bk), w_g, wp, bp, wf, bf, mask, options, x)


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
    return _forward(q, k, None, w_g, wp, bp, wf, bf, mask, options, q)


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
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`like`: tokens or an image in whose form the output is."""
    token_dim, width = wf.shape
    view = _tokens(q)
    _, batch, n_tokens, in_dims, _ = view
    key_view = view if k is q else _tokens(k)
    inputs = (
        view.data, key_view.data, *_contiguous(*(projections or (None,) * 4)),
        *_contiguous(w_g, wp, bp, wf, bf), _mask_bytes(mask),
    )  # fmt: skip
    plan = _forward_plan(
        _Kind(
            batch, n_tokens, in_dims, width, token_dim, view.layout, q.dtype, q.device, options,
            projections is not None, _precision(q.dtype), _missing(inputs), _reusable(inputs),
        )
    )  # fmt: skip
    new, acc = q.new_empty, accumulator(q.dtype)
    shape, strides = output_like(like, token_dim)
    out = torch.empty_strided(shape, strides, dtype=q.dtype, device=q.device)
    global_query = new(batch, width, dtype=acc)
    statistics = new(batch, 2, dtype=acc)
    folded = new(token_dim, width)
    pooled = new(batch, plan.splits, width, dtype=acc)
    split_statistics = new(batch, plan.splits, 2, dtype=acc)
    results = (out, global_query, statistics, folded, pooled, split_statistics)
    with device_guard(q):
        plan.start(inputs, results)
    return out, global_query, statistics, folded


class _Kind(NamedTuple):
    """Everything that the kernels of a call are compiled for, or their grids computed from."""

    batch: int
    n_tokens: int
    in_dims: int
    width: int
    token_dim: int
    tokens: Layout
    dtype: torch.dtype
    device: torch.device
    options: Options
    project: bool
    precision: str
    missing: tuple[bool, ...]
    """Which of the inputs are None."""
    reusable: bool
    """As `Prepared` has it."""


class _ForwardPlan:
    """The two launches of a forward for one kind of call.

    Attributes:
        splits: partial sums of an item that the first launch leaves.
    """

    def __init__(self, kind: _Kind) -> None:
        batch, n_tokens, in_dims, width, token_dim = kind[:5]
        tokens, dtype, options = kind.tokens, kind.dtype, kind.options
        cfg = config.choose_config(width, dtype, config.architecture(kind.device))
        # Without tokens there is nothing to pool, but a backward may ask for M, G and statistics.
        splits, tiles_per_split = _split_tokens(max(n_tokens, 1), cfg.block_n)
        self.splits = splits
        block_m = 32 if width <= 64 else 64
        fold_programs = _cdiv(token_dim, block_m) * _cdiv(width, block_m)
        tiles = _cdiv(n_tokens, cfg.block_n)
        shared: dict[str, Any] = {
            "C": in_dims,
            "E": width,
            "D": token_dim,
            "EPS": options.eps,
            "POOLING": options.pooling,
            "QK_NORM": options.qk_norm,
            "PROJECT": kind.project,
            "CHANNELS_LAST": tokens.channels_last,
            "ALIGN": tokens.align,
            "PRECISION": kind.precision,
            "BLOCK_N": cfg.block_n,
            "BLOCK_E": config.next_power_of_two(width),
            "BLOCK_K": cfg.block_k,
            "num_warps": cfg.num_warps,
        }
        self._pool = Prepared(
            _pool_forward_kernel,
            batch * splits + fold_programs,
            (n_tokens, splits, tiles_per_split, batch * splits, tokens.stride_b, tokens.stride),
            {"SCALE": options.scale, "BLOCK_M": block_m, "num_stages": cfg.num_stages} | shared,
            kind.reusable,
        )
        self._output = Prepared(
            _output_forward_kernel,
            batch * tiles,
            (n_tokens, splits, tiles, tokens.stride_b, tokens.stride),
            {
                "BLOCK_J": cfg.block_j,
                "BLOCK_S": config.BLOCK_S,
                "num_stages": cfg.output_num_stages,
            }
            | shared,
            kind.reusable,
        )
        numbers = torch.finfo(accumulator(dtype)).bits // 8
        sizes = [
            batch * width * numbers,
            batch * 2 * numbers,
            token_dim * width * dtype.itemsize,
            batch * splits * width * numbers,
            batch * splits * 2 * numbers,
        ]
        self._temporary_bytes, self._offsets = _lay_out(sizes)

    @property
    def ready(self) -> bool:
        """Whether `start` takes addresses."""
        return self._output.ready

    def start(self, inputs: Sequence[Pointer], results: Sequence[Pointer]) -> None:
        """Launch both kernels in the current stream.

        Args:
            inputs: q, k (both x if the kernels project it), the nine weights, the mask.
            results: out, G, statistics, M, and the two temporary ones of the first launch.
        """
        q, k, wq, bq, wk, bk, w_g, wp, bp, wf, bf, mask = inputs
        out, global_query, statistics, folded, pooled, split_statistics = results
        self._pool(q, wq, bq, w_g, mask, wp, wf, pooled, split_statistics, folded)
        self._output(
            q, k, wq, bq, wk, bk, bp, wf, bf, folded, pooled, split_statistics, out, global_query,
            statistics,
        )  # fmt: skip

    def infer(self, x: Tensor, out: Tensor, weights: Sequence[int | None]) -> None:
        """Fill out [B, N, D], contiguous, by address; for when `ready`.

        Args:
            weights: addresses of the nine weights; more is ignored.
        """
        temporary = x.new_empty(self._temporary_bytes, dtype=torch.uint8)
        at, address = temporary.data_ptr(), x.data_ptr()
        inputs = (address, address, *weights[:9], None)
        results = (out.data_ptr(), *[at + offset for offset in self._offsets])
        with device_guard(x):
            self.start(inputs, results)


_forward_plan = functools.lru_cache(maxsize=512)(_ForwardPlan)


def compiled_forward(
    x: Tensor, width: int, token_dim: int, weights: Sequence[int | None], options: Options
) -> Callable[[Tensor, Tensor, Sequence[int | None]], None] | None:
    """`_ForwardPlan.infer` for tokens or images like x, if such a call was made before; else None.

    Args:
        weights: addresses of the nine weights, contiguous.
    """
    view = _tokens(x)
    if view.data is not x or width > config.MAX_PROJECTED_WIDTH:
        return None
    plan = _forward_plan(
        _Kind(
            view.batch, view.n_tokens, view.width, width, token_dim, view.layout, x.dtype, x.device,
            options, True, _precision(x.dtype), _missing((x, x, *weights, None)), True,
        )
    )  # fmt: skip
    return plan.infer if plan.ready else None


class _BackwardKind(NamedTuple):
    """What a backward adds to it.

    `of`: its `tokens` are those of the queries and keys, or of x, if the kernels project it.
    """

    of: _Kind
    dout: Layout
    dx: Layout | None
    """None: rows leave no gradient of x."""
    x: Layout | None
    """Of the tokens that queries and keys were made of; None if they were given."""
    x_width: int
    needs_weights: bool


class _BackwardPlan:
    """The launches of a backward for one kind of call.

    Attributes:
        fuses: the moments are summed by the rows kernel; else from planes that it leaves.
    """

    def __init__(self, kind: _BackwardKind) -> None:
        of = kind.of
        batch, n_tokens, in_dims, width, token_dim = of[:5]
        tokens, dtype, options = of.tokens, of.dtype, of.options
        cfg = config.choose_config(width, dtype, config.architecture(of.device))
        widest = max(in_dims, token_dim, width)
        project, needs_weights = of.project, kind.needs_weights
        self.fuses = needs_weights and project and widest <= config.MAX_FUSED_WIDTH
        strides = (tokens.stride_b, tokens.stride, kind.dout.stride_b, kind.dout.stride)
        shared: dict[str, Any] = {
            "E": width,
            "D": token_dim,
            "CHANNELS_LAST": tokens.channels_last,
            "ALIGN": tokens.align,
            "DOUT_CHANNELS_LAST": kind.dout.channels_last,
            "DOUT_ALIGN": kind.dout.align,
            "PRECISION": of.precision,
        }
        by_rows: dict[str, Any] = {
            "C": in_dims,
            "EPS": options.eps,
            "QK_NORM": options.qk_norm,
            "PROJECT": project,
            "BLOCK_E": config.next_power_of_two(width),
            "BLOCK_K": cfg.block_k,
        }
        reusable = of.reusable

        splits, tiles_per_split = _split_tokens(n_tokens, cfg.block_n)
        self._pool = Prepared(
            _pool_backward_kernel,
            batch * splits,
            (n_tokens, splits, tiles_per_split, *strides),
            {"BLOCK_N": cfg.block_n, "num_warps": cfg.num_warps, "num_stages": cfg.num_stages}
            | shared
            | by_rows,
            reusable,
        )

        tiles = _cdiv(n_tokens, cfg.rows_block_n)
        # Fused, a program leaves a set of moments; else only a few sums, and may be short.
        group = config.FUSED_GROUP_TOKENS if self.fuses else config.GROUP_TOKENS
        tiles_per_group = min(tiles, group // cfg.rows_block_n)
        groups = _cdiv(tiles, tiles_per_group)
        num_dw_g = num_moments = batch * groups
        x_planes = 0 if kind.x is None else 2
        # Numbers in a set of moments, see `_finish_backward_kernel`.
        moment_width = x_planes * width * (kind.x_width + 1) + (2 * width + 1) * token_dim
        dx = kind.dx or tokens
        self._rows = Prepared(
            _rows_backward_kernel,
            batch * groups,
            (
                n_tokens, splits, groups, tiles_per_group, *strides, dx.stride_b, dx.stride,
                batch * n_tokens * width,
            ),
            shared
            | by_rows
            | {
                # One alignment for x and dx, whose strides differ where x has gaps.
                "ALIGN": min(tokens.align, dx.align),
                "SCALE": options.scale,
                "POOLING": options.pooling,
                "FUSE": self.fuses,
                "BLOCK_J": cfg.block_j,
                "BLOCK_C": config.next_power_of_two(in_dims) if self.fuses else 16,
                "BLOCK_D": config.next_power_of_two(token_dim) if self.fuses else 16,
                "BLOCK_N": cfg.rows_block_n,
                "BLOCK_S": config.BLOCK_S,
                "num_warps": cfg.rows_num_warps,
                "num_stages": cfg.rows_num_stages,
            },
            reusable,
        )  # fmt: skip
        self._needs_weights = needs_weights
        self._grad_g = (batch, splits, width)
        if not needs_weights:
            return

        if not self.fuses:
            block = 64
            tiles = batch * _cdiv(n_tokens, block)
            across = x_planes * _cdiv(kind.x_width, block) + 2 * _cdiv(token_dim, block)
            jobs = _cdiv(width, block) * across
            tiles_per_split = _cdiv(tiles, config.moment_splits(jobs, tiles))
            splits = num_moments = _cdiv(tiles, tiles_per_split)
            x = kind.x or kind.dout
            self._moments = Prepared(
                _weights_backward_kernel,
                jobs * splits,
                (
                    n_tokens, tiles, splits, tiles_per_split, batch * n_tokens * width,
                    x.stride_b, x.stride, kind.dout.stride_b, kind.dout.stride,
                ),
                shared
                | {
                    "CHANNELS_LAST": x.channels_last,
                    "ALIGN": x.align,
                    "C": kind.x_width,
                    "X_PLANES": x_planes,
                    "BLOCK_R": block,
                    "BLOCK_J": block,
                    "BLOCK_N": block,
                    "num_warps": 4 if dtype in config.HALVES else 8,
                    "num_stages": 2,
                },
                reusable,
            )  # fmt: skip
        self._dw_g, self._sums = (num_dw_g, width), (num_moments, moment_width)
        block, partials = config.finish_blocks(moment_width)
        self._finish = Prepared(
            _finish_backward_kernel,
            _cdiv(width, block) + _cdiv(moment_width, block),
            (num_dw_g, num_moments),
            {
                "C": kind.x_width if x_planes else 0,
                "E": width,
                "D": token_dim,
                "X_PLANES": x_planes,
                "BLOCK_J": block,
                "BLOCK_S": partials,
                "num_warps": 8,
                "num_stages": 2,
            },
            reusable,
        )

    def temporaries(self, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Room for partial sums: of dG, and of the gradient of w_g and the moments if needed."""
        new, acc = like.new_empty, accumulator(like.dtype)
        grad_g = new(self._grad_g, dtype=acc)
        if not self._needs_weights:
            return grad_g, None, None
        return grad_g, new(self._dw_g, dtype=acc), new(self._sums, dtype=acc)

    def start_rows(
        self,
        inputs: Sequence[Tensor | None],
        saved: Sequence[Tensor],
        dout: Tensor,
        grad_g: Tensor,
        dx: Tensor | None,
        planes: Sequence[Tensor | None],
        sums: Sequence[Tensor | None],
    ) -> None:
        """The first two launches.

        Args:
            inputs: as `_ForwardPlan.start` has them.
            saved: G, statistics, M.
            planes: dq, dk, and t and z in one, where wanted.
            sums: partial sums of the gradient of w_g, if weights' gradients are wanted, and of the
                moments, if it `fuses` them.
        """
        q, k, wq, bq, wk, bk, w_g, _, bp, wf, _, mask = inputs
        global_query, statistics, folded = saved
        self._pool(k, wk, bk, folded, dout, grad_g)
        self._rows(
            q, k, wq, bq, wk, bk, w_g, mask, bp, wf, folded, global_query, statistics, grad_g, dout,
            dx, *planes, *sums,
        )  # fmt: skip

    def start_moments(self, x: Tensor, dout: Tensor, planes: Tensor, moments: Tensor) -> None:
        """Partial sums of the moments of planes (dq, dk,) t, z [2 or 4, B, N, E]."""
        self._moments(x, dout, planes, moments)

    def finish(
        self, dw_g_parts: Tensor, moments: Tensor, gradients: Sequence[Tensor | None]
    ) -> None:
        """Add up partial sums to `gradients`: dw_g, dWq, dWk, U, V, dbq, dbk, dbf."""
        self._finish(dw_g_parts, moments, *gradients)


_backward_plan = functools.lru_cache(maxsize=512)(_BackwardPlan)


def forget_plans() -> None:
    """Plan the next calls anew: for whoever changes what plans are made of."""
    _forward_plan.cache_clear()
    _backward_plan.cache_clear()


def _weight_gradients(
    plan: _BackwardPlan,
    dw_g_parts: Tensor,
    moments: Tensor,
    x_width: int,
    inputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """dWq, dbq, dWk, dbk (None if x_width is 0), dw_g, dWp, dbp, dWf, dbf."""
    _, _, _, bq, _, bk, w_g, wp, bp, wf, bf, _ = inputs
    assert w_g is not None
    assert wp is not None
    assert wf is not None
    token_dim, width = wf.shape
    new = wf.new_empty
    dwq = dwk = dbq = dbk = None
    if x_width:
        dwq, dwk = new(width, x_width), new(width, x_width)
        dbq, dbk = (None if bias is None else new(width) for bias in (bq, bk))
    dw_g = new(w_g.shape)
    dbf = None if bp is None and bf is None else new(token_dim)
    # U and V are rounded to the storage type, as eager rounds the operands of its GEMMs.
    U, V = new(token_dim, width), new(token_dim, width)
    plan.finish(dw_g_parts, moments, (dw_g, dwq, dwk, U, V, dbq, dbk, dbf))
    wf_t = wf.t()
    dwp = wf_t @ U
    dbp = None if bp is None or dbf is None else wf_t @ dbf
    # In place: out of place, addmm would copy V first.
    dwf = V.addmm_(U, wp.t())
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
    saved: Sequence[Tensor],
    options: Options,
    needs_tokens: bool,
    needs_weights: bool,
) -> list[Tensor | None]:
    """Gradients of x and the nine weights; None where not asked for or without bias."""
    width, token_dim = wq.shape[0], wf.shape[0]
    project = width <= config.MAX_PROJECTED_WIDTH
    with device_guard(x):
        view, dout_view = _tokens(x), _tokens(dout)
        _, batch, n_tokens, in_dims, _ = view
        q = k = view
        if not project:
            q, k = map(_tokens, _queries_and_keys(x, wq, bq, wk, bk))
        dx_view = _empty_like(view) if needs_tokens and project else None
        dx = None if dx_view is None else dx_view.data
        inputs = (
            q.data, k.data, *_contiguous(wq, bq, wk, bk, w_g, wp, bp, wf, bf), _mask_bytes(mask)
        )  # fmt: skip
        saved = _contiguous(*saved)  # which hooks may have put anywhere
        reusable = _reusable((*inputs, *saved, view.data, dout_view.data))
        plan = _backward_plan(
            _BackwardKind(
                _Kind(
                    batch, n_tokens, q.width, width, token_dim, q.layout, x.dtype, x.device,
                    options, project, _precision(x.dtype), _missing(inputs), reusable,
                ),
                dout_view.layout, None if dx_view is None else dx_view.layout, view.layout, in_dims,
                needs_weights,
            )
        )  # fmt: skip
        planes = dq = dk = sides = None
        if not project or (needs_weights and not plan.fuses):
            planes = x.new_empty(4 if needs_weights else 2, batch, n_tokens, width)
            dq, dk, sides = planes[0], planes[1], planes[2:] if needs_weights else None
        grad_g, dw_g_parts, moments = plan.temporaries(x)
        plan.start_rows(
            inputs, saved, dout_view.data, grad_g, dx, (dq, dk, sides),
            (dw_g_parts, moments if plan.fuses else None),
        )  # fmt: skip
        if needs_tokens and not project:
            assert dq is not None
            assert dk is not None
            dx = torch.mm(dq.view(-1, width), wq).addmm_(dk.view(-1, width), wk)
            dx = dx.view(batch, n_tokens, in_dims)
            dx = dx if x.dim() == 3 else as_image(dx, x.shape[2:])
        if dx is not None and dx.stride() != x.stride():
            # The strides that an operator promises: those of the input where it is dense.
            dx = torch.empty_like(x).copy_(dx)
        if dw_g_parts is None or moments is None:
            return [dx, *[None] * 9]
        if planes is not None:
            plan.start_moments(view.data, dout_view.data, planes, moments)
        return [dx, *_weight_gradients(plan, dw_g_parts, moments, in_dims, inputs)]


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
    saved: Sequence[Tensor],
    options: Options,
    needs_tokens: bool,
    needs_weights: bool,
) -> list[Tensor | None]:
    """Gradients of q, k and the five weights; None where not asked for or without bias."""
    batch, n_tokens, width = q.shape
    with device_guard(q):
        if q.stride() != k.stride():
            q, k = q.contiguous(), k.contiguous()
        view, key_view, dout_view = _tokens(q), _tokens(k), _tokens(dout)
        inputs = (
            view.data, key_view.data, *(None,) * 4, *_contiguous(w_g, wp, bp, wf, bf),
            _mask_bytes(mask),
        )  # fmt: skip
        saved = _contiguous(*saved)  # which hooks may have put anywhere
        plan = _backward_plan(
            _BackwardKind(
                _Kind(
                    batch, n_tokens, width, width, wf.shape[0], view.layout, q.dtype, q.device,
                    options, False, _precision(q.dtype), _missing(inputs),
                    _reusable((*inputs, *saved, dout_view.data)),
                ),
                dout_view.layout, None, None, 0, needs_weights,
            )
        )  # fmt: skip
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk = torch.empty_like(dq)
        sides = q.new_empty(2, *q.shape) if needs_weights else None
        grad_g, dw_g_parts, moments = plan.temporaries(q)
        plan.start_rows(
            inputs, saved, dout_view.data, grad_g, None, (dq, dk, sides), (dw_g_parts, None)
        )
        grads: list[Tensor | None] = [dq, dk] if needs_tokens else [None, None]
        if sides is None or dw_g_parts is None or moments is None:
            return [*grads, *[None] * 5]
        plan.start_moments(dout_view.data, dout_view.data, sides, moments)
        weights = _weight_gradients(plan, dw_g_parts, moments, 0, inputs)
        return [*grads, *weights[4:]]
