"""A forward and a backward of an operator by the launch functions of its Triton kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from swiftkernels.ops.additive_attention.triton import launch
from swiftkernels.ops.additive_attention.weights import Options
from swiftkernels.ops.conv_mlp import weights as conv_mlp
from swiftkernels.ops.conv_mlp.triton import launch as conv_mlp_launch
from swiftkernels.ops.operator import Needs
from swiftkernels.ops.types import Pooling
from swiftkernels.testing.cases import backward_by, forward_by


def forward(
    tensors: Any, mask: Tensor | None = None, pooling: Pooling = "l2"
) -> Callable[[], list[Any]]:
    """Run the forward.

    Args:
        tensors: x and the nine weights, by `make_tensors`.
        mask: of the tokens, [B, N].
        pooling: of the layer.

    Returns:
        The backward with all gradients, a function without arguments.
    """
    width = tensors[1].shape[0]
    options = Options(pooling, True, width**-0.5, 1e-12)
    out, saved = forward_by(launch, tensors, mask, options)
    # The output is also used as its gradient: to make another tensor would be one more operator.
    return functools.partial(backward_by, launch, out, tensors, mask, saved, options)


def block(
    x: Tensor, hidden: int, kernel: int | None, *, infer: bool = False
) -> Callable[[], list[Tensor | None]]:
    """Run the forward of conv_mlp with GELU and the residual branch.

    Args:
        x: images [B, C, H, W].
        hidden: channels between the products; all weights are zero.
        kernel: of the depthwise convolution, or None.
        infer: with BatchNorm and scale, as the layer does.

    Returns:
        The backward with all gradients, a function without arguments.
    """
    C = x.shape[1]
    depthwise: tuple[Tensor | None, Tensor | None] = (None, None)
    if kernel is not None:
        depthwise = x.new_zeros(C, 1, kernel, kernel), x.new_zeros(C)
    weights = conv_mlp.Weights(
        *depthwise, x.new_zeros(hidden, C), x.new_zeros(hidden), x.new_zeros(C, hidden),
        x.new_zeros(C), x.new_ones(C) if infer else None,
    )  # fmt: skip
    options = conv_mlp.Options("gelu", True)
    if infer:
        norm = conv_mlp_launch.Norm(*(x.new_ones(C) for _ in range(4)))
        out = conv_mlp_launch.infer(x, weights, norm, 1e-5, options)
    else:
        out, _ = conv_mlp_launch.forward((x,), weights, None, options, "statistics")
    saved, needs = conv_mlp_launch.Saved(), Needs(True, True)
    return functools.partial(
        conv_mlp_launch.backward, out, (x,), weights, None, saved, options, needs
    )
