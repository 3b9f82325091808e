"""Tile sizes by width and storage type. Nothing is tuned at the first call.

Token and batch counts have no influence on the order in which the kernels sum within a batch
element: its result does not depend on the batch. PyTorch's products in wide layers may choose other
orders.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from swiftkernels.backends.triton.sizes import PROGRAMS, cdiv, power_of_two

MAX_PROJECTED_WIDTH = 128
"""Up to this E the kernels compute q and k from x, and the output from these; above, PyTorch's
products do: see `wide.py`."""

MAX_WIDTH = 1024
"""Widest E in half precision, and half of it in float32: a tile of rows has to fit on chip."""

MAX_FUSED_WIDTH = 64
"""Up to this width (C, E and D), four E x E accumulators fit next to a tile of the backward."""

BLOCK_S = 16
"""Partial sums that are combined at a time."""

HALVES = (torch.float16, torch.bfloat16)


class Config(NamedTuple):
    """Tile sizes; every `tl.dot` needs at least 16 in each dimension."""

    block_n: int
    """Tokens of a tile."""
    block_k: int
    """Depth of a step of a dot product with weights."""
    block_j: int
    """Output columns computed at a time."""
    num_warps: int = 8
    num_stages: int = 2
    rows_block_n: int = 16
    """Tokens of a tile of `_rows_backward_kernel`, which needs the most registers."""
    rows_num_warps: int = 8
    rows_num_stages: int = 1
    groups: tuple[int, ...] = (64, 32)
    """Tokens of a program of `_rows_backward_kernel`, which stores a set of sums: see `group`."""


_FUSED_GROUPS = (256, 128, 96, 64, 32)

# By (width of a tile, bytes of a number). Those of 16 bits were the fastest of several on an H100;
# docs/gpu_kernels.md lists what the kernels use when they are compiled with them.
_TABLE = {
    (64, 2): Config(
        128, 32, 64, 4, rows_block_n=32, rows_num_warps=4, groups=(256, 128, 96, 64, 32)
    ),
    (64, 4): Config(32, 32, 16, 4, groups=(256, 128, 96, 64, 32)),
    (128, 2): Config(64, 32, 64, 4, rows_block_n=32, rows_num_warps=4, groups=(128, 64, 32)),
    (128, 4): Config(32, 16, 16, num_stages=1, rows_num_stages=2, groups=(128, 64, 32)),
}


def max_width(dtype: torch.dtype) -> int:
    """The widest E that the kernels take in that type."""
    return MAX_WIDTH if dtype in HALVES else MAX_WIDTH // 2


def choose_config(width: int, dtype: torch.dtype, architecture: str = "large") -> Config:
    """The tile sizes for E = width on a class of GPUs, up to `MAX_PROJECTED_WIDTH`."""
    # float64 is for checking gradients; it uses the sizes of float32.
    size = 2 if dtype in HALVES else 4
    block_e = max(power_of_two(width), 64)
    chosen = _TABLE[block_e, size]
    if architecture == "amd":
        # AMD's warps have 64 lanes. With as many warps, several lanes would hold the same numbers.
        chosen = chosen._replace(num_warps=4, rows_block_n=16, rows_num_warps=4)
    return chosen


def wide_tile(width: int, architecture: str) -> tuple[int, int]:
    """Tokens of a tile of the kernels of wide layers, and warps: those without spills."""
    return min(16, 8192 // power_of_two(width)), 4 if architecture == "amd" else 8


def group(cfg: Config, batch: int, n_tokens: int) -> int:
    """Tokens of a program of `_rows_backward_kernel`: the largest group that fills half of a GPU.

    A larger group stores fewer partial sums.

    No gradient of a batch element depends on it but for the order in which the gradients of the
    weights are summed.
    """
    filling = (t for t in cfg.groups if batch * cdiv(n_tokens, t) >= PROGRAMS // 2)
    return next(filling, cfg.groups[-1])
