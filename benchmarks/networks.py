"""A small image classifier in which only the token mixer varies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from swiftkernels import AdditiveAttention
from swiftkernels.ops.additive_attention.reference import POOLINGS
from swiftkernels.ops.types import Pooling
from swiftkernels.testing.peers import PEERS

WIDTH = 48
DEPTH = 2
PATCH = 4


def additive(pooling: Pooling, dim: int) -> nn.Module:
    """The library's operator with one of its poolings, [B, N, dim] -> [B, N, dim]."""
    return AdditiveAttention(dim, dim, num_heads=1, pooling=pooling)


MIXERS: dict[str, Callable[[int], nn.Module] | None] = {
    **{f"additive_{pooling}": partial(additive, pooling) for pooling in POOLINGS},
    **PEERS,
    "none": None,
}
"""Functions that make a mixer of a width, [B, N, C] -> [B, N, C]; "none" removes the branch."""


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )
        self.mixer: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        # No layer scale: SwiftFormer's starts at 1e-5 and would hide the mixer in a short training.
        if self.mixer is not None:
            x = x + self.mixer(x)
        return x + self.mlp(x)


class Classifier(nn.Module):
    """4x4 patches, two blocks on the 7x7 tokens, the mean, and a head, [B, 1, 28, 28] -> [B, 10].

    Before the mean, patches interact only in the mixers. Overlapping convolutions, as in
    SwiftFormer, would do a part of their work. They would also encode the positions of the tokens;
    here an embedding does that.

    Args:
        mixer: a key of `MIXERS`.
        seed: of the initial weights; those of the shared parts do not depend on the mixer.
    """

    def __init__(self, mixer: str, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Sequential(
                nn.Conv2d(1, WIDTH, PATCH, stride=PATCH), nn.BatchNorm2d(WIDTH)
            )
            self.places = nn.Parameter(0.2 * torch.randn(1, (28 // PATCH) ** 2, WIDTH))
            self.blocks = nn.Sequential(*(Block(WIDTH) for _ in range(DEPTH)))
            self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))
            # The mixers come last, so that the other weights do not depend on them.
            make = MIXERS[mixer]
            if make is not None:
                for block in self.blocks:
                    assert isinstance(block, Block)
                    block.mixer = nn.Sequential(nn.LayerNorm(WIDTH), make(WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2) + self.places  # [B, 49, C]
        return self.head(self.blocks(tokens).mean(1))
