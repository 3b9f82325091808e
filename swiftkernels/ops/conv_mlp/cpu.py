"""The compiled CPU kernels as a backend (`ops/operator.py`).

The backward with a depthwise convolution is PyTorch's (`gradients.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from swiftkernels.backends import cache
from swiftkernels.backends.cpu import library
from swiftkernels.backends.cpu.library import TYPES
from swiftkernels.backends.cpu.packing import (
    FINGERPRINT,
    NEVER_STALE,
    PackedPlan,
    Packer,
    packed_weights,
)
from swiftkernels.backends.layouts import image_strides, output_like, readable_tokens
from swiftkernels.ops.conv_mlp import gradients
from swiftkernels.ops.conv_mlp.gradients import Saved, saved_like
from swiftkernels.ops.conv_mlp.reference import ACTIVATIONS
from swiftkernels.ops.conv_mlp.weights import Options, Weights
from swiftkernels.ops.operator import Needs
from swiftkernels.ops.plan import Plans

__all__ = ["Saved", "backward", "forward", "inference_plan", "pack", "packed_plan", "saved_like"]

# The structs of csrc/abi.h; of `struct PackedWeights` without the `Fingerprint` at its end.
_PACKED_WEIGHTS = struct.Struct("7q5P")
_CALL = struct.Struct("5qP4qP4q")
_PACK_CALL = struct.Struct("qP")
_RAW_WEIGHTS = struct.Struct("5q5P")
_BACKWARD_CALL = struct.Struct("4qP3qP3qP3q5P")

BLOCK = 128
"""Most hidden channels that are computed together; their tile stays in the second-level cache."""

_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}

library.register_interface(
    "conv_mlp",
    {
        "revision": 4,
        "sizeof(PackedWeights)": _PACKED_WEIGHTS.size + FINGERPRINT.size,
        "sizeof(Call)": _CALL.size,
        "sizeof(PackCall)": _PACK_CALL.size,
        "sizeof(RawWeights)": _RAW_WEIGHTS.size,
        "sizeof(BackwardCall)": _BACKWARD_CALL.size,
        **_CODES,
    },
)

kernels = library.kernels_of("conv_mlp", "pack", "forward", "backward")


def pack(packer: Packer, weights: Weights, options: Options) -> bytes:
    """`struct PackedWeights` without its fingerprint."""
    depthwise_weight, depthwise_bias, weight1, bias1, _, bias2, scale = weights
    hidden, in_dims = weight1.shape[:2]
    out_dims = weights.token_dim
    blocks = -(-hidden // BLOCK)
    block = -(-hidden // blocks // packer.lanes) * packer.lanes
    matrices = packer.buffer(
        sum(
            packer.panel_floats(in_dims, count) + packer.panel_floats(count, out_dims)
            for count in (min(block, hidden - at) for at in range(0, hidden, block))
        )
    )
    raw, _kept = _raw_weights(weights, options)
    packer.library.swiftkernels_conv_mlp_pack(raw, _PACK_CALL.pack(block, matrices.data_ptr()))
    if scale is not None and bias2 is not None:
        bias2 = bias2.float() * scale.float()
    kernel, depthwise, zeros_or_bias = 0, 0, 0
    if depthwise_weight is not None:
        kernel = depthwise_weight.shape[-1]
        depthwise = packer.rows(depthwise_weight.reshape(in_dims, -1).t())
        zeros_or_bias = packer.vector(depthwise_bias, in_dims)
    return _PACKED_WEIGHTS.pack(
        in_dims, hidden, out_dims, kernel, _CODES[options.activation], options.residual, block,
        depthwise, zeros_or_bias, matrices.data_ptr(), packer.vector(bias1, hidden),
        packer.vector(bias2, out_dims),
    )  # fmt: skip


def _raw_weights(weights: Weights, options: Options) -> tuple[bytes, list[Tensor | None]]:
    """`struct RawWeights`, and the tensors that it points to."""
    raw = [None if w is None else library.dense(w, torch.float32) for w in weights[2:]]
    fields = _RAW_WEIGHTS.pack(
        weights.width, len(weights.weight1), weights.token_dim, _CODES[options.activation],
        options.residual, *[0 if w is None else w.data_ptr() for w in raw],
    )  # fmt: skip
    return fields, raw


def forward(
    inputs: Sequence[Tensor], weights: Weights, mask: None, options: Options, keep: str
) -> tuple[Tensor, Saved]:
    """The output in channels_last memory format; the weights are packed for this call."""
    (x,) = inputs
    out = x.new_empty_strided(*output_like(x, weights.token_dim))
    if out.numel() > 0:
        packer = Packer(kernels())
        fields = pack(packer, weights, options) + NEVER_STALE
        call = _CALL.pack(
            *_sizes(x), torch.get_num_threads(), TYPES[x.dtype], library.address("x", x),
            *image_strides(x), out.data_ptr(), *image_strides(out),
        )  # fmt: skip
        library.check(kernels().swiftkernels_conv_mlp_forward(fields, call))
    return out, Saved()


def backward(
    dout: Tensor,
    inputs: Sequence[Tensor],
    weights: Weights,
    mask: None,
    saved: Saved,
    options: Options,
    needs: Needs,
) -> list[Tensor | None]:
    """Gradients of x and of the weights; None where not needed or without bias."""
    if weights.depthwise_weight is not None:
        return gradients.backward(dout, inputs, weights, mask, saved, options, needs)
    x, *sizes, x_strides = readable_tokens(inputs[0])
    dout, *_, dout_strides = readable_tokens(dout)
    raw, _kept = _raw_weights(weights, options)
    d_weights = [None if w is None or not needs.weights else w.new_empty(w.shape) for w in weights]
    dx = torch.empty_like(inputs[0]) if needs.inputs else None
    written, dx_fields = dx, (0, 0, 0, 0)
    if dx is not None:
        written, *_, dx_strides = readable_tokens(dx)
        dx_fields = (written.data_ptr(), *dx_strides)  # type: ignore[assignment]
    call = _BACKWARD_CALL.pack(
        *sizes, torch.get_num_threads(), TYPES[x.dtype], library.address("x", x), *x_strides,
        library.address("the gradient", dout), *dout_strides, *dx_fields,
        *[0 if g is None else g.data_ptr() for g in d_weights[2:]],
    )  # fmt: skip
    library.check(kernels().swiftkernels_conv_mlp_backward(raw, call))
    if dx is not None and written is not None and written is not dx:
        dx.copy_(written)
    return [dx, *d_weights]


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """The first fields of `struct Call`."""
    batch, _, height, width = x.shape
    return batch, height, width


def inference_plan(
    x: Tensor, weights: Weights, mask: None, options: Options, residual_scale: None, plans: Plans
) -> PackedPlan | None:
    """The plan for inputs like x, with packed weights; None where packing does not pay.

    It does not pay for weights that are computed at every call, such as those of a parametrization.
    """
    if not all(type(w) is Parameter for w in (weights.weight1, weights.weight2)):
        return None
    return packed_plan(x, weights, lambda: weights, weights.token_dim, options, plans)


def packed_plan(
    x: Tensor,
    watched: tuple[Tensor | None, ...],
    weights: Callable[[], Weights],
    token_dim: int,
    options: Options,
    plans: Plans,
) -> PackedPlan | None:
    """The plan for inputs like x; None where packing does not pay.

    Args:
        x: [B, C, H, W]
        watched: the tensors that `weights` reads. The plan is called with these.
        weights: computes the weights; it is called when they are packed.
        token_dim: D
        options: of the operator.
        plans: keep the packed weights.
    """
    slot = plans.slot((x.dtype, options), watched)
    packed = packed_weights(
        kernels(), slot, cache.present(watched), lambda packer: pack(packer, weights(), options)
    )
    if packed is None:
        return None
    shape, strides = out = output_like(x, token_dim)
    like = torch.empty_strided(shape, strides, device="meta")
    return PackedPlan(
        kernels().swiftkernels_conv_mlp_forward, _CALL, _sizes(x), x, image_strides(x), out,
        image_strides(like), slot,
    )  # fmt: skip
