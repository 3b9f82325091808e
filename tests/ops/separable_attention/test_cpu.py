"""The CPU kernels of separable attention against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from swiftkernels.backends.cpu import library
from swiftkernels.ops.separable_attention.op import separable_attention
from swiftkernels.testing.cases import convert
from swiftkernels.testing.tolerance import assert_as_good_as_eager
from tests.ops.separable_attention.cases import check, make_tensors

pytestmark = [
    pytest.mark.skipif(bool(library.why_not()), reason="no compiled kernels"),
    pytest.mark.usefixtures("one_thread"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (2, 1, 48),
    (2, 7, 1),
    (1, 49, 220),
    (3, 65, 37),
    (1, 257, 56),
    (2, 700, 33),
    (40, 9, 20),
    (2, 64, 4, 49),
    (1, 37, 3, 31),
    (1, 48, 2, 300),
    (1, 128, 4, 16),
)
"""Odd widths and numbers of tokens, and every division of the work."""


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_as_good_as_eager(shape: tuple[int, ...]) -> None:
    check("cpu", make_tensors(shape, 48), torch.float32)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def test_output_is_in_the_memory_format_of_the_input() -> None:
    x, *weights = convert(make_tensors((2, 40, 4, 35), 33), torch.float32)
    assert x is not None
    assert separable_attention(x, *weights, backend="cpu").is_contiguous()
    out = separable_attention(channels_last(x), *weights, backend="cpu")
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mean", [10.0, 1000.0])
def test_tokens_around_a_large_mean(mean: float) -> None:
    check("cpu", make_tensors((2, 300, 48), 48, mean=mean), torch.float32)


def test_nan_and_infinity_reach_the_output() -> None:
    for bad in (float("nan"), float("inf")):
        x, *weights = convert(make_tensors((2, 49, 48), 48), torch.float32)
        assert x is not None
        x[0, 3, 5] = bad
        out = separable_attention(x, *weights, backend="cpu")
        assert out[0].isnan().all()
        assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 49, 37), (1, 300, 48), (1, 48, 4, 200)])
def test_packed_weights_give_the_same_output(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = convert(make_tensors(shape, 33), dtype)
    parameters = [t if i == 0 or t is None else nn.Parameter(t) for i, t in enumerate(tensors)]
    with torch.no_grad():
        packed = separable_attention(*parameters, backend="cpu")
        raw = separable_attention(*tensors, backend="cpu")
    assert torch.equal(packed, raw)
    trained = separable_attention(*parameters, backend="cpu")
    assert trained.requires_grad
    assert torch.equal(packed, trained)


def test_long_sequences_are_as_good_as_eager() -> None:
    tensors = make_tensors((1, 20000, 16), 16)
    x, *weights = convert(tensors, torch.float32)
    with torch.inference_mode():
        assert_as_good_as_eager(
            separable_attention(x, *weights, backend="cpu"),
            separable_attention(x, *weights, backend="reference"),
            separable_attention(*tensors, backend="reference"),
        )
