"""What the tests of separable attention share: tensors without kinks, gradients, comparisons."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from swiftkernels.ops.separable_attention.op import separable_attention
from swiftkernels.testing.cases import convert, forward_backward
from swiftkernels.testing.tolerance import assert_as_good_as_eager

NAMES = ("x", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")

Tensors = list[Tensor | None]

KINK = 2e-7
"""Of the largest value, how far all are from 0, where the gradient of relu jumps. The rounding of
float32 must not decide on which side."""


def make_tensors(
    shape: Sequence[int], token_dim: int, bias: bool = True, scale: float = 1.0, mean: float = 0.0
) -> Tensors:
    """x [B, N, C] or [B, C, P, N] and weights in float64; no value of a token is next to 0."""
    C = shape[2] if len(shape) == 3 else shape[1]
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        x = (randn(shape) + mean) * scale
        qkv = randn(1 + 2 * C, C) / C**0.5
        qkv_bias = randn(1 + 2 * C) / 4 if bias else None
        tensors: Tensors = [x, qkv, qkv_bias, randn(token_dim, C) / C**0.5]
        tensors.append(randn(token_dim) / 4 if bias else None)
        # As float32 has them.
        x, qkv, qkv_bias, *_ = tensors = convert(convert(tensors, torch.float32), torch.float64)
        assert x is not None
        assert qkv is not None
        tokens = x if x.dim() == 3 else x.movedim(1, -1)
        values = linear(tokens, qkv[1 + C :], None if qkv_bias is None else qkv_bias[1 + C :])
        if values.numel() == 0 or values.abs().min() > KINK * values.abs().max():
            return tensors
    raise AssertionError(f"every draw of {tuple(shape)} has a value next to 0")


def run(backend: str, tensors: Tensors, dout: Tensor | None = None) -> dict[str, Tensor]:
    """The output, and the gradients of all tensors."""
    attention = functools.partial(separable_attention, backend=backend)
    return forward_backward(attention, tensors, NAMES, dout)


def check(
    backend: str, tensors: Tensors, dtype: torch.dtype, dout: Tensor | None = None
) -> dict[str, Tensor]:
    """Compare output and gradients of a backend in dtype with the definition; returns them."""
    rounded = convert(tensors, dtype)
    if dout is not None:
        dout = dout.to(dtype)
    ours, eager = run(backend, rounded, dout), run("reference", rounded, dout)
    exact = run("reference", convert(rounded, torch.float64), dout)
    for name in NAMES:
        if name in exact:
            assert ours[name].shape == eager[name].shape, name
    for name, value in ours.items():
        if name == "qkv_bias":  # that of the scores is exactly 0
            assert value[0] == 0
            value, eager[name], exact[name] = value[1:], eager[name][1:], exact[name][1:]
        assert_as_good_as_eager(value, eager[name], exact[name], name=name)
    return ours
