"""Additive attention of Fastformer."""

from __future__ import annotations

from torch import Tensor, nn

from swiftkernels.testing.peers.heads import choose_heads


class Fastformer(nn.Module):
    """Two poolings, of queries and of keys, [B, N, C] -> [B, N, C] (arXiv 2108.09084).

    Softmax over the tokens, with one score per head and token, computed from all channels as in the
    authors' code. The query is also the value. Scores have no bias: the softmax would cancel it.
    """

    def __init__(self, dim: int, num_heads: int | None = None) -> None:
        super().__init__()
        self.num_heads = choose_heads(dim, num_heads)
        self.scale = (dim // self.num_heads) ** -0.5
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.query_score = nn.Linear(dim, self.num_heads, bias=False)
        self.key_score = nn.Linear(dim, self.num_heads, bias=False)
        self.transform = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        p = self.key(x) * self._pool(q, self.query_score(q))
        return self.transform(q * self._pool(p, self.key_score(p))) + q

    def _pool(self, rows: Tensor, scores: Tensor) -> Tensor:
        """Each head's weighted mean over the tokens: [B, N, C] and [B, N, h] -> [B, 1, C]."""
        weights = (scores * self.scale).softmax(1)  # [B, N, h]
        heads = rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, h, N, d]
        return (weights.transpose(1, 2).unsqueeze(2) @ heads).flatten(1).unsqueeze(1)
