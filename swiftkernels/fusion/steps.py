"""The steps of a chain: what a fused program computes, defined in plain PyTorch.

Shapes: B images, C channels, H x W a feature map. A step takes x [B, C, H, W] of any floating-point
type and of any height and width. BatchNorms, layer scales and the mean of several heads are folded
into the weights; the functions at the end fold in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.ops.additive_attention import reference
from swiftkernels.ops.additive_attention.weights import Options, Weights

Tensors = Mapping[str, Any]
"""The tensors of a step by name, None where it has none."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "none": lambda x: x,
}
"""What stands between the two products of a `ConvMlp`, by name."""

KERNEL_SIZES = (3, 5, 7)
"""Of the depthwise convolutions that a `ConvMlp` may have."""


@dataclass(frozen=True, eq=False)
class Step:
    """A step of a chain: named tensors, options, and the definition of what it computes."""

    kind: ClassVar[str]

    def tensors(self) -> dict[str, Tensor | None]:
        """The tensors by name, in a fixed order."""
        return {field.name: getattr(self, field.name) for field in self._tensor_fields()}

    def with_tensors(self, tensors: Tensors) -> Step:
        """The same step with other tensors, by the names of `tensors()`."""
        return dataclasses.replace(self, **tensors)

    def plain(self, x: Tensor) -> Tensor:
        """What the step computes, in PyTorch's operators, [B, C, H, W] -> [B, D, H', W']."""
        return self.compute(x, self.tensors())

    def compute(self, x: Tensor, t: Tensors) -> Tensor:
        """As `plain`, with these tensors instead of those of the step."""
        raise NotImplementedError

    @property
    def in_channels(self) -> int:
        """C of the input; 0 if any number will do."""
        return 0

    @classmethod
    def _tensor_fields(cls) -> list[dataclasses.Field[Any]]:
        return [field for field in dataclasses.fields(cls) if "Tensor" in str(field.type)]


@dataclass(frozen=True, eq=False)
class Stem(Step):
    """Two times a 3 x 3 convolution of stride 2 and padding 1, and ReLU."""

    kind = "stem"

    weight1: Tensor
    """[C1, C, 3, 3]"""
    bias1: Tensor
    """[C1]"""
    weight2: Tensor
    """[D, C1, 3, 3]"""
    bias2: Tensor
    """[D]"""

    def compute(self, x: Tensor, t: Tensors) -> Tensor:
        x = F.relu(F.conv2d(x, t["weight1"], t["bias1"], stride=2, padding=1))
        return F.relu(F.conv2d(x, t["weight2"], t["bias2"], stride=2, padding=1))

    @property
    def in_channels(self) -> int:
        return self.weight1.shape[1]


@dataclass(frozen=True, eq=False)
class Convolution(Step):
    """A 3 x 3 convolution of stride 2 and padding 1: a downsampling."""

    kind = "convolution"

    weight: Tensor
    """[D, C, 3, 3]"""
    bias: Tensor
    """[D]"""

    def compute(self, x: Tensor, t: Tensors) -> Tensor:
        return F.conv2d(x, t["weight"], t["bias"], stride=2, padding=1)

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1]


@dataclass(frozen=True, eq=False)
class ConvMlp(Step):
    """x + weight2 activation(weight1 depthwise(x)), without `residual` only the second summand.

    The depthwise convolution is k x k with stride 1 and zeros around the map, as wide and high as
    x; without `depthwise_weight` there is none.
    """

    kind = "conv_mlp"

    depthwise_weight: Tensor | None
    """[C, 1, k, k]"""
    depthwise_bias: Tensor | None
    """[C]"""
    weight1: Tensor
    """[H, C]"""
    bias1: Tensor
    """[H]"""
    weight2: Tensor
    """[C, H]"""
    bias2: Tensor
    """[C]"""
    activation: str
    """A key of `ACTIVATIONS`."""
    residual: bool

    def compute(self, x: Tensor, t: Tensors) -> Tensor:
        out, depthwise, weight1, weight2 = x, t["depthwise_weight"], t["weight1"], t["weight2"]
        if depthwise is not None:
            channels, _, _, k = depthwise.shape
            out = F.conv2d(out, depthwise, t["depthwise_bias"], padding=k // 2, groups=channels)
        out = F.conv2d(out, weight1[:, :, None, None], t["bias1"])
        out = F.conv2d(ACTIVATIONS[self.activation](out), weight2[:, :, None, None], t["bias2"])
        return x + out if self.residual else out

    @property
    def in_channels(self) -> int:
        return self.weight1.shape[1]


@dataclass(frozen=True, eq=False)
class Attention(Step):
    """x + residual_scale * attention(x): additive attention over the pixels, C channels in and out.

    The weights are those of the layer.
    """

    kind = "attention"

    weights: Weights
    options: Options
    residual_scale: Tensor | None
    """[C]; None for 1."""

    def tensors(self) -> dict[str, Tensor | None]:
        return {**self.weights._asdict(), "residual_scale": self.residual_scale}

    def with_tensors(self, tensors: Tensors) -> Attention:
        weights = Weights(*[tensors[name] for name in Weights._fields])
        return Attention(weights, self.options, tensors["residual_scale"])

    def compute(self, x: Tensor, t: Tensors) -> Tensor:
        weights = Weights(*[t[name] for name in Weights._fields])
        tokens = x.flatten(2).transpose(1, 2)
        out = reference.additive_self_attention(tokens, weights, None, self.options)
        scale = t["residual_scale"]
        if scale is not None:
            out = scale * out
        return x + out.transpose(1, 2).reshape(x.shape)

    @property
    def in_channels(self) -> int:
        return self.weights.in_dims


@dataclass(frozen=True, eq=False)
class Pool(Step):
    """The mean over the pixels, [B, C, H, W] -> [B, C, 1, 1]."""

    kind = "pool"

    def compute(self, x: Tensor, t: Tensors) -> Tensor:
        return x.mean((2, 3), keepdim=True)


@dataclass(frozen=True, eq=False)
class Linear(Step):
    """A linear layer on pooled features, [B, C, 1, 1] -> [B, K, 1, 1]."""

    kind = "linear"

    weight: Tensor
    """[K, C]"""
    bias: Tensor
    """[K]"""

    def compute(self, x: Tensor, t: Tensors) -> Tensor:
        return F.linear(x.flatten(1), t["weight"], t["bias"])[:, :, None, None]

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1]


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
