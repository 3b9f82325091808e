"""A forward and a backward of additive attention by the launch functions of its Triton kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from swiftkernels.ops.additive_attention.triton import launch
from swiftkernels.ops.additive_attention.weights import Options
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
