"""Separable self-attention of MobileViTv2, not fused."""

from __future__ import annotations

from torch import Tensor, nn

from swiftkernels.ops.separable_attention.reference import separable_attention
from swiftkernels.ops.separable_attention.weights import Weights


class SeparableAttention(nn.Module):
    """relu(value) times one pooled key, [B, N, C] -> [B, N, C] (arXiv 2206.02680).

    One score per token, softmax over the tokens, no heads. MobileViTv2 pools each of the four
    pixels of its 2x2 patches separately; here all tokens are pooled together.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 1 + 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv, proj = self.qkv, self.proj
        return separable_attention(x, Weights(qkv.weight, qkv.bias, proj.weight, proj.bias))
