"""Random inputs and parameters, and the comparison of outputs, all in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from swiftkernels.integrations.probe import is_near as is_near

INPUTS = ((2, 11, 7, 4.0), (1, 9, 13, 1000.0))
"""Batch, height, width and scale of the random inputs of blocks. Large numbers show functions that
differ there only, such as ReLU and ReLU6."""


def randomise(network: nn.Module) -> None:
    """Random parameters, so that every part of a block shows in its output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            if not p.is_floating_point() or p.numel() == 0:
                continue
            fan_in = p[0].numel() if p.dim() > 1 else 1
            if fan_in > 1:
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(fan_in))
            else:
                p.copy_(0.2 + 0.4 * torch.rand(p.shape, generator=generator))


def random_input(*shape: int) -> Tensor:
    """Normal random numbers in float64, the same at every call with this shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def output(module: nn.Module, x: Tensor) -> Tensor | None:
    """The output of an unknown module, None if that is no tensor."""
    try:
        out = module(x.clone())
    except Exception:  # an unknown module may raise anything
        return None
    return out if isinstance(out, Tensor) and out.dtype == x.dtype else None


def fits(out: Tensor, compute: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether a function gives `out` for x."""
    try:
        return is_near(out, compute(x))
    except (RuntimeError, ValueError):  # the shapes of the parts do not fit in this order
        return False
