"""The compiled CPU kernels as a backend (`ops/operator.py`)."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from swiftkernels.backends import cache
from swiftkernels.backends.cpu import library, packing
from swiftkernels.backends.cpu.library import TYPES
from swiftkernels.backends.cpu.packing import FINGERPRINT, PackedPlan, Packer, packed_weights
from swiftkernels.ops.operator import Needs
from swiftkernels.ops.plan import Plans
from swiftkernels.ops.separable_attention.layouts import output_like, sequences_of
from swiftkernels.ops.separable_attention.weights import Options, Weights

# The structs of csrc/abi.h; of `struct PackedWeights` without the `Fingerprint` at its end.
_PACKED_WEIGHTS = struct.Struct("2q7P")
_RAW_WEIGHTS = struct.Struct("2q4P")
_SEQUENCES = "P4q"
_CALL = struct.Struct(f"5q{_SEQUENCES * 2}3P")
_BACKWARD_CALL = struct.Struct(f"5q{_SEQUENCES * 3}3Pq4P")

_NO_SEQUENCES = (0, 0, 0, 0, 0)
_NOT_SAVED = (0, 0, 0)

# csrc/abi.cpp exports the same numbers.
library.register_interface(
    "separable",
    {
        "revision": 1,
        "sizeof(PackedWeights)": _PACKED_WEIGHTS.size + FINGERPRINT.size,
        "sizeof(RawWeights)": _RAW_WEIGHTS.size,
        "sizeof(Call)": _CALL.size,
        "sizeof(BackwardCall)": _BACKWARD_CALL.size,
    },
)


kernels = library.kernels_of("separable")


class Saved(NamedTuple):
    """What the backward needs besides the inputs, in float32; B counts sequences."""

    context: Tensor
    """[B, C]"""
    pooled: Tensor
    """The mean of the tokens, weighted with the softmax of their scores, [B, C]."""
    softmax: Tensor
    """The highest score, and the sum of exp(score - highest), [B, 2]."""


def saved_like(inputs: Sequence[Tensor], weights: Weights, keep: str) -> Saved:
    """Uninitialised results that a forward saves; empty if no backward follows."""
    (x,) = inputs
    batch, groups, *_ = sequences_of(x)
    count = 0 if keep == "nothing" else batch * groups
    new = functools.partial(x.new_empty, dtype=torch.float32)
    return Saved(new(count, weights.width), new(count, weights.width), new(count, 2))


def forward(
    inputs: Sequence[Tensor], weights: Weights, mask: None, options: Options, keep: str
) -> tuple[Tensor, Saved]:
    """The output, [B, N, D] or [B, D, P, N], and what it saves; the weights are not packed."""
    (x,) = inputs
    out = x.new_empty_strided(*output_like(x, weights.token_dim))
    saved = saved_like(inputs, weights, keep)
    if out.numel() > 0:
        fields, _alive = _raw_weights(weights)
        call = _call_fields(x, out, None if keep == "nothing" else saved)
        library.check(kernels().swiftkernels_separable_forward_training(fields, call))
    return out, saved


def backward(
    dout: Tensor,
    inputs: Sequence[Tensor],
    weights: Weights,
    mask: None,
    saved: Saved,
    options: Options,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the four weights; None where not needed or without bias."""
    (x,) = inputs
    # Hooks of saved tensors may have changed strides and types.
    saved = Saved(*[library.dense(t, torch.float32) for t in saved])
    dx = torch.empty_like(x) if needs.inputs else None
    gradients = [
        None
        if w is None or not needs.weights
        else torch.empty_like(w, dtype=torch.float32, memory_format=torch.contiguous_format)
        for w in weights
    ]
    fields, _alive = _raw_weights(weights)
    call = _BACKWARD_CALL.pack(
        *_sizes(x), *_sequences(x), *_sequences(dout),
        *(_NO_SEQUENCES if dx is None else _sequences(dx)),
        *[t.data_ptr() for t in saved], needs.weights,
        *[0 if g is None else g.data_ptr() for g in gradients],
    )  # fmt: skip
    library.check(kernels().swiftkernels_separable_backward(fields, call))
    return dx, *[None if g is None else g.to(x.dtype) for g in gradients]


def _call_fields(x: Tensor, out: Tensor, saved: Saved | None) -> bytes:
    """`struct Call`."""
    pointers = _NOT_SAVED if saved is None else [t.data_ptr() for t in saved]
    return _CALL.pack(*_sizes(x), *_sequences(x), *_sequences(out), *pointers)


def _sizes(x: Tensor) -> tuple[int, ...]:
    """The first fields of the structs of a call."""
    s = sequences_of(x)
    return s.batch, s.groups, s.tokens, torch.get_num_threads(), TYPES[x.dtype]


def _sequences(t: Tensor) -> tuple[int, ...]:
    """`struct Sequences`."""
    return library.address("x", t), *sequences_of(t).strides


def _raw_weights(weights: Weights) -> tuple[bytes, list[Tensor | None]]:
    """`struct RawWeights`, and the tensors that must stay alive while it is used."""
    ready = packing.float32(weights)
    return _RAW_WEIGHTS.pack(weights.width, weights.token_dim, *packing.addresses(ready)), ready


def pack(packer: Packer, weights: Weights, dtype: torch.dtype) -> bytes:
    """`struct PackedWeights` of the weights rounded to dtype, without its `Fingerprint`."""
    rounded = [None if w is None else w.detach().to(dtype) for w in weights]
    qkv, qkv_bias, proj, proj_bias = rounded
    assert qkv is not None
    assert proj is not None
    width, token_dim = weights.width, weights.token_dim
    query, key, value = qkv.flatten(1).split([1, width, width])
    _, key_bias, value_bias = (None,) * 3 if qkv_bias is None else qkv_bias.split([1, width, width])
    return _PACKED_WEIGHTS.pack(
        width, token_dim, packer.rows(query), packer.rows(key), packer.vector(key_bias, width),
        packer.matrix(value.t()), packer.vector(value_bias, width),
        packer.matrix(proj.flatten(1).t()), packer.vector(proj_bias, token_dim),
    )  # fmt: skip


def inference_plan(
    x: Tensor,
    weights: Weights,
    mask: None,
    options: Options,
    residual_scale: None,
    plans: Plans,
) -> PackedPlan | None:
    """The plan for inputs like x, with packed weights; None where packing does not pay.

    It does not pay for weights that are computed at every call, such as those of a parametrization.
    """
    if not all(type(w) is Parameter for w in (weights.qkv_weight, weights.proj_weight)):
        return None
    slot = plans.slot(x.dtype, weights)
    packed = packed_weights(
        kernels(), slot, cache.present(weights), lambda packer: pack(packer, weights, x.dtype)
    )
    if packed is None:
        return None
    shape, strides = out = output_like(x, weights.token_dim)
    *sizes, _, x_strides = sequences_of(x)
    out_strides = sequences_of(torch.empty_strided(shape, strides, device="meta")).strides
    return PackedPlan(
        kernels().swiftkernels_separable_forward, _CALL, sizes, x, x_strides, out, out_strides,
        slot, zeros=len(_NOT_SAVED),
    )  # fmt: skip
