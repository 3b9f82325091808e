"""What the tests of conv_mlp share: random arguments, and the rule for errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from swiftkernels.ops.conv_mlp import cpu
from swiftkernels.ops.conv_mlp.op import conv_mlp
from swiftkernels.ops.plan import _known
from swiftkernels.testing.cases import convert, forward_backward
from swiftkernels.testing.tolerance import ULPS, assert_as_good_as_eager

Tensors = list[Tensor | None]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS = (1, 3, 16, 37, 48, 56)
HIDDEN = (1, 40, 192, 300)
IMAGES = ((1, 1), (1, 9), (8, 1), (5, 3), (7, 7), (30, 31))
KERNELS = (None, 3, 5, 7)


def make_tensors(
    shape: tuple[int, ...], hidden: int, kernel: int | None = 3, out_dims: int = 0
) -> Tensors:
    """x [B, C, H, W] and weights in float64, with values that float16 has; D = C by default."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).half().double()

    C, D = shape[1], out_dims or shape[1]
    depthwise: Tensors = [None, None]
    if kernel is not None:
        depthwise = [randn(C, 1, kernel, kernel) / 4, randn(C)]
    return [
        randn(*shape), *depthwise, randn(hidden, C) / C**0.5, randn(hidden),
        randn(D, hidden) / hidden**0.5, randn(D), randn(D),
    ]  # fmt: skip


def make_pair(shape: tuple[int, ...], hidden: int, out_dims: int = 0) -> Tensors:
    """As `make_tensors`, without the depthwise convolution: the tensors of `PAIR`."""
    x, _, _, *pair = make_tensors(shape, hidden, None, out_dims)
    return [x, *pair]


def run(*tensors: Tensor | None, **options: Any) -> Tensor:
    """The output without gradients; the weights are parameters, which the CPU kernels pack."""
    x, *weights = tensors
    parameters = [None if w is None else nn.Parameter(w, requires_grad=False) for w in weights]
    with torch.no_grad():
        return conv_mlp(x, *parameters, **{"backend": "cpu"} | options)


def assert_accurate(tensors: Tensors, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    """The output is as accurate as eager's; returns it."""
    rounded = convert(tensors, dtype)
    rounded[0] = tensors[0].to(dtype)  # with its strides
    options = {"residual": tensors[0].shape[1] == tensors[-1].numel()} | options
    out = run(*rounded, **options)
    exact = run(*convert(rounded, torch.float64), **options, backend="reference")
    assert_as_good_as_eager(out, run(*rounded, **options, backend="reference"), exact)
    return out


PAIR = ("x", "weight1", "bias1", "weight2", "bias2", "scale")
"""Names of the tensors of `make_pair`."""


def gradients_of(tensors: Tensors, dout: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """The gradients without a depthwise convolution, by name."""

    def function(x: Tensor, *pair: Tensor | None) -> Tensor:
        return conv_mlp(x, None, None, *pair, **{"backend": "cpu"} | options)

    gradients = forward_backward(function, tensors, PAIR, dout)
    del gradients["output"]
    return gradients


def assert_gradients_accurate(
    tensors: Tensors, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Tensor]:
    """The gradients are as accurate as eager's; returns them.

    Those of one channel are single numbers, of which eager's may be right by chance.
    """
    rounded = convert(tensors, dtype)
    rounded[0] = tensors[0].to(dtype)  # with its strides
    residual = tensors[0].shape[1] == tensors[3].shape[0]  # type: ignore[union-attr]
    options = {"residual": residual} | options
    found = gradients_of(rounded, **options)
    eager = gradients_of(rounded, **options, backend="reference")
    exact = gradients_of(convert(rounded, torch.float64), **options, backend="reference")
    for name, gradient in found.items():
        ulps = 1000 if 1 in tensors[3].shape[:2] else ULPS  # type: ignore[union-attr]
        assert_as_good_as_eager(gradient, eager[name], exact[name], ulps, name)
    return found


@contextlib.contextmanager
def kernels_in_use(handle: Any) -> Iterator[None]:
    """Use the functions of another library."""
    _known.clear()  # packed for the other library's vectors
    with mock.patch.object(cpu, "kernels", return_value=handle):
        yield
    _known.clear()


def identity(x: Tensor, activation: str, backend: str) -> Tensor:
    """The activation of x [N], by the operator with weights of 1."""
    tensors: Tensors = [x.view(1, 1, 1, -1), None, None, x.new_ones(1, 1), None]
    return run(*tensors, x.new_ones(1, 1), None, activation=activation, residual=False,
               backend=backend).flatten()  # fmt: skip


# How x lies in memory.


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def with_gaps(x: Tensor) -> Tensor:
    """Between all elements NaN, which must not be read."""
    wide = x.new_full([2 * n for n in x.shape], float("nan"))
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


def part_of_channels(x: Tensor) -> Tensor:
    """Pixels of full vectors with a gap behind each: they are read in place."""
    batch, channels, rows, columns = x.shape
    wide = x.new_full((batch, rows, columns, channels + 16), float("nan"))
    return wide[..., :channels].copy_(x.movedim(1, -1)).movedim(-1, 1)


def crop(x: Tensor) -> Tensor:
    """A part of a larger image, with a gap behind each row."""
    batch, channels, rows, columns = x.shape
    wide = channels_last(x.new_full((batch, channels, rows + 3, columns + 2), float("nan")))
    return wide[:, :, 1 : rows + 1, 2:].copy_(x)


def expanded(x: Tensor) -> Tensor:
    return x[:1, :, :1].expand(x.shape)


LAYOUTS = (torch.Tensor.contiguous, channels_last, with_gaps, part_of_channels, crop, expanded)
