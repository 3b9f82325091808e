"""The operators that the benchmarks measure: how to make their layers, and at which sizes.

A further operator is one more `Operator` in `OPERATORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.ops.additive_attention.layer import AdditiveAttention
from swiftkernels.ops.additive_attention.op import SELF_ATTENTION
from swiftkernels.ops.separable_attention import op as separable
from swiftkernels.ops.separable_attention.layer import SeparableAttention
from swiftkernels.ops.separable_attention.reference import separable_attention
from swiftkernels.ops.separable_attention.weights import Weights

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


class Size(NamedTuple):
    """Tokens and width of an input [B, N, C]."""

    tokens: int
    """N"""
    width: int
    """C"""
    name: str = ""
    stage: Stage | None = None
    """The first stage with this size; None if there is none."""


def _swiftformer_sizes() -> tuple[Size, ...]:
    """The different sizes of all stages, each named by the stages that have it."""
    shared: dict[tuple[int, int], list[Stage]] = {}
    for model in SWIFTFORMER_WIDTHS:
        for stage in (Stage(model, index) for index in range(4)):
            shared.setdefault((stage.tokens, stage.width), []).append(stage)
    return tuple(Size(*k, "/".join(s.name for s in own), own[0]) for k, own in shared.items())


@dataclass(frozen=True)
class Operator:
    """An operator [B, N, C] -> [B, N, C] of this library."""

    name: str
    layer: Callable[[int, str], nn.Module]
    """The layer from its width C and a backend, with weights drawn from torch's generator."""
    choose_backend: Callable[[str, Tensor], str]
    """The backend that runs where this one is asked for, for an input."""
    published: Callable[[nn.Module], nn.Module]
    """The layer as its authors publish it, with the weights of one by `layer`. It needs nothing but
    operators of PyTorch that export to ONNX."""
    sizes: tuple[Size, ...]
    """The sizes at which networks use the operator."""
    quick_sizes: tuple[Size, ...]
    """Some of `sizes`, for a short run."""


class _PublishedAdditive(nn.Module):
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


def _additive_layer(width: int, backend: Any) -> nn.Module:
    return AdditiveAttention(width, width, num_heads=1, backend=backend)


def _choose_additive_backend(backend: str, x: Tensor) -> str:
    return SELF_ATTENTION.choose_backend(backend, x, x.shape[-1])


def _published_additive(layer: nn.Module) -> nn.Module:
    assert isinstance(layer, AdditiveAttention)
    return _PublishedAdditive(layer)


_SIZES = _swiftformer_sizes()

ADDITIVE_ATTENTION = Operator(
    "additive_attention",
    layer=_additive_layer,
    choose_backend=_choose_additive_backend,
    published=_published_additive,
    sizes=_SIZES,
    quick_sizes=tuple(s for s in _SIZES if s.name in ("XS-1/S-1/L1-1", "XS-3", "XS-4")),
)


class _PublishedSeparable(nn.Module):
    """The formula of separable attention, without checks."""

    def __init__(self, layer: SeparableAttention) -> None:
        super().__init__()
        self.qkv_proj, self.out_proj = layer.qkv_proj, layer.out_proj

    def forward(self, x: Tensor) -> Tensor:
        qkv, out = self.qkv_proj, self.out_proj
        return separable_attention(x, Weights(qkv.weight, qkv.bias, out.weight, out.bias))


def _separable_layer(width: int, backend: Any) -> nn.Module:
    return SeparableAttention(width, backend=backend)


def _choose_separable_backend(backend: str, x: Tensor) -> str:
    return separable.SEPARABLE_ATTENTION.choose_backend(backend, x, x.shape[-1])


def _published_separable(layer: nn.Module) -> nn.Module:
    assert isinstance(layer, SeparableAttention)
    return _PublishedSeparable(layer)


_MOBILEVIT_SIZES = tuple(
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

SEPARABLE_ATTENTION = Operator(
    "separable_attention",
    layer=_separable_layer,
    choose_backend=_choose_separable_backend,
    published=_published_separable,
    sizes=_MOBILEVIT_SIZES,
    quick_sizes=_MOBILEVIT_SIZES[3:6],
)

OPERATORS = {o.name: o for o in (ADDITIVE_ATTENTION, SEPARABLE_ATTENTION)}
