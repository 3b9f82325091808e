"""What the backends share: the accumulator type and the packed projection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type that norms, scores and sums are computed in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pack_projections(
    wq: Tensor, bq: Tensor | None, wk: Tensor, bk: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Query and key layer as one with 2 E outputs: weight [2 E, C], bias [2 E] or None."""
    weight = torch.cat((wq, wk))
    if bq is None and bk is None:
        return weight, None
    if bq is None or bk is None:
        zeros = wq.new_zeros(wq.shape[0])
        bq, bk = zeros if bq is None else bq, zeros if bk is None else bk
    return weight, torch.cat((bq, bk))


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
    """B, N, C and the strides of tokens [B, N, C], or of an image [B, C, H, W] as such.

    None for an image with gaps between its rows, which has no stride from token to token.
    """
    if len(shape) == 3:
        return shape[0], shape[1], shape[2], strides
    batch, width, rows, columns = shape
    # The stride of an axis of one element says nothing.
    step = strides[3] if columns > 1 else strides[2]
    if rows > 1 and strides[2] != columns * step:
        return None
    return batch, rows * columns, width, (strides[0], step, strides[1])


def output_like(t: Tensor, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of an output of that width for tokens or an image t.

    Its tokens are contiguous: those of an image are in the order of channels_last.
    """
    if t.dim() == 3:
        batch, n_tokens, _ = t.shape
        return (batch, n_tokens, width), (n_tokens * width, width, 1)
    batch, _, rows, columns = t.shape
    return (batch, width, rows, columns), (rows * columns * width, 1, columns * width, width)
