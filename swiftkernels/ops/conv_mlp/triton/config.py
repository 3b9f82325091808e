"""Tile sizes by width and storage type. Nothing is tuned at the first call.

The number of pixels has no influence on the order of sums: the output of an image does not depend
on the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from swiftkernels.backends.triton.sizes import PROGRAMS, cdiv, power_of_two

MAX_FUSED_WIDTH = 128
"""Widest layer whose forward is one launch, and whose backward is a kernel.

On an H100 one launch is faster up to here, and slower above.
"""

MAX_PARTIAL_BYTES = 8
"""Partial sums of the weight gradients move at most so many times the bytes of x, if there are
several."""


class Config(NamedTuple):
    """Tile sizes; every `tl.dot` needs at least 16 in each dimension."""

    block_n: int
    """Pixels of a tile."""
    block_k: int
    """Depth of a step of a product with x or dout."""
    block_h: int
    """Hidden channels of a block."""
    block_j: int
    """Output columns of a program."""
    num_warps: int = 4
    num_stages: int = 2


# By (width of a tile, bytes of a number). Compiled with these sizes, kernels keep their tiles in
# registers and shared memory; docs/gpu_kernels.md lists what they use.
_DEPTHWISE = {
    (64, 2): Config(64, 64, 64, 64),
    (64, 4): Config(32, 64, 32, 64),
    (128, 2): Config(64, 128, 64, 128),
    (128, 4): Config(32, 128, 16, 128, 8),
}
_POINTWISE = {
    (64, 2): Config(64, 64, 64, 64),
    (64, 4): Config(32, 64, 32, 64),
    (128, 2): Config(64, 128, 64, 128, 4, 3),
    (128, 4): Config(32, 32, 16, 128, 8),
}
_INPUT_BACKWARD = {
    (64, 2): Config(64, 64, 64, 64),
    (64, 4): Config(32, 32, 32, 64),
    (128, 2): Config(64, 64, 64, 128),
    (128, 4): Config(32, 32, 32, 128, 8),
}
_WEIGHTS_BACKWARD = {
    (64, 2): Config(128, 64, 32, 64),
    (64, 4): Config(32, 32, 32, 64),
    (128, 2): Config(64, 64, 64, 128, 8),
    (128, 4): Config(32, 32, 32, 128, 8),
}

INPUT_BLOCK_N, INPUT_BLOCK_C = 32, 64
"""Pixels and channels of a tile of `_input_kernel`."""


def _choose(
    table: dict[tuple[int, int], Config], width: int, dtype: torch.dtype, architecture: str
) -> Config:
    # float64 is for checking gradients; it uses the sizes of float32.
    chosen = table[max(64, power_of_two(width)), min(4, dtype.itemsize)]
    if architecture == "amd":
        # AMD's warps have 64 lanes, and 512 registers each if there are four of them.
        chosen = chosen._replace(num_warps=4, num_stages=1)
    return chosen


def forward_config(
    width: int, dtype: torch.dtype, depthwise: bool, architecture: str = "large"
) -> Config:
    """The tile sizes of a forward, for the larger of C and D, on a class of GPUs."""
    return _choose(_DEPTHWISE if depthwise else _POINTWISE, width, dtype, architecture)


def backward_configs(
    width: int, dtype: torch.dtype, architecture: str = "large"
) -> tuple[Config, Config]:
    """The tile sizes of the kernels for the gradients of x and of the weights, alike."""
    tables = (_INPUT_BACKWARD, _WEIGHTS_BACKWARD)
    x, weights = (_choose(table, width, dtype, architecture) for table in tables)
    return x, weights


def split_pixels(jobs: int, tiles: int, max_splits: int) -> tuple[int, int]:
    """(splits, tiles per split) of the pixels of a batch, for the gradients of the weights.

    As few splits as fill a GPU, because each writes partial sums of the size of the weights.

    Args:
        jobs: programs of a split.
        tiles: tiles of pixels in the batch.
        max_splits: beyond it the partial sums would outweigh everything else.
    """
    splits = max(1, min(cdiv(PROGRAMS, jobs), max_splits, tiles))
    tiles_per_split = cdiv(tiles, splits)
    return cdiv(tiles, tiles_per_split), tiles_per_split
