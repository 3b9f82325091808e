"""conv_mlp in plain PyTorch: the definition every backend is tested against.

Shapes: B images, C channels, H hidden channels, D output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from swiftkernels.ops.conv_mlp.weights import Options, Weights

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
}
"""In the order of their numbers in C++, `Activation` in backends/cpu/csrc/activation.h."""


def as_convolution(weight: Tensor) -> Tensor:
    """The matrix of a linear layer as that of a 1x1 convolution."""
    return weight.view(*weight.shape[:2], 1, 1)


def depthwise(x: Tensor, weights: Weights) -> Tensor:
    """The k x k convolution of every channel by itself, with zeros around the image."""
    weight = weights.depthwise_weight
    if weight is None:
        return x
    padding = weight.shape[-1] // 2
    return F.conv2d(x, weight, weights.depthwise_bias, padding=padding, groups=weight.shape[0])


def conv_mlp(x: Tensor, weights: Weights, mask: None, options: Options) -> Tensor:
    """x + scale * W2 activation(W1 depthwise(x)), without `residual` only the second summand.

    [B, C, H, W] -> [B, D, H, W]. W1 and W2 are linear layers of every pixel. This is the
    convolutional encoder of SwiftFormer (arXiv 2303.15446, section 4), and without depthwise
    convolution, scale and residual its MLP; BatchNorms are folded into the weights.
    """
    hidden = F.conv2d(depthwise(x, weights), as_convolution(weights.weight1), weights.bias1)
    hidden = ACTIVATIONS[options.activation](hidden)
    out = F.conv2d(hidden, as_convolution(weights.weight2), weights.bias2)
    if weights.scale is not None:
        out = out * weights.scale[:, None, None]
    return x + out if options.residual else out
