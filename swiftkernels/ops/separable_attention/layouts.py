"""The sequences of separable attention, and their strides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """batch x groups sequences of tokens; each is pooled separately."""

    batch: int
    groups: int
    tokens: int
    width: int
    strides: tuple[int, int, int, int]
    """Of batch, group, token, channel."""


def sequences_of(t: Tensor) -> Sequences:
    """The sequences of tokens [B, N, C], or of the pixels of patches [B, C, P, N]."""
    s = t.stride()
    if t.dim() == 3:
        batch, tokens, width = t.shape
        return Sequences(batch, 1, tokens, width, (s[0], 0, s[1], s[2]))
    batch, width, groups, tokens = t.shape
    return Sequences(batch, groups, tokens, width, (s[0], s[2], s[3], s[1]))


def output_like(x: Tensor, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of an output of that width; an image has the memory format of x."""
    if x.dim() == 3:
        batch, tokens, _ = x.shape
        return (batch, tokens, width), (tokens * width, width, 1)
    batch, _, groups, tokens = x.shape
    shape, step = (batch, width, groups, tokens), groups * tokens
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return shape, (step * width, 1, tokens * width, width)
    return shape, (width * step, step, tokens, 1)
