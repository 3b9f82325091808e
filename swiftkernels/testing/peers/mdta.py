"""Multi-Dconv head transposed attention of Restormer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.testing.peers.heads import choose_heads


class MDTA(nn.Module):
    """XCA after a depthwise 3x3 convolution, [B, N, C] -> [B, N, C] (arXiv 2111.09881).

    The convolution needs the grid (H, W) of the tokens, N = H * W: by default a square. Restormer's
    networks have no biases.
    """

    def __init__(self, dim: int, num_heads: int | None = None) -> None:
        super().__init__()
        self.num_heads = choose_heads(dim, num_heads)
        self.temperature = nn.Parameter(torch.ones(self.num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.depthwise = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Attend.

        Raises:
            ValueError: N is not H * W, or not a square if no grid is given.
        """
        grid = _check_grid(x.shape[1], grid)
        image = x.transpose(1, 2).unflatten(2, grid)  # [B, C, H, W]
        qkv = self.depthwise(self.qkv(image)).flatten(2)  # [B, 3C, N]
        q, k, v = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)  # [B, h, d, N]
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)  # [B, h, d, d]
        out = (scores * self.temperature).softmax(-1) @ v  # [B, h, d, N]
        image = out.flatten(1, 2).unflatten(2, grid)
        return self.proj(image).flatten(2).transpose(1, 2)


def _check_grid(n_tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    if grid is None:
        side = math.isqrt(n_tokens)
        if side * side != n_tokens:
            raise ValueError(
                f"MDTA needs the grid of its tokens; {n_tokens} tokens are not a square. "
                "Pass grid=(H, W)."
            )
        return side, side
    if grid[0] * grid[1] != n_tokens:
        raise ValueError(f"grid must have H * W = N = {n_tokens}; got {grid}.")
    return grid
