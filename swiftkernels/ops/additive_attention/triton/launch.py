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
import torch.nn.functional as F
from torch import Tensor

from swiftkernels.backends import cache
from swiftkernels.backends.layouts import (
    accumulator,
    as_image,
    output_like,
    to_tokens,
    tokens_of,
)
from swiftkernels.backends.torch_state import autocast_off, device_guard, fits_kernels
from swiftkernels.backends.triton.kernel_launch import KernelLaunch, Pointer
from swiftkernels.backends.triton.linear import Linear, linear_launch
from swiftkernels.backends.triton.sizes import (
    architecture,
    cdiv,
    power_of_two,
    split_batch,
    split_tokens,
    sum_tile,
)
from swiftkernels.backends.triton.tensors import (
    Layout,
    compact,
    contiguous,
    has_tensor_cores,
    layout,
    precision,
    rows_layout,
)
from swiftkernels.ops.additive_attention.triton import config, pooling
from swiftkernels.ops.additive_attention.triton.backward import (
    _finish_backward_kernel,
    _pool_backward_kernel,
    _rows_backward_kernel,
    _weights_backward_kernel,
)
from swiftkernels.ops.additive_attention.triton.forward import (
    _operands_kernel,
    _output_forward_kernel,
    _pool_forward_kernel,
)
from swiftkernels.ops.additive_attention.weights import (
    AnyWeights,
    Options,
    OutputWeights,
    Weights,
    pack_projections,
)
from swiftkernels.ops.operator import Needs
from swiftkernels.ops.plan import Plans


class _Tokens(NamedTuple):
    """Tokens, or an image, that the kernels can read as [B, N, C]."""

    data: Tensor
    batch: int
    n_tokens: int
    width: int
    layout: Layout


def _tokens(t: Tensor) -> _Tokens:
    """t [B, N, C] or [B, C, H, W], or a copy where the kernels cannot read its strides."""
    tokens = tokens_of(t.shape, t.stride())
    if tokens is not None:
        batch, n_tokens, width, strides = tokens
        found = layout(n_tokens, width, strides)
        if found is not None:
            return _Tokens(t, batch, n_tokens, width, found)
    return _tokens(compact(t))


def _empty_like(tokens: _Tokens) -> _Tokens:
    """Uninitialised tokens with the same order of axes in memory, without gaps."""
    data = tokens.data
    if data.dim() == 3 and not tokens.layout.channels_last:
        return _tokens(data.new_empty(data.mT.shape).mT)
    contiguous = data.dim() == 3 or not tokens.layout.channels_last
    memory_format = torch.contiguous_format if contiguous else torch.channels_last
    return _tokens(torch.empty_like(data, memory_format=memory_format))


def _mask_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


class Saved(NamedTuple):
    """What the backward needs besides the inputs."""

    global_query: Tensor
    """G, [B, E]"""
    statistics: Tensor
    """Of the pooling, [B, 2]."""
    product: Tensor
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
    x: _Tokens | None
    """What queries and keys are made of; None if they were given."""
    project: bool
    """Whether the kernels project x."""


def _read(inputs: Sequence[Tensor], weights: AnyWeights) -> _Inputs:
    """From x, which the kernels project, or one GEMM if E is large; or from given q and k."""
    if not isinstance(weights, Weights):
        q, k = inputs
        if q.stride() != k.stride():
            q, k = q.contiguous(), k.contiguous()
        return _Inputs(_tokens(q), _tokens(k), _NO_PROJECTIONS, None, False)
    (x,) = inputs
    if not is_wide(weights.width):
        view = _tokens(x)
        return _Inputs(view, view, weights[:4], view, True)
    return _projected(x, pack_projections(*weights[:4]))._replace(x=_tokens(x))


def _projected(x: Tensor, projections: tuple[Tensor, Tensor | None]) -> _Inputs:
    """Queries and keys of a wide layer by one GEMM; `projections` are the two layers as one."""
    q, k = F.linear(_flattened(x), *projections).chunk(2, dim=2)  # views of one buffer
    return _Inputs(_tokens(q), _tokens(k), _NO_PROJECTIONS, None, False)


def _flattened(t: Tensor) -> Tensor:
    """Tokens [B, N, C], or an image [B, C, H, W] as tokens."""
    return to_tokens(t, channels_first=t.dim() == 4)


_NO_PROJECTIONS = (None,) * 4


def _pointers(read: _Inputs, weights: AnyWeights, mask: Tensor | None) -> tuple[Tensor | None, ...]:
    """q, k, the nine weights and the mask, as `_ForwardLaunches.start` takes them."""
    return (
        read.q.data, read.k.data, *contiguous((*read.projections, *weights[-5:])),
        _mask_bytes(mask),
    )  # fmt: skip


class Residual(NamedTuple):
    """What the last kernel adds to the scaled output in inference."""

    x: Tensor | None = None
    """Tokens [B, N, D] without gaps, or an image in channels_last memory format."""
    scale: Tensor | None = None
    """[D]"""


NO_RESIDUAL = Residual()


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
    with device_guard(inputs[0]):
        read = _read(inputs, weights)
        saved = saved_like(inputs, weights, keep)
        return _forward(inputs[0], read, weights, mask, options, residual, saved, None), saved


def _forward(
    like: Tensor,
    read: _Inputs,
    weights: AnyWeights,
    mask: Tensor | None,
    options: Options,
    residual: Residual,
    saved: Saved,
    final: Tensor | None,
) -> Tensor:
    """The output, for inputs with axes as those of `like`; fills `saved`, M only without `final`.

    `final` is [Wf, M] of a wide layer, if it is known.
    """
    q = read.q
    pointers = (*_pointers(read, weights, mask), *residual)
    launches = _forward_launches(
        _launch_key(read, weights, options, pointers, fits_kernels(*pointers), final is None)
    )
    out = like.new_empty_strided(*output_like(like, weights.token_dim))
    acc = saved.global_query.dtype
    pooled = like.new_empty(q.batch, launches.splits, weights.width, dtype=acc)
    split_statistics = like.new_empty(q.batch, launches.splits, 2, dtype=acc)
    results = (out, *saved, pooled, split_statistics)
    if launches.is_wide:
        launches.start_wide(pointers, results, final)
    else:
        launches.start(pointers, results)
    return out


class PackedWide(NamedTuple):
    """The weights of a wide layer as `infer_wide` reads them."""

    projections: tuple[Tensor, Tensor | None]
    """The query and key layers as one: [2 E, C], [2 E] or None."""
    others: OutputWeights
    final: Tensor
    """[Wf, M], [D, 2 E]"""


def is_wide(width: int) -> bool:
    """Whether a GEMM computes queries and keys for such an E, and another one the output."""
    return width > config.MAX_PROJECTED_WIDTH


def pack_wide(weights: Weights) -> PackedWide:
    """The weights in new memory."""
    others = OutputWeights(*weights[4:])
    final_weight, dtype = others.final_weight, others.final_weight.dtype
    product = final_weight.to(accumulator(dtype)) @ others.proj_weight.to(accumulator(dtype))
    highest = torch.finfo(dtype).max
    final = torch.cat((final_weight, product.clamp(-highest, highest).to(dtype)), 1)
    return PackedWide(pack_projections(*weights[:4]), others, final)


def infer_wide(x: Tensor, packed: PackedWide, options: Options, residual: Residual) -> Tensor:
    """The output of a wide layer for tokens, or an image in channels_last memory format."""
    with device_guard(x), autocast_off(x.device.type):
        read = _projected(x, packed.projections)
        saved = saved_like((x,), packed.others, "")
        return _forward(x, read, packed.others, None, options, residual, saved, packed.final)


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
    product: bool
    """Whether the first launch computes M."""


def _launch_key(
    read: _Inputs,
    weights: AnyWeights,
    options: Options,
    pointers: Sequence[Tensor | None],
    reusable: bool,
    product: bool = True,
) -> _LaunchKey:
    q, dtype = read.q, read.q.data.dtype
    return _LaunchKey(
        q.batch, q.n_tokens, q.width, weights.width, weights.token_dim, q.layout, dtype,
        q.data.device, options, read.project, precision(dtype),
        tuple([p is None for p in pointers]), reusable, product,
    )  # fmt: skip


class _ForwardLaunches:
    """The two launches of a forward, or three of a wide layer.

    Attributes:
        splits: partial sums of a batch element that the first launch computes.
        is_wide: whether to use `start_wide`; else `start`.
    """

    def __init__(self, key: _LaunchKey) -> None:
        batch, n_tokens, in_dims, width, token_dim = key[:5]
        tokens, dtype, options = key.tokens, key.dtype, key.options
        cfg = config.choose_config(width, dtype, architecture(key.device))
        # Without tokens there is nothing to pool, but a backward may need M, G and statistics.
        splits, tiles_per_split = split_tokens(max(n_tokens, 1), cfg.block_n)
        self.splits = splits
        self.is_wide = is_wide(width)
        block_m = 32 if width <= 64 else 64
        m_programs = cdiv(token_dim, block_m) * cdiv(width, block_m) if key.product else 0
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
        if not self.is_wide:
            self._output = KernelLaunch(
                _output_forward_kernel,
                batch * tiles,
                (n_tokens, splits, tiles, *tokens.strides),
                {
                    "BLOCK_J": cfg.block_j,
                    "BLOCK_S": config.BLOCK_S,
                    "num_stages": 2,
                }
                | shared,
                key.reusable,
            )
        else:
            self._plan_wide(key)
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
        """Whether `start` takes addresses; `start_wide` does not."""
        return not self.is_wide and self._output.ready

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

    def _plan_wide(self, key: _LaunchKey) -> None:
        """The launches after the first of a wide layer."""
        batch, n_tokens, _, width, token_dim = key[:5]
        tiles = cdiv(n_tokens, config.OPERANDS_BLOCK_N)
        self._operands_shape = batch, n_tokens, 2 * width
        self._operands = KernelLaunch(
            _operands_kernel,
            batch * tiles,
            (n_tokens, self.splits, tiles, *key.tokens.strides),
            {
                "E": width, "EPS": key.options.eps, "POOLING": key.options.pooling,
                "QK_NORM": key.options.qk_norm, "CHANNELS_LAST": key.tokens.channels_last,
                "ALIGN": key.tokens.align, "BLOCK_N": config.OPERANDS_BLOCK_N,
                "BLOCK_E": power_of_two(width), "BLOCK_S": config.BLOCK_S,
                "num_warps": 4, "num_stages": 1,
            },
            key.reusable,
        )  # fmt: skip
        self._product: KernelLaunch | None = None
        if has_tensor_cores(key.dtype, key.precision):
            layer = Linear(
                batch, n_tokens, 2 * width, token_dim, "none", False, key.dtype, key.device,
                key.precision,
            )  # fmt: skip
            self._product = linear_launch(
                layer, rows_layout(n_tokens, 2 * width), rows_layout(n_tokens, token_dim),
                key.reusable,
            )  # fmt: skip

    def start_wide(
        self, inputs: Sequence[Any], results: Sequence[Tensor], final: Tensor | None
    ) -> None:
        """Launch the kernels of a wide layer in the current stream.

        Args:
            inputs, results: as in `start`; all are tensors or None.
            final: [Wf, M], or None to compute it.
        """
        q, k, *_, w_g, wp, bp, wf, bf, mask, residual, scale = inputs
        out, global_query, statistics, product, pooled, split_statistics = results
        self._pool(q, None, None, w_g, mask, wp, wf, pooled, split_statistics, product)
        operands = out.new_empty(self._operands_shape)
        self._operands(q, k, bp, pooled, split_statistics, operands, global_query, statistics)
        if final is None:
            final = torch.cat((wf, product), 1)
        if self._product is not None:
            self._product(operands, final, bf, scale, residual, out)
            return
        tokens = _flattened(out)
        tokens.copy_(F.linear(operands, final, bf))
        if residual is not None:
            tokens.mul_(scale).add_(_flattened(residual))

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
            and _tokens(x).data is x
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
    x: Layout | None
    """Of the tokens that were projected to queries and keys; None if these were given."""
    x_width: int
    needs_weights: bool


class _BackwardLaunches:
    """The launches of a backward.

    Attributes:
        fuses: whether `_rows_backward_kernel` sums the moments; otherwise it stores the operands
            that `_weights_backward_kernel` sums them from.
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
        num_dw_g = num_moments = batch * groups
        x_operands = 0 if key.x is None else 2
        # Numbers of a set of moments, see `_finish_backward_kernel`.
        moment_width = x_operands * width * (key.x_width + 1) + (2 * width + 1) * token_dim
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
        if not needs_weights:
            return

        if not self.fuses:
            block = 64
            tiles = batch * cdiv(n_tokens, block)
            across = x_operands * cdiv(key.x_width, block) + 2 * cdiv(token_dim, block)
            jobs = cdiv(width, block) * across
            splits, tiles_per_split = split_batch(jobs, tiles)
            num_moments = splits
            x = key.x or key.dout
            self._moments = KernelLaunch(
                _weights_backward_kernel,
                jobs * splits,
                (
                    n_tokens, tiles, splits, tiles_per_split, batch * n_tokens * width,
                    *x.strides, *key.dout.strides,
                ),
                shared
                | {
                    "CHANNELS_LAST": x.channels_last,
                    "ALIGN": x.align,
                    "C": key.x_width,
                    "X_OPERANDS": x_operands,
                    "BLOCK_R": block,
                    "BLOCK_J": block,
                    "BLOCK_N": block,
                    "num_warps": 4 if dtype in config.HALVES else 8,
                    "num_stages": 2,
                },
                reusable,
            )  # fmt: skip
        self._dw_g, self._sums = (num_dw_g, width), (num_moments, moment_width)
        block, partials = sum_tile(moment_width)
        self._finish = KernelLaunch(
            _finish_backward_kernel,
            cdiv(width, block) + cdiv(moment_width, block),
            (num_dw_g, num_moments),
            {
                "C": key.x_width if x_operands else 0,
                "E": width,
                "D": token_dim,
                "X_OPERANDS": x_operands,
                "BLOCK_J": block,
                "BLOCK_S": partials,
                "num_warps": 8,
                "num_stages": 2,
            },
            reusable,
        )

    def temporaries(self, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Uninitialised partial sums of dG and, if weights need gradients, of dw_g and moments."""
        new, acc = like.new_empty, accumulator(like.dtype)
        grad_g = new(*self._grad_g, dtype=acc)
        if not self._needs_weights:
            return grad_g, None, None
        return grad_g, new(*self._dw_g, dtype=acc), new(*self._sums, dtype=acc)

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
            sums: for partial sums of dw_g, if needed, and of the moments, if it `fuses`.
        """
        q, k, wq, bq, wk, bk, w_g, _, bp, wf, _, mask = inputs
        global_query, statistics, product = saved
        self._pool(k, wk, bk, product, dout, grad_g)
        self._rows(
            q, k, wq, bq, wk, bk, w_g, mask, bp, wf, product, global_query, statistics, grad_g,
            dout, dx, *operands, *sums,
        )  # fmt: skip

    def start_moments(self, x: Tensor, dout: Tensor, operands: Tensor, moments: Tensor) -> None:
        """Partial sums of the moments, from the operands (dq, dk,) t, z [2 or 4, B, N, E]."""
        self._moments(x, dout, operands, moments)

    def finish(
        self, dw_g_parts: Tensor, moments: Tensor, gradients: Sequence[Tensor | None]
    ) -> None:
        """Add the partial sums; results in `gradients`: dw_g, dWq, dWk, U, V, dbq, dbk, dbf."""
        self._finish(dw_g_parts, moments, *gradients)


_backward_launches = functools.lru_cache(maxsize=512)(_BackwardLaunches)


def forget_launches() -> None:
    """Clear the cache of launches, after a change that their keys do not show."""
    _forward_launches.cache_clear()
    _backward_launches.cache_clear()


def _weight_gradients(
    launches: _BackwardLaunches,
    dw_g_parts: Tensor,
    moments: Tensor,
    x_width: int,
    weights: AnyWeights,
) -> list[Tensor | None]:
    """In the order of the weights; dWq, dbq, dWk and dbk only for `Weights`."""
    w = weights
    token_dim, width = w.final_weight.shape
    new = w.final_weight.new_empty
    projections: list[Tensor | None] = []
    dwq = dwk = dbq = dbk = None
    if isinstance(weights, Weights):
        dwq, dwk = new(width, x_width), new(width, x_width)
        dbq = None if weights.query_bias is None else new(width)
        dbk = None if weights.key_bias is None else new(width)
        projections = [dwq, dbq, dwk, dbk]
    dw_g = new(*w.w_g.shape)
    d_final_bias = None if w.proj_bias is None and w.final_bias is None else new(token_dim)
    # U and V are rounded to the storage type, as eager rounds the operands of its GEMMs.
    U, V = new(token_dim, width), new(token_dim, width)
    launches.finish(dw_g_parts, moments, (dw_g, dwq, dwk, U, V, dbq, dbk, d_final_bias))
    wf_t = w.final_weight.t()
    d_proj = wf_t @ U
    d_proj_bias = None
    if w.proj_bias is not None and d_final_bias is not None:
        d_proj_bias = wf_t @ d_final_bias
    # In place, because addmm would copy V first.
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
        source = read.x
        x_width = 0 if source is None else source.width
        dout_view = _tokens(dout)
        dx_view = _empty_like(q) if needs.inputs and read.project else None
        dx = None if dx_view is None else dx_view.data
        pointers = _pointers(read, weights, mask)
        kept = contiguous(saved)  # hooks of saved tensors may have changed the strides
        data = x if source is None else source.data
        reusable = fits_kernels(*pointers, *kept, data, dout_view.data)
        launches = _backward_launches(
            _BackwardKey(
                _launch_key(read, weights, options, pointers, reusable), dout_view.layout,
                None if dx_view is None else dx_view.layout,
                None if source is None else source.layout, x_width, needs.weights,
            )
        )  # fmt: skip
        operands = dq = dk = tz = None
        if source is None:
            dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in inputs)
            operands = tz = x.new_empty(2, *x.shape) if needs.weights else None
        elif not read.project or (needs.weights and not launches.fuses):
            operands = x.new_empty(4 if needs.weights else 2, q.batch, q.n_tokens, weights.width)
            dq, dk, tz = operands[0], operands[1], operands[2:] if needs.weights else None
        grad_g, dw_g_parts, moments = launches.temporaries(x)
        launches.start_rows(
            pointers, kept, dout_view.data, grad_g, dx, (dq, dk, tz),
            (dw_g_parts, moments if launches.fuses else None),
        )  # fmt: skip
        if source is not None and needs.inputs and not read.project:
            dx = _input_gradient(dq, dk, x, weights)
        gradients: list[Tensor | None] = [dx]
        if source is None:
            gradients = [dq, dk] if needs.inputs else [None, None]
        # The operator promises the strides of an input where it is dense.
        gradients = [
            g if g is None or g.stride() == t.stride() else torch.empty_like(t).copy_(g)
            for g, t in zip(gradients, inputs, strict=True)
        ]
        if dw_g_parts is None or moments is None:
            return [*gradients, *[None] * len(weights)]
        if operands is not None:
            tokens = dout_view if source is None else source
            launches.start_moments(tokens.data, dout_view.data, operands, moments)
        return [*gradients, *_weight_gradients(launches, dw_g_parts, moments, x_width, weights)]


def _input_gradient(dq: Tensor | None, dk: Tensor | None, x: Tensor, weights: AnyWeights) -> Tensor:
    """The gradient of x from those of queries and keys, [B, N, E], by two GEMMs."""
    assert isinstance(weights, Weights)
    assert dq is not None
    assert dk is not None
    batch, n_tokens, width = dq.shape
    dx = torch.mm(dq.view(-1, width), weights.query_weight)
    dx = dx.addmm_(dk.view(-1, width), weights.key_weight).view(batch, n_tokens, -1)
    return dx if x.dim() == 3 else as_image(dx, x.shape[2:])
