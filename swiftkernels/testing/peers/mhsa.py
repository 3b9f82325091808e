"""Multi-head self-attention, the quadratic one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.testing.peers.heads import choose_heads


class MultiHeadSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over the tokens, [B, N, C] -> [B, N, C] (arXiv 1706.03762).

    The softmax runs over N x N scores: quadratic in N. PyTorch's own fused attention computes it.
    """

    def __init__(self, dim: int, num_heads: int | None = None) -> None:
        super().__init__()
        self.num_heads = choose_heads(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, h, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, h, N, d]
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))
