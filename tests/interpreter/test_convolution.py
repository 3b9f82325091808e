"""The Triton kernel of the convolutions of fused networks, against PyTorch's in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from swiftkernels.fusion.steps import ACTIVATIONS, Convolution
from swiftkernels.fusion.triton import launch
from swiftkernels.testing.tolerance import assert_as_good_as_eager
from tests.interpreter.instruments import TorchKernels, count_launches


def convolution(
    channels: int,
    out_channels: int,
    kernel: int = 3,
    stride: int = 2,
    padding: int = 1,
    activation: str = "relu",
) -> Convolution:
    generator = torch.Generator().manual_seed(channels + 10 * kernel)
    weight = torch.randn(out_channels, channels, kernel, kernel, generator=generator)
    bias = torch.randn(out_channels, generator=generator)
    return Convolution(weight / weight[0].numel() ** 0.5, bias, stride, padding, activation)


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def as_type(step: Convolution, dtype: torch.dtype) -> Convolution:
    return Convolution(
        step.weight.to(dtype), step.bias.to(dtype), step.stride, step.padding, step.activation
    )


def convolve(x: Tensor, step: Convolution) -> Tensor:
    return launch.ConvolutionPlan(x, step)(x, launch.pack(step), None, None)


def check(x: Tensor, step: Convolution) -> None:
    """As accurate as PyTorch's convolution, in channels_last memory format."""
    step = as_type(step, x.dtype)
    out = convolve(x, step)
    exact = as_type(step, torch.float64).plain(x.double())
    assert_as_good_as_eager(out, step.plain(x), exact)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("channels", "out_channels"),
    [(3, 24), (24, 48), (32, 64), (48, 56), (64, 112), (1, 1), (5, 70)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_widths_and_types(channels: int, out_channels: int, dtype: torch.dtype) -> None:
    check(images(2, channels, 9, 11).to(dtype), convolution(channels, out_channels))


@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_kernels_strides_and_padding(kernel: int, stride: int) -> None:
    for padding in {0, kernel // 2, kernel}:
        check(images(1, 6, 8, 13), convolution(6, 20, kernel, stride, padding))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    check(8 * images(1, 4, 7, 7), convolution(4, 16, activation=activation))


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_nan_and_infinity_are_those_of_pytorch(activation: str) -> None:
    x = images(1, 3, 9, 9)
    x[0, 1, 0, 0], x[0, 2, 8, 8] = torch.nan, torch.inf
    step = convolution(3, 16, activation=activation)
    out, expected = convolve(x, step), step.plain(x)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


@pytest.mark.parametrize(
    "image", [(1, 1), (1, 30), (30, 1), (2, 2), (17, 33)], ids="{0[0]} x {0[1]}".format
)
def test_sizes(image: tuple[int, int]) -> None:
    check(images(3, 8, *image), convolution(8, 16))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice of channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "slice of channels_last": lambda x: torch.cat([x, x], 1).contiguous(
        memory_format=torch.channels_last
    )[:, 3 : 3 + x.shape[1]],
    "every second column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand(len(x), -1, -1, -1),
    "one channel for all": lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str) -> None:
    check(LAYOUTS[layout](images(2, 8, 7, 10)), convolution(8, 20))


def test_weights_in_any_memory_format() -> None:
    step = convolution(8, 20)
    weight = step.weight.contiguous(memory_format=torch.channels_last)
    assert launch.pack(Convolution(weight, step.bias)).weight.data_ptr() == weight.data_ptr()
    check(images(1, 8, 5, 5), Convolution(weight, step.bias.repeat(2)[::2]))


def test_an_image_does_not_depend_on_the_others() -> None:
    x, step = images(3, 8, 9, 9), convolution(8, 16)
    assert torch.equal(convolve(x, step)[1:2], convolve(x[1:2], step))


def test_it_is_one_launch_and_one_allocation() -> None:
    x, step = images(1, 3, 16, 16), convolution(3, 24)
    weights = launch.pack(step)
    with count_launches() as launches, TorchKernels() as kernels:
        launch.ConvolutionPlan(x, step)(x, weights, None, None)
    assert launches == ["_convolution_kernel"]
    assert kernels.calls == []


def test_deep_convolutions_are_left_to_pytorch() -> None:
    assert launch.takes(convolution(64, 3))
    assert not launch.takes(convolution(65, 3))


def test_kernels_larger_than_the_image_are_refused() -> None:
    with pytest.raises(ValueError, match="large enough for a convolution of 5 x 5 pixels"):
        convolve(images(1, 3, 2, 9), convolution(3, 8, 5))
