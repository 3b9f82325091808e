"""The weights of separable attention, as modules pass them to the kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """Two linear layers, or 1x1 convolutions with weights [..., ..., 1, 1]; biases may be None."""

    qkv_weight: Tensor
    """[1 + 2 C, C]: the row of the scores, then keys, then values."""
    qkv_bias: Tensor | None
    """[1 + 2 C]"""
    proj_weight: Tensor
    """[D, C]"""
    proj_bias: Tensor | None
    """[D]"""

    @property
    def width(self) -> int:
        """C"""
        return self.qkv_weight.shape[1]

    @property
    def token_dim(self) -> int:
        """D"""
        return self.proj_weight.shape[0]


class Options(NamedTuple):
    """This operator has no variants."""
