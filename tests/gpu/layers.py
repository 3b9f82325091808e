"""Layers and inputs for the tests on GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swiftkernels import AdditiveAttention


def make_layer(
    width: int, dtype: torch.dtype, device: torch.device, **options: Any
) -> AdditiveAttention:
    """A layer on the Triton kernels, with the same weights at every call and on every device."""
    torch.manual_seed(0)
    layer = AdditiveAttention(width, width, 1, **{"backend": "triton"} | options)
    return layer.to(device, dtype)


def random_images(
    width: int, dtype: torch.dtype, device: torch.device, batch: int = 3, seed: int = 1
) -> Tensor:
    """Images [B, C, 14, 14], the same at every call and on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, width, 14, 14, generator=generator).to(device, dtype)


def train(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of all parameters for ones from the next layer."""
    x = x.detach().requires_grad_()
    out = layer(x)
    grads = torch.autograd.grad(out, [x, *layer.parameters()], torch.ones_like(out))
    return [out.detach(), *grads]
