"""Activation checkpointing of blocks that have buffers, such as BatchNorm's running statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(blocks: nn.Sequential, x: Tensor) -> Tensor:
    """blocks(x), keeping only each block's input for the backward, which computes the rest again.

    The second computation sees the buffers as they were before the first one, and what it writes
    into them is discarded. So running statistics count a batch once, whatever class keeps them, and
    layers that read what they update compute the same again.

    Args:
        blocks: modules of one tensor each.
        x: the input of the first block.

    Example:
        >>> blocks = nn.Sequential(nn.BatchNorm1d(3), nn.GELU())
        >>> recomputed(blocks, torch.randn(4, 3, requires_grad=True)).sum().backward()
        >>> int(blocks[0].num_batches_tracked)
        1
    """
    if not torch.is_grad_enabled():
        return blocks(x)
    for block in blocks:
        x = _recomputed(block, x)
    return x


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # which recomputes without side effects
        return checkpoint(block, x, use_reentrant=False)
    contexts = contextlib.nullcontext(), _EarlierBuffers(block)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: contexts)


class _EarlierBuffers:
    """A context in which a module has copies of the buffers that it had when this was made."""

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(module.modules())
        self.earlier = [_copied(m._buffers) for m in self.modules]

    def __enter__(self) -> None:
        self.current = [dict(m._buffers) for m in self.modules]
        for module, buffers in zip(self.modules, self.earlier, strict=True):
            # Copied again: with retain_graph=True there are several recomputations.
            module._buffers.update(_copied(buffers))

    def __exit__(self, *error: object) -> None:
        for module, buffers in zip(self.modules, self.current, strict=True):
            module._buffers.update(buffers)


def _copied(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if b is None else b.detach().clone() for name, b in buffers.items()}
