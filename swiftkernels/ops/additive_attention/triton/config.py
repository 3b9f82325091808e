"""Tile sizes by width and storage type. Nothing is tuned at the first call.

Token and batch counts have no influence on the order of sums within a batch element: its result
does not depend on the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from swiftkernels.backends.triton.sizes import PROGRAMS, cdiv, power_of_two

MAX_PROJECTED_WIDTH = 128
"""Up to this E the kernels compute q and k from x, and the output from these; above, products of
their own compute both."""

OPERANDS_BLOCK_N = 16
"""Tokens of a tile of `_operands_kernel`."""

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


# By (width of a tile, bytes of a number). Those of 16 bits were the fastest of several on an H100;
# docs/gpu_kernels.md lists what the kernels use when they are compiled with them.
_TABLE = {
    (64, 2): Config(128, 32, 64, 4, rows_block_n=32, rows_num_warps=4, groups=(256, 128, 64)),
    (64, 4): Config(32, 32, 16, 4, groups=(256, 128, 64)),
    (128, 2): Config(64, 32, 64, 4, rows_block_n=32, rows_num_warps=4, groups=(128, 64, 32)),
    (128, 4): Config(32, 16, 16, num_stages=1, rows_num_stages=2, groups=(128, 64, 32)),
    (256, 2): Config(32, 32, 32, rows_block_n=32),
    (256, 4): Config(16, 16, 16, rows_num_stages=2),
    (512, 2): Config(16, 16, 16),
    (512, 4): Config(16, 16, 16, rows_num_stages=2),
    (1024, 2): Config(16, 16, 16, num_stages=1),
}


def max_width(dtype: torch.dtype) -> int:
    """The widest E that the kernels take in that type."""
    return MAX_WIDTH if dtype in HALVES else MAX_WIDTH // 2


def choose_config(width: int, dtype: torch.dtype, architecture: str = "large") -> Config:
    """The tile sizes for E = width on a class of GPUs."""
    # float64 is for checking gradients; it uses the sizes of float32.
    size = 2 if dtype in HALVES else 4
    block_e = max(power_of_two(width), 64)
    chosen = _TABLE[block_e, size]
    if architecture == "amd":
        # AMD's warps have 64 lanes. With as many warps, several lanes would hold the same numbers.
        chosen = chosen._replace(num_warps=4, rows_block_n=16, rows_num_warps=4)
    return chosen


def group(cfg: Config, batch: int, n_tokens: int) -> int:
    """Tokens of a program of `_rows_backward_kernel`: the largest group that fills most of a GPU.

    No gradient of a batch element depends on it but for the order in which the gradients of the
    weights are summed.
    """
    full = 3 * PROGRAMS // 4
    filling = (tokens for tokens in cfg.groups if batch * cdiv(n_tokens, tokens) >= full)
    return next(filling, cfg.groups[-1])
