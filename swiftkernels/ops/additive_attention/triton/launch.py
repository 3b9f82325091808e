"""The Triton kernels as a backend (`ops/operator.py`), from tokens or from given queries and keys.

It allocates the results, describes the strides, chooses the tiles and starts the kernels. What
depends only on shapes, strides and options is computed once and cached: the launches.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftkernels.backends import cache
from swiftkernels.backends.layouts import accumulator, output_like
from swiftkernels.backends.torch_state import device_guard, fits_kernels
from swiftkernels.backends.triton.kernel_launch import KernelLaunch, Pointer
from swiftkernels.backends.triton.sizes import (
    architecture,
    cdiv,
    power_of_two,
    split_tokens,
    sum_tile,
)
from swiftkernels.backends.triton.tensors import Layout, Tokens, contiguous, precision, read_tokens
from swiftkernels.ops.additive_attention.triton import config, pooling, wide
from swiftkernels.ops.additive_attention.triton.backward import (
    _finish_backward_kernel,
    _pool_backward_kernel,
    _rows_backward_kernel,
)
from swiftkernels.ops.additive_attention.triton.forward import (
    _output_forward_kernel,
    _pool_forward_kernel,
)
from swiftkernels.ops.additive_attention.triton.tokens import (
    NO_RESIDUAL,
    Residual,
    Saved,
    empty_like,
    given_tokens,
    is_wide,
    mask_bytes,
    rows_of,
    saved_like,
)
from swiftkernels.ops.additive_attention.weights import AnyWeights, Options, Weights
from swiftkernels.ops.operator import Needs
from swiftkernels.ops.plan import Plans


class _Inputs(NamedTuple):
    """What the kernels read queries and keys from."""

    q: Tokens
    k: Tokens
    projections: tuple[Tensor | None, ...]
    """Weights and biases of the query and key layers, if the kernels project x."""
    project: bool
    """Whether the kernels project x."""


def _read(inputs: Sequence[Tensor], weights: AnyWeights) -> _Inputs:
    """From x, which the kernels project, or from given q and k."""
    if not isinstance(weights, Weights):
        return _Inputs(*given_tokens(inputs), _NO_PROJECTIONS, False)
    x = read_tokens(inputs[0])
    return _Inputs(x, x, weights[:4], True)


_NO_PROJECTIONS = (None,) * 4


def _pointers(read: _Inputs, weights: AnyWeights, mask: Tensor | None) -> tuple[Tensor | None, ...]:
    """q, k, the nine weights and the mask, as `_ForwardLaunches.start` takes them."""
    return (
        read.q.data, read.k.data, *contiguous((*read.projections, *weights[-5:])),
        mask_bytes(mask),
    )  # fmt: skip


def forward(
    inputs: Sequence[Tensor],
    weights: AnyWeights,
    mask: Tensor | None,
    options: Options,
    keep: str = "",
    residual: Residual = NO_RESIDUAL,
) -> tuple[Tensor, Saved]:
    """The output, and what the backward needs.

    Args:
        inputs: x, or q and k. x is tokens or an image [B, C, H, W]; the output of an image is an
            image in channels_last memory format.
        weights: `Weights`, or `OutputWeights` for q and k.
        mask: of the tokens.
        options: of the operator.
        keep: not used; only other backends have a choice.
        residual: the output is x + scale * output; only in inference.
    """
    like = inputs[0]
    with device_guard(like):
        if is_wide(weights.width):
            return wide.forward(inputs, weights, mask, options, residual)
        read = _read(inputs, weights)
        saved = saved_like(inputs, weights, keep)
        pointers = (*_pointers(read, weights, mask), *residual)
        launches = _forward_launches(
            _launch_key(read, weights, options, pointers, fits_kernels(*pointers))
        )
        out = like.new_empty_strided(*output_like(like, weights.token_dim))
        acc, parts = saved.global_query.dtype, (read.q.batch, launches.splits)
        pooled = like.new_empty(*parts, weights.width, dtype=acc)
        split_statistics = like.new_empty(*parts, 2, dtype=acc)
        launches.start(pointers, (out, *saved, pooled, split_statistics))
        return out, saved


class _LaunchKey(NamedTuple):
    """What the launches of a call depend on: constants of the kernels, sizes of the grids."""

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
    """See `KernelLaunch`."""


def _launch_key(
    read: _Inputs,
    weights: AnyWeights,
    options: Options,
    pointers: Sequence[Tensor | None],
    reusable: bool,
) -> _LaunchKey:
    q, dtype = read.q, read.q.data.dtype
    return _LaunchKey(
        q.batch, q.n_tokens, q.width, weights.width, weights.token_dim, q.layout, dtype,
        q.data.device, options, read.project, precision(dtype),
        tuple([p is None for p in pointers]), reusable,
    )  # fmt: skip


class _ForwardLaunches:
    """The two launches of a forward.

    Attributes:
        splits: partial sums of a batch element that the first launch computes.
    """

    def __init__(self, key: _LaunchKey) -> None:
        batch, n_tokens, in_dims, width, token_dim = key[:5]
        tokens, dtype, options = key.tokens, key.dtype, key.options
        cfg = config.choose_config(width, dtype, architecture(key.device))
        # `split_tokens` takes at least one.
        splits, tiles_per_split = split_tokens(max(n_tokens, 1), cfg.block_n)
        self.splits = splits
        block_m = 32 if width <= 64 else 64
        m_programs = cdiv(token_dim, block_m) * cdiv(width, block_m)
        tiles = cdiv(n_tokens, cfg.block_n)
        shared: dict[str, Any] = {
            "C": in_dims,
            "E": width,
            "D": token_dim,
            "EPS": options.eps,
            "POOLING": options.pooling,
            "QK_NORM": options.qk_norm,
            "PROJECT": key.project,
            "CHANNELS_LAST": tokens.channels_last,
            "ALIGN": tokens.align,
            "PRECISION": key.precision,
            "BLOCK_N": cfg.block_n,
            "BLOCK_E": power_of_two(width),
            "BLOCK_K": cfg.block_k,
            "num_warps": cfg.num_warps,
        }
        self._pool = KernelLaunch(
            _pool_forward_kernel,
            batch * splits + m_programs,
            (n_tokens, splits, tiles_per_split, batch * splits, *tokens.strides),
            {"SCALE": options.scale, "BLOCK_M": block_m, "num_stages": cfg.num_stages} | shared,
            key.reusable,
        )
        self._output = KernelLaunch(
            _output_forward_kernel,
            batch * tiles,
            (n_tokens, splits, tiles, *tokens.strides),
            {"BLOCK_J": cfg.block_j, "BLOCK_S": config.BLOCK_S, "num_stages": 2} | shared,
            key.reusable,
        )
        acc_bytes = accumulator(dtype).itemsize
        sizes = (
            batch * width * acc_bytes,
            batch * 2 * acc_bytes,
            token_dim * width * dtype.itemsize,
            batch * splits * width * acc_bytes,
            batch * splits * 2 * acc_bytes,
        )
        # In inference, all results but the output are in one buffer, each at a multiple of 16.
        ends = itertools.accumulate(cdiv(size, 16) * 16 for size in sizes)
        *self._offsets, self._buffer_bytes = (0, *ends)

    @property
    def ready(self) -> bool:
        """Whether `start` takes addresses."""
        return self._output.ready

    def start(self, inputs: Sequence[Pointer], results: Sequence[Pointer]) -> None:
        """Launch both kernels in the current stream.

        Args:
            inputs: q, k (both are x if the kernels project it), the nine weights, the mask, and
                what `Residual` has.
            results: out, G, statistics, M, and the partial sums and statistics of the splits.
        """
        q, k, wq, bq, wk, bk, w_g, wp, bp, wf, bf, mask, residual, scale = inputs
        out, global_query, statistics, product, pooled, split_statistics = results
        self._pool(q, wq, bq, w_g, mask, wp, wf, pooled, split_statistics, product)
        self._output(
            q, k, wq, bq, wk, bk, bp, wf, bf, residual, scale, product, pooled, split_statistics,
            out, global_query, statistics,
        )  # fmt: skip

    def infer(
        self, x: Tensor, out: Tensor, weights: Sequence[int | None], scale: int | None
    ) -> None:
        """Compute out [B, N, D], contiguous, once `ready`.

        `weights` are the nine addresses, `scale` is that of the residual branch or None.
        """
        buffer = x.new_empty(self._buffer_bytes, dtype=torch.uint8)
        start, address = buffer.data_ptr(), x.data_ptr()
        residual = (None if scale is None else address, scale)
        inputs = (address, address, *weights, None, *residual)
        results = (out.data_ptr(), *[start + offset for offset in self._offsets])
        with device_guard(x):
            self.start(inputs, results)


_forward_launches = functools.lru_cache(maxsize=512)(_ForwardLaunches)


class InferencePlan:
    """Launches the kernels by address, once they are compiled for such inputs.

    With a `residual_scale`, x has to be laid out as the output is.
    """

    lasting = True

    def __init__(
        self,
        x: Tensor,
        weights: Weights,
        mask: Tensor | None,
        options: Options,
        residual_scale: Tensor | None = None,
    ) -> None:
        self._options = options
        self._places = cache.places(cache.present(weights))
        self._precision = precision(x.dtype)
        self._out = output_like(x, weights.token_dim)
        self._launches: _ForwardLaunches | None = None
        by_address = (
            mask is None
            and not is_wide(weights.width)
            and read_tokens(x).data is x
            and fits_kernels(*weights)
            and all(w is None or w.is_contiguous() for w in weights)
        )
        if by_address:
            read = _read((x,), weights)
            residual = _residual(x, residual_scale)
            pointers = (*_pointers(read, weights, None), *residual)
            self._launches = _forward_launches(_launch_key(read, weights, options, pointers, True))
        self._addresses = [None if w is None else w.data_ptr() for w in weights]

    def __call__(
        self, x: Tensor, weights: Weights, mask: Tensor | None, residual_scale: Tensor | None
    ) -> Tensor | None:
        if self._places != cache.places(cache.present(weights)):
            return None
        if self._precision != precision(x.dtype):
            return None  # PyTorch's setting has changed
        launches = self._launches
        if launches is None or not launches.ready or not fits_kernels(x, residual_scale):
            residual = _residual(x, residual_scale)
            return forward((x,), weights, mask, self._options, "", residual)[0]
        out = torch.empty_strided(*self._out, dtype=x.dtype, device=x.device)
        scale = None if residual_scale is None else residual_scale.data_ptr()
        launches.infer(x, out, self._addresses, scale)
        return out


def _residual(x: Tensor, scale: Tensor | None) -> Residual:
    return NO_RESIDUAL if scale is None else Residual(x, scale)


def inference_plan(
    x: Tensor,
    weights: Weights,
    mask: Tensor | None,
    options: Options,
    residual_scale: Tensor | None,
    plans: Plans,
) -> InferencePlan | None:
    """The plan for inputs like x; None if the kernels cannot add x, which its layout decides."""
    if residual_scale is not None:
        memory_format = torch.contiguous_format if x.dim() == 3 else torch.channels_last
        if not x.is_contiguous(memory_format=memory_format):
            return None
    return InferencePlan(x, weights, mask, options, residual_scale)


class _BackwardKey(NamedTuple):
    """What the launches of a backward depend on."""

    forward: _LaunchKey
    dout: Layout
    dx: Layout | None
    """None: `_rows_backward_kernel` does not compute the gradient of x."""
    needs_weights: bool


class _BackwardLaunches:
    """The launches of a backward.

    Attributes:
        fuses: whether `_rows_backward_kernel` sums the moments; otherwise it stores the operands
            that products of PyTorch compute them from.
    """

    def __init__(self, key: _BackwardKey) -> None:
        of = key.forward
        batch, n_tokens, in_dims, width, token_dim = of[:5]
        tokens, dtype, options = of.tokens, of.dtype, of.options
        cfg = config.choose_config(width, dtype, architecture(of.device))
        widest = max(in_dims, token_dim, width)
        project, needs_weights = of.project, key.needs_weights
        self.fuses = needs_weights and project and widest <= config.MAX_FUSED_WIDTH
        strides = (*tokens.strides, *key.dout.strides)
        shared: dict[str, Any] = {
            "E": width,
            "D": token_dim,
            "CHANNELS_LAST": tokens.channels_last,
            "ALIGN": tokens.align,
            "DOUT_CHANNELS_LAST": key.dout.channels_last,
            "DOUT_ALIGN": key.dout.align,
            "PRECISION": of.precision,
        }
        by_rows: dict[str, Any] = {
            "C": in_dims,
            "EPS": options.eps,
            "QK_NORM": options.qk_norm,
            "PROJECT": project,
            "BLOCK_E": power_of_two(width),
            "BLOCK_K": cfg.block_k,
        }
        reusable = of.reusable

        splits, tiles_per_split = split_tokens(n_tokens, cfg.block_n)
        self._pool = KernelLaunch(
            _pool_backward_kernel,
            batch * splits,
            (n_tokens, splits, tiles_per_split, *strides),
            {"BLOCK_N": cfg.block_n, "num_warps": cfg.num_warps, "num_stages": cfg.num_stages}
            | shared
            | by_rows,
            reusable,
        )

        tiles = cdiv(n_tokens, cfg.rows_block_n)
        tiles_per_group = config.group(cfg, batch, n_tokens) // cfg.rows_block_n
        tiles_per_group = max(1, min(tiles, tiles_per_group))
        groups = cdiv(tiles, tiles_per_group)
        # Numbers of a set of moments, see `_finish_backward_kernel`.
        moment_width = 2 * width * (in_dims + token_dim) + token_dim
        dx = key.dx or tokens
        self._rows = KernelLaunch(
            _rows_backward_kernel,
            batch * groups,
            (
                n_tokens, splits, groups, tiles_per_group, *strides, *dx.strides,
                batch * n_tokens * width,
            ),
            shared
            | by_rows
            | {
                # One alignment for x and dx: their strides differ where x has gaps.
                "ALIGN": min(tokens.align, dx.align),
                "SCALE": options.scale,
                "POOLING": options.pooling,
                "NORMALISES": options.pooling in pooling.NORMALISED,
                "FUSE": self.fuses,
                "BLOCK_J": cfg.block_j,
                "BLOCK_C": power_of_two(in_dims) if self.fuses else 16,
                "BLOCK_D": power_of_two(token_dim) if self.fuses else 16,
                "BLOCK_N": cfg.rows_block_n,
                "BLOCK_S": config.BLOCK_S,
                "num_warps": cfg.rows_num_warps,
                "num_stages": cfg.rows_num_stages,
            },
            reusable,
        )  # fmt: skip
        self._needs_weights = needs_weights
        self._grad_g = (batch, splits, width)
        parts = batch * groups * (1 if self.fuses else tiles_per_group)
        self._sums, self._moments = (parts, 3, width), (batch * groups, moment_width)
        if not self.fuses:
            return
        block, partials = sum_tile(moment_width)
        self._finish = KernelLaunch(
            _finish_backward_kernel,
            cdiv(3 * width, block) + cdiv(moment_width, block),
            (batch * groups,),
            {
                "C": in_dims,
                "E": width,
                "D": token_dim,
                "BLOCK_J": block,
                "BLOCK_S": partials,
                "num_warps": 8,
                "num_stages": 2,
            },
            reusable,
        )

    def temporaries(self, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Uninitialised partial sums: of dG, of vectors if weights need gradients, and of moments
        if it `fuses`."""
        new, acc = like.new_empty, accumulator(like.dtype)
        return (
            new(*self._grad_g, dtype=acc),
            new(*self._sums, dtype=acc) if self._needs_weights else None,
            new(*self._moments, dtype=acc) if self.fuses else None,
        )

    def start_rows(
        self,
        inputs: Sequence[Tensor | None],
        saved: Sequence[Tensor],
        dout: Tensor,
        grad_g: Tensor,
        dx: Tensor | None,
        operands: Sequence[Tensor | None],
        sums: Sequence[Tensor | None],
    ) -> None:
        """The first two launches.

        Args:
            inputs: as in `_ForwardLaunches.start`.
            saved: G, statistics, M.
            dout: the gradient of the output.
            grad_g: for partial sums of dG.
            dx: for the gradient of x, if needed.
            operands: for dq, dk, and for t and z [2, B, N, E], if needed.
            sums: what `temporaries` returns after the first.
        """
        q, k, wq, bq, wk, bk, w_g, _, bp, wf, _, mask = inputs
        global_query, statistics, product = saved
        self._pool(k, wk, bk, product, dout, grad_g)
        self._rows(
            q, k, wq, bq, wk, bk, w_g, mask, bp, wf, product, global_query, statistics, grad_g,
            dout, dx, *operands, *sums,
        )  # fmt: skip

    def finish(self, sums: Tensor, moments: Tensor, gradients: Sequence[Tensor | None]) -> None:
        """Add the partial sums; results in `gradients`: dw_g, dWq, dWk, U, V, dbq, dbk, dbf."""
        self._finish(sums, moments, *gradients)


_backward_launches = functools.lru_cache(maxsize=512)(_BackwardLaunches)


def forget_launches() -> None:
    """Clear the cache of launches, after a change that their keys do not show."""
    _forward_launches.cache_clear()
    _backward_launches.cache_clear()
    wide.forget_launches()


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
    compute = wide.backward if is_wide(weights.width) else _backward
    with device_guard(inputs[0]):
        gradients = compute(dout, inputs, weights, mask, saved, options, needs)
        # The operator promises the strides of an input where it is dense.
        for i, t in enumerate(inputs):
            found = gradients[i]
            if found is not None and found.stride() != t.stride():
                gradients[i] = torch.empty_like(t).copy_(found)
    return gradients


def _backward(
    dout: Tensor,
    inputs: Sequence[Tensor],
    weights: AnyWeights,
    mask: Tensor | None,
    saved: Saved,
    options: Options,
    needs: Needs,
) -> list[Tensor | None]:
    """As `backward`; the gradients of inputs may have other strides than these."""
    x = inputs[0]
    read = _read(inputs, weights)
    q, projects = read.q, read.project
    dout_view = read_tokens(dout)
    dx = empty_like(q) if needs.inputs and projects else None
    pointers = _pointers(read, weights, mask)
    kept = contiguous(saved)  # hooks of saved tensors may have changed the strides
    reusable = fits_kernels(*pointers, *kept, dout_view.data)
    launches = _backward_launches(
        _BackwardKey(
            _launch_key(read, weights, options, pointers, reusable), dout_view.layout,
            None if dx is None else dx.layout, needs.weights,
        )
    )  # fmt: skip
    stores = needs.weights and not launches.fuses
    rows = q.batch * q.n_tokens, weights.width
    dq, dk = (x.new_empty(rows) if stores or not projects else None for _ in range(2))
    tz = x.new_empty(2, *rows) if stores else None
    grad_g, sums, moments = launches.temporaries(x)
    launches.start_rows(
        pointers, kept, dout_view.data, grad_g, None if dx is None else dx.data, (dq, dk, tz),
        (sums, moments),
    )  # fmt: skip
    gradients: list[Tensor | None] = [None if dx is None else dx.data]
    if not projects:
        gradients = [g.view(x.shape) if needs.inputs and g is not None else None for g in (dq, dk)]
    if sums is None:
        return [*gradients, *[None] * len(weights)]
    if moments is not None:
        total = _finish(launches, sums, moments, weights)
    else:
        total = _total(sums, dq, dk, tz, dout, x, weights)
    return [*gradients, *_weight_gradients(total, weights)]


class _Total(NamedTuple):
    """Sums over all tokens, in the type of the weights."""

    projections: list[Tensor | None]
    """dWq, dbq, dWk and dbk; empty if queries and keys were given."""
    dw_g: Tensor
    U: Tensor
    """dout^T t, [D, E]. It is rounded, as V is, as eager rounds the operands of its products."""
    V: Tensor
    """dout^T z, [D, E]"""
    d_final_bias: Tensor | None
    """The sum of dout, [D], if a bias needs it."""


def _finish(
    launches: _BackwardLaunches, sums: Tensor, moments: Tensor, weights: AnyWeights
) -> _Total:
    """From what `_rows_backward_kernel` summed for groups of tokens."""
    assert isinstance(weights, Weights)
    w = weights
    new = w.final_weight.new_empty
    dwq, dwk = new(w.query_weight.shape), new(w.query_weight.shape)
    dbq = None if w.query_bias is None else new(w.width)
    dbk = None if w.key_bias is None else new(w.width)
    dw_g, U, V = new(w.width), new(w.final_weight.shape), new(w.final_weight.shape)
    d_final_bias = new(w.token_dim) if _needs_dout(w) else None
    launches.finish(sums, moments, (dw_g, dwq, dwk, U, V, dbq, dbk, d_final_bias))
    return _Total([dwq, dbq, dwk, dbk], dw_g, U, V, d_final_bias)


def _total(
    sums: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    tz: Tensor | None,
    dout: Tensor,
    x: Tensor,
    weights: AnyWeights,
) -> _Total:
    """By products of PyTorch, from the rows that `_rows_backward_kernel` stored."""
    assert dq is not None
    assert dk is not None
    assert tz is not None
    t, z = tz
    grad_out = rows_of(dout)
    # Gradients of their own: not parts of one tensor.
    dw_g, dbq, dbk = (t.to(dq.dtype, copy=True) for t in sums.sum(0))
    projections: list[Tensor | None] = []
    if isinstance(weights, Weights):
        projections = wide.projection_gradients(dq, dk, dbq, dbk, x, weights)
    return _Total(
        projections, dw_g, grad_out.t() @ t, grad_out.t() @ z,
        grad_out.sum(0) if _needs_dout(weights) else None,
    )  # fmt: skip


def _needs_dout(weights: AnyWeights) -> bool:
    """Whether a bias needs the sum of dout."""
    return weights.proj_bias is not None or weights.final_bias is not None


def _weight_gradients(total: _Total, weights: AnyWeights) -> list[Tensor | None]:
    """In the order of the weights."""
    projections, dw_g, U, V, d_final_bias = total
    w, wf_t = weights, weights.final_weight.t()
    d_proj, d_proj_bias = wf_t @ U, None
    if w.proj_bias is not None and d_final_bias is not None:
        d_proj_bias = wf_t @ d_final_bias
    # In place, because addmm would copy V first.
    d_final = V.addmm_(U, w.proj_weight.t())
    return [
        *projections, dw_g.view(w.w_g.shape), d_proj, d_proj_bias, d_final,
        None if w.final_bias is None else d_final_bias,
    ]  # fmt: skip
