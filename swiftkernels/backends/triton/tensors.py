"""What a launch needs to know about its tensors: strides, alignment, precision."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftkernels.backends.layouts import tokens_of
from swiftkernels.backends.torch_state import allow_tf32


class Layout(NamedTuple):
    """Strides of tokens of which either the channels or the tokens are adjacent in memory."""

    batch_strides: tuple[int, ...]
    """Of the axes before tokens and channels."""
    stride: int
    """Of the tokens if `channels_last`, else of the channels; the other stride is 1."""
    channels_last: bool
    align: int
    """A power of two up to 16 that divides all strides but that of 1."""

    @property
    def strides(self) -> tuple[int, ...]:
        """As the kernels take them."""
        return (*self.batch_strides, self.stride)


@functools.lru_cache(maxsize=1024)
def layout(n_tokens: int, width: int, strides: tuple[int, ...]) -> Layout | None:
    """The layout of tokens; None if neither tokens nor channels are adjacent.

    Args:
        n_tokens: tokens of a sequence.
        width: channels.
        strides: of the batch axes, of tokens, of channels.
    """
    *batch_strides, token_stride, channel_stride = strides
    if channel_stride == 1 or width == 1:
        stride, channels_last = token_stride, True
    elif token_stride == 1 or n_tokens == 1:
        stride, channels_last = channel_stride, False
    else:
        return None
    align = math.gcd(16, *batch_strides, stride)
    return Layout(tuple(batch_strides), stride, channels_last, align)


def rows_layout(n_tokens: int, width: int) -> Layout:
    """The layout of sequences [B, N, width] without gaps."""
    return Layout((n_tokens * width,), width, True, math.gcd(16, width))


def compact(t: Tensor) -> Tensor:
    """A copy of t without gaps.

    `contiguous()` is not enough: it returns a tensor unchanged if only axes of one element have odd
    strides.
    """
    return t.new_empty(t.shape).copy_(t)


class Tokens(NamedTuple):
    """Tokens, or an image, that the kernels can read as [B, N, C]."""

    data: Tensor
    batch: int
    n_tokens: int
    width: int
    layout: Layout


def read_tokens(t: Tensor) -> Tokens:
    """t [B, N, C] or [B, C, H, W], or a copy where the kernels cannot read its strides."""
    found = tokens_of(t.shape, t.stride())
    if found is not None:
        batch, n_tokens, width, strides = found
        described = layout(n_tokens, width, strides)
        if described is not None:
            return Tokens(t, batch, n_tokens, width, described)
    return read_tokens(compact(t))


def contiguous(tensors: Sequence[Tensor | None]) -> list[Any]:
    """The tensors, or contiguous copies."""
    return [None if t is None else t.contiguous() for t in tensors]


def precision(dtype: torch.dtype, convolution: bool = False) -> str:
    """`input_precision` of the matrix products, or of convolutions, on tensors of that type.

    Most AMD GPUs have no TF32, for which Triton does not compile there.
    """
    allowed = dtype == torch.float32 and torch.version.hip is None and allow_tf32(convolution)
    return "tf32" if allowed else "ieee"


def has_tensor_cores(dtype: torch.dtype, precision: str) -> bool:
    """Whether tensor cores of NVIDIA's GPUs multiply numbers of that type.

    Without them, Triton's products take several times as long as those of PyTorch's libraries.
    """
    return dtype.itemsize == 2 or precision == "tf32"
