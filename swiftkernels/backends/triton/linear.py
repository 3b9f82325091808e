"""A linear layer of all tokens with what surrounds it, in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from swiftkernels.backends.triton.activations import activate
from swiftkernels.backends.triton.kernel_launch import KernelLaunch
from swiftkernels.backends.triton.sizes import architecture, cdiv
from swiftkernels.backends.triton.tensors import Layout
from swiftkernels.backends.triton.tiles import (
    dot,
    load_tokens,
    load_transposed,
    load_vector,
    to_operand,
)


@triton.jit(
    do_not_specialize=[
        "n_tokens", "num_tiles", "stride_b", "stride", "residual_stride_b", "residual_stride",
    ]
)  # fmt: skip
def _linear_kernel(
    x_ptr,  # [B, N, C]
    weight_ptr, bias_ptr,  # [D, C], [D] or None
    scale_ptr,  # [D] or None
    residual_ptr,  # [B, N, D] or None
    out_ptr,  # [B, N, D], contiguous
    n_tokens, num_tiles, stride_b, stride, residual_stride_b, residual_stride,
    C: tl.constexpr, D: tl.constexpr, ACTIVATION: tl.constexpr, OPERAND: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    RESIDUAL_CHANNELS_LAST: tl.constexpr, RESIDUAL_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """residual + scale * activation(x W^T + b), BLOCK_D channels of BLOCK_N tokens.

    With OPERAND the output will be an operand of another product.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    across: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    tile = pid // across
    batch = (tile // num_tiles).to(tl.int64)
    rows = (tile % num_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    ds = pid % across * BLOCK_D + tl.arange(0, BLOCK_D)
    x_ptr += batch * tl.multiple_of(stride_b.to(tl.int64), ALIGN)
    out = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for k0 in range(0, C, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        x_tile = load_tokens(x_ptr, rows, ks, n_tokens, C, stride, CHANNELS_LAST, ALIGN)
        out = dot(x_tile, load_transposed(weight_ptr, ds, ks, D, C), out, PRECISION)
    if bias_ptr is not None:
        out += load_vector(bias_ptr, ds, D, ACC)[None, :]
    out = activate(out, ACTIVATION, DTYPE)
    if scale_ptr is not None:
        out = out * load_vector(scale_ptr, ds, D, ACC)[None, :]
    if residual_ptr is not None:
        residual_ptr += batch * tl.multiple_of(residual_stride_b.to(tl.int64), RESIDUAL_ALIGN)
        out += load_tokens(
            residual_ptr, rows, ds, n_tokens, D, residual_stride, RESIDUAL_CHANNELS_LAST,
            RESIDUAL_ALIGN,
        ).to(ACC)  # fmt: skip
    out = to_operand(out, DTYPE) if OPERAND else out.to(DTYPE)
    offsets = (batch * n_tokens + rows)[:, None] * D + ds[None, :]
    tl.store(out_ptr + offsets, out, mask=(rows < n_tokens)[:, None] & (ds < D)[None, :])


class Tile(NamedTuple):
    """Sizes of the kernel; it has four warps."""

    block_d: int
    """Channels of the output."""
    num_stages: int
    programs: int
    """The tile is for grids of at least so many."""


BLOCK_N = 64
"""Tokens of a tile."""

TILES = (Tile(128, 3, 96), Tile(64, 4, 64), Tile(32, 4, 0))
"""Wide tiles read less, narrow ones fill a GPU. Chosen on an H100, in float16, at the sizes of
SwiftFormers."""


def choose_tile(sequences: int, n_tokens: int, out_dims: int) -> Tile:
    """The first of `TILES` whose grid is large enough.

    A number of the output is summed in the same order with all of them, so that it does not depend
    on the batch.
    """
    down = sequences * cdiv(n_tokens, BLOCK_N)
    return next(tile for tile in TILES if down * cdiv(out_dims, tile.block_d) >= tile.programs)


class Linear(NamedTuple):
    """A layer and its tokens: residual + scale * activation(x W^T + b)."""

    sequences: int
    n_tokens: int
    """Of a sequence."""
    in_dims: int
    out_dims: int
    activation: str
    operand: bool
    """Whether the output will be an operand of another product: then float16 saturates."""
    dtype: torch.dtype
    device: torch.device
    precision: str
    """`input_precision` of the product."""


def linear_launch(
    layer: Linear, x: Layout, residual: Layout | None = None, reusable: bool = True
) -> KernelLaunch:
    """A launch with the pointers of x, W [D, C], b, scale, residual and output.

    b, scale and residual may be None. The output is contiguous.

    Args:
        layer: the sizes.
        x: the layout of the input [B, N, C].
        residual: that of the residual [B, N, D], if there is one.
        reusable: see `KernelLaunch`.
    """
    sequences, n_tokens, in_dims, out_dims, activation, operand, dtype, device, how = layer
    tile = choose_tile(sequences, n_tokens, out_dims)
    tiles = cdiv(n_tokens, BLOCK_N)
    added = x if residual is None else residual
    return KernelLaunch(
        _linear_kernel,
        sequences * tiles * cdiv(out_dims, tile.block_d),
        (n_tokens, tiles, *x.strides, *added.strides),
        {
            "C": in_dims, "D": out_dims, "ACTIVATION": activation, "OPERAND": operand,
            "CHANNELS_LAST": x.channels_last, "ALIGN": x.align,
            "RESIDUAL_CHANNELS_LAST": added.channels_last, "RESIDUAL_ALIGN": added.align,
            "PRECISION": how, "BLOCK_N": BLOCK_N,
            "BLOCK_K": 64 if dtype.itemsize == 2 else 32, "BLOCK_D": tile.block_d,
            # AMD's compute units have 64 KiB of shared memory.
            "num_stages": 2 if architecture(device) == "amd" else tile.num_stages, "num_warps": 4,
        },
        reusable,
    )  # fmt: skip
