"""The weights and options of conv_mlp, as modules pass them to the kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

KERNEL_SIZES = (3, 5, 7)
"""Of the depthwise convolution."""


class Weights(NamedTuple):
    """A depthwise convolution and two linear layers, or 1x1 convolutions with weights
    [..., ..., 1, 1]; there may be no depthwise convolution, and biases and scale may be None."""

    depthwise_weight: Tensor | None
    """[C, 1, k, k]"""
    depthwise_bias: Tensor | None
    """[C]"""
    weight1: Tensor
    """[H, C]"""
    bias1: Tensor | None
    """[H]"""
    weight2: Tensor
    """[D, H]"""
    bias2: Tensor | None
    """[D]"""
    scale: Tensor | None = None
    """[D], times the output of the second layer."""

    @property
    def width(self) -> int:
        """C"""
        return self.weight1.shape[1]

    @property
    def token_dim(self) -> int:
        """D"""
        return self.weight2.shape[0]


class Options(NamedTuple):
    """What is computed besides the weights."""

    activation: str
    """A key of `reference.ACTIVATIONS`."""
    residual: bool
    """Whether x is added; D = C."""
