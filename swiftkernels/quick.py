"""The short way to the kernels, for small inputs: past the checks that a layer has passed before.

A call through `swiftkernels.functional` takes longer than the kernels do for a small image. It
leaves a note here, and as long as the layer's weights stand where they stood in the version they
had, the next calls need to look at the input alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftkernels import compat, ops
from swiftkernels.common import output_like, tokens_of
from swiftkernels.cpu import launch, weights
from swiftkernels.cpu.weights import Weights
from swiftkernels.reference import Options

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
    """Of the weights."""
    aligned: bool
    """All of them lie as the Triton kernels expect."""
    kinds: dict[Any, _Infer]
    """What was prepared for kinds of input."""


def remember(layer: Weights, key: Key, chosen: str, options: Options, x: Tensor) -> None:
    """Note that a call with this layer and options on tokens like x passed all checks."""
    token_dim, width = layer.wf.shape
    addresses = weights.addresses(layer)
    aligned = all(w is None or compat.fits_kernels(w) for w in layer)
    weights.notes(layer)[key] = Checked(
        chosen, options, x.dtype, x.device, x.shape[2], width, token_dim, addresses, aligned, {}
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
        return _infer_on_cpu(x, layer, checked)
    if layer.layer_scale is not None or not _same_places(layer, checked):
        return None
    quickest = _infer_by_triton(x, checked)
    if quickest is not None:
        return quickest
    operator = ops.additive_self_attention
    return operator.call((x, *layer[:9]), None, checked.options, checked.backend, "nothing")[0]


def _same_places(layer: Weights, checked: Checked) -> bool:
    """Whether the weights, which may have been replaced through `.data`, stand where they stood."""
    if weights.addresses(layer) != checked.addresses or layer.wq.dtype is not checked.dtype:
        return False
    for w in layer:  # noqa: SIM110 - a generator takes twice as long
        if w is not None and not w.is_contiguous():
            return False
    return True


class _Infer(NamedTuple):
    """How the Triton kernels are started for one kind of input, and what the output is."""

    start: Callable[[Tensor, Tensor, Sequence[int | None]], None]
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _infer_by_triton(x: Tensor, checked: Checked) -> Tensor | None:
    """By address, once the kernels for inputs like x are compiled; till then None."""
    if not (checked.aligned and compat.fits_kernels(x)):
        return None
    key = (x.shape, x.stride(), checked.dtype is torch.float32 and compat.allow_tf32())
    infer = checked.kinds.get(key)
    if infer is None:
        infer = _prepare(x, checked)
        if infer is None:
            return None
        if len(checked.kinds) >= MAX_KINDS:
            checked.kinds.clear()
        checked.kinds[key] = infer
    out = torch.empty_strided(
        infer.shape, infer.strides, dtype=checked.dtype, device=checked.device
    )
    infer.start(x, out, checked.addresses)
    return out


def _prepare(x: Tensor, checked: Checked) -> _Infer | None:
    width, token_dim = checked.width, checked.token_dim
    start = ops.implementation("triton").compiled_forward(
        x, width, token_dim, checked.addresses[:9], checked.options
    )
    return None if start is None else _Infer(start, *output_like(x, token_dim))


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
    if checked is None or layer.layer_scale is not None or not _same_places(layer, checked):
        return None
    # The CPU kernels take tokens alone, and the long way saves those.
    images = channels_first and (checked.backend == "cpu" or compat.saves_through_hooks())
    out = ops.additive_self_attention(
        x.flatten(2).transpose(1, 2) if images else x,
        *layer[:9],
        mask=None,
        options=checked.options,
        backend=checked.backend,
        recompute=recompute,
    )
    return out.transpose(1, 2).unflatten(2, x.shape[2:]) if images else out
