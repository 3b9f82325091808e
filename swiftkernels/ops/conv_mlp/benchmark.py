"""conv_mlp as the benchmarks measure it: the convolutional blocks of SwiftFormer XS and L1."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.ops.benchmark import Benchmark, Size
from swiftkernels.ops.conv_mlp.layer import ConvMlp
from swiftkernels.ops.conv_mlp.op import CONV_MLP


class PublishedBlock(nn.Module):
    """The convolutional encoder of SwiftFormer, without checks."""

    def __init__(self, layer: ConvMlp) -> None:
        super().__init__()
        self.dwconv, self.norm = layer.dwconv, layer.norm
        self.pwconv1, self.pwconv2 = layer.pwconv1, layer.pwconv2
        self.layer_scale = layer.layer_scale

    def forward(self, x: Tensor) -> Tensor:
        assert self.dwconv is not None
        assert self.norm is not None
        hidden = self.pwconv1(self.norm(self.dwconv(x)))
        out: Tensor = x + self.layer_scale * self.pwconv2(F.gelu(hidden))
        return out


def _layer(width: int, backend: Any) -> nn.Module:
    return ConvMlp(width, backend=backend)


def _shape(size: Size, batch: int) -> tuple[int, ...]:
    side = math.isqrt(size.tokens)
    return batch, size.width, side, size.tokens // side


_SIZES = tuple(
    Size(tokens, width, f"{model}-{stage + 1}", stage)
    for model, widths in {"XS": (48, 56, 112, 220), "L1": (48, 96, 192, 384)}.items()
    for stage, (tokens, width) in enumerate(zip((3136, 784, 196, 49), widths, strict=True))
    if (model, stage) != ("L1", 0)  # the same as in XS
)
"""Pixels and channels of the four stages, for images of 224 x 224 pixels."""

BENCHMARK = Benchmark(
    CONV_MLP,
    layer=_layer,
    published=PublishedBlock,
    sizes=_SIZES,
    quick_sizes=_SIZES[:4:3],
    shape=_shape,
)
