"""The backward of conv_mlp in PyTorch's operators: the same that autograd runs on the definition.

Nothing but x and the weights is kept from the forward: the backward computes the hidden channels
again. It is not written by autograd on the definition, because a registered operator runs below
autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftkernels.ops.conv_mlp import reference
from swiftkernels.ops.conv_mlp.weights import Options, Weights
from swiftkernels.ops.operator import Needs

aten = torch.ops.aten

_ACTIVATION_BACKWARDS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda dout, x: dout,
    "relu": lambda dout, x: aten.threshold_backward(dout, x, 0),
    "gelu": aten.gelu_backward,
    "gelu_tanh": partial(aten.gelu_backward, approximate="tanh"),
    "silu": aten.silu_backward,
    "hardswish": aten.hardswish_backward,
}


class Saved(NamedTuple):
    """The backward needs nothing besides the inputs."""


def saved_like(inputs: Sequence[Tensor], weights: Weights, keep: str) -> Saved:
    """Nothing."""
    return Saved()


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
    (x,) = inputs
    depthwise, _, weight1, bias1, *_ = weights
    if x.is_contiguous():
        dout = dout.contiguous()  # PyTorch's convolutions are fastest where all formats are equal
    convolved = reference.depthwise(x, weights)
    hidden = F.conv2d(convolved, reference.as_convolution(weight1), bias1)
    activated = reference.ACTIVATIONS[options.activation](hidden)
    weight2 = scaled_weight2(weights)
    dhidden, dweight2, dbias2 = _convolution(dout, activated, weight2, True, needs.weights)
    dhidden = _ACTIVATION_BACKWARDS[options.activation](dhidden, hidden)
    need_convolved = needs.inputs or (needs.weights and depthwise is not None)
    dx, *first = _convolution(dhidden, convolved, weight1, need_convolved, needs.weights)
    around: list[Any] = [None, None]
    if depthwise is not None:
        dx, *around = _convolution(dx, x, depthwise, needs.inputs, needs.weights)
    if needs.inputs:
        dx = torch.empty_like(x).copy_(dx + dout if options.residual else dx)
    second: list[Tensor | None] = [None] * 3
    if needs.weights:
        second = of_second_layer(dweight2, dbias2, weights)
    gradients = [
        None if w is None or g is None else g.reshape(w.shape).contiguous()
        for w, g in zip(weights, (*around, *first, *second), strict=True)
    ]
    return [dx if needs.inputs else None, *gradients]


def scaled_weight2(weights: Weights) -> Tensor:
    """W2 [D, H] or [D, H, 1, 1], with the scale multiplied in."""
    weight, scale = weights.weight2, weights.scale
    return weight if scale is None else weight * scale.view(-1, *[1] * (weight.dim() - 1))


def of_second_layer(dweight: Tensor, dbias: Tensor | None, weights: Weights) -> list[Tensor | None]:
    """The gradients of W2, b2 and the scale.

    Args:
        dweight, dbias: the gradients of diag(scale) W2 and of scale b2.
        weights: of the operator.
    """
    _, _, _, _, weight2, bias2, scale = weights
    if scale is None:
        return [dweight, dbias, None]
    dweight = dweight.view(weight2.shape)
    dscale = (dweight * weight2).flatten(1).sum(1)
    if bias2 is not None and dbias is not None:
        dscale = dscale + dbias * bias2
        dbias = dbias * scale
    return [scaled_weight2(weights._replace(weight2=dweight)), dbias, dscale]


def _convolution(
    dout: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> list[Tensor]:
    """The gradients of a pointwise or a depthwise convolution: of x, the weight and the bias."""
    groups, padding = 1, 0
    if weight.shape[2:] in ((), (1, 1)):
        weight = reference.as_convolution(weight)
    else:
        groups, padding = weight.shape[0], weight.shape[-1] // 2
    mask = [needs_x, needs_weight, needs_weight]
    found: list[Tensor] = aten.convolution_backward(
        dout, x, weight, [weight.shape[0]], [1, 1], [padding] * 2, [1, 1], False, [0, 0], groups,
        mask,
    )  # fmt: skip
    return list(found)
