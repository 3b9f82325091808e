"""Launching: allocate, describe strides, choose tiles, start the kernels.

A backend (`ops/operator.py`) of both operators, from tokens and from given queries and keys.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftkernels.backends import cache
from swiftkernels.backends.layouts import (
    accumulator,
    as_image,
    as_tokens,
    output_like,
    tokens_of,
)
from swiftkernels.backends.torch_state import allow_tf32, device_guard, fits_kernels
from swiftkernels.backends.triton.prepared import Pointer, Prepared
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
from swiftkernels.ops.additive_attention.weights import (
    Options,
    OutputWeights,
    Weights,
    pack_projections,
)
from swiftkernels.ops.operator import Needs
from swiftkernels.ops.plan import Plans

AnyWeights = Weights | OutputWeights


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


class Saved(NamedTuple):
    """What the backward needs besides the inputs."""

    global_query: Tensor
    """G, [B, E]"""
    statistics: Tensor
    """Of the pooling, [B, 2]."""
    folded: Tensor
    """M = Wf Wp, [D, E]"""


def saved_like(inputs: Sequence[Tensor], weights: AnyWeights, keep: str) -> Saved:
    """What a forward keeps, uninitialised."""
    new, batch = inputs[0].new_empty, inputs[0].shape[0]
    acc = accumulator(inputs[0].dtype)
    return Saved(
        new(batch, weights.width, dtype=acc),
        new(batch, 2, dtype=acc),
        new(weights.token_dim, weights.width),
    )


class _Inputs(NamedTuple):
    """What the kernels read queries and keys from."""

    q: _Tokens
    k: _Tokens
    projections: tuple[Tensor | None, ...]
    """Weights and biases of the query and key layers, if the kernels project x."""

    @property
    def project(self) -> bool:
        return self.projections[0] is not None


def _read(inputs: Sequence[Tensor], weights: AnyWeights) -> _Inputs:
    """From x, projected by the kernels, or by one GEMM if it is wide; or from given q and k."""
    if not isinstance(weights, Weights):
        q, k = inputs
        if q.stride() != k.stride():
            q, k = q.contiguous(), k.contiguous()
        return _Inputs(_tokens(q), _tokens(k), (None,) * 4)
    (x,) = inputs
    if weights.width <= config.MAX_PROJECTED_WIDTH:
        view = _tokens(x)
        return _Inputs(view, view, weights[:4])
    tokens = x if x.dim() == 3 else as_tokens(x)
    both = torch.nn.functional.linear(tokens, *pack_projections(*weights[:4]))
    q, k = both.chunk(2, dim=2)  # views of one buffer
    return _Inputs(_tokens(q), _tokens(k), (None,) * 4)


def _pointers(read: _Inputs, weights: AnyWeights, mask: Tensor | None) -> tuple[Tensor | None, ...]:
    """q, k, the nine weights and the mask, as `_ForwardPlan.start` takes them."""
    return (
        read.q.data, read.k.data, *_contiguous(*read.projections), *_contiguous(*weights[-5:]),
        _mask_bytes(mask),
    )  # fmt: skip


def forward(
    inputs: Sequence[Tensor],
    weights: AnyWeights,
    mask: Tensor | None,
    options: Options,
    keep: str = "",
) -> tuple[Tensor, Saved]:
    """The output, and what the backward needs.

    Args:
        inputs: x, tokens or an image [B, C, H, W], whose output is an image in the order of
            channels_last; or q and k.
        weights: `Weights`, or `OutputWeights` for q and k.
        keep: for other backends.
    """
    like = inputs[0]
    with device_guard(like):
        read = _read(inputs, weights)
        q = read.q
        pointers = _pointers(read, weights, mask)
        plan = _forward_plan(_kind(read, weights, options, pointers, _reusable(pointers)))
        out = like.new_empty_strided(*output_like(like, weights.token_dim))
        saved = saved_like(inputs, weights, keep)
        acc = saved.global_query.dtype
        pooled = like.new_empty(q.batch, plan.splits, weights.width, dtype=acc)
        split_statistics = like.new_empty(q.batch, plan.splits, 2, dtype=acc)
        plan.start(pointers, (out, *saved, pooled, split_statistics))
    return out, saved


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


def _kind(
    read: _Inputs,
    weights: AnyWeights,
    options: Options,
    pointers: Sequence[Tensor | None],
    reusable: bool,
) -> _Kind:
    q, dtype = read.q, read.q.data.dtype
    return _Kind(
        q.batch, q.n_tokens, q.width, weights.width, weights.token_dim, q.layout, dtype,
        q.data.device, options, read.project, _precision(dtype), _missing(pointers), reusable,
    )  # fmt: skip


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


class InferencePlan:
    """Starts the kernels by address, once those for inputs of one kind are compiled."""

    lasting = True

    def __init__(self, x: Tensor, weights: Weights, mask: Tensor | None, options: Options) -> None:
        self._options = options
        self._places = cache.places(cache.present(weights))
        self._precision = _precision(x.dtype)
        self._out = output_like(x, weights.token_dim)
        self._plan: _ForwardPlan | None = None
        by_address = (
            mask is None
            and weights.width <= config.MAX_PROJECTED_WIDTH
            and all(w.is_contiguous() for w in cache.present(weights))
        )
        if by_address and _tokens(x).data is x and _reusable(weights):
            read = _read((x,), weights)
            pointers = _pointers(read, weights, None)
            self._plan = _forward_plan(_kind(read, weights, options, pointers, True))
        self._addresses = [None if w is None else w.data_ptr() for w in weights]

    def __call__(
        self, x: Tensor, weights: Weights, mask: Tensor | None, residual_scale: Tensor | None
    ) -> Tensor | None:
        assert residual_scale is None, "these kernels do not add x"
        if self._places != cache.places(cache.present(weights)):
            return None
        if self._precision != _precision(x.dtype):
            return None  # the setting has changed
        plan = self._plan
        if plan is None or not plan.ready or not fits_kernels(x):
            return forward((x,), weights, mask, self._options)[0]
        out = torch.empty_strided(*self._out, dtype=x.dtype, device=x.device)
        plan.infer(x, out, self._addresses)
        return out


def inference_plan(
    x: Tensor,
    weights: Weights,
    mask: Tensor | None,
    options: Options,
    residual_scale: Tensor | None,
    plans: Plans,
) -> InferencePlan | None:
    """The plan for inputs like x; None with a residual_scale, which these kernels do not take."""
    return None if residual_scale is not None else InferencePlan(x, weights, mask, options)


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
    weights: AnyWeights,
) -> list[Tensor | None]:
    """In the order of the weights; the kernels sum dWq, dbq, dWk and dbk only for `Weights`."""
    w = weights.output if isinstance(weights, Weights) else weights
    token_dim, width = w.final_weight.shape
    new = w.final_weight.new_empty
    projections: list[Tensor | None] = []
    dwq = dwk = dbq = dbk = None
    if isinstance(weights, Weights):
        dwq, dwk = new(width, x_width), new(width, x_width)
        biases = weights.query_bias, weights.key_bias
        dbq, dbk = (None if bias is None else new(width) for bias in biases)
        projections = [dwq, dbq, dwk, dbk]
    dw_g = new(w.w_g.shape)
    d_final_bias = None if w.proj_bias is None and w.final_bias is None else new(token_dim)
    # U and V are rounded to the storage type, as eager rounds the operands of its GEMMs.
    U, V = new(token_dim, width), new(token_dim, width)
    plan.finish(dw_g_parts, moments, (dw_g, dwq, dwk, U, V, dbq, dbk, d_final_bias))
    wf_t = w.final_weight.t()
    d_proj = wf_t @ U
    d_proj_bias = None
    if w.proj_bias is not None and d_final_bias is not None:
        d_proj_bias = wf_t @ d_final_bias
    # In place: out of place, addmm would copy V first.
    d_final = V.addmm_(U, w.proj_weight.t())
    return [
        *projections, dw_g, d_proj, d_proj_bias, d_final,
        None if w.final_bias is None else d_final_bias,
    ]  # fmt: skip


def backward(
    dout: Tensor,
    inputs: Sequence[Tensor],
    weights: AnyWeights,
    mask: Tensor | None,
    saved: Saved,
    options: Options,
    needs: Needs,
) -> list[Tensor | None]:
    """Gradients of inputs and weights; None where not needed or without bias."""
    x = inputs[0]
    with device_guard(x):
        read = _read(inputs, weights)
        q = read.q
        # Tokens that queries and keys were made of; None if they were given.
        source = _tokens(x) if isinstance(weights, Weights) else None
        x_width = 0 if source is None else source.width
        dout_view = _tokens(dout)
        dx_view = _empty_like(q) if needs.inputs and read.project else None
        dx = None if dx_view is None else dx_view.data
        pointers = _pointers(read, weights, mask)
        kept = _contiguous(*saved)  # which hooks may have put anywhere
        data = x if source is None else source.data
        reusable = _reusable((*pointers, *kept, data, dout_view.data))
        plan = _backward_plan(
            _BackwardKind(
                _kind(read, weights, options, pointers, reusable), dout_view.layout,
                None if dx_view is None else dx_view.layout,
                None if source is None else source.layout, x_width, needs.weights,
            )
        )  # fmt: skip
        planes = dq = dk = sides = None
        if source is None:
            dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in inputs)
            planes = sides = x.new_empty(2, *x.shape) if needs.weights else None
        elif not read.project or (needs.weights and not plan.fuses):
            planes = x.new_empty(4 if needs.weights else 2, q.batch, q.n_tokens, weights.width)
            dq, dk, sides = planes[0], planes[1], planes[2:] if needs.weights else None
        grad_g, dw_g_parts, moments = plan.temporaries(x)
        plan.start_rows(
            pointers, kept, dout_view.data, grad_g, dx, (dq, dk, sides),
            (dw_g_parts, moments if plan.fuses else None),
        )  # fmt: skip
        gradients: list[Tensor | None] = [dx]
        if source is None:
            gradients = [dq, dk] if needs.inputs else [None, None]
        elif needs.inputs and not read.project:
            gradients = [_input_gradient(dq, dk, x, weights)]
        # The strides that an operator promises: those of the input where it is dense.
        gradients = [
            g if g is None or g.stride() == t.stride() else torch.empty_like(t).copy_(g)
            for g, t in zip(gradients, inputs, strict=True)
        ]
        if dw_g_parts is None or moments is None:
            return [*gradients, *[None] * len(weights)]
        if planes is not None:
            tokens = dout_view if source is None else source
            plan.start_moments(tokens.data, dout_view.data, planes, moments)
        return [*gradients, *_weight_gradients(plan, dw_g_parts, moments, x_width, weights)]


def _input_gradient(dq: Tensor | None, dk: Tensor | None, x: Tensor, weights: AnyWeights) -> Tensor:
    """Gradient of x by two GEMMs from those of queries and keys, [B, N, E]."""
    assert isinstance(weights, Weights)
    assert dq is not None
    assert dk is not None
    batch, n_tokens, width = dq.shape
    dx = torch.mm(dq.view(-1, width), weights.query_weight)
    dx = dx.addmm_(dk.view(-1, width), weights.key_weight).view(batch, n_tokens, -1)
    return dx if x.dim() == 3 else as_image(dx, x.shape[2:])
