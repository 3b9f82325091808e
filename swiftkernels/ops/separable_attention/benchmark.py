"""Separable attention as the benchmarks measure it: the sizes of the MobileViTv2."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from swiftkernels.ops.benchmark import Benchmark, Size
from swiftkernels.ops.separable_attention.layer import SeparableAttention
from swiftkernels.ops.separable_attention.op import SEPARABLE_ATTENTION
from swiftkernels.ops.separable_attention.reference import separable_attention
from swiftkernels.ops.separable_attention.weights import Weights


class PublishedAttention(nn.Module):
    """The formula of separable attention, without checks."""

    def __init__(self, layer: SeparableAttention) -> None:
        super().__init__()
        self.qkv_proj, self.out_proj = layer.qkv_proj, layer.out_proj

    def forward(self, x: Tensor) -> Tensor:
        qkv, out = self.qkv_proj, self.out_proj
        return separable_attention(x, Weights(qkv.weight, qkv.bias, out.weight, out.bias))


def _layer(width: int, backend: Any) -> nn.Module:
    return SeparableAttention(width, backend=backend)


_SIZES = tuple(
    Size((256, 64, 16)[stage], width, f"{model}-{stage + 1}")
    for model, widths in {
        "0.5": (64, 96, 128),
        "1.0": (128, 192, 256),
        "2.0": (256, 384, 512),
    }.items()
    for stage, width in enumerate(widths)
)
"""Patches and channels of the three stages of MobileViTv2 that attend, for images of 256 x 256
pixels; each image has four sequences."""

BENCHMARK = Benchmark(
    SEPARABLE_ATTENTION,
    layer=_layer,
    published=PublishedAttention,
    sizes=_SIZES,
    quick_sizes=_SIZES[3:6],
)
