"""Separable self-attention of MobileViTv2."""

from __future__ import annotations

from torch import Tensor, nn


class SeparableAttention(nn.Module):
    """relu(value) times one pooled key, [B, N, C] -> [B, N, C] (arXiv 2206.02680).

    One score per token, softmax over the tokens, no heads. MobileViTv2 pools each of the four
    pixels of its 2x2 patches on its own; here all tokens are pooled together.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.qkv = nn.Linear(dim, 1 + 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).split([1, self.dim, self.dim], dim=-1)
        context = (query.softmax(1) * key).sum(1, keepdim=True)  # [B, 1, C]
        return self.proj(value.relu() * context)
