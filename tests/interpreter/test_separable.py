"""The Triton kernels of separable attention against its definition, and their memory accesses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swiftkernels.ops.separable_attention.op import separable_attention
from swiftkernels.testing.cases import convert
from swiftkernels.testing.tolerance import assert_exact
from swiftkernels.testing.triton_trace import trace
from tests.interpreter.instruments import count_launches
from tests.ops.separable_attention.cases import Tensors, make_tensors, run

FORWARD = ["_pool_forward_kernel", "_context_forward_kernel", "_output_forward_kernel"]
BACKWARD = [
    "_rows_backward_kernel",
    "_context_backward_kernel",
    "_tokens_backward_kernel",
    "_weights_backward_kernel",
    "_sum_partials_kernel",
    "_sum_partials_kernel",
]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def check_exactly(tensors: Tensors, dout: Tensor | None = None) -> None:
    assert_exact(run("triton", tensors, dout), run("reference", tensors, dout))


@pytest.mark.parametrize(
    "width",
    [
        *(1, 64, 128, 220, 384),
        *(pytest.param(w, marks=pytest.mark.slow) for w in (37, 48, 96, 192, 256, 512)),
    ],
)
def test_every_width_equals_the_definition(width: int) -> None:
    check_exactly(make_tensors((1, 18, width), width))


@pytest.mark.parametrize("n_tokens", [1, 65, 300])
def test_every_number_of_tokens_equals_the_definition(n_tokens: int) -> None:
    check_exactly(make_tensors((2, n_tokens, 16), 24))


def test_many_sequences_equal_the_definition() -> None:
    """More than a tile of contexts has."""
    check_exactly(make_tensors((5, 8, 4, 9), 8))


def test_launches() -> None:
    tensors = convert(make_tensors((2, 16, 4, 9), 16), torch.float32)
    with count_launches() as names:
        separable_attention(*tensors, backend="triton")
    assert names == FORWARD
    with count_launches() as names:
        run("triton", tensors)
    assert names == FORWARD + BACKWARD


def test_only_wanted_gradients_are_computed() -> None:
    tensors = make_tensors((2, 16, 4, 9), 16)
    expected = run("reference", tensors)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn((2, 16, 4, 9), generator=generator, dtype=torch.float64)
    for wanted in (0, 1):
        leaves = [t if t is None else t.detach().requires_grad_(i == wanted)
                  for i, t in enumerate(tensors)]  # fmt: skip
        with count_launches() as names:
            out = separable_attention(*leaves, backend="triton")
            (found,) = torch.autograd.grad(out, leaves[wanted], dout)
        name = list(expected)[1 + wanted]
        assert_exact({name: found}, {name: expected[name]})
        assert ("_weights_backward_kernel" in names) == (wanted == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 35, 24), (3, 37, 3, 17), (5, 16, 4, 16)])
def test_every_access_is_inside_its_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = convert(make_tensors(shape, 20), dtype)
    with trace() as launches:
        run("triton", tensors)
        if len(shape) == 4:
            x, *weights = tensors
            assert x is not None
            run("triton", [channels_last(x), *weights])
    assert len(launches) % len(FORWARD + BACKWARD) == 0
