"""Launches the kernel of convolutions, see `convolution.py`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from swiftkernels.backends.torch_state import device_guard, fits_kernels
from swiftkernels.backends.triton.kernel_launch import KernelLaunch
from swiftkernels.backends.triton.sizes import cdiv, power_of_two
from swiftkernels.backends.triton.tensors import precision
from swiftkernels.fusion.steps import Convolution, size_after
from swiftkernels.fusion.triton.convolution import _convolution_kernel

MAX_DEPTH = 576
"""Most numbers of x that a number of the output is made of: 64 channels in 3 x 3.

Deeper convolutions are left to the libraries behind PyTorch's, which also split the depth: there
the products take longer than the maps, of which the kernel saves a pass or two.
"""

BLOCK = 64
"""Pixels and channels of a tile of the output."""

BLOCK_K = {2: 64, 4: 32}
"""Depth of a step of the product, by bytes of a number."""


class Weights(NamedTuple):
    """The weights as the kernel reads them."""

    weight: Tensor
    """[D, k, k, C], contiguous"""
    bias: Tensor
    """[D]"""


def takes(step: Convolution) -> bool:
    """Whether the kernel is made for a convolution."""
    return step.weight[0].numel() <= MAX_DEPTH


def pack(step: Convolution) -> Weights:
    """The weights of a convolution, in new memory where they are in another order."""
    return Weights(step.weight.permute(0, 2, 3, 1).contiguous(), step.bias.contiguous())


class ConvolutionPlan:
    """Launches the kernel for inputs of one shape, type and device, with the same strides.

    Args:
        x: such an input, [B, C, H, W] in float32, float16 or bfloat16, with any strides.
        step: the convolution. The plan is called with its packed weights.
    """

    lasting = True

    def __init__(self, x: Tensor, step: Convolution) -> None:
        batch, channels, height, width = x.shape
        stride_b, stride_c, stride_h, stride_w = x.stride()
        D, kernel = len(step.weight), step.weight.shape[-1]
        out_height, out_width = size_after(step, height, width)
        self._out = (
            (batch, D, out_height, out_width),
            (out_height * out_width * D, 1, out_width * D, D),
        )
        tiles = cdiv(out_height * out_width, BLOCK)
        block_d = min(BLOCK, power_of_two(D))
        block_k = min(BLOCK_K[x.dtype.itemsize], power_of_two(step.weight[0].numel()))
        channels_last = stride_c == 1 or channels == 1
        self._programs = batch * tiles * cdiv(D, block_d)
        self._numbers = (
            tiles, height, width, out_height, out_width, stride_b, stride_h, stride_w, stride_c,
        )  # fmt: skip
        self._constants = {
            "C": channels, "D": D, "KERNEL": kernel, "STRIDE": step.stride,
            "PADDING": step.padding, "ACTIVATION": step.activation,
            "CHANNELS_LAST": channels_last,
            "ALIGN": math.gcd(16, stride_b, stride_h, stride_w) if channels_last else 1,
            "BLOCK_N": BLOCK, "BLOCK_K": block_k, "BLOCK_D": block_d,
            "num_warps": 4, "num_stages": 2,
        }  # fmt: skip
        self._launches: dict[tuple[str, bool], KernelLaunch] = {}

    def __call__(
        self, x: Tensor, weights: Weights, mask: Tensor | None, residual_scale: Tensor | None
    ) -> Tensor:
        """The output, in channels_last memory format.

        The weights are not compared with those of earlier calls: a chain that has other ones makes
        new plans.
        """
        out = torch.empty_strided(*self._out, dtype=x.dtype, device=x.device)
        how = precision(x.dtype, True), fits_kernels(x, *weights)
        launch = self._launches.get(how)
        if launch is None:
            constants = self._constants | {"PRECISION": how[0]}
            launch = self._launches[how] = KernelLaunch(
                _convolution_kernel, self._programs, self._numbers, constants, how[1]
            )
        with device_guard(x):
            launch(x, *weights, out)
        return out
