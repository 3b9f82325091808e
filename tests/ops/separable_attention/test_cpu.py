"""The CPU kernels of separable attention against its definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from swiftkernels.backends.cpu import library
from swiftkernels.ops.separable_attention.op import separable_attention
from swiftkernels.testing.cases import convert
from swiftkernels.testing.tolerance import assert_as_good_as_eager
from tests.ops.separable_attention.cases import Tensors, check, make_tensors, run

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


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("shape", [(3, 65, 37), (2, 48, 4, 49), (1, 300, 64)])
def test_halves_are_as_good_as_eager(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check("cpu", make_tensors(shape, 37), dtype)


@pytest.mark.parametrize("shape", [(2, 49, 48), (2, 37, 4, 9)])
def test_layers_without_biases(shape: tuple[int, ...]) -> None:
    check("cpu", make_tensors(shape, 33, bias=False), torch.float32)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def with_gaps(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    wide[..., ::2] = x
    return wide[..., ::2]


def unfolded(x: Tensor) -> Tensor:
    """[B, C, P, N] as a view of patches of two pixels in a row of an image."""
    return x.mT.contiguous().mT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "lay_out"),
    [
        ((3, 65, 40), transposed),
        ((3, 65, 40), with_gaps),
        ((2, 40, 4, 35), channels_last),
        ((2, 40, 4, 35), with_gaps),
        ((2, 40, 2, 35), unfolded),
    ],
)
def test_any_strides(
    shape: tuple[int, ...], lay_out: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    plain = convert(make_tensors(shape, 40), dtype)
    x = plain[0]
    assert x is not None
    dout = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    strided: Tensors = [lay_out(x), *plain[1:]]
    ours, expected = run("cpu", strided, lay_out(dout)), run("cpu", plain, dout)
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name
    with torch.inference_mode():
        out = separable_attention(*strided, backend="cpu")
        assert torch.equal(out, ours["output"])


def test_gradient_of_stride_0() -> None:
    tensors = make_tensors((3, 65, 37), 33)
    dout = torch.ones((), dtype=torch.float64).expand(3, 65, 33)
    check("cpu", tensors, torch.float32, dout)


def test_output_is_in_the_memory_format_of_the_input() -> None:
    x, *weights = convert(make_tensors((2, 40, 4, 35), 33), torch.float32)
    assert x is not None
    assert separable_attention(x, *weights, backend="cpu").is_contiguous()
    out = separable_attention(channels_last(x), *weights, backend="cpu")
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mean", [10.0, 1000.0])
def test_tokens_around_a_large_mean(mean: float) -> None:
    check("cpu", make_tensors((2, 300, 48), 48, mean=mean), torch.float32)


@pytest.mark.parametrize("scale", [1e-20, 1e-4, 100.0, 1e4])
def test_huge_and_tiny_tokens(scale: float) -> None:
    """Scores of 1e4 and more: one token has all of the weight."""
    check("cpu", make_tensors((2, 49, 48), 48, scale=scale), torch.float32)


def test_zero_tokens_give_no_nan() -> None:
    x, *weights = convert(make_tensors((2, 49, 48), 48), torch.float32)
    assert x is not None
    found = run("cpu", [torch.zeros_like(x), *weights])
    assert all(t.isfinite().all() for t in found.values())
    expected = run("reference", [torch.zeros_like(x), *weights])
    torch.testing.assert_close(found["output"], expected["output"])


def test_nan_and_infinity_reach_the_output() -> None:
    for bad in (float("nan"), float("inf")):
        x, *weights = convert(make_tensors((2, 49, 48), 48), torch.float32)
        assert x is not None
        x[0, 3, 5] = bad
        out = separable_attention(x, *weights, backend="cpu")
        assert out[0].isnan().all()
        assert out[1].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 49, 48), (2, 0, 48), (0, 48, 4, 9)])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(shape: tuple[int, ...]) -> None:
    found = run("cpu", convert(make_tensors(shape, 33), torch.float32))
    assert found["output"].numel() == 0
    assert found["x"].shape == shape
    assert not found["qkv_weight"].any()
    assert not found["proj_bias"].any()


@pytest.mark.parametrize("shape", [(2, 300, 48), (5, 40, 37), (1, 1000, 20), (1, 40, 3, 50)])
def test_outputs_do_not_depend_on_threads_or_the_batch(shape: tuple[int, ...]) -> None:
    x, *weights = convert(make_tensors(shape, 33), torch.float32)
    assert x is not None
    with torch.inference_mode():
        expected = separable_attention(x, *weights, backend="cpu")
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(separable_attention(x, *weights, backend="cpu"), expected)
        torch.set_num_threads(1)
        first = separable_attention(x[:1], *weights, backend="cpu")
        assert torch.equal(first, expected[:1])


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("shape", [(2, 300, 48), (5, 40, 37), (1, 1000, 20)])
def test_gradients_on_several_threads(shape: tuple[int, ...], threads: int) -> None:
    tensors = make_tensors(shape, 33)
    torch.set_num_threads(threads)
    found = check("cpu", tensors, torch.float32)
    again = run("cpu", convert(tensors, torch.float32))
    assert all(torch.equal(found[name], again[name]) for name in found)


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


def test_only_wanted_gradients_are_computed() -> None:
    tensors = convert(make_tensors((2, 49, 48), 33), torch.float32)
    expected = run("cpu", tensors)
    for wanted in range(5):
        leaves = [t if t is None else t.detach().requires_grad_(i == wanted)
                  for i, t in enumerate(tensors)]  # fmt: skip
        out = separable_attention(*leaves, backend="cpu")
        dout = torch.randn(
            out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        (found,) = torch.autograd.grad(out, leaves[wanted], dout.float())
        assert torch.equal(found, list(expected.values())[1 + wanted])


def test_long_sequences_are_as_good_as_eager() -> None:
    tensors = make_tensors((1, 20000, 16), 16)
    x, *weights = convert(tensors, torch.float32)
    with torch.inference_mode():
        assert_as_good_as_eager(
            separable_attention(x, *weights, backend="cpu"),
            separable_attention(x, *weights, backend="reference"),
            separable_attention(*tensors, backend="reference"),
        )
