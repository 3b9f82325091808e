"""The Triton kernels as a backend (`ops/operator.py`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftkernels.backends.layouts import accumulator
from swiftkernels.backends.torch_state import device_guard, fits_kernels
from swiftkernels.backends.triton.kernel_launch import KernelLaunch
from swiftkernels.backends.triton.sizes import (
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
    layout,
    precision,
)
from swiftkernels.ops.operator import Needs
from swiftkernels.ops.separable_attention.layouts import Sequences, output_like, sequences_of
from swiftkernels.ops.separable_attention.triton import config
from swiftkernels.ops.separable_attention.triton.backward import (
    _context_backward_kernel,
    _rows_backward_kernel,
    _sum_partials_kernel,
    _tokens_backward_kernel,
    _weights_backward_kernel,
)
from swiftkernels.ops.separable_attention.triton.forward import (
    _context_forward_kernel,
    _output_forward_kernel,
    _pool_forward_kernel,
)
from swiftkernels.ops.separable_attention.weights import Options, Weights

BLOCK_B = 16
"""Sequences of a tile of contexts: `tl.dot` needs at least 16 rows."""


class Saved(NamedTuple):
    """What the backward needs besides the inputs, in the accumulator type; B counts sequences."""

    context: Tensor
    """[B, C]."""
    pooled: Tensor
    """[B, C]: the mean of the tokens, weighted with the softmax of their scores."""
    softmax: Tensor
    """[B, 2]: the highest score, and the sum of exp(score - highest)."""


@functools.lru_cache(maxsize=1024)
def _layout(s: Sequences) -> Layout | None:
    """The layout of the sequences; None if neither tokens nor channels are adjacent.

    Where tokens are adjacent, `align` also divides their number.
    """
    found = layout(s.tokens, s.width, s.strides)
    if found is None or found.channels_last:
        return found
    return found._replace(align=math.gcd(found.align, s.tokens))


def _readable(t: Tensor) -> tuple[Tensor, Layout]:
    """t and its layout, or those of a copy where the kernels cannot read its strides."""
    found = _layout(sequences_of(t))
    return _readable(compact(t)) if found is None else (t, found)


class _LaunchKey(NamedTuple):
    """What the launches of a call depend on: constants of the kernels, sizes of the grids."""

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
    """See `KernelLaunch`."""
    x: Layout
    out: Layout
    """Of the output, or of its gradient."""

    def constants(self, cfg: config.Config) -> dict[str, Any]:
        """The constants that all kernels with tiles of tokens have."""
        return {
            "C": self.width,
            "CHANNELS_LAST": self.x.channels_last,
            "ALIGN": self.x.align,
            "PRECISION": self.precision,
            "BLOCK_N": cfg.block_n,
            "BLOCK_C": power_of_two(self.width),
            "num_warps": cfg.num_warps,
            "num_stages": cfg.num_stages,
        }

    def context_launch(self, kernel: Any, splits: int) -> KernelLaunch:
        """A launch of a kernel on the contexts of all sequences."""
        block_j = min(64, power_of_two(self.width))
        return KernelLaunch(
            kernel,
            cdiv(self.sequences, BLOCK_B) * cdiv(self.width, block_j),
            (self.sequences, splits),
            {
                "C": self.width, "PRECISION": self.precision, "BLOCK_B": BLOCK_B, "BLOCK_K": 32,
                "BLOCK_J": block_j, "num_warps": 4 if self.width <= 256 else 8, "num_stages": 2,
            },
            self.reusable,
        )  # fmt: skip


class _ForwardLaunches:
    """The three launches of a forward.

    Attributes:
        splits: partial sums of a sequence that the first launch computes.
    """

    def __init__(self, key: _LaunchKey) -> None:
        cfg = config.choose_config(key.width, key.dtype, backward=False)
        constants = key.constants(cfg)
        self.splits, tiles_per_split = split_tokens(key.n_tokens, cfg.block_n)
        self.pool = KernelLaunch(
            _pool_forward_kernel,
            key.sequences * self.splits,
            (key.n_tokens, self.splits, tiles_per_split, key.groups, *key.x.strides),
            {name: value for name, value in constants.items() if name != "PRECISION"},
            key.reusable,
        )
        self.context = key.context_launch(_context_forward_kernel, self.splits)
        tiles = cdiv(key.n_tokens, cfg.block_n)
        self.output = KernelLaunch(
            _output_forward_kernel,
            key.sequences * tiles,
            (key.n_tokens, tiles, key.groups, *key.x.strides, *key.out.strides),
            constants
            | {
                "D": key.out_width,
                "OUT_CHANNELS_LAST": key.out.channels_last,
                "OUT_ALIGN": key.out.align,
                "BLOCK_K": cfg.block_k,
                "BLOCK_J": cfg.block_j,
            },
            key.reusable,
        )


_forward_launches = functools.lru_cache(maxsize=512)(_ForwardLaunches)


class _BackwardLaunches:
    """The launches of a backward.

    Attributes:
        splits: partial sums of a sequence that the kernels compute.
        weight_splits: partial sums of the weight gradients.
        sum_width: numbers of such a sum.
    """

    def __init__(self, key: _LaunchKey, dx: Layout | None) -> None:
        width, out_width, n_tokens = key.width, key.out_width, key.n_tokens
        cfg = config.choose_config(width, key.dtype, backward=True)
        self.splits, tiles_per_split = split_tokens(n_tokens, cfg.block_n)
        constants = key.constants(cfg)
        numbers = (n_tokens, self.splits, tiles_per_split, key.groups, *key.x.strides)
        of_dout = {
            "D": out_width,
            "DOUT_CHANNELS_LAST": key.out.channels_last,
            "DOUT_ALIGN": key.out.align,
        }
        self.rows = KernelLaunch(
            _rows_backward_kernel,
            key.sequences * self.splits,
            (*numbers, *key.out.strides),
            constants | of_dout | {"BLOCK_K": cfg.block_k},
            key.reusable,
        )
        self.context = key.context_launch(_context_backward_kernel, self.splits)
        dx = dx or key.x
        self.tokens = KernelLaunch(
            _tokens_backward_kernel,
            key.sequences * self.splits,
            (*numbers, *dx.strides),
            constants
            | {
                "DX_CHANNELS_LAST": dx.channels_last,
                "DX_ALIGN": dx.align,
                "BLOCK_J": cfg.block_j,
            },
            key.reusable,
        )
        block = 64
        jobs = cdiv(width, block) * (cdiv(width, block) + cdiv(out_width, block))
        tiles = key.sequences * cdiv(n_tokens, block)
        self.weight_splits, tiles_per_split = split_batch(jobs, tiles)
        self.weights = KernelLaunch(
            _weights_backward_kernel,
            jobs * self.weight_splits,
            (
                n_tokens, tiles, self.weight_splits, tiles_per_split,
                key.sequences * n_tokens * width, key.groups, *key.x.strides, *key.out.strides,
            ),
            {name: constants[name] for name in ("C", "CHANNELS_LAST", "ALIGN", "PRECISION")}
            | of_dout
            | {
                "BLOCK_R": block, "BLOCK_J": block, "BLOCK_N": block,
                "num_warps": 4 if key.dtype.itemsize == 2 else 8,
                "num_stages": 2 if key.dtype.itemsize == 2 or width <= 64 else 1,
            },
            key.reusable,
        )  # fmt: skip
        self.sum_width = width * width + out_width * width + width + out_width
        self.sum_query = _sum(key.sequences * self.splits, width, key.reusable)
        self.sum_weights = _sum(self.weight_splits, self.sum_width, key.reusable)


def _sum(parts: int, width: int, reusable: bool) -> KernelLaunch:
    """A launch of `_sum_partials_kernel`."""
    columns, partials = sum_tile(width)
    return KernelLaunch(
        _sum_partials_kernel,
        cdiv(width, columns),
        (parts,),
        {
            "WIDTH": width, "BLOCK_J": columns, "BLOCK_S": partials, "num_warps": 8,
            "num_stages": 2,
        },
        reusable,
    )  # fmt: skip


_backward_launches = functools.lru_cache(maxsize=512)(_BackwardLaunches)


def forget_launches() -> None:
    """Clear the cache of launches, after a change that their keys do not show."""
    _forward_launches.cache_clear()
    _backward_launches.cache_clear()


def _launch_key(
    x: Tensor, weights: Weights, layout: Layout, out: Layout, *others: Tensor
) -> _LaunchKey:
    s = sequences_of(x)
    return _LaunchKey(
        s.batch * s.groups, s.groups, s.tokens, s.width, weights.token_dim, x.dtype, x.device,
        precision(x.dtype), tuple([w is None for w in weights]),
        fits_kernels(x, *others, *weights), layout, out,
    )  # fmt: skip


def saved_like(inputs: Sequence[Tensor], weights: Weights, keep: str) -> Saved:
    """Uninitialised results that a forward saves."""
    (x,) = inputs
    batch, groups, _, width, _ = sequences_of(x)
    new = functools.partial(x.new_empty, dtype=accumulator(x.dtype))
    return Saved(new(batch * groups, width), new(batch * groups, width), new(batch * groups, 2))


def forward(
    inputs: Sequence[Tensor], weights: Weights, mask: None, options: Options, keep: str
) -> tuple[Tensor, Saved]:
    """The output, [B, N, D] or [B, D, P, N], and what the backward needs."""
    x, layout = _readable(inputs[0])
    weights = Weights(*contiguous(weights))
    out = x.new_empty_strided(*output_like(inputs[0], weights.token_dim))
    saved = saved_like(inputs, weights, keep)
    if out.numel() == 0:
        return out, saved
    out_layout = _layout(sequences_of(out))
    assert out_layout is not None
    key = _launch_key(x, weights, layout, out_layout)
    launches = _forward_launches(key)
    new = functools.partial(x.new_empty, dtype=accumulator(x.dtype))
    pooled = new(key.sequences, launches.splits, key.width)
    statistics = new(key.sequences, launches.splits, 2)
    qkv, qkv_bias, proj, proj_bias = weights
    with device_guard(x):
        launches.pool(x, qkv, pooled, statistics)
        launches.context(pooled, statistics, qkv, qkv_bias, *saved)
        launches.output(x, qkv, qkv_bias, proj, proj_bias, saved.context, out)
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
    """Gradients of x and of the four weights; None where not needed or without bias."""
    x, layout = _readable(inputs[0])
    dout, dout_layout = _readable(dout)
    weights = Weights(*contiguous(weights))
    qkv, qkv_bias, proj, proj_bias = weights
    context, pooled, softmax = contiguous(saved)  # hooks may have changed their strides
    dx = written = dx_layout = None
    if needs.inputs:
        dx = written = torch.empty_like(inputs[0])
        if _layout(sequences_of(dx)) is None:
            written = dx.new_empty(dx.shape)
        dx_layout = _layout(sequences_of(written))
    key = _launch_key(x, weights, layout, dout_layout, dout)
    launches = _backward_launches(key, dx_layout)
    new = functools.partial(x.new_empty, dtype=accumulator(x.dtype))
    operands = x.new_empty(1 + needs.weights, key.sequences, key.n_tokens, key.width)
    dv, u = operands[0], operands[1] if needs.weights else None
    dcontext_parts = new(key.sequences, launches.splits, key.width)
    dquery_parts = torch.empty_like(dcontext_parts) if needs.weights else None
    dcontext, dpooled = torch.empty_like(pooled), torch.empty_like(pooled)
    with device_guard(x):
        launches.rows(x, qkv, qkv_bias, proj, context, dout, dv, u, dcontext_parts)
        launches.context(dcontext_parts, qkv, dcontext, dpooled)
        launches.tokens(x, qkv, pooled, softmax, dpooled, dv, written, dquery_parts)
        if dx is not None and written is not None and written is not dx:
            dx.copy_(written)
        if not needs.weights:
            return dx, None, None, None, None
        parts = new(launches.weight_splits, launches.sum_width)
        sums, dquery = x.new_empty(launches.sum_width), x.new_empty(1, key.width)
        launches.weights(x, dout, operands, parts)
        launches.sum_weights(parts, sums)
        launches.sum_query(dquery_parts, dquery)
        sizes = [key.width**2, key.width * key.out_width, key.width, key.out_width]
        dwv, dwp, dbv, dbp = sums.split(sizes)
        # A copy: the operator promises contiguous gradients of weights, not views.
        dproj = proj.new_empty(proj.shape)
        dproj.view(key.out_width, key.width).copy_(dwp.view(key.width, key.out_width).t())
        dwk = (dcontext.t() @ pooled).to(x.dtype)
        dqkv = torch.cat((dquery, dwk, dwv.view(dwk.shape))).view(qkv.shape)
        dqkv_bias = None
        if qkv_bias is not None:
            # The bias of the scores cancels in the softmax.
            dbk = dcontext.sum(0).to(x.dtype)
            dqkv_bias = torch.cat((dbk.new_zeros(1), dbk, dbv))
        dproj_bias = None if proj_bias is None else dbp.clone()
    return dx, dqkv, dqkv_bias, dproj, dproj_bias
