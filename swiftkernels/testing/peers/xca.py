"""Cross-covariance attention of XCiT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.testing.peers.heads import choose_heads


class CrossCovarianceAttention(nn.Module):
    """Attention between channels, [B, N, C] -> [B, N, C] (XCA, arXiv 2106.09681).

    q, k, v are [d, N] per head, the rows of q and k have norm 1, and softmax(q k^T * temperature)
    is d x d: linear in N. The temperature of each head is learned.
    """

    def __init__(self, dim: int, num_heads: int | None = None) -> None:
        super().__init__()
        self.num_heads = choose_heads(dim, num_heads)
        self.temperature = nn.Parameter(torch.ones(self.num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, h, d]
        q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)  # [B, h, d, N]
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)  # [B, h, d, d]
        out = (scores * self.temperature).softmax(-1) @ v  # [B, h, d, N]
        return self.proj(out.permute(0, 3, 1, 2).flatten(2))
