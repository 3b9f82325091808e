"""The forward of training and the backward by the compiled kernels."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swiftkernels.backends.cpu import library
from swiftkernels.backends.cpu import packing as shared
from swiftkernels.backends.cpu.library import TYPES
from swiftkernels.backends.layouts import output_like, readable_tokens
from swiftkernels.ops.additive_attention.cpu import config, packing
from swiftkernels.ops.additive_attention.cpu.packing import FOLDED, PLAIN, TRIANGULAR
from swiftkernels.ops.additive_attention.reference import POOLINGS
from swiftkernels.ops.additive_attention.weights import Options, Weights
from swiftkernels.ops.operator import Needs

# `struct Call` and `struct BackwardCall` in csrc/abi.h.
_CALL = struct.Struct("6qP3qP3qP2q3P")
_BACKWARD_CALL = struct.Struct("9qP3qP3qP3qP2q12P")

# csrc/abi.cpp exports the same numbers.
library.register_interface(
    "additive",
    {
        "revision": 5,
        "sizeof(PackedWeights)": packing.PACKED_WEIGHTS.size + shared.FINGERPRINT.size,
        "sizeof(RawWeights)": packing.RAW_WEIGHTS.size,
        "sizeof(Call)": _CALL.size,
        "sizeof(BackwardCall)": _BACKWARD_CALL.size,
        "sizeof(Fingerprint)": shared.FINGERPRINT.size,
        "MAX_SOURCES": shared.MAX_SOURCES,
        **{name.upper(): code for code, name in enumerate(POOLINGS)},
        "PLAIN": PLAIN,
        "TRIANGULAR": TRIANGULAR,
        "FOLDED": FOLDED,
        "SHORT_SEQUENCE": config.SHORT_SEQUENCE,
    },
)


kernels = library.kernels_of("additive")


class Saved(NamedTuple):
    """What the backward needs besides the inputs; empty where nothing is saved."""

    global_query: Tensor
    """G, [B, E]"""
    statistics: Tensor
    """a, 1/|q| and 1/|k| [3, B, N], and 1/|s| [B], in one [B, 3 N + 1]."""
    unit_rows: Tensor
    """The normalised q and k, [2, B, N, E]; empty if the backward computes them again."""


def saved_like(inputs: Sequence[Tensor], weights: Weights, keep: str) -> Saved:
    """Uninitialised results that a forward saves."""
    (x,) = inputs
    if keep == "nothing":
        return Saved(x.new_empty(0), x.new_empty(0), x.new_empty(0))
    batch, n_tokens = x.shape[0], x.shape[1] if x.dim() == 3 else x.shape[2] * x.shape[3]
    return Saved(
        x.new_empty(batch, weights.width, dtype=torch.float32),
        x.new_empty(batch, 3 * n_tokens + 1, dtype=torch.float32),
        x.new_empty((2, batch, n_tokens, weights.width) if keep == "rows" else 0),
    )


def forward(
    inputs: Sequence[Tensor],
    weights: Weights,
    mask: Tensor | None,
    options: Options,
    keep: str,
) -> tuple[Tensor, Saved]:
    """The output, and what `keep` requires; the weights are not packed.

    For an image [B, C, H, W] the output is an image in channels_last memory format.
    """
    (x,) = inputs
    out = x.new_empty_strided(*output_like(x, weights.token_dim))
    saved = saved_like(inputs, weights, keep)
    if out.numel() > 0:
        fields, _alive = packing.raw_weights(weights, options)
        data, batch, n_tokens, strides = readable_tokens(x)
        *_, out_strides = readable_tokens(out)
        call = call_fields(
            batch, n_tokens, PLAIN, data, strides, out, out_strides, False, mask, saved
        )
        library.check(kernels().swiftkernels_additive_forward_training(fields, call))
    return out, saved


def call_fields(
    batch: int,
    n_tokens: int,
    form: int,
    x: Tensor,
    x_strides: tuple[int, ...],
    out: Tensor,
    out_strides: tuple[int, ...],
    adds_input: bool,
    mask: Tensor | None,
    saved: Saved | None = None,
) -> bytes:
    """`struct Call`; strides are of batch, token and channel."""
    return _CALL.pack(
        batch, n_tokens, form, torch.get_num_threads(), TYPES[x.dtype], adds_input,
        library.address("x", x), *x_strides, out.data_ptr(), *out_strides,
        *((0, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride())),
        *((0, 0, 0) if saved is None else [t.data_ptr() for t in saved]),
    )  # fmt: skip


def backward(
    dout: Tensor,
    inputs: Sequence[Tensor],
    weights: Weights,
    mask: Tensor | None,
    saved: Saved,
    options: Options,
    needs: Needs,
) -> list[Tensor | None]:
    """Gradients of x and the weights; None where not needed or without bias."""
    x, batch, n_tokens, strides = readable_tokens(inputs[0])
    dout, _, _, dout_strides = readable_tokens(dout)
    width = weights.width
    threads = torch.get_num_threads()
    grouped = n_tokens <= config.SHORT_SEQUENCE and config.backward_by_elements(
        batch, n_tokens, width, threads
    )
    # For few tokens in the batch, the products of E x E matrices after the moments cost too much.
    direct = grouped and batch * n_tokens < 2 * width
    # Hooks of saved tensors may have changed strides and types.
    saved = Saved(
        library.dense(saved.global_query, torch.float32),
        library.dense(saved.statistics, torch.float32),
        library.dense(saved.unit_rows, x.dtype),
    )
    folded = saved.unit_rows.numel() == 0 and config.folds_backward(batch, n_tokens, width)
    fields, ready = packing.raw_weights(weights, options)
    d_input = torch.empty_like(inputs[0]) if needs.inputs else None
    written, dx_fields = d_input, (0, 0, 0, 0)
    if d_input is not None:
        written, _, _, dx_strides = readable_tokens(d_input)
        dx_fields = (written.data_ptr(), *dx_strides)  # type: ignore[assignment]
    gradients: list[Tensor | None] = [None] * len(weights)
    if needs.weights:
        gradients = [None if w is None else torch.empty_like(w) for w in ready]
    call = _BACKWARD_CALL.pack(
        batch, n_tokens, grouped, threads, TYPES[x.dtype], direct, folded, needs.inputs,
        needs.weights,
        library.address("x", x), *strides, library.address("the gradient", dout), *dout_strides,
        *dx_fields,
        *((0, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride())),
        library.address("a saved tensor", saved.global_query), saved.statistics.data_ptr(),
        saved.unit_rows.data_ptr(),
        *[0 if g is None else g.data_ptr() for g in gradients],
    )  # fmt: skip
    library.check(kernels().swiftkernels_additive_backward(fields, call))
    if x.dtype != torch.float32:
        gradients = [None if g is None else g.to(x.dtype) for g in gradients]
    if d_input is not None and written is not None and written is not d_input:
        d_input.copy_(written)
    return [d_input, *gradients]
