"""Folds BatchNorms in evaluation and scales into the layers next to them, in float64."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A BatchNorm in evaluation as x * scale + shift: scale and shift, [C] in float64."""
    n: Any = norm
    scale = torch.rsqrt(n.running_var.detach().double() + n.eps)
    if n.weight is not None:
        scale = scale * n.weight.detach().double()
    shift = -n.running_mean.detach().double() * scale
    return scale, shift if n.bias is None else shift + n.bias.detach().double()


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight [D, ...] and bias [D] of a convolution or a linear layer in float64."""
    weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
    weight = weight.detach().double()
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().double()


def norm_behind(weight: Tensor, bias: Tensor, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Fold a BatchNorm behind a layer into its weight [D, ...] and bias [D]."""
    if norm is None:
        return weight, bias
    scale, shift = affine(norm)
    return scaled(weight, scale), bias * scale + shift


def norm_before(weight: Tensor, bias: Tensor, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Fold a BatchNorm in front of a layer into its weight [D, C] and bias [D]."""
    if norm is None:
        return weight, bias
    scale, shift = affine(norm)
    return weight * scale, bias + weight @ shift


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """weight [D, ...] with its rows multiplied by scale [D]."""
    return weight * scale.reshape([-1] + [1] * (weight.dim() - 1))
