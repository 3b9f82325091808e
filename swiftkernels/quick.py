"""The short way to the kernels, for small inputs: past the checks that a layer has passed before.

A call through `swiftkernels.functional` takes longer than the kernels do for a small image. It
leaves a note here, and as long as the layer's weights are of the same kind and stand where they
stood, the next calls need to look at the input alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftkernels import compat, ops
from swiftkernels.common import as_image, as_tokens, output_like, tokens_of
from swiftkernels.cpu import launch, weights
from swiftkernels.cpu.weights import Weights
from swiftkernels.reference import Options
from swiftkernels.triton import config

Key = tuple[str, str, bool, float | None, float]
"""backend, pooling, qk_norm, scale, eps: as `additive_self_attention` is given them."""

MAX_KINDS = 64
"""Kinds of input kept in mind for a layer."""


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
    addresses: weights.Addresses
    shapes: tuple[torch.Size | None, ...]
    """These two of the weights."""
    by_address: bool
    """The Triton kernels can be started by these addresses."""
    prepared: dict[Any, _Prepared]
    """By kinds of input."""


def remember(layer: Weights, key: Key, chosen: str, options: Options, x: Tensor) -> None:
    """Note that a call with this layer and options on tokens like x passed all checks."""
    token_dim, width = layer.wf.shape
    before: Checked | None = weights.find_note(layer, key)
    checked = Checked(
        backend=chosen,
        options=options,
        dtype=x.dtype,
        device=x.device,
        in_dims=x.shape[2],
        width=width,
        token_dim=token_dim,
        addresses=weights.addresses(layer),
        shapes=tuple(None if w is None else w.shape for w in layer),
        by_address=width <= config.MAX_PROJECTED_WIDTH
        and all(w is None or compat.fits_kernels(w) for w in layer),
        prepared={},
    )
    if before is not None and before._replace(prepared={}) == checked:
        return  # and what was prepared stays
    weights.notes(layer)[key] = checked


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
        return _infer_on_cpu(x, layer, checked)
    if layer.layer_scale is not None or not _same_weights(layer, checked):
        return None
    out = _infer_by_triton(x, checked)
    if out is not None:
        return out
    operator = ops.additive_self_attention
    return operator.call((x, *layer[:9]), None, checked.options, checked.backend, "nothing")[0]


def _same_weights(layer: Weights, checked: Checked) -> bool:
    """Whether the weights, which may have been replaced through `.data`, are what was checked."""
    if weights.addresses(layer) != checked.addresses:
        return False
    dtype = checked.dtype
    for w, shape in zip(layer, checked.shapes, strict=True):
        if w is not None and (w.shape != shape or w.dtype is not dtype or not w.is_contiguous()):
            return False
    return True


class _Prepared(NamedTuple):
    """How the Triton kernels are started for one kind of input, and what the output is."""

    start: Callable[[Tensor, Tensor, Sequence[int | None]], None]
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _infer_by_triton(x: Tensor, checked: Checked) -> Tensor | None:
    """By address, once the kernels for inputs like x are compiled; till then None."""
    if not (checked.by_address and compat.fits_kernels(x)):
        return None
    key = (x.shape, x.stride(), checked.dtype is torch.float32 and compat.allow_tf32())
    prepared = checked.prepared.get(key)
    if prepared is None:
        start = ops.implementation("triton").compiled_forward(
            x, checked.width, checked.token_dim, checked.addresses[:9], checked.options
        )
        if start is None:
            return None
        if len(checked.prepared) >= MAX_KINDS:
            checked.prepared.clear()
        prepared = _Prepared(start, *output_like(x, checked.token_dim))
        checked.prepared[key] = prepared
    out = torch.empty_strided(
        prepared.shape, prepared.strides, dtype=checked.dtype, device=checked.device
    )
    prepared.start(x, out, checked.addresses)
    return out


def _infer_on_cpu(x: Tensor, layer: Weights, checked: Checked) -> Tensor | None:
    """By the CPU kernels, which the packed weights lead to at once."""
    scaled = layer.layer_scale is not None
    if scaled:
        out = torch.empty_like(x)
    else:
        shape, strides = output_like(x, checked.token_dim)
        out = torch.empty_strided(shape, strides, dtype=x.dtype, device="cpu")
    tokens, out_tokens = tokens_of(x), tokens_of(out)
    if tokens is None or out_tokens is None:
        return None  # rows of pixels with gaps: the long way makes a copy
    batch, n_tokens, _, x_strides = tokens
    form = launch.config.form(n_tokens, checked.in_dims, checked.width, checked.options.qk_norm)
    packed = weights.find_packed(layer, checked.options, form)
    if packed is not None and packed.cancels:
        form = weights.PLAIN
        packed = weights.find_packed(layer, checked.options, form)
    if packed is None:
        return None
    done = launch.call_forward(
        packed, batch, n_tokens, form, x, x_strides, out, out_tokens[3], scaled
    )
    return out if done else None


def train(
    x: Tensor, layer: Weights, key: Key, channels_first: bool, recompute: bool | None
) -> Tensor | None:
    """The output for x, differentiable; None: take the long way."""
    checked = checked_layer(x, layer, key, channels_first)
    if checked is None or layer.layer_scale is not None or not _same_weights(layer, checked):
        return None
    # The CPU kernels take tokens alone, and the long way saves those.
    flattens = channels_first and (checked.backend == "cpu" or compat.saves_through_hooks())
    out = ops.additive_self_attention(
        as_tokens(x) if flattens else x,
        *layer[:9],
        mask=None,
        options=checked.options,
        backend=checked.backend,
        recompute=recompute,
    )
    return as_image(out, x.shape[2:]) if flattens else out
