"""Tokens as the kernels read them, and what a forward takes and keeps at every width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swiftkernels.backends.layouts import accumulator, to_tokens
from swiftkernels.backends.triton.tensors import Tokens, read_tokens
from swiftkernels.ops.additive_attention.triton import config
from swiftkernels.ops.additive_attention.weights import AnyWeights, Weights


def given_tokens(inputs: Sequence[Tensor]) -> tuple[Tokens, Tokens]:
    """Queries and keys with one layout."""
    q, k = inputs
    if q.stride() != k.stride():
        q, k = q.contiguous(), k.contiguous()
    return read_tokens(q), read_tokens(k)


def empty_like(like: Tokens) -> Tokens:
    """Uninitialised tokens with the same order of axes in memory, without gaps."""
    data = like.data
    if data.dim() == 3 and not like.layout.channels_last:
        return read_tokens(data.new_empty(data.mT.shape).mT)
    contiguous = data.dim() == 3 or not like.layout.channels_last
    memory_format = torch.contiguous_format if contiguous else torch.channels_last
    return read_tokens(torch.empty_like(data, memory_format=memory_format))


def rows_of(t: Tensor) -> Tensor:
    """The tokens of a batch, t [B, N, C] or [B, C, H, W], as one matrix [B N, C].

    A copy where the channels are not adjacent.
    """
    return to_tokens(t, channels_first=t.dim() == 4).flatten(0, 1)


def count_tokens(t: Tensor) -> int:
    """N of t [B, N, C] or [B, C, H, W]."""
    return t.shape[1] if t.dim() == 3 else t.shape[2] * t.shape[3]


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """The mask as the kernels read it."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def is_wide(width: int) -> bool:
    """Whether PyTorch's products surround the kernels at such an E: see `wide.py`."""
    return width > config.MAX_PROJECTED_WIDTH


class Saved(NamedTuple):
    """What the backward needs besides the inputs."""

    global_query: Tensor
    """G, [B, E]"""
    statistics: Tensor
    """Of the pooling, [B, 2]."""
    factors: Tensor
    """M = Wf Wp, [D, E]; of a wide layer what `wide_factors` divides, [4 or 2, B N, E]."""


def saved_like(inputs: Sequence[Tensor], weights: AnyWeights, keep: str) -> Saved:
    """What a forward keeps, uninitialised."""
    x, width = inputs[0], weights.width
    shape: tuple[int, ...] = weights.token_dim, width
    if is_wide(width):
        planes = 4 if isinstance(weights, Weights) else 2
        shape = planes, x.shape[0] * count_tokens(x), width
    return Saved(*statistics_like(x, width), x.new_empty(shape))


def wide_factors(factors: Tensor) -> tuple[Sequence[Tensor], Tensor]:
    """What a wide layer keeps.

    Returns:
        q and k, [B N, E] each, or nothing if they were given; and z and y side by side,
        [B N, 2 E].
    """
    *projected, _, _ = factors
    _, rows, width = factors.shape
    return projected, factors[-2:].view(rows, 2 * width)


def statistics_like(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """G and the statistics of the pooling, uninitialised."""
    new, acc = x.new_empty, accumulator(x.dtype)
    return new(x.shape[0], width, dtype=acc), new(x.shape[0], 2, dtype=acc)


class Residual(NamedTuple):
    """What the last kernel adds to the scaled output in inference."""

    x: Tensor | None = None
    """Tokens [B, N, D] without gaps, or an image in channels_last memory format."""
    scale: Tensor | None = None
    """[D]"""


NO_RESIDUAL = Residual()
