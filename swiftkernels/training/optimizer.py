"""What the recipe does to parameters, gradients and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

HEADS = ("head.", "head_dist.")
"""Prefixes of the classifiers' parameters, whose gradients are not clipped."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: matrices and kernels decay; biases and norms, [C], do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def clip_adaptively_(
    parameters: Iterable[Tensor], factor: float = 0.01, least: float = 1e-3
) -> None:
    """Adaptive gradient clipping (arXiv 2102.06171, equation 3), in place.

    A unit is what makes one output: a row of a matrix, a kernel of a convolution; a vector is one
    unit. Its gradient's norm is cut to `factor` times the norm of its weights, of which `least` is
    the smallest that counts. The paper leaves out the classifier.
    """
    for p in parameters:
        if p.grad is None:
            continue
        allowed = factor * _unit_norm(p).clamp(min=least)
        norm = _unit_norm(p.grad)
        # Where nothing is cut the factor is 1, and the gradient stays the same to the bit.
        p.grad.mul_(torch.where(norm > allowed, allowed / norm, 1.0))


def _unit_norm(t: Tensor) -> Tensor:
    if t.dim() <= 1:
        return torch.linalg.vector_norm(t)
    return torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())), keepdim=True)


def clipped_parameters(model: nn.Module) -> list[Tensor]:
    """All parameters but those of the classifiers."""
    return [p for name, p in model.named_parameters() if not name.startswith(HEADS)]


def learning_rate(
    step: int, steps: int, warmup_steps: int, peak: float, start: float, end: float
) -> float:
    """Of that step of `steps`: from `start` to `peak` in a line, then by half a cosine to `end`."""
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return end + (peak - end) * (1 + math.cos(math.pi * progress)) / 2
