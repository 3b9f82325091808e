"""The backward of conv_mlp without a depthwise convolution, in the CPU kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from swiftkernels.backends.cpu import library
from swiftkernels.ops.conv_mlp.layer import ConvMlp
from swiftkernels.ops.conv_mlp.op import conv_mlp
from swiftkernels.ops.conv_mlp.reference import ACTIVATIONS
from swiftkernels.testing.cases import convert, forward_backward
from tests.ops.conv_mlp.cases import (
    DTYPES,
    IMAGES,
    LAYOUTS,
    PAIR,
    Tensors,
    assert_gradients_accurate,
    channels_last,
    gradients_of,
    make_pair,
)

pytestmark = [
    pytest.mark.skipif(bool(library.why_not()), reason="no compiled kernels"),
    pytest.mark.usefixtures("one_thread", "uninitialised_memory_is_nan"),
]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, residual: bool) -> None:
    assert_gradients_accurate(
        make_pair((2, 20, 9, 11), 40), activation=activation, residual=residual
    )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("image", IMAGES)
def test_odd_sizes(image: tuple[int, int]) -> None:
    for C, H in itertools.product((1, 3, 16, 37, 56), (1, 40, 300)):
        assert_gradients_accurate(make_pair((2, C, *image), H))


@pytest.mark.usefixtures("isa")
def test_other_widths_of_the_output() -> None:
    for D in (1, 16, 50):
        assert_gradients_accurate(make_pair((1, 24, 6, 7), 64, out_dims=D))


@pytest.mark.usefixtures("isa")
def test_many_tiles_are_added_in_two_levels() -> None:
    assert_gradients_accurate(make_pair((2, 16, 80, 80), 20))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("missing", [(2, 4), (5,), (4,), (2, 4, 5)])
def test_without_biases_and_scale(missing: tuple[int, ...]) -> None:
    for D in (16, 21):
        tensors = make_pair((2, 16, 7, 7), 40, D)
        for i in missing:
            tensors[i] = None
        assert_gradients_accurate(tensors)


@pytest.mark.usefixtures("isa")
def test_a_scale_of_zero_has_a_gradient() -> None:
    tensors = make_pair((2, 16, 7, 7), 40)
    tensors[5] = torch.zeros(16, dtype=torch.float64)
    gradients = assert_gradients_accurate(tensors, residual=False)
    assert gradients["scale"].all()
    assert not any(gradients[name].any() for name in ("x", "weight1", "weight2", "bias2"))


def test_the_gradient_is_in_the_format_of_the_input() -> None:
    """PyTorch's layers before a block are slow with gradients in another format."""
    block = ConvMlp(16).train()
    for layout in (Tensor.contiguous, channels_last):
        x = layout(torch.randn(2, 16, 5, 6))
        seen: list[Tensor] = []
        leaf = x.requires_grad_()
        middle = leaf * 1
        middle.register_hook(seen.append)
        block(middle).square().sum().backward()
        assert seen[0].stride() == x.stride()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_and_types(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    for C in (16, 21):
        tensors = make_pair((3, C, 12, 13), 40)
        tensors[0] = layout(tensors[0].to(dtype))
        dx = assert_gradients_accurate(tensors, dtype)["x"]
        assert dx.stride() == torch.empty_like(tensors[0]).stride()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_of_the_gradient_do_not_matter(layout: Callable[[Tensor], Tensor]) -> None:
    tensors = convert(make_pair((3, 16, 12, 13), 40), torch.float32)
    dout = layout(torch.randn(3, 16, 12, 13))
    expected = gradients_of(tensors, dout=dout.contiguous())
    for name, gradient in gradients_of(tensors, dout=dout).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


@pytest.mark.usefixtures("isa")
def test_only_what_is_needed_is_computed() -> None:
    tensors = convert(make_pair((2, 20, 9, 11), 40), torch.float32)
    expected = gradients_of(tensors)
    dout = torch.randn(2, 20, 9, 11, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    for wanted in ([0], [1, 2, 3, 4, 5], [3], [5]):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        call(*leaves).backward(dout.float())
        for i, (leaf, name) in enumerate(zip(leaves, PAIR, strict=True)):
            assert (leaf.grad is not None) == (i in wanted)
            assert leaf.grad is None or torch.equal(leaf.grad, expected[name])


def call(x: Tensor, *pair: Tensor | None, backend: str = "cpu") -> Tensor:
    return conv_mlp(x, None, None, *pair, backend=backend)


@pytest.mark.usefixtures("isa")
def test_every_run_gives_the_same_bits() -> None:
    tensors = convert(make_pair((2, 48, 40, 41), 192), torch.float32)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        expected = gradients_of(tensors)
        for _ in range(3):
            again = gradients_of(tensors)
            assert all(torch.equal(again[name], t) for name, t in expected.items())
    torch.set_num_threads(1)


def test_zeros_and_their_gradients() -> None:
    """Rows of zeros have the activation's slope at 0."""
    for activation in ACTIVATIONS:
        tensors = make_pair((2, 16, 5, 5), 40)
        tensors[0] = torch.zeros_like(tensors[0])
        tensors[2] = torch.zeros_like(tensors[2])
        assert_gradients_accurate(tensors, activation=activation)


VALUES = torch.cat([torch.linspace(-20, 20, 40_001), torch.logspace(-30, 15, 501),
                    -torch.logspace(-30, 15, 501)])  # fmt: skip


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_accuracy_of_slopes(activation: str) -> None:
    """4e-7 absolute; at the kinks of hardswish and ReLU the slopes are PyTorch's."""

    def slopes(backend: str, x: Tensor) -> Tensor:
        ones = x.new_ones(1, 1)
        leaf = x.view(1, 1, 1, -1).requires_grad_()
        out = conv_mlp(leaf, None, None, ones, None, ones, None, activation=activation,
                       residual=False, backend=backend)  # fmt: skip
        out.backward(torch.ones_like(out))
        assert leaf.grad is not None
        return leaf.grad.flatten()

    exact = slopes("reference", VALUES.double())
    assert (slopes("cpu", VALUES.clone()) - exact).abs().max() <= 4e-7


def test_nothing_but_the_input_and_the_weights_is_saved() -> None:
    tensors = [t.requires_grad_() for t in convert(make_pair((2, 16, 9, 8), 64), torch.float32)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(*tensors)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in tensors}


def test_second_derivatives_are_those_of_the_definition() -> None:
    tensors = convert(make_pair((1, 3, 4, 2), 5), torch.float32)

    def second(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves: Tensors = [t.to(dtype).requires_grad_() for t in tensors]
        (dx,) = torch.autograd.grad(
            call(*leaves, backend=backend).square().sum(), leaves[0], create_graph=True
        )
        return list(torch.autograd.grad(dx.square().sum(), leaves))

    exact = second("reference", torch.float64)
    for ours, expected in zip(second("cpu", torch.float32), exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def test_empty_images() -> None:
    for shape in ((0, 16, 3, 4), (2, 16, 0, 5)):
        gradients = gradients_of(convert(make_pair(shape, 40), torch.float32))
        assert all(not t.any() for t in gradients.values())


def test_a_failed_call_leaves_no_gradient() -> None:
    x, *pair = convert(make_pair((2, 16, 9, 8), 40), torch.float32)
    out = call(x.requires_grad_(), *pair)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="x must have memory"):
        out.backward(torch.ones_like(out))
    assert x.grad is None


def test_auto_takes_the_kernels_for_training() -> None:
    tensors = convert(make_pair((2, 16, 9, 8), 40), torch.float32)
    ours = forward_backward(functools.partial(call, backend="auto"), tensors, PAIR)
    expected = forward_backward(call, tensors, PAIR)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
