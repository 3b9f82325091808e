"""The short way to the kernels, for small inputs: past the checks that a layer has passed before.

A call through `api.py` takes longer than the kernels do for a small image. It
leaves a note here, and as long as the layer's weights are of the same kind and stand where they
stood, the next calls need to look at the input alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftkernels.backends import torch_state
from swiftkernels.backends.layouts import as_image, as_tokens, output_like, tokens_of
from swiftkernels.ops import operator
from swiftkernels.ops.additive_attention.cpu import launch, packing
from swiftkernels.ops.additive_attention.cpu.packing import Weights
from swiftkernels.ops.additive_attention.reference import Options
from swiftkernels.ops.additive_attention.triton import config

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
    addresses: packing.Addresses
    shapes: tuple[torch.Size | None, ...]
    """These two of the weights."""
    by_address: bool
    """The Triton kernels can be started by these addresses."""
    prepared: dict[Any, Any]
    """By kinds of input: `_Prepared` or `_Sizes`."""

    def keep(self, kind: Any, prepared: Any) -> None:
        """Keep in mind what was prepared for a kind of input."""
        if len(self.prepared) >= MAX_KINDS:
            self.prepared.clear()
        self.prepared[kind] = prepared


def remember(layer: Weights, key: Key, chosen: str, options: Options, x: Tensor) -> None:
    """Note that a call with this layer and options on tokens like x passed all checks."""
    token_dim, width = layer.wf.shape
    notes = packing.layer_of(layer).notes
    before: Checked | None = notes.get(key)
    checked = Checked(
        backend=chosen,
        options=options,
        dtype=x.dtype,
        device=x.device,
        in_dims=x.shape[2],
        width=width,
        token_dim=token_dim,
        addresses=packing.addresses(layer),
        shapes=tuple(None if w is None else w.shape for w in layer),
        by_address=width <= config.MAX_PROJECTED_WIDTH
        and all(w is None or torch_state.fits_kernels(w) for w in layer),
        prepared={},
    )
    if before is not None and before._replace(prepared={}) == checked:
        return  # and what was prepared stays
    notes[key] = checked


def _note(x: Tensor, layer: Weights, key: Key) -> tuple[Checked, packing.KnownLayer] | None:
    """What is noted for a layer, if nothing but the kernels wants to see a call on x."""
    if type(x) is not Tensor or not torch_state.nothing_listens() or torch_state.any_autocast():
        return None
    known = packing.find_layer(layer.wq, layer.wf)
    checked = None if known is None else known.notes.get(key)
    if known is None or checked is None or x.dtype is not checked.dtype:
        return None
    if x.layout is not torch.strided or x.is_neg():
        return None
    return checked, known


def _fits(x: Tensor, checked: Checked, channels_first: bool) -> bool:
    """Whether x [B, N, C] or [B, C, H, W] needs no more checks either."""
    dims, channels = (4, 1) if channels_first else (3, 2)
    return (
        x.dim() == dims
        and x.shape[channels] == checked.in_dims
        and x.numel() > 0
        and x.device == checked.device
    )


def infer(x: Tensor, layer: Weights, key: Key, channels_first: bool) -> Tensor | None:
    """The output for x where no gradient is needed; None: take the long way.

    With a layer scale, x + scale * output.
    """
    noted = _note(x, layer, key)
    if noted is None:
        return None
    checked, known = noted
    if checked.backend == "cpu":
        return _infer_on_cpu(x, layer, checked, known, channels_first)
    if layer.layer_scale is not None or not _fits(x, checked, channels_first):
        return None
    if not _same_weights(layer, checked):
        return None
    out = _infer_by_triton(x, checked)
    if out is not None:
        return out
    op = operator.additive_self_attention
    return op.call((x, *layer[:9]), None, checked.options, checked.backend, "nothing")[0]


def _same_weights(layer: Weights, checked: Checked) -> bool:
    """Whether the weights, which may have been replaced through `.data`, are what was checked."""
    if packing.addresses(layer) != checked.addresses:
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
    if not (checked.by_address and torch_state.fits_kernels(x)):
        return None
    kind = (x.shape, x.stride(), checked.dtype is torch.float32 and torch_state.allow_tf32())
    prepared = checked.prepared.get(kind)
    if prepared is None:
        start = operator.implementation("triton").compiled_forward(
            x, checked.width, checked.token_dim, checked.addresses[:9], checked.options
        )
        if start is None:
            return None
        prepared = _Prepared(start, *output_like(x, checked.token_dim))
        checked.keep(kind, prepared)
    out = torch.empty_strided(
        prepared.shape, prepared.strides, dtype=checked.dtype, device=checked.device
    )
    prepared.start(x, out, checked.addresses)
    return out


class _Sizes(NamedTuple):
    """What the CPU kernels are told of one kind of input and its output."""

    batch: int
    n_tokens: int
    form: int
    key: Hashable
    """The `packing_key`."""
    x_strides: tuple[int, ...]
    """Of batch, token, channel; as the next."""
    out_strides: tuple[int, ...]
    out_layout: tuple[tuple[int, ...], tuple[int, ...]]
    """Shape and strides."""


def _infer_on_cpu(
    x: Tensor, layer: Weights, checked: Checked, known: packing.KnownLayer, channels_first: bool
) -> Tensor | None:
    """By the CPU kernels, which the packed weights lead to at once."""
    scaled = layer.layer_scale is not None
    kind = (x.shape, x.stride(), channels_first, scaled)
    sizes: _Sizes | None = checked.prepared.get(kind)
    if not x.is_cpu:
        return None
    if sizes is None:
        sizes = _sizes(x, checked, scaled) if _fits(x, checked, channels_first) else None
        if sizes is None:
            return None  # or rows of pixels with gaps: the long way makes a copy
        checked.keep(kind, sizes)
    form = sizes.form
    tensors = packing.present(layer)
    packed = known.find_packed(tensors, sizes.key)
    if packed is not None and packed.cancels:
        form = packing.PLAIN
        key = packing.packing_key(scaled, checked.options, form, checked.dtype)
        packed = known.find_packed(tensors, key)
    if packed is None:
        return None
    out = torch.empty_strided(*sizes.out_layout, dtype=checked.dtype, device="cpu")
    done = launch.call_forward(
        packed, sizes.batch, sizes.n_tokens, form, x, sizes.x_strides, out, sizes.out_strides,
        scaled,
    )  # fmt: skip
    return out if done else None


def _sizes(x: Tensor, checked: Checked, scaled: bool) -> _Sizes | None:
    layout = output_like(x, checked.token_dim)
    if scaled:
        like = torch.empty_like(x)
        layout = tuple(like.shape), like.stride()
    tokens, out = tokens_of(x.shape, x.stride()), tokens_of(*layout)
    if tokens is None or out is None:
        return None
    batch, n_tokens, _, x_strides = tokens
    form = launch.config.form(n_tokens, checked.in_dims, checked.width, checked.options.qk_norm)
    key = packing.packing_key(scaled, checked.options, form, checked.dtype)
    return _Sizes(batch, n_tokens, form, key, x_strides, out[3], layout)


def train(
    x: Tensor, layer: Weights, key: Key, channels_first: bool, recompute: bool | None
) -> Tensor | None:
    """The output for x, differentiable; None: take the long way."""
    noted = _note(x, layer, key)
    if noted is None or layer.layer_scale is not None:
        return None
    checked, _ = noted
    if not _fits(x, checked, channels_first) or not _same_weights(layer, checked):
        return None
    # The CPU kernels take tokens alone, and the long way saves those.
    flattens = channels_first and (checked.backend == "cpu" or torch_state.saves_through_hooks())
    out = operator.additive_self_attention(
        as_tokens(x) if flattens else x,
        *layer[:9],
        mask=None,
        options=checked.options,
        backend=checked.backend,
        recompute=recompute,
    )
    return as_image(out, x.shape[2:]) if flattens else out
