"""Views of images as tokens and back, their strides, and the accumulator type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swiftkernels.backends import torch_state


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type that norms, scores and sums are computed in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_tokens(image: Tensor) -> Tensor:
    """[B, C, *spatial] -> [B, N, C], a view where the strides allow it."""
    return image.flatten(2).transpose(1, 2)


def as_image(tokens: Tensor, spatial: Sequence[int]) -> Tensor:
    """[B, N, C] -> [B, C, *spatial], a view."""
    batch, _, width = tokens.shape
    return tokens.transpose(1, 2).view(batch, width, *spatial)


def tokens_of(
    shape: Sequence[int], strides: tuple[int, ...]
) -> tuple[int, int, int, tuple[int, ...]] | None:
    """B, N, C and the strides of tokens [B, N, C], or of an image [B, C, H, W] read as tokens.

    None for an image with gaps between its rows: its pixels have no single stride.
    """
    if len(shape) == 3:
        return shape[0], shape[1], shape[2], strides
    batch, width, rows, columns = shape
    # The stride of an axis of one element has no meaning.
    step = strides[3] if columns > 1 else strides[2]
    if rows > 1 and strides[2] != columns * step:
        return None
    return batch, rows * columns, width, (strides[0], step, strides[1])


def readable_tokens(t: Tensor) -> tuple[Tensor, int, int, tuple[int, ...]]:
    """t [B, N, C] or [B, C, H, W], or a copy without gaps between rows of pixels.

    Also B, N, and the strides of batch, token and channel.
    """
    if t.dim() == 3:
        return t, t.shape[0], t.shape[1], t.stride()
    found = tokens_of(t.shape, t.stride())
    if found is None:
        return readable_tokens(t.contiguous())
    batch, n_tokens, _, strides = found
    return t, batch, n_tokens, strides


def image_strides(t: Tensor) -> tuple[int, int, int, int]:
    """Of batch, row, column and channel of [B, C, H, W], as `struct Images` in C++ has them."""
    batch, channel, row, column = t.stride()
    return batch, row, column, channel


def output_like(t: Tensor, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of an output of that width for tokens or an image t.

    Its tokens are contiguous, so an image is in channels_last memory format.
    """
    if t.dim() == 3:
        batch, n_tokens, _ = t.shape
        return (batch, n_tokens, width), (n_tokens * width, width, 1)
    batch, _, rows, columns = t.shape
    return (batch, width, rows, columns), (rows * columns * width, 1, columns * width, width)


def to_tokens(x: Tensor, channels_first: bool) -> Tensor:
    """[B, N, C], [B, *spatial, C] or, if `channels_first`, [B, C, *spatial] -> [B, N, C]."""
    if channels_first:
        return as_tokens(x)
    return x if x.dim() == 3 else x.flatten(1, -2)


def from_tokens(tokens: Tensor, shape: Sequence[int], channels_first: bool) -> Tensor:
    """[B, N, D] -> the order of axes of an x of that shape; a view."""
    if channels_first:
        return as_image(tokens, shape[2:])
    batch, _, width = tokens.shape
    return tokens if len(shape) == 3 else tokens.view(batch, *shape[1:-1], width)


def in_channels_last(x: Tensor) -> Tensor:
    """x [B, C, H, W] in channels_last memory format; its gradient is in the format of x.

    PyTorch's layers before are slow where the formats of their output and its gradient differ.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    if x.is_contiguous() and torch_state.nothing_listens() and torch_state.is_plain(x):
        out: Tensor = _InChannelsLast.apply(x)
        return out
    return x.contiguous(memory_format=torch.channels_last)


class _InChannelsLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return dout.contiguous()
