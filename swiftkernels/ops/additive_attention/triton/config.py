"""Tile sizes by width and storage type: one table, no tuning at the first call.

Token and batch counts never enter, so they never trigger a recompilation, and an item's result does
not depend on its batch.
"""

from __future__ import annotations

import functools
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

PROGRAMS = 128
"""Programs that fill a GPU, about."""

MOMENT_SPLITS, MOMENT_TILES = 64, 32
"""Partial sums of the weight gradients, at most, and token tiles that are worth one more."""

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
    output_num_stages: int
    """Of `_output_forward_kernel`, whose two matrices need twice the shared memory."""
    rows_block_n: int
    """Tokens of a tile of `_rows_backward_kernel`, which keeps the most in registers."""
    rows_num_warps: int
    rows_num_stages: int


# (largest block_e, bytes of an element): chosen so that the kernels, compiled for sm_80 and sm_90,
# keep their tiles in registers and shared memory. docs/gpu_kernels.md has what they use.
_TABLE = {
    (64, 2): Config(64, 32, 32, 4, 2, 2, 16, 8, 1),
    (64, 4): Config(32, 32, 16, 4, 2, 2, 16, 8, 1),
    (128, 2): Config(32, 32, 32, 4, 2, 2, 32, 8, 1),
    (128, 4): Config(32, 16, 16, 8, 1, 2, 16, 8, 2),
    (256, 2): Config(32, 32, 32, 8, 2, 2, 16, 8, 1),
    (256, 4): Config(16, 16, 16, 8, 2, 2, 16, 8, 2),
    (512, 2): Config(16, 16, 16, 8, 2, 2, 16, 8, 3),
    (512, 4): Config(16, 16, 16, 8, 2, 2, 16, 8, 2),
    (1024, 2): Config(16, 16, 16, 8, 1, 1, 16, 8, 1),
}


def next_power_of_two(n: int) -> int:
    """The smallest power of two >= n, and >= 16: what a tile of width n is padded to."""
    return max(16, 1 << (n - 1).bit_length())


def moment_splits(jobs: int, tiles: int) -> int:
    """In how many partial sums `jobs` tiles of the weight gradients take `tiles` tiles of tokens.

    As many as fill a GPU: each leaves sums of the size of the weights in memory. More only where
    the tokens outweigh those by far.
    """
    splits = max(-(-PROGRAMS // jobs), min(MOMENT_SPLITS, tiles // MOMENT_TILES))
    return max(1, min(splits, tiles))


def finish_blocks(width: int) -> tuple[int, int]:
    """(columns of a program, partials added at a time) to sum partials of `width` numbers.

    A tile of 16,384 numbers stays in the registers of eight warps.
    """
    columns = min(max(64, next_power_of_two(width // PROGRAMS)), 4096)
    return columns, min(32, 16_384 // columns)


def max_width(dtype: torch.dtype) -> int:
    """The widest E that the kernels take in that type."""
    return MAX_WIDTH if dtype in HALVES else MAX_WIDTH // 2


@functools.cache
def architecture(device: torch.device) -> str:
    """The class of a GPU: "amd", "small" with 99 KiB of shared memory for a block, or "large"."""
    if torch.version.hip is not None:
        return "amd"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) in _SMALL:
        return "small"
    return "large"


_SMALL = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Compute capabilities of GPUs for desktops: 99 KiB of shared memory, where servers' have 163."""


def choose_config(width: int, dtype: torch.dtype, architecture: str = "large") -> Config:
    """The tile sizes for E = width on a class of GPUs."""
    # float64 is for checking gradients; it takes the row of float32.
    size = 2 if dtype in HALVES else 4
    block_e = max(next_power_of_two(width), 64)
    chosen = _TABLE[block_e, size]
    if architecture == "amd":
        # AMD's warps have 64 lanes: half as many, or small tiles would be held several times over.
        chosen = chosen._replace(num_warps=4, rows_block_n=16, rows_num_warps=4)
    if architecture != "large" and (block_e, size) == (512, 4):
        # Two stages take 128 KiB of shared memory.
        chosen = chosen._replace(output_num_stages=1)
    return chosen
