"""Sizes of tiles and grids. This module does not import Triton.

The token count of a sequence decides how it is split, the batch does not: so the result of a
sequence does not depend on its batch.
"""

from __future__ import annotations

import functools

import torch

PROGRAMS = 128
"""About as many programs fill a GPU."""

MAX_SPLITS = 64
"""Most splits of the tokens of a sequence, or of a batch. Every split makes one partial sum."""

MIN_TILES_PER_SPLIT = 32
"""Token tiles of a batch that are worth one more partial sum of the weight gradients, once the GPU
is full."""

MAX_SUM_TILE = 16_384
"""Numbers of a tile of partial sums; as many stay in the registers of eight warps."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two >= n, and >= 16: what a tile of width n is padded to."""
    return max(16, 1 << (n - 1).bit_length())


def split_tokens(n_tokens: int, block_n: int) -> tuple[int, int]:
    """(splits, tiles per split) of the tokens of a sequence, for the kernels that pool them."""
    tiles = cdiv(n_tokens, block_n)
    tiles_per_split = cdiv(tiles, MAX_SPLITS)
    return cdiv(tiles, tiles_per_split), tiles_per_split


def split_batch(jobs: int, tiles: int) -> tuple[int, int]:
    """(splits, tiles per split) of the token tiles of a batch, for sums of weight gradients.

    As few splits as fill a GPU, as each writes partial sums of the size of the weights. There are
    more only where the tokens outweigh these by far.

    Args:
        jobs: tiles of the weight gradients; there is a program for each job and split.
        tiles: token tiles of the batch.
    """
    splits = max(cdiv(PROGRAMS, jobs), min(MAX_SPLITS, tiles // MIN_TILES_PER_SPLIT))
    tiles_per_split = cdiv(tiles, max(1, min(splits, tiles)))
    return cdiv(tiles, tiles_per_split), tiles_per_split


def sum_tile(width: int) -> tuple[int, int]:
    """(columns, partial sums) of the tiles in which partial sums of `width` numbers are added."""
    columns = min(max(64, power_of_two(width // PROGRAMS)), 4096)
    return columns, min(32, MAX_SUM_TILE // columns)


@functools.cache
def architecture(device: torch.device) -> str:
    """The class of a GPU: "amd", "small" (99 KiB of shared memory for a block), or "large"."""
    if torch.version.hip is not None:
        return "amd"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) in _SMALL:
        return "small"
    return "large"


_SMALL = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Compute capabilities of desktop GPUs: 99 KiB of shared memory, where those of servers have 163
or more."""
