"""Tile sizes by width and storage type. Nothing is tuned at the first call.

Token and batch counts have no influence: they never trigger a recompilation, and the result of a
sequence does not depend on the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from swiftkernels.backends.triton.sizes import power_of_two


class Config(NamedTuple):
    """Tile sizes; every `tl.dot` needs at least 16 in each dimension."""

    block_n: int
    """Tokens of a tile."""
    block_k: int
    """Depth of a step of a product with weights."""
    block_j: int
    """Output columns computed at a time."""
    num_warps: int = 8
    num_stages: int = 2


# By (width of a tile, bytes of a number). Compiled for sm_80, sm_90 and gfx942 with these sizes,
# kernels keep their tiles in registers and shared memory.
_FORWARD = {
    (64, 2): Config(block_n=32, block_k=64, block_j=32, num_warps=4),
    (64, 4): Config(block_n=32, block_k=32, block_j=16, num_warps=4),
    (128, 2): Config(block_n=32, block_k=64, block_j=32, num_warps=4),
    (128, 4): Config(block_n=32, block_k=16, block_j=16, num_stages=1),
    (256, 2): Config(block_n=32, block_k=32, block_j=32),
    (256, 4): Config(block_n=16, block_k=16, block_j=16),
    (512, 2): Config(block_n=16, block_k=16, block_j=16),
    (512, 4): Config(block_n=16, block_k=16, block_j=16, num_stages=1),
}
_BACKWARD = {
    (64, 2): Config(block_n=16, block_k=64, block_j=32, num_warps=4, num_stages=1),
    (64, 4): Config(block_n=16, block_k=16, block_j=16, num_warps=4, num_stages=1),
    (128, 2): Config(block_n=32, block_k=64, block_j=32, num_warps=4, num_stages=1),
    (128, 4): Config(block_n=16, block_k=16, block_j=16),
    (256, 2): Config(block_n=16, block_k=32, block_j=32, num_warps=4, num_stages=1),
    (256, 4): Config(block_n=16, block_k=16, block_j=16),
    (512, 2): Config(block_n=16, block_k=16, block_j=16, num_stages=1),
    (512, 4): Config(block_n=16, block_k=16, block_j=16, num_stages=1),
}


def choose_config(width: int, dtype: torch.dtype, backward: bool) -> Config:
    """The tile sizes of a forward or a backward for C = width."""
    # float64 is for checking gradients; it uses the sizes of float32.
    key = max(64, power_of_two(width)), min(4, dtype.itemsize)
    return (_BACKWARD if backward else _FORWARD)[key]
