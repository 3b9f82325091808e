"""Activation checkpointing of blocks that have buffers, such as BatchNorm's running statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(blocks: nn.Sequential, x: Tensor) -> Tensor:
    """blocks(x), storing only the input of each block; the backward recomputes the rest.

    The recomputation reads the buffers as they were before the forward, and its changes to them are
    discarded. So running statistics count a batch once, in any class of module, and modules that
    read the buffers that they update compute the same values again.

    Args:
        blocks: modules that take and return one tensor.
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
    if torch.compiler.is_compiling():  # the compiler recomputes without side effects
        return checkpoint(block, x, use_reentrant=False)
    contexts = contextlib.nullcontext(), _EarlierBuffers(block)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: contexts)


class _EarlierBuffers:
    """A context in which a module has copies of its buffers from when this object was created."""

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(module.modules())
        self.earlier = [_copied(m._buffers) for m in self.modules]

    def __enter__(self) -> None:
        self.current = [dict(m._buffers) for m in self.modules]
        for module, buffers in zip(self.modules, self.earlier, strict=True):
            # Copied again: retain_graph=True allows several recomputations.
            module._buffers.update(_copied(buffers))

    def __exit__(self, *error: object) -> None:
        for module, buffers in zip(self.modules, self.current, strict=True):
            module._buffers.update(buffers)


def _copied(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if b is None else b.detach().clone() for name, b in buffers.items()}
