"""Additive attention as the benchmarks measure it: the sizes of the SwiftFormers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.ops.additive_attention.layer import AdditiveAttention
from swiftkernels.ops.additive_attention.op import SELF_ATTENTION
from swiftkernels.ops.benchmark import Benchmark, Size

IMAGE_SIZE = 224
"""Pixels of a side of the images that the networks classify."""

SWIFTFORMER_WIDTHS = {
    "XS": (48, 56, 112, 220),
    "S": (48, 64, 168, 224),
    "L1": (48, 96, 192, 384),
    "L3": (64, 128, 320, 512),
}
"""Channels in the four stages of each SwiftFormer."""


@dataclass(frozen=True)
class Stage:
    """A stage of a SwiftFormer, which ends in an additive attention."""

    model: str
    """A key of `SWIFTFORMER_WIDTHS`."""
    index: int
    """0 to 3"""

    @property
    def name(self) -> str:
        return f"{self.model}-{self.index + 1}"

    @property
    def width(self) -> int:
        """C"""
        return SWIFTFORMER_WIDTHS[self.model][self.index]

    @property
    def tokens(self) -> int:
        """N: the stem divides both sides of the image by 4, each further stage by 2."""
        return (IMAGE_SIZE // 4 // 2**self.index) ** 2


def _swiftformer_sizes() -> tuple[Size, ...]:
    """The different sizes of all stages, each named by the stages that have it."""
    shared: dict[tuple[int, int], list[Stage]] = {}
    for model in SWIFTFORMER_WIDTHS:
        for stage in (Stage(model, index) for index in range(4)):
            shared.setdefault((stage.tokens, stage.width), []).append(stage)
    return tuple(Size(*k, "/".join(s.name for s in own), own[0]) for k, own in shared.items())


class PublishedAttention(nn.Module):
    """The formula of additive attention, without checks.

    Scores are a column [B, N, 1]: OpenVINO's importer fails on the product with a vector.
    """

    def __init__(self, layer: AdditiveAttention) -> None:
        super().__init__()
        self.to_query, self.to_key = layer.to_query, layer.to_key
        self.w_g = layer.w_g  # [E, 1]
        self.proj, self.final = layer.proj, layer.final
        self.scale_factor = layer.scale_factor

    def forward(self, x: Tensor) -> Tensor:
        q = F.normalize(self.to_query(x), dim=-1)  # [B, N, E]
        k = F.normalize(self.to_key(x), dim=-1)
        weights = F.normalize((q @ self.w_g) * self.scale_factor, dim=1)  # [B, N, 1]
        G = (weights * q).sum(dim=1, keepdim=True)  # [B, 1, E]
        return self.final(self.proj(G * k) + q)


def _layer(width: int, backend: Any) -> nn.Module:
    return AdditiveAttention(width, backend=backend)


_SIZES = _swiftformer_sizes()

BENCHMARK = Benchmark(
    SELF_ATTENTION,
    layer=_layer,
    published=PublishedAttention,
    sizes=_SIZES,
    quick_sizes=tuple(s for s in _SIZES if s.name in ("XS-1/S-1/L1-1", "XS-3", "XS-4")),
)
