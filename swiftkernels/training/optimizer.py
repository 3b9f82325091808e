"""Weight decay, gradient clipping and learning rate of the recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

HEADS = ("head.", "head_dist.")
"""Name prefixes of the heads, of which the gradients are not clipped."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices and kernels decay; biases and norms [C] do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def clip_adaptively_(
    parameters: Iterable[Tensor], factor: float = 0.01, min_norm: float = 1e-3
) -> None:
    """Adaptive gradient clipping (arXiv 2102.06171, equation 3), in place.

    A unit is the weights of one output: a row of a matrix, a kernel of a convolution; a vector is
    one unit. The gradient of a unit is scaled so that its norm is at most `factor` times the norm
    of the unit, or times `min_norm` if that is larger. The paper does not clip the classifier.

    Args:
        parameters: parameters with gradients; those without are skipped.
        factor: largest ratio of the norms.
        min_norm: lower bound of the norm of a unit.
    """
    for p in parameters:
        if p.grad is None:
            continue
        allowed = factor * _unit_norm(p).clamp(min=min_norm)
        norm = _unit_norm(p.grad)
        # A factor of exactly 1 leaves the other gradients unchanged to the bit.
        p.grad.mul_(torch.where(norm > allowed, allowed / norm, 1.0))


def _unit_norm(t: Tensor) -> Tensor:
    if t.dim() <= 1:
        return torch.linalg.vector_norm(t)
    return torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())), keepdim=True)


def clipped_parameters(model: nn.Module) -> list[Tensor]:
    """All parameters except those of the heads."""
    return [p for name, p in model.named_parameters() if not name.startswith(HEADS)]


def learning_rate(
    step: int, steps: int, warmup_steps: int, peak: float, start: float, end: float
) -> float:
    """The learning rate of a step: linear from `start` to `peak`, then half a cosine to `end`."""
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return end + (peak - end) * (1 + math.cos(math.pi * progress)) / 2
