"""The steps of a chain: what a fused program computes, defined in plain PyTorch.

Shapes: B images, C channels, H x W a feature map. A step takes x [B, C, H, W] of any floating-point
type and of any height and width. BatchNorms, layer scales and the mean of several heads are folded
into the weights (`ops/folding.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftkernels.ops.additive_attention import reference
from swiftkernels.ops.additive_attention.weights import Options, Weights
from swiftkernels.ops.conv_mlp.reference import ACTIVATIONS as CONV_MLP_ACTIVATIONS
from swiftkernels.ops.conv_mlp.reference import conv_mlp
from swiftkernels.ops.conv_mlp.weights import Options as ConvMlpOptions
from swiftkernels.ops.conv_mlp.weights import Weights as ConvMlpWeights

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {**CONV_MLP_ACTIVATIONS, "relu6": F.relu6}
"""Of the steps besides `ConvMlp`, in the order of their numbers in C++, `Activation` in
backends/cpu/csrc/activation.h."""

GATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": F.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}
"""Of `SqueezeExcite`, in the order of their numbers in C++, `Gate` in csrc/abi.h."""

Tensors = Mapping[str, Any]
"""The tensors of a step by name, None where it has none."""


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
        """What the step alone computes, in PyTorch's operators, [B, C, H, W] -> [B, D, H', W']."""
        return self.compute(x, self.tensors())

    def compute(self, x: Tensor, t: Tensors) -> Tensor:
        """As `plain`, with these tensors instead of those of the step."""
        raise NotImplementedError

    @property
    def adds(self) -> int:
        """The number of steps from the one whose input is added to the output on to this one, which
        is one of them; 0 if nothing is added, or only by `compute`."""
        return 0

    @property
    def in_channels(self) -> int:
        """C of the input; 0 if any number will do."""
        return 0

    @classmethod
    def _tensor_fields(cls) -> list[dataclasses.Field[Any]]:
        return [field for field in dataclasses.fields(cls) if "Tensor" in str(field.type)]


@dataclass(frozen=True, eq=False)
class Stem(Step):
    """Two times a 3 x 3 convolution of stride 2 and padding 1, and an activation."""

    kind = "stem"

    weight1: Tensor
    """[C1, C, 3, 3]"""
    bias1: Tensor
    """[C1]"""
    weight2: Tensor
    """[D, C1, 3, 3]"""
    bias2: Tensor
    """[D]"""
    activation1: str = "relu"
    """A key of `ACTIVATIONS`."""
    activation2: str = "relu"

    def compute(self, x: Tensor, t: Tensors) -> Tensor:
        x = F.conv2d(x, t["weight1"], t["bias1"], stride=2, padding=1)
        x = ACTIVATIONS[self.activation1](x)
        x = F.conv2d(x, t["weight2"], t["bias2"], stride=2, padding=1)
        return ACTIVATIONS[self.activation2](x)

    @property
    def convolutions(self) -> tuple[Convolution, Convolution]:
        """The same as two steps."""
        return (
            Convolution(self.weight1, self.bias1, 2, 1, self.activation1),
            Convolution(self.weight2, self.bias2, 2, 1, self.activation2),
        )

    @property
    def in_channels(self) -> int:
        return self.weight1.shape[1]


@dataclass(frozen=True, eq=False)
class Convolution(Step):
    """A convolution of k x k with zeros around the image, an activation, and an earlier map."""

    kind = "convolution"

    weight: Tensor
    """[D, C, k, k]"""
    bias: Tensor
    """[D]"""
    stride: int = 2
    padding: int = 1
    activation: str = "none"
    adds: int = 0
    """See `Step.adds`; only without activation."""

    def compute(self, x: Tensor, t: Tensors) -> Tensor:
        out = F.conv2d(x, t["weight"], t["bias"], stride=self.stride, padding=self.padding)
        return ACTIVATIONS[self.activation](out)

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1]


@dataclass(frozen=True, eq=False)
class PartialConvolution(Step):
    """A 3 x 3 convolution, like `Convolution`, of the first c channels; the others stay."""

    kind = "partial_convolution"

    weight: Tensor
    """[c, c, k, k]"""
    bias: Tensor
    """[c]"""
    channels: int
    """C"""

    def compute(self, x: Tensor, t: Tensors) -> Tensor:
        weight = t["weight"]
        first, others = x.split([len(weight), x.shape[1] - len(weight)], dim=1)
        first = F.conv2d(first, weight, t["bias"], padding=weight.shape[-1] // 2)
        return torch.cat([first, others], dim=1)

    @property
    def in_channels(self) -> int:
        return self.channels


@dataclass(frozen=True, eq=False)
class Depthwise(Step):
    """A convolution of every channel by itself to m channels, with k // 2 zeros around the image,
    and an activation."""

    kind = "depthwise"

    weight: Tensor
    """[m C, 1, k, k], with k of `KERNEL_SIZES` in `ops/conv_mlp/weights.py`."""
    bias: Tensor
    """[m C]"""
    stride: int = 1
    activation: str = "none"
    multiplier: int = 1
    """m"""

    def compute(self, x: Tensor, t: Tensors) -> Tensor:
        weight = t["weight"]
        padding = weight.shape[-1] // 2
        out = F.conv2d(x, weight, t["bias"], self.stride, padding, groups=x.shape[1])
        return ACTIVATIONS[self.activation](out)

    @property
    def in_channels(self) -> int:
        return len(self.weight) // self.multiplier


@dataclass(frozen=True, eq=False)
class Normalise(Step):
    """weight * (x - mean) / sqrt(variance + eps) + bias, over the channels of each pixel, as
    LayerNorm, or over all numbers of an image, as GroupNorm with one group."""

    kind = "normalise"

    weight: Tensor
    """[C]"""
    bias: Tensor
    """[C]"""
    eps: float
    over_image: bool

    def compute(self, x: Tensor, t: Tensors) -> Tensor:
        if self.over_image:
            return F.group_norm(x, 1, t["weight"], t["bias"], self.eps)
        pixels = x.permute(0, 2, 3, 1)
        out = F.layer_norm(pixels, pixels.shape[-1:], t["weight"], t["bias"], self.eps)
        return out.permute(0, 3, 1, 2)

    @property
    def in_channels(self) -> int:
        return len(self.weight)


@dataclass(frozen=True, eq=False)
class Average(Step):
    """scale * (mean - x), where mean is that of the k x k pixels around, as far as they are in the
    image, and an earlier map: the pooling of PoolFormer."""

    kind = "average"

    scale: Tensor
    """[C]"""
    kernel: int
    adds: int = 0
    """See `Step.adds`."""

    def compute(self, x: Tensor, t: Tensors) -> Tensor:
        k = self.kernel
        mean = F.avg_pool2d(x, k, 1, k // 2, count_include_pad=False)
        return t["scale"].view(-1, 1, 1) * (mean - x)

    @property
    def in_channels(self) -> int:
        return len(self.scale)


@dataclass(frozen=True, eq=False)
class SqueezeExcite(Step):
    """x * gate(W2 activation(W1 mean(x))), with the mean over the pixels."""

    kind = "squeeze_excite"

    weight1: Tensor
    """[R, C]"""
    bias1: Tensor
    """[R]"""
    weight2: Tensor
    """[C, R]"""
    bias2: Tensor
    """[C]"""
    activation: str
    gate: str
    """A key of `GATES`."""

    def compute(self, x: Tensor, t: Tensors) -> Tensor:
        hidden = F.linear(x.mean((2, 3)), t["weight1"], t["bias1"])
        hidden = ACTIVATIONS[self.activation](hidden)
        gate = GATES[self.gate](F.linear(hidden, t["weight2"], t["bias2"]))
        return x * gate[:, :, None, None]

    @property
    def in_channels(self) -> int:
        return self.weight1.shape[1]


@dataclass(frozen=True, eq=False)
class ConvMlp(Step):
    """The operator `conv_mlp`, with a residual branch or without."""

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
    """A key of `ACTIVATIONS` in `ops/conv_mlp/reference.py`."""
    residual: bool
    adds: int = 0
    """See `Step.adds`; of a map before the input, which `residual` adds."""

    @property
    def options(self) -> ConvMlpOptions:
        return ConvMlpOptions(self.activation, self.residual)

    def compute(self, x: Tensor, t: Tensors) -> Tensor:
        return conv_mlp(x, ConvMlpWeights(**t), None, self.options)

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


def size_after(step: Step, height: int, width: int) -> tuple[int, int]:
    """Height and width of the map that a step makes.

    Raises:
        ValueError: a kernel is larger than the map.
    """
    if isinstance(step, Pool):
        return 1, 1
    if isinstance(step, Stem):
        for half in step.convolutions:
            height, width = size_after(half, height, width)
        return height, width
    if not isinstance(step, (Convolution, Depthwise)):
        return height, width
    kernel, stride = step.weight.shape[-1], step.stride
    padding = step.padding if isinstance(step, Convolution) else kernel // 2
    if min(height, width) + 2 * padding < kernel:
        raise ValueError(
            f"x must be large enough for a convolution of {kernel} x {kernel} pixels; its map has "
            f"{height} x {width}. Pass larger images."
        )
    return (height + 2 * padding - kernel) // stride + 1, (
        width + 2 * padding - kernel
    ) // stride + 1


def run(steps: Sequence[Step], x: Tensor, tensors: Sequence[Tensors] | None = None) -> Tensor:
    """What steps compute one after the other, in PyTorch's operators.

    Args:
        steps: of a chain or a block.
        x: [B, C, H, W]
        tensors: of the steps, instead of their own.
    """
    maps = [x]
    for number, step in enumerate(steps):
        out = step.compute(maps[-1], step.tensors() if tensors is None else tensors[number])
        maps.append(maps[-step.adds] + out if step.adds else out)
    return maps[-1]
