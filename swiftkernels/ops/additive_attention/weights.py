"""Weights and options of additive attention, as modules pass them to the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swiftkernels.ops.types import Pooling


class OutputWeights(NamedTuple):
    """The weights of the operator on given queries and keys; biases may be None."""

    w_g: Tensor
    """Scoring vector, [E] or [E, 1]."""
    proj_weight: Tensor
    """[E, E]"""
    proj_bias: Tensor | None
    """[E]"""
    final_weight: Tensor
    """[D, E]"""
    final_bias: Tensor | None
    """[D]"""

    @property
    def width(self) -> int:
        """E"""
        return self.final_weight.shape[1]

    @property
    def token_dim(self) -> int:
        """D"""
        return self.final_weight.shape[0]


class Weights(NamedTuple):
    """The weights of a layer; biases may be None."""

    query_weight: Tensor
    """[E, C]"""
    query_bias: Tensor | None
    """[E]"""
    key_weight: Tensor
    """[E, C]"""
    key_bias: Tensor | None
    """[E]"""
    w_g: Tensor
    """Scoring vector, [E] or [E, 1]."""
    proj_weight: Tensor
    """[E, E]"""
    proj_bias: Tensor | None
    """[E]"""
    final_weight: Tensor
    """[D, E]"""
    final_bias: Tensor | None
    """[D]"""

    @property
    def in_dims(self) -> int:
        """C"""
        return self.query_weight.shape[1]

    @property
    def width(self) -> int:
        """E"""
        return self.final_weight.shape[1]

    @property
    def token_dim(self) -> int:
        """D"""
        return self.final_weight.shape[0]


AnyWeights = Weights | OutputWeights
"""Of the operator on tokens, or of that on given queries and keys."""


class Options(NamedTuple):
    """The variant of the operator."""

    pooling: Pooling
    """"l2", "softmax", "sum" or "linear": see `reference.pool_weights`."""
    qk_norm: bool
    """Divide the rows of q and k by their L2 norms."""
    scale: float
    """Factor of the scores, D ** -0.5 everywhere."""
    eps: float
    """Lower bound of every norm, 1e-12 everywhere."""


def pack_projections(
    wq: Tensor, bq: Tensor | None, wk: Tensor, bk: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The query and key layers as one layer: weight [2 E, C], bias [2 E] or None."""
    weight = torch.cat((wq, wk))
    if bq is None and bk is None:
        return weight, None
    if bq is None or bk is None:
        zeros = wq.new_zeros(wq.shape[0])
        bq, bk = zeros if bq is None else bq, zeros if bk is None else bk
    return weight, torch.cat((bq, bk))
