"""The definition of separable attention, against a formula in NumPy and in float64 by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from swiftkernels.ops.separable_attention.op import separable_attention
from tests.ops.separable_attention.cases import make_tensors


def formula(x: NDArray[np.float64], w: list[NDArray[np.float64] | None]) -> NDArray[np.float64]:
    """One sequence [N, C]."""
    qkv, qkv_bias, proj, proj_bias = (0 if t is None else t for t in w)
    rows = x @ qkv.T + qkv_bias
    weights = np.exp(rows[:, 0] - rows[:, 0].max())
    weights /= weights.sum()
    width = x.shape[1]
    context = sum(a * row[1 : 1 + width] for a, row in zip(weights, rows, strict=True))
    return (np.maximum(rows[:, 1 + width :], 0) * context) @ proj.T + proj_bias


@pytest.mark.parametrize("bias", [True, False])
def test_definition_follows_the_formula(bias: bool) -> None:
    x, *weights = make_tensors((3, 11, 5), 4, bias=bias)
    assert x is not None
    arrays = [None if w is None else w.numpy() for w in weights]
    expected = np.stack([formula(tokens, arrays) for tokens in x.numpy()])
    out = separable_attention(x, *weights, backend="reference")
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-12)


def test_every_pixel_of_a_patch_is_pooled_on_its_own() -> None:
    x, *weights = make_tensors((2, 5, 3, 7), 4)
    assert x is not None
    out = separable_attention(x, *weights, backend="reference")
    for pixel in range(3):
        tokens = x[:, :, pixel].mT  # [B, N, C]
        expected = separable_attention(tokens, *weights, backend="reference").mT
        torch.testing.assert_close(out[:, :, pixel], expected)


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 2, 5)])
def test_gradients_of_the_definition(shape: tuple[int, ...]) -> None:
    tensors = [t.requires_grad_() for t in make_tensors(shape, 2) if t is not None]

    def attention(*tensors: torch.Tensor) -> torch.Tensor:
        return separable_attention(*tensors, backend="reference")

    assert torch.autograd.gradcheck(attention, tensors)
    assert torch.autograd.gradgradcheck(attention, tensors)
