"""Tile sizes by width and storage type: one table, no tuning at the first call.

Token and batch counts never enter, so they never trigger a recompilation, and the result for a
sequence does not depend on its batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Tile sizes; every `tl.dot` needs at least 16 in each dimension."""

    block_n: int
    """Tokens of a tile."""
    block_k: int
    """Depth of a step of a product with weights."""
    block_j: int
    """Columns written at a time."""
    num_warps: int
    num_stages: int


# (largest width of a tile, bytes of an element): chosen so that the kernels, compiled for sm_80,
# sm_90 and gfx942, keep their tiles in registers and shared memory.
_FORWARD = {
    (64, 2): Config(32, 64, 32, 4, 2),
    (64, 4): Config(32, 32, 16, 4, 2),
    (128, 2): Config(32, 64, 32, 4, 2),
    (128, 4): Config(32, 16, 16, 8, 1),
    (256, 2): Config(32, 32, 32, 8, 2),
    (256, 4): Config(16, 16, 16, 8, 2),
    (512, 2): Config(16, 16, 16, 8, 2),
    (512, 4): Config(16, 16, 16, 8, 1),
}
_BACKWARD = {
    (64, 2): Config(16, 64, 32, 4, 1),
    (64, 4): Config(16, 16, 16, 4, 1),
    (128, 2): Config(32, 64, 32, 4, 1),
    (128, 4): Config(16, 16, 16, 8, 2),
    (256, 2): Config(16, 32, 32, 4, 1),
    (256, 4): Config(16, 16, 16, 8, 2),
    (512, 2): Config(16, 16, 16, 8, 1),
    (512, 4): Config(16, 16, 16, 8, 1),
}


def power_of_two(n: int) -> int:
    """The smallest power of two >= n, and >= 16: what a tile of width n is padded to."""
    return max(16, 1 << (n - 1).bit_length())


def _key(width: int, dtype: torch.dtype) -> tuple[int, int]:
    # float64 is for checking gradients; it takes the row of float32.
    return max(64, power_of_two(width)), min(4, dtype.itemsize)


def forward_config(width: int, dtype: torch.dtype) -> Config:
    """The tile sizes of the forward for C = width."""
    return _FORWARD[_key(width, dtype)]


def backward_config(width: int, dtype: torch.dtype) -> Config:
    """The tile sizes of the backward for C = width."""
    return _BACKWARD[_key(width, dtype)]
