"""Linear attention of Katharopoulos et al."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.testing.peers.heads import choose_heads


class LinearAttention(nn.Module):
    """phi(q) (phi(k)^T v) / (phi(q) . sum phi(k)), [B, N, C] -> [B, N, C] (arXiv 2006.16236).

    phi = elu + 1 replaces the softmax. So the d x d product k^T v comes first: linear in N.
    """

    def __init__(self, dim: int, num_heads: int | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_heads = choose_heads(dim, num_heads)
        self.eps = eps
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, h, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, h, N, d]
        q, k = F.elu(q) + 1, F.elu(k) + 1
        # Numerator and denominator are divided by N: sums of thousands of tokens overflow float16.
        n_tokens = x.shape[1]
        k_mean = k.mean(2).unsqueeze(-1)  # [B, h, d, 1]
        kv_mean = k.transpose(-2, -1) @ v / n_tokens  # [B, h, d, d]
        out = q @ kv_mean / (q @ k_mean + self.eps / n_tokens)
        return self.proj(out.transpose(1, 2).flatten(2))
