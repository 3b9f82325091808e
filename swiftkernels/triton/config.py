"""Tile sizes by width and storage type: one table, no tuning at the first call.

Token and batch counts never enter, so they never trigger a recompilation, and an item's result does
not depend on its batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_PROJECTED_WIDTH = 256
"""Up to this E the kernels project x themselves; above, one GEMM makes queries and keys first."""

MAX_WIDTH = 1024
"""Widest E in half precision, half of it in float32: a tile of rows has to fit on chip."""

MAX_FUSED_WIDTH = 64
"""Up to this width (C, E and D) four E x E accumulators fit beside a tile of the backward."""

MAX_SPLITS = 64
"""Partial sums an item's tokens are pooled in, at most."""

FUSED_GROUP_TOKENS = 512
"""Tokens a program of the fused backward walks through; each leaves one set of moments."""

GROUP_TOKENS = 64
"""The same for the backward without fused moments, where a program leaves only a few sums."""

MOMENT_SPLITS = 64
"""Partial sums of the weight gradients, at most."""

BLOCK_S = 16
"""Partial sums combined at a time."""


HALVES = (torch.float16, torch.bfloat16)


class Config(NamedTuple):
    """Tile sizes; every `tl.dot` needs at least 16 in each dimension."""

    block_n: int
    """Tokens of a tile."""
    block_k: int
    """Depth of a step of a dot product with weights."""
    block_j: int
    """Output columns written at a time."""
    num_warps: int
    num_stages: int
    rows_block_n: int
    """Tokens of a tile of `_rows_backward_kernel`, which keeps the most in registers."""
    rows_num_warps: int
    rows_num_stages: int


# (largest block_e, bytes of an element): chosen so that, compiled for sm_80 and sm_90, the kernels
# up to E = 256 keep their tiles in registers (the rows kernel within a few of them) and in shared
# memory.
_TABLE = {
    (64, 2): Config(64, 32, 32, 4, 2, 16, 8, 1),
    (64, 4): Config(32, 32, 32, 4, 2, 16, 8, 2),
    (128, 2): Config(32, 32, 32, 4, 2, 32, 8, 1),
    (128, 4): Config(32, 16, 16, 8, 2, 32, 8, 1),
    (256, 2): Config(32, 32, 32, 8, 2, 16, 8, 1),
    (256, 4): Config(16, 16, 16, 8, 2, 16, 8, 2),
    (512, 2): Config(16, 32, 16, 8, 2, 16, 8, 2),
    (512, 4): Config(16, 16, 16, 8, 1, 16, 8, 2),
    (1024, 2): Config(16, 16, 16, 8, 1, 16, 8, 1),
}


def next_power_of_two(n: int) -> int:
    """The smallest power of two >= n, and >= 16: what a tile of width n is padded to."""
    return max(16, 1 << (n - 1).bit_length())


def max_width(dtype: torch.dtype) -> int:
    """The widest E that the kernels take in that type."""
    return MAX_WIDTH if dtype in HALVES else MAX_WIDTH // 2


def choose_config(width: int, dtype: torch.dtype) -> Config:
    """The tile sizes for E = width."""
    # float64 is for checking gradients; it takes the row of float32.
    size = 2 if dtype in HALVES else 4
    return _TABLE[max(next_power_of_two(width), 64), size]
