"""The weights of separable attention, as every backend takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """The two linear layers. Matrices may be those of 1x1 convolutions, [..., ..., 1, 1]."""

    qkv: Tensor
    """[1 + 2 C, C]: one row for the scores, then the keys, then the values."""
    qkv_bias: Tensor | None
    """[1 + 2 C]."""
    proj: Tensor
    """[D, C]."""
    proj_bias: Tensor | None
    """[D]."""


class Options(NamedTuple):
    """Nothing selects a variant of this operator."""
