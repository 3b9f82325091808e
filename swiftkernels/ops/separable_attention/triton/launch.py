"""Separable attention by Triton kernels, as a backend (`ops/operator.py`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftkernels.backends.layouts import accumulator
from swiftkernels.backends.torch_state import allow_tf32, device_guard, fits_kernels
from swiftkernels.backends.triton.prepared import Prepared
from swiftkernels.ops.operator import Needs
from swiftkernels.ops.separable_attention.layouts import Sequences, output_like, sequences_of
from swiftkernels.ops.separable_attention.triton.backward import (
    _context_backward_kernel,
    _rows_backward_kernel,
    _sum_partials_kernel,
    _tokens_backward_kernel,
    _weights_backward_kernel,
)
from swiftkernels.ops.separable_attention.triton.config import (
    Config,
    backward_config,
    forward_config,
    power_of_two,
)
from swiftkernels.ops.separable_attention.triton.forward import (
    _context_forward_kernel,
    _output_forward_kernel,
    _pool_forward_kernel,
)
from swiftkernels.ops.separable_attention.weights import Options, Weights

MAX_PARTS = 64
"""Partial sums that the tokens of a sequence are pooled in, at most."""

PROGRAMS = 128
"""Programs that fill a GPU, about."""

MAX_SPLITS, SPLIT_TILES = 64, 32
"""Partial sums of the weight gradients, at most, and tiles of tokens that are worth one more."""

BLOCK_B = 16
"""Sequences of a tile of contexts; `tl.dot` takes no fewer rows."""


class Saved(NamedTuple):
    """What the backward needs beside the inputs, in the accumulator type; B counts sequences."""

    context: Tensor
    """[B, C]."""
    pooled: Tensor
    """[B, C]: the mean of the tokens, weighted with the softmax of their scores."""
    softmax: Tensor
    """[B, 2]: the highest score, and the sum of exp(score - highest)."""


class Layout(NamedTuple):
    """How sequences lie in memory; one of the strides of token and channel is 1.

    `align` divides the strides and, where tokens are adjacent, their number.
    """

    stride_b: int
    stride_g: int
    stride: int
    channels_last: bool
    align: int

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.stride_b, self.stride_g, self.stride


@functools.lru_cache(maxsize=1024)
def _layout(s: Sequences) -> Layout | None:
    """None: neither tokens nor channels are adjacent."""
    stride_b, stride_g, token_stride, channel_stride = s.strides
    if channel_stride == 1 or s.width == 1:
        stride, channels_last = token_stride, True
    elif token_stride == 1 or s.tokens == 1:
        stride, channels_last = channel_stride, False
    else:
        return None
    align = math.gcd(16, stride_b, stride_g, stride)
    if not channels_last:
        align = math.gcd(align, s.tokens)
    return Layout(stride_b, stride_g, stride, channels_last, align)


def _readable(t: Tensor) -> tuple[Tensor, Layout]:
    """t and its layout, or those of a copy where the kernels cannot read its strides."""
    found = _layout(sequences_of(t))
    if found is not None:
        return t, found
    # `contiguous()` is not enough: it returns tensors unchanged when only axes of one element have
    # odd strides.
    return _readable(t.new_empty(t.shape).copy_(t))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _divide(n_tokens: int, block_n: int) -> tuple[int, int]:
    """(parts, tiles in each) of the tokens of a sequence: a function of N only."""
    tiles = _cdiv(n_tokens, block_n)
    tiles_per_part = _cdiv(tiles, MAX_PARTS)
    return _cdiv(tiles, tiles_per_part), tiles_per_part


class _Kind(NamedTuple):
    """All that the kernels of a call are compiled for, or their grids computed from."""

    sequences: int
    groups: int
    n_tokens: int
    width: int
    out_width: int
    dtype: torch.dtype
    device: torch.device
    precision: str
    missing: tuple[bool, ...]
    """Which of the weights are None."""
    reusable: bool
    """As `Prepared` has it."""
    x: Layout
    out: Layout
    """Of the output, or of its gradient."""

    def constants(self, config: Config) -> dict[str, Any]:
        """Of every kernel that goes through tokens."""
        return {
            "C": self.width,
            "CHANNELS_LAST": self.x.channels_last,
            "ALIGN": self.x.align,
            "PRECISION": self.precision,
            "BLOCK_N": config.block_n,
            "BLOCK_C": power_of_two(self.width),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def of_contexts(self, kernel: Any, parts: int) -> Prepared:
        """A launch over the contexts of all sequences."""
        block_j = min(64, power_of_two(self.width))
        return Prepared(
            kernel,
            _cdiv(self.sequences, BLOCK_B) * _cdiv(self.width, block_j),
            (self.sequences, parts),
            {
                "C": self.width, "PRECISION": self.precision, "BLOCK_B": BLOCK_B, "BLOCK_K": 32,
                "BLOCK_J": block_j, "num_warps": 4 if self.width <= 256 else 8, "num_stages": 2,
            },
            self.reusable,
        )  # fmt: skip


class _ForwardPlan:
    """The three launches of a forward for one kind of call.

    Attributes:
        parts: partial sums of a sequence that the first launch leaves.
    """

    def __init__(self, kind: _Kind) -> None:
        config = forward_config(kind.width, kind.dtype)
        constants = kind.constants(config)
        self.parts, tiles_per_part = _divide(kind.n_tokens, config.block_n)
        self.pool = Prepared(
            _pool_forward_kernel,
            kind.sequences * self.parts,
            (kind.n_tokens, self.parts, tiles_per_part, kind.groups, *kind.x.strides),
            {name: value for name, value in constants.items() if name != "PRECISION"},
            kind.reusable,
        )
        self.context = kind.of_contexts(_context_forward_kernel, self.parts)
        tiles = _cdiv(kind.n_tokens, config.block_n)
        self.output = Prepared(
            _output_forward_kernel,
            kind.sequences * tiles,
            (kind.n_tokens, tiles, kind.groups, *kind.x.strides, *kind.out.strides),
            constants
            | {
                "D": kind.out_width,
                "OUT_CHANNELS_LAST": kind.out.channels_last,
                "OUT_ALIGN": kind.out.align,
                "BLOCK_K": config.block_k,
                "BLOCK_J": config.block_j,
            },
            kind.reusable,
        )


_forward_plan = functools.lru_cache(maxsize=512)(_ForwardPlan)


class _BackwardPlan:
    """The launches of a backward for one kind of call.

    Attributes:
        parts: partial sums of a sequence that the kernels leave.
        splits: partial sums of the weight gradients.
    """

    def __init__(self, kind: _Kind, dx: Layout | None) -> None:
        width, out_width, n_tokens = kind.width, kind.out_width, kind.n_tokens
        config = backward_config(width, kind.dtype)
        self.parts, tiles_per_part = _divide(n_tokens, config.block_n)
        constants = kind.constants(config)
        numbers = (n_tokens, self.parts, tiles_per_part, kind.groups, *kind.x.strides)
        of_dout = {
            "D": out_width,
            "DOUT_CHANNELS_LAST": kind.out.channels_last,
            "DOUT_ALIGN": kind.out.align,
        }
        self.rows = Prepared(
            _rows_backward_kernel,
            kind.sequences * self.parts,
            (*numbers, *kind.out.strides),
            constants | of_dout | {"BLOCK_K": config.block_k},
            kind.reusable,
        )
        self.context = kind.of_contexts(_context_backward_kernel, self.parts)
        dx = dx or kind.x
        self.tokens = Prepared(
            _tokens_backward_kernel,
            kind.sequences * self.parts,
            (*numbers, *dx.strides),
            constants
            | {
                "DX_CHANNELS_LAST": dx.channels_last,
                "DX_ALIGN": dx.align,
                "BLOCK_J": config.block_j,
            },
            kind.reusable,
        )
        block = 64
        jobs = _cdiv(width, block) * (_cdiv(width, block) + _cdiv(out_width, block))
        tiles = kind.sequences * _cdiv(n_tokens, block)
        # As many as fill a GPU; more only where the tokens outweigh the sums by far.
        splits = max(_cdiv(PROGRAMS, jobs), min(MAX_SPLITS, tiles // SPLIT_TILES))
        tiles_per_split = _cdiv(tiles, max(1, min(splits, tiles)))
        self.splits = _cdiv(tiles, tiles_per_split)
        self.weights = Prepared(
            _weights_backward_kernel,
            jobs * self.splits,
            (
                n_tokens, tiles, self.splits, tiles_per_split, kind.sequences * n_tokens * width,
                kind.groups, *kind.x.strides, *kind.out.strides,
            ),
            {name: constants[name] for name in ("C", "CHANNELS_LAST", "ALIGN", "PRECISION")}
            | of_dout
            | {
                "BLOCK_R": block, "BLOCK_J": block, "BLOCK_N": block,
                "num_warps": 4 if kind.dtype.itemsize == 2 else 8,
                "num_stages": 2 if kind.dtype.itemsize == 2 or width <= 64 else 1,
            },
            kind.reusable,
        )  # fmt: skip
        self.sum_width = width * width + out_width * width + width + out_width
        self.sum_query = _sum(kind.sequences * self.parts, width, kind.reusable)
        self.sum_weights = _sum(self.splits, self.sum_width, kind.reusable)


def _sum(parts: int, width: int, reusable: bool) -> Prepared:
    """A launch of `_sum_partials_kernel`; a tile of 16,384 numbers stays in registers."""
    columns = min(max(64, power_of_two(width // PROGRAMS)), 4096)
    return Prepared(
        _sum_partials_kernel,
        _cdiv(width, columns),
        (parts,),
        {
            "WIDTH": width, "BLOCK_J": columns, "BLOCK_S": min(32, 16_384 // columns),
            "num_warps": 8, "num_stages": 2,
        },
        reusable,
    )  # fmt: skip


_backward_plan = functools.lru_cache(maxsize=512)(_BackwardPlan)


def forget_plans() -> None:
    """Plan the next calls anew: for whoever changes what plans are made of."""
    _forward_plan.cache_clear()
    _backward_plan.cache_clear()


def _kind(x: Tensor, weights: Weights, layout: Layout, out: Layout, *others: Tensor) -> _Kind:
    s = sequences_of(x)
    tensors = (x, *others, *[w for w in weights if w is not None])
    return _Kind(
        s.batch * s.groups, s.groups, s.tokens, s.width, weights.token_dim, x.dtype, x.device,
        "tf32" if x.dtype == torch.float32 and allow_tf32() else "ieee",
        tuple([w is None for w in weights]), all(map(fits_kernels, tensors)), layout, out,
    )  # fmt: skip


def _contiguous(weights: Weights) -> Weights:
    return Weights(*[None if w is None else w.contiguous() for w in weights])  # type: ignore[arg-type]


def saved_like(inputs: Sequence[Tensor], weights: Weights, keep: str) -> Saved:
    """What a forward saves, uninitialised."""
    (x,) = inputs
    batch, groups, _, width, _ = sequences_of(x)
    new = functools.partial(x.new_empty, dtype=accumulator(x.dtype))
    return Saved(new(batch * groups, width), new(batch * groups, width), new(batch * groups, 2))


def forward(
    inputs: Sequence[Tensor], weights: Weights, mask: None, options: Options, keep: str
) -> tuple[Tensor, Saved]:
    """The output, [B, N, D] or [B, D, P, N], and what the backward needs."""
    x, layout = _readable(inputs[0])
    weights = _contiguous(weights)
    out = x.new_empty_strided(*output_like(inputs[0], weights.token_dim))
    saved = saved_like(inputs, weights, keep)
    if out.numel() == 0:
        return out, saved
    out_layout = _layout(sequences_of(out))
    assert out_layout is not None
    kind = _kind(x, weights, layout, out_layout)
    plan = _forward_plan(kind)
    new = functools.partial(x.new_empty, dtype=accumulator(x.dtype))
    pooled = new(kind.sequences, plan.parts, kind.width)
    statistics = new(kind.sequences, plan.parts, 2)
    qkv, qkv_bias, proj, proj_bias = weights
    with device_guard(x):
        plan.pool(x, qkv, pooled, statistics)
        plan.context(pooled, statistics, qkv, qkv_bias, *saved)
        plan.output(x, qkv, qkv_bias, proj, proj_bias, saved.context, out)
    return out, saved


def backward(
    dout: Tensor,
    inputs: Sequence[Tensor],
    weights: Weights,
    mask: None,
    saved: Sequence[Tensor],
    options: Options,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the four weights; None where not asked for or without bias."""
    x, layout = _readable(inputs[0])
    dout, dout_layout = _readable(dout)
    weights = _contiguous(weights)
    qkv, qkv_bias, proj, proj_bias = weights
    context, pooled, softmax = (t.contiguous() for t in saved)  # hooks may have put them anywhere
    dx = written = dx_layout = None
    if needs.inputs:
        dx = written = torch.empty_like(inputs[0])
        if _layout(sequences_of(dx)) is None:
            written = dx.new_empty(dx.shape)
        dx_layout = _layout(sequences_of(written))
    kind = _kind(x, weights, layout, dout_layout, dout)
    plan = _backward_plan(kind, dx_layout)
    new = functools.partial(x.new_empty, dtype=accumulator(x.dtype))
    planes = x.new_empty(1 + needs.weights, kind.sequences, kind.n_tokens, kind.width)
    dv, u = planes[0], planes[1] if needs.weights else None
    dcontext_parts = new(kind.sequences, plan.parts, kind.width)
    dquery_parts = torch.empty_like(dcontext_parts) if needs.weights else None
    dcontext, dpooled = torch.empty_like(pooled), torch.empty_like(pooled)
    with device_guard(x):
        plan.rows(x, qkv, qkv_bias, proj, context, dout, dv, u, dcontext_parts)
        plan.context(dcontext_parts, qkv, dcontext, dpooled)
        plan.tokens(x, qkv, pooled, softmax, dpooled, dv, written, dquery_parts)
        if dx is not None and written is not None and written is not dx:
            dx.copy_(written)
        if not needs.weights:
            return dx, None, None, None, None
        parts = new(plan.splits, plan.sum_width)
        sums, dquery = x.new_empty(plan.sum_width), x.new_empty(1, kind.width)
        plan.weights(x, dout, planes, parts)
        plan.sum_weights(parts, sums)
        plan.sum_query(dquery_parts, dquery)
        sizes = [kind.width**2, kind.width * kind.out_width, kind.width, kind.out_width]
        dwv, dwp, dbv, dbp = sums.split(sizes)
        dproj = dwp.view(kind.width, kind.out_width).t().reshape(proj.shape)
        dwk = (dcontext.t() @ pooled).to(x.dtype)
        dqkv = torch.cat((dquery, dwk, dwv.view(dwk.shape))).view(qkv.shape)
        dqkv_bias = None
        if qkv_bias is not None:
            # The bias of the scores cancels in the softmax.
            dbk = dcontext.sum(0).to(x.dtype)
            dqkv_bias = torch.cat((dbk.new_zeros(1), dbk, dbv))
        dproj_bias = None if proj_bias is None else dbp.clone()
    return dx, dqkv, dqkv_bias, dproj, dproj_bias
