"""The short way to the kernels, for small inputs: past the checks that a layer has passed before.

A call through `swiftkernels.functional` takes longer than the kernels do for a small image. It
leaves a note here, and as long as the layer's weights stand where they stood in the version they
had, the next calls need to look at the input alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swiftkernels import compat, ops
from swiftkernels.cpu import launch, weights
from swiftkernels.cpu.weights import Weights
from swiftkernels.reference import Options

Key = tuple[str, str, bool, float | None, float]
"""backend, pooling, qk_norm, scale, eps: as `additive_self_attention` is given them."""


class Checked(NamedTuple):
    """A layer that passed all checks."""

    backend: str
    """The one that was chosen."""
    options: Options
    dtype: torch.dtype
    device: torch.device
    in_dims: int
    width: int
    token_dim: int
    sizes: weights.State
    """And addresses of the weights."""


def remember(layer: Weights, key: Key, chosen: str, options: Options, x: Tensor) -> None:
    """Note that a call with this layer and options on tokens like x passed all checks."""
    token_dim, width = layer.wf.shape
    weights.notes(layer)[key] = Checked(
        chosen, options, x.dtype, x.device, x.shape[2], width, token_dim, weights.sizes(layer)
    )


def checked_layer(x: Tensor, layer: Weights, key: Key, channels_first: bool) -> Checked | None:
    """The note for this layer, if x [B, N, C] or [B, C, H, W] needs no more checks either."""
    if (
        type(x) is not Tensor
        or (layer.layer_scale is not None and not isinstance(layer.layer_scale, Tensor))
        or not compat.nothing_listens()
    ):
        return None
    checked: Checked | None = weights.find_note(layer, key)
    if checked is None or x.dtype is not checked.dtype or x.device != checked.device:
        return None
    if torch.is_autocast_enabled(checked.device.type):
        return None
    dims, channels = (4, 1) if channels_first else (3, 2)
    if x.dim() != dims or x.shape[channels] != checked.in_dims or x.numel() == 0:
        return None
    return checked if x.layout is torch.strided and not x.is_neg() else None


def infer(x: Tensor, layer: Weights, key: Key, channels_first: bool) -> Tensor | None:
    """The output for x where no gradient is needed; None: take the long way.

    With a layer scale, x + scale * output.
    """
    checked = checked_layer(x, layer, key, channels_first)
    if checked is None:
        return None
    if checked.backend == "cpu":
        return _infer_on_cpu(x, layer, checked, channels_first)
    if layer.layer_scale is not None or checked.sizes != weights.sizes(layer):
        return None
    tensors = (_tokens(x, channels_first), *layer[:9])
    operator = ops.additive_self_attention
    out = operator.call(tensors, None, checked.options, checked.backend, "nothing")[0]
    return _restored(out, x, channels_first)


def _infer_on_cpu(
    x: Tensor, layer: Weights, checked: Checked, channels_first: bool
) -> Tensor | None:
    """The same by the CPU kernels, which the packed weights lead to at once."""
    shape, strides, token_dim = x.shape, x.stride(), checked.token_dim
    if channels_first:
        batch, _, height, width = shape
        if strides[2] != width * strides[3]:
            return None  # rows of pixels with gaps: the long way makes a copy
        n_tokens = height * width
        strides = (strides[0], strides[3], strides[1])
    else:
        batch, n_tokens, _ = shape
    if layer.layer_scale is not None:
        out = torch.empty_like(x)
    elif channels_first:
        out = torch.empty_strided(
            (batch, token_dim, height, width),
            (n_tokens * token_dim, 1, width * token_dim, token_dim),
            dtype=x.dtype,
            device="cpu",
        )
    else:
        out = torch.empty((batch, n_tokens, token_dim), dtype=x.dtype, device="cpu")
    out_strides = out.stride()
    if channels_first:
        if out_strides[2] != width * out_strides[3]:
            return None  # those of an x without a dense order of its own
        out_strides = (out_strides[0], out_strides[3], out_strides[1])
    form = launch.config.form(n_tokens, checked.in_dims, checked.width, checked.options.qk_norm)
    packed = weights.find_packed(layer, checked.options, form)
    if packed is not None and packed.cancels:
        form = weights.PLAIN
        packed = weights.find_packed(layer, checked.options, form)
    if packed is None:
        return None
    done = launch.call_forward(
        packed, batch, n_tokens, form, x, strides, out, out_strides, layer.layer_scale is not None
    )
    return out if done else None


def train(
    x: Tensor, layer: Weights, key: Key, channels_first: bool, recompute: bool | None
) -> Tensor | None:
    """The output for x, differentiable; None: take the long way."""
    checked = checked_layer(x, layer, key, channels_first)
    if checked is None or layer.layer_scale is not None or checked.sizes != weights.sizes(layer):
        return None
    # A view of w_g is one more node for autograd: the CPU kernels do without.
    w_g = layer.w_g if checked.backend == "cpu" else layer.w_g.flatten()
    out = ops.additive_self_attention(
        _tokens(x, channels_first),
        *layer[:4],
        w_g,
        *layer[5:9],
        mask=None,
        options=checked.options,
        backend=checked.backend,
        recompute=recompute,
    )
    return _restored(out, x, channels_first)


def _tokens(x: Tensor, channels_first: bool) -> Tensor:
    """x [B, C, H, W] as tokens [B, H W, C], if `channels_first`."""
    return x.flatten(2).transpose(1, 2) if channels_first else x


def _restored(out: Tensor, x: Tensor, channels_first: bool) -> Tensor:
    """Output tokens with the axes of x."""
    return out.transpose(1, 2).unflatten(2, x.shape[2:]) if channels_first else out
