"""Layers above `MAX_PROJECTED_WIDTH`: products of PyTorch, and kernels for what is between them.

z = qn + bp + y Wp^T with y = G * kn, and the output is z Wf^T + bf, as in the definition: with few
tokens the weights are most of what moves, and M = Wf Wp would be one more matrix of their size.
Fused networks have packed [Wf, M] before: there one product of [qn + bp, y] makes the output and
adds the residual branch (`pack`, `infer`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftkernels.backends.layouts import accumulator, as_image, output_like
from swiftkernels.backends.torch_state import autocast_off, device_guard, fits_kernels
from swiftkernels.backends.triton.kernel_launch import KernelLaunch
from swiftkernels.backends.triton.linear import Linear, linear_launch
from swiftkernels.backends.triton.sizes import architecture, cdiv, power_of_two, split_tokens
from swiftkernels.backends.triton.tensors import (
    Layout,
    Tokens,
    contiguous,
    precision,
    read_tokens,
    rows_layout,
)
from swiftkernels.ops.additive_attention.triton import config, pooling
from swiftkernels.ops.additive_attention.triton.backward import (
    _pool_wide_backward_kernel,
    _rows_wide_backward_kernel,
)
from swiftkernels.ops.additive_attention.triton.forward import (
    _operands_kernel,
    _pool_forward_kernel,
)
from swiftkernels.ops.additive_attention.triton.tokens import (
    NO_RESIDUAL,
    Residual,
    Saved,
    count_tokens,
    given_tokens,
    mask_bytes,
    rows_of,
    saved_like,
    statistics_like,
    wide_factors,
)
from swiftkernels.ops.additive_attention.weights import (
    AnyWeights,
    Options,
    OutputWeights,
    Weights,
    pack_projections,
)
from swiftkernels.ops.operator import Needs


class _Key(NamedTuple):
    """What the launches depend on: constants of the kernels, sizes of the grids."""

    batch: int
    n_tokens: int
    width: int
    layout: Layout
    """Of queries and keys."""
    dtype: torch.dtype
    device: torch.device
    options: Options
    missing: tuple[bool, ...]
    """Which of the inputs are None."""
    reusable: bool
    """See `KernelLaunch`."""


def _key(q: Tokens, options: Options, pointers: Sequence[Tensor | None]) -> _Key:
    missing = tuple([p is None for p in pointers])
    dtype, device = q.data.dtype, q.data.device
    return _Key(
        q.batch, q.n_tokens, q.width, q.layout, dtype, device, options, missing,
        fits_kernels(*pointers),
    )  # fmt: skip


class _Sizes:
    """What the launches of forward and backward have in common.

    Attributes:
        splits: partial sums of a batch element that a pooling kernel computes.
        tiles: token tiles of a batch element that a kernel of rows reads.
        pooling_numbers, rows_numbers, constants, rows_constants: arguments of both kinds.
    """

    def __init__(self, key: _Key) -> None:
        n_tokens, width, options = key.n_tokens, key.width, key.options
        block_n, num_warps = config.wide_tile(width, architecture(key.device))
        # `split_tokens` takes at least one.
        self.splits, tiles_per_split = split_tokens(max(n_tokens, 1), block_n)
        self.tiles = cdiv(n_tokens, block_n)
        self.constants: dict[str, Any] = {
            "E": width, "EPS": options.eps, "QK_NORM": options.qk_norm,
            "CHANNELS_LAST": key.layout.channels_last, "ALIGN": key.layout.align,
            "BLOCK_E": power_of_two(width), "BLOCK_N": block_n, "num_warps": num_warps,
            "num_stages": 1,
        }  # fmt: skip
        self.pooling_numbers = n_tokens, self.splits, tiles_per_split
        self.rows_numbers = n_tokens, self.splits, self.tiles, *key.layout.strides
        self.rows_constants = self.constants | {
            "POOLING": options.pooling, "BLOCK_S": config.BLOCK_S,
        }  # fmt: skip


class _ForwardLaunches(_Sizes):
    """The kernels of a forward."""

    def __init__(self, key: _Key) -> None:
        super().__init__(key)
        batch, options, strides = key.batch, key.options, key.layout.strides
        self.pool = KernelLaunch(
            _pool_forward_kernel,
            batch * self.splits,
            (*self.pooling_numbers, batch * self.splits, *strides),
            {
                **self.constants, "SCALE": options.scale, "POOLING": options.pooling,
                "PROJECT": False,
                # Nothing is projected and no M computed: these have no effect.
                "C": key.width, "D": key.width, "PRECISION": "ieee", "BLOCK_K": 16, "BLOCK_M": 16,
            },
            key.reusable,
        )  # fmt: skip
        self.operands = KernelLaunch(
            _operands_kernel, batch * self.tiles, self.rows_numbers,
            self.rows_constants, key.reusable,
        )  # fmt: skip


class _BackwardLaunches(_Sizes):
    """The kernels of a backward."""

    def __init__(self, key: _Key) -> None:
        super().__init__(key)
        batch, options = key.batch, key.options
        self.pool = KernelLaunch(
            _pool_wide_backward_kernel, batch * self.splits,
            (*self.pooling_numbers, *key.layout.strides), self.constants, key.reusable,
        )  # fmt: skip
        self.dqk = KernelLaunch(
            _rows_wide_backward_kernel, batch * self.tiles, self.rows_numbers,
            {
                **self.rows_constants, "SCALE": options.scale,
                "NORMALISES": options.pooling in pooling.NORMALISED,
            },
            key.reusable,
        )  # fmt: skip


_forward_launches = functools.lru_cache(maxsize=512)(_ForwardLaunches)
_backward_launches = functools.lru_cache(maxsize=512)(_BackwardLaunches)


def forget_launches() -> None:
    """As `launch.forget_launches`."""
    _forward_launches.cache_clear()
    _backward_launches.cache_clear()
    _product.cache_clear()


def _write_operands(
    q: Tokens,
    k: Tokens,
    weights: AnyWeights,
    mask: Tensor | None,
    options: Options,
    statistics: Sequence[Tensor],
    operands: Tensor,
) -> None:
    """Write qn + bp and G * kn to `operands` [B N, 2 E], and G and the pooling's `statistics`."""
    w_g, _, bp, *_ = contiguous(weights[-5:])
    mask = mask_bytes(mask)
    pointers = (q.data, k.data, w_g, bp, mask, operands, *statistics)
    launches = _forward_launches(_key(q, options, pointers))
    new, acc = operands.new_empty, accumulator(operands.dtype)
    pooled = new(q.batch, launches.splits, q.width, dtype=acc)
    parts = new(q.batch, launches.splits, 2, dtype=acc)
    launches.pool(q.data, None, None, w_g, mask, None, None, pooled, parts, None)
    launches.operands(q.data, k.data, bp, pooled, parts, operands, *statistics)


def forward(
    inputs: Sequence[Tensor],
    weights: AnyWeights,
    mask: Tensor | None,
    options: Options,
    residual: Residual = NO_RESIDUAL,
) -> tuple[Tensor, Saved]:
    """As `launch.forward`."""
    first = inputs[0]
    saved = saved_like(inputs, weights, "")
    projected, operands = wide_factors(saved.factors)
    if isinstance(weights, Weights):
        x = rows_of(first)
        _linear(x, weights.query_weight, weights.query_bias, projected[0])
        _linear(x, weights.key_weight, weights.key_bias, projected[1])
    q, k = _queries_and_keys(inputs, projected)
    _write_operands(q, k, weights, mask, options, saved[:2], operands)
    z, y = operands.chunk(2, 1)
    torch.addmm(z, y, weights.proj_weight.t(), out=z)
    out = first.new_empty_strided(*output_like(first, weights.token_dim))
    rows = rows_of(out)
    _linear(z, weights.final_weight, weights.final_bias, rows)
    if residual.x is not None and residual.scale is not None:
        rows.mul_(residual.scale).add_(rows_of(residual.x))
    return out, saved


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """A linear layer of the rows of x, into `out`."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _queries_and_keys(
    inputs: Sequence[Tensor], projected: Sequence[Tensor]
) -> tuple[Tokens, Tokens]:
    """The `projected` [B N, E], or the inputs if there are none."""
    if not projected:
        return given_tokens(inputs)
    (x,) = inputs
    shape = x.shape[0], count_tokens(x), projected[0].shape[1]
    q, k = (read_tokens(t.view(shape)) for t in projected)
    return q, k


class PackedWide(NamedTuple):
    """The weights of a wide layer as `infer` reads them."""

    projections: tuple[Tensor, Tensor | None]
    """The query and key layers as one: [2 E, C], [2 E] or None."""
    others: OutputWeights
    final: Tensor
    """[Wf, M], [D, 2 E]"""


def pack(weights: Weights) -> PackedWide:
    """The weights in new memory."""
    others = OutputWeights(*weights[4:])
    final_weight, dtype = others.final_weight, others.final_weight.dtype
    product = final_weight.to(accumulator(dtype)) @ others.proj_weight.to(accumulator(dtype))
    highest = torch.finfo(dtype).max
    final = torch.cat((final_weight, product.clamp(-highest, highest).to(dtype)), 1)
    return PackedWide(pack_projections(*weights[:4]), others, final)


def infer(x: Tensor, packed: PackedWide, options: Options, residual: Residual) -> Tensor:
    """The output for tokens, or for an image in channels_last memory format.

    For types that have tensor cores (`tensors.has_tensor_cores`): without them the last product
    would be slow.
    """
    projections, others, final = packed
    batch, n_tokens, (token_dim, row) = x.shape[0], count_tokens(x), final.shape
    with device_guard(x), autocast_off(x.device.type):
        q, k = F.linear(rows_of(x), *projections).view(batch, n_tokens, row).chunk(2, 2)
        operands = x.new_empty(batch * n_tokens, row)
        statistics = statistics_like(x, others.width)
        _write_operands(read_tokens(q), read_tokens(k), others, None, options, statistics, operands)
        out = x.new_empty_strided(*output_like(x, token_dim))
        pointers = (operands, final, others.final_bias, residual.scale, residual.x, out)
        layer = Linear(
            batch, n_tokens, row, token_dim, "none", False, x.dtype, x.device, precision(x.dtype)
        )
        missing = tuple([p is None for p in pointers])
        _product(layer, missing, fits_kernels(*pointers))(*pointers)
    return out


@functools.lru_cache(maxsize=512)
def _product(layer: Linear, missing: tuple[bool, ...], reusable: bool) -> KernelLaunch:
    """The product of operands and [Wf, M]; `missing` says which of its pointers are None."""
    rows, added = (rows_layout(layer.n_tokens, w) for w in (layer.in_dims, layer.out_dims))
    return linear_launch(layer, rows, added, reusable)


def backward(
    dout: Tensor,
    inputs: Sequence[Tensor],
    weights: AnyWeights,
    mask: Tensor | None,
    saved: Saved,
    options: Options,
    needs: Needs,
) -> list[Tensor | None]:
    """As `launch.backward`; the gradients of inputs may have other strides than these."""
    w = weights
    projected, operands = wide_factors(saved.factors.contiguous())  # hooks may change strides
    z, y = operands.chunk(2, 1)
    q, k = _queries_and_keys(inputs, projected)
    grad_out = rows_of(dout)
    grad_z = grad_out @ w.final_weight
    grad_y = grad_z @ w.proj_weight

    (w_g,), mask = contiguous(w[-5:-4]), mask_bytes(mask)
    statistics = contiguous(saved[:2])
    pointers = (q.data, k.data, w_g, mask, *statistics, grad_z, grad_y)
    launches = _backward_launches(_key(q, options, pointers))
    new, acc = grad_z.new_empty, accumulator(grad_z.dtype)
    grad_g = new(q.batch, launches.splits, q.width, dtype=acc)
    launches.pool(k.data, grad_y, grad_g)
    grad_q, grad_k = new(grad_z.shape), new(grad_z.shape)
    sums = new(q.batch * launches.tiles, 4, q.width, dtype=acc)
    launches.dqk(
        q.data, k.data, w_g, mask, *statistics, grad_g, grad_z, grad_y, grad_q, grad_k, sums
    )

    gradients: list[Tensor | None] = [None] * len(inputs)
    if needs.inputs and isinstance(weights, Weights):
        gradients = [_input_gradient(grad_q, grad_k, inputs[0], weights)]
    elif needs.inputs:
        gradients = [g.view(inputs[0].shape) for g in (grad_q, grad_k)]
    if not needs.weights:
        return [*gradients, *[None] * len(weights)]
    # Gradients of their own: not parts of one tensor.
    dw_g, dbq, dbk, d_proj_bias = (t.to(dout.dtype, copy=True) for t in sums.sum(0))
    projections = []
    if isinstance(weights, Weights):
        projections = projection_gradients(grad_q, grad_k, dbq, dbk, inputs[0], weights)
    return [
        *gradients, *projections, dw_g.view(w.w_g.shape), grad_z.t() @ y,
        None if w.proj_bias is None else d_proj_bias, grad_out.t() @ z,
        None if w.final_bias is None else grad_out.sum(0),
    ]  # fmt: skip


def _input_gradient(grad_q: Tensor, grad_k: Tensor, x: Tensor, weights: Weights) -> Tensor:
    """The gradient of x from those of queries and keys, [B N, E]."""
    dx = grad_q @ weights.query_weight
    torch.addmm(dx, grad_k, weights.key_weight, out=dx)
    dx = dx.view(x.shape[0], count_tokens(x), weights.in_dims)
    return dx if x.dim() == 3 else as_image(dx, x.shape[2:])


def projection_gradients(
    grad_q: Tensor, grad_k: Tensor, dbq: Tensor, dbk: Tensor, x: Tensor, weights: Weights
) -> list[Tensor | None]:
    """Of weight and bias of the query layer, then of the key layer.

    `dbq` and `dbk` are the sums of the rows of `grad_q` and `grad_k`, [B N, E].
    """
    rows = rows_of(x)
    return [
        grad_q.t() @ rows, None if weights.query_bias is None else dbq,
        grad_k.t() @ rows, None if weights.key_bias is None else dbk,
    ]  # fmt: skip
