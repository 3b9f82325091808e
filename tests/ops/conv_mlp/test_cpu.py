"""The CPU kernels of conv_mlp against its definition, with every library that runs here."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from swiftkernels.backends.cpu import library
from swiftkernels.ops.conv_mlp.op import conv_mlp
from swiftkernels.ops.conv_mlp.reference import ACTIVATIONS
from swiftkernels.testing.cases import convert
from tests.ops.conv_mlp.cases import (
    CHANNELS,
    DTYPES,
    HIDDEN,
    IMAGES,
    KERNELS,
    LAYOUTS,
    assert_accurate,
    channels_last,
    identity,
    make_tensors,
    run,
)

pytestmark = [
    pytest.mark.skipif(bool(library.why_not()), reason="no compiled kernels"),
    pytest.mark.usefixtures("one_thread", "uninitialised_memory_is_nan"),
]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_and_activations(kernel: int | None, activation: str) -> None:
    for residual in (True, False):
        tensors = make_tensors((2, 20, 9, 11), 40, kernel)
        assert_accurate(tensors, activation=activation, residual=residual)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("image", IMAGES)
def test_odd_sizes(image: tuple[int, int]) -> None:
    kernels = itertools.cycle((3, 5, None, 7, 3))
    for C, H in itertools.product(CHANNELS, HIDDEN):
        assert_accurate(make_tensors((2, C, *image), H, next(kernels)))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kernel", KERNELS)
def test_other_widths_of_the_output(kernel: int | None) -> None:
    for D in (1, 16, 50):
        assert_accurate(make_tensors((1, 24, 6, 7), 64, kernel, out_dims=D))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_and_types(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    for C, kernel in itertools.product((16, 21), KERNELS):
        tensors = make_tensors((3, C, 12, 13), 40, kernel)
        tensors[0] = layout(tensors[0].to(dtype))
        out = assert_accurate(tensors, dtype)
        assert out.is_contiguous(memory_format=torch.channels_last)
        tensors[0] = tensors[0].contiguous()
        assert torch.equal(run(*convert(tensors, dtype)), out)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", [(1, 48, 28, 28), (2, 37, 30, 31), (5, 16, 7, 7), (1, 20, 1, 9)])
def test_the_number_of_threads_does_not_matter(shape: tuple[int, ...]) -> None:
    for kernel, layout in itertools.product(KERNELS, (torch.Tensor.contiguous, channels_last)):
        tensors = convert(make_tensors(shape, 192, kernel), torch.float32)
        tensors[0] = layout(tensors[0])
        expected = run(*tensors)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(*tensors), expected)
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_give_the_same_output(dtype: torch.dtype) -> None:
    tensors = convert(make_tensors((2, 37, 9, 8), 40), dtype)
    with torch.no_grad():
        assert torch.equal(run(*tensors), conv_mlp(*tensors, backend="cpu"))


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("image", [(0, 5), (5, 0), (3, 4)])
def test_empty_images(batch: int, image: tuple[int, int]) -> None:
    tensors = convert(make_tensors((batch, 16, *image), 40, out_dims=5), torch.float32)
    assert run(*tensors, residual=False).shape == (batch, 5, *image)
    assert conv_mlp(*tensors, residual=False, backend="cpu").shape == (batch, 5, *image)


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda p: p.mul_(1.5),
    "through .data": lambda p: p.data.mul_(1.5),
    "a vector through .data": lambda p: p.data.flatten()[:1].mul_(1.5),
    "new data": lambda p: setattr(p, "data", p.data * 1.5),
}


@pytest.mark.parametrize("write", WRITES)
def test_written_weights_are_noticed(write: str) -> None:
    x, *tensors = convert(make_tensors((1, 16, 7, 7), 40), torch.float32)
    weights = [nn.Parameter(t, requires_grad=False) for t in tensors]
    with torch.no_grad():
        for p in weights:
            for _ in range(3):  # weights that change at every call are not packed
                before = conv_mlp(x, *weights, backend="cpu")
            WRITES[write](p)
            out = conv_mlp(x, *weights, backend="cpu")
            expected = conv_mlp(x, *[w.detach().clone() for w in weights], backend="cpu")
            assert torch.equal(out, expected)
            assert not torch.equal(out, before)


def test_one_tensor_in_another_place_is_packed_anew() -> None:
    x, _, _, w1, b1, w2, b2, _ = convert(make_tensors((1, 16, 7, 7), 40, None), torch.float32)
    tensors = [None if t is None else nn.Parameter(t) for t in (w1, b1, w2, b2)]
    w1, b1, w2, vector = tensors
    with torch.no_grad():
        for ends in ((vector, None), (None, vector), (vector, None)):
            out, expected = (
                conv_mlp(x, None, None, w1, b1, w2, *ends, backend=backend)
                for backend in ("cpu", "reference")
            )
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_within_reach_of_the_convolution(
    activation: str, bad: float
) -> None:
    for kernel in KERNELS:
        reach = (kernel or 1) // 2
        tensors = convert(make_tensors((2, 16, 9, 11), 40, kernel), torch.float32)
        assert tensors[0] is not None
        expected = run(*tensors, activation=activation)
        tensors[0][0, 3, 4, 5] = bad
        out = run(*tensors, activation=activation)
        near = torch.zeros(2, 16, 9, 11, dtype=torch.bool)
        near[0, :, 4 - reach : 5 + reach, 5 - reach : 6 + reach] = True
        assert torch.equal(out[~near], expected[~near])
        assert not out[near].isfinite().any()
        if bad != bad:
            assert out[near].isnan().all()


VALUES = torch.cat([torch.linspace(-20, 20, 100_001), torch.logspace(-30, 30, 1001),
                    -torch.logspace(-30, 30, 1001)])  # fmt: skip


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_accuracy_of_activations(activation: str) -> None:
    """4e-7 absolute, above 1 relative."""
    exact = identity(VALUES.double(), activation, "reference")
    error = (identity(VALUES, activation, "cpu") - exact).abs()
    assert (error <= 4e-7 * exact.abs().clamp(min=1)).all()
    if activation == "gelu":
        assert error[VALUES.abs() < 3].max() <= 4e-7


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_infinity(activation: str) -> None:
    inf = float("inf")
    found = identity(torch.tensor([inf, 3e38, -3e38, -inf, float("nan")]), activation, "cpu")
    assert found[0] == inf
    assert found[1] > 2e38
    assert found[4].isnan()
    if activation != "none":
        assert -1e-20 < found[2] <= 0
        assert found[3].isnan() or -1e-20 < found[3] <= 0
