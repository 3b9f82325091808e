"""The short way to the kernels, for small inputs: past the checks that a layer has passed before.

A call through `swiftkernels.functional` takes longer than the kernels do for a small image. It
leaves a note here, and as long as the layer's weights stand where they stood in the version they
had, the next calls need to look at the input alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swiftkernels import compat
from swiftkernels.cpu import launch, weights
from swiftkernels.cpu.weights import Weights
from swiftkernels.reference import Options

Key = tuple[str, bool, float | None, float]
"""pooling, qk_norm, scale, eps: as `additive_self_attention` is given them."""


class Checked(NamedTuple):
    """A layer that passed all checks."""

    options: Options
    dtype: torch.dtype
    in_dims: int
    width: int
    token_dim: int


def remember(layer: Weights, key: Key, options: Options, x: Tensor) -> None:
    """Note that a call with this layer and options on tokens like x passed all checks."""
    token_dim, width = layer.wf.shape
    weights.notes(layer)[key] = Checked(options, x.dtype, x.shape[2], width, token_dim)


def attend(x: Tensor, layer: Weights, key: Key, channels_first: bool) -> Tensor | None:
    """The output for x [B, N, C] or [B, C, H, W]; None: take the long way.

    With a layer scale, x + scale * output.
    """
    if (
        torch.is_grad_enabled()
        or type(x) is not Tensor
        or not compat.nothing_listens()
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    checked = weights.find_note(layer, key)
    if checked is None or x.dtype is not checked.dtype or not x.is_cpu:
        return None
    shape, strides = x.shape, x.stride()
    if channels_first:
        if len(shape) != 4 or shape[1] != checked.in_dims:
            return None
        batch, _, height, width = shape
        if strides[2] != width * strides[3]:
            return None  # rows of pixels with gaps: the long way makes a copy
        n_tokens = height * width
        strides = (strides[0], strides[3], strides[1])
    else:
        if len(shape) != 3 or shape[2] != checked.in_dims:
            return None
        batch, n_tokens, _ = shape
    if batch == 0 or n_tokens == 0 or x.layout is not torch.strided:
        return None
    token_dim = checked.token_dim
    if layer.layer_scale is not None:
        out = torch.empty_like(x)
    elif channels_first:
        out = torch.empty_strided(
            (batch, token_dim, height, width),
            (n_tokens * token_dim, 1, width * token_dim, token_dim),
            dtype=x.dtype,
        )
    else:
        out = torch.empty((batch, n_tokens, token_dim), dtype=x.dtype)
    out_strides = out.stride()
    if channels_first:
        out_strides = (out_strides[0], out_strides[3], out_strides[1])
    form = launch.config.form(n_tokens, checked.in_dims, checked.width, checked.options.qk_norm)
    packed = weights.find_packed(layer, checked.options, form)
    if packed is None:
        return None
    done = launch.call_forward(
        packed, batch, n_tokens, form, x, strides, out, out_strides, layer.layer_scale is not None
    )
    return out if done else None
