"""Separable attention as an operator, and as a function."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from swiftkernels.backends import torch_state
from swiftkernels.backends.cpu import library
from swiftkernels.ops import plan as planning
from swiftkernels.ops.operator import Backend, Call, Operator
from swiftkernels.ops.plan import Plan, Plans
from swiftkernels.ops.separable_attention import reference
from swiftkernels.ops.separable_attention.layouts import output_like
from swiftkernels.ops.separable_attention.weights import Options, Weights
from swiftkernels.utils import checks

BACKENDS = ("auto", "triton", "cpu", "reference")

MAX_TRITON_WIDTH = 512
"""Widest C that the Triton kernels take: a tile of rows has to fit on chip."""


def _why_not_triton(x: Tensor, width: int) -> str:
    reason = torch_state.why_not_triton(x.device)
    if not reason and width > MAX_TRITON_WIDTH:
        return f"takes up to {MAX_TRITON_WIDTH} channels; got {width}"
    return reason


def _flops(shapes: Mapping[str, Sequence[int]]) -> int:
    rows, width = shapes["qkv_weight"][:2]
    return width * (rows + shapes["proj_weight"][0])


def _example(batch: int, n_tokens: int, in_dims: int, token_dim: int) -> Call:
    """A layer on random tokens."""
    C, D = in_dims, token_dim
    weights = Weights(
        torch.randn(1 + 2 * C, C) / C**0.5, torch.randn(1 + 2 * C), torch.randn(D, C) / C**0.5,
        torch.randn(D),
    )  # fmt: skip
    return Call((torch.randn(batch, n_tokens, C),), weights, None, Options(), "auto", "statistics")


def _patches(call: Call) -> Call:
    """[B, C, P, N], P patches' pixels."""
    x = call.inputs[0]
    return call._replace(inputs=(x.mT.unflatten(2, (math.gcd(x.shape[1], 3), -1)),))


_PACKAGE = "swiftkernels.ops.separable_attention"

SEPARABLE_ATTENTION = Operator(
    "separable_attention",
    inputs=("x",),
    weights=Weights,
    options=Options,
    reference=reference.separable_attention,
    backends={
        "triton": Backend(
            f"{_PACKAGE}.triton.launch", _why_not_triton, torch_state.triton_is_automatic
        ),
        "cpu": Backend(f"{_PACKAGE}.cpu", lambda x, _: library.why_not_for(x)),
    },
    eager=lambda x, _: "reference",
    flops=_flops,
    function=f"{_PACKAGE}.op:separable_attention",
    example=_example,
    variants={"patches": _patches},
    layer=f"{_PACKAGE}.layer:SeparableAttention",
    output=output_like,
)
OPERATORS = (SEPARABLE_ATTENTION,)


def separable_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Separable attention from tokens and weights; `SeparableAttention` as a function.

    Args:
        x: tokens [B, N, C], or the P pixels of N patches [B, C, P, N], of any strides. The softmax
            runs over the N.
        qkv_weight, qkv_bias: the layer of score, keys and values, [1 + 2 C, C] (or, as a 1x1
            convolution, [1 + 2 C, C, 1, 1]) and [1 + 2 C] or None.
        proj_weight, proj_bias: the output layer, [D, C] (or [D, C, 1, 1]) and [D] or None.
        backend: "auto", "triton", "cpu" or "reference". Only "auto" chooses; the others never fall
            back.

    Returns:
        The output, [B, N, D] or [B, D, P, N].

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, with the
            remedy.

    Example:
        >>> x, w = torch.randn(2, 49, 64), torch.randn(129, 64) / 8
        >>> separable_attention(x, w, None, torch.randn(64, 64) / 8, None).shape
        torch.Size([2, 49, 64])
    """
    weights = Weights(qkv_weight, qkv_bias, proj_weight, proj_bias)
    return attend(x, weights, backend)[0]


def attend(
    x: Tensor, weights: Weights, backend: str, plans: Plans | None = None
) -> tuple[Tensor, Plan]:
    """The output by a new plan, and the plan.

    Args:
        x, weights, backend: as in `separable_attention`.
        plans: of a layer; its next calls may use the plan. None: the plan is used only once.
    """
    checks.check_floating("x", x)
    if (dtype := torch_state.autocast_dtype(x)) is not None:
        cast = [None if w is None else w.to(dtype) for w in weights]
        x, weights = x.to(dtype), Weights(*cast)  # type: ignore[arg-type]
    _check(x, weights)
    matrices = (weights.qkv_weight, weights.proj_weight)
    make = functools.partial(
        planning.make_plan, SEPARABLE_ATTENTION, x, weights, matrices, Options(), backend, plans
    )
    return planning.run(make, x, weights, None, None)


def _check(x: Tensor, weights: Weights) -> None:
    """Raise for bad arguments."""
    for name in ("qkv_weight", "proj_weight"):
        checks.check_pointwise(name, getattr(weights, name))
    rows, width = weights.qkv_weight.shape[:2]
    if rows != 1 + 2 * width:
        raise ValueError(
            f"qkv_weight must have 1 + 2 C = {1 + 2 * width} rows (score, keys, values); got "
            f"{rows}. Check that it is the layer's joint projection."
        )
    if weights.proj_weight.shape[1] != width:
        raise ValueError(
            f"proj_weight must have C = {width} columns; got {weights.proj_weight.shape[1]}. "
            "Check that both weights come from one layer."
        )
    for name, bias, length in (
        ("qkv_bias", weights.qkv_bias, rows),
        ("proj_bias", weights.proj_bias, weights.proj_weight.shape[0]),
    ):
        if bias is not None:
            checks.check_shape(name, bias, (length,), "one number per row of the weight")
    if x.dim() not in (3, 4) or x.shape[1 if x.dim() == 4 else -1] != width:
        raise ValueError(
            f"x must be [B, N, {width}] (tokens) or [B, {width}, P, N] (pixels of patches); got "
            f"shape {tuple(x.shape)}. Check the width of the layer, or the order of the axes."
        )
    checks.check_alike("x", x, weights._asdict())
