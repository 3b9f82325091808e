"""A forward and a backward of additive attention by the launch functions of its Triton kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from swiftkernels.ops.additive_attention.reference import Options
from swiftkernels.ops.additive_attention.triton import launch


def forward(
    tensors: Any, mask: Tensor | None = None, pooling: str = "l2"
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
    run_forward: Any = launch.additive_self_attention_forward
    run_backward: Any = launch.additive_self_attention_backward
    out, *saved = run_forward(*tensors, mask, options)
    # The output serves as its gradient: another tensor would be one more operator.
    return functools.partial(run_backward, out, *tensors, mask, tuple(saved), options, True, True)
