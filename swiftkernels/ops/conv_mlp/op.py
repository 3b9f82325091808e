"""conv_mlp as an operator, and as a function."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from swiftkernels.backends import torch_state
from swiftkernels.backends.cpu import library
from swiftkernels.ops import plan as planning
from swiftkernels.ops.conv_mlp import reference
from swiftkernels.ops.conv_mlp.weights import KERNEL_SIZES, Options, Weights
from swiftkernels.ops.operator import Backend, Call, Operator, needs_gradient
from swiftkernels.utils import checks

BACKENDS = ("auto", "triton", "cpu", "reference")


def _flops(shapes: Mapping[str, Sequence[int]]) -> int:
    hidden, width = shapes["weight1"][:2]
    depthwise = shapes["depthwise_weight"]
    return math.prod(depthwise or (0,)) + hidden * (width + shapes["weight2"][0])


def _example(batch: int, n_tokens: int, in_dims: int, token_dim: int, kernel: int = 3) -> Call:
    """A block on random images, with as many rows as columns if possible."""
    C, D, H = in_dims, token_dim, 2 * in_dims
    rows = max((n for n in range(1, math.isqrt(n_tokens) + 1) if n_tokens % n == 0), default=0)
    x = torch.randn(batch, C, rows, n_tokens // max(1, rows))
    weights = Weights(
        torch.randn(C, 1, kernel, kernel) / kernel, torch.randn(C), torch.randn(H, C) / C**0.5,
        torch.randn(H), torch.randn(D, H) / H**0.5, torch.randn(D), torch.randn(D),
    )  # fmt: skip
    options = Options("gelu", False)
    return Call((x,), weights, None, options, "auto", "statistics")


def _another(call: Call, **changes: int) -> Call:
    """Another example, of the same size but for the changes."""
    batch, C, rows, columns = call.inputs[0].shape
    size = {"in_dims": C, "token_dim": call.weights.token_dim} | changes
    return _example(batch, rows * columns, **size)._replace(backend=call.backend)


def _residual(call: Call) -> Call:
    other = _another(call, token_dim=call.weights.width)
    return other._replace(options=Options("relu", True))


def _without_depthwise(call: Call) -> Call:
    weights = call.weights._replace(depthwise_weight=None, depthwise_bias=None)
    return call._replace(weights=weights)


def _without_scale(call: Call) -> Call:
    return call._replace(weights=call.weights._replace(scale=None))


def _convolutions(call: Call) -> Call:
    w = call.weights
    weights = w._replace(
        weight1=w.weight1[:, :, None, None].clone(), weight2=w.weight2[:, :, None, None].clone()
    )
    return call._replace(weights=weights)


def _with_activation(name: str) -> Callable[[Call], Call]:
    return lambda call: call._replace(options=Options(name, False))


_PACKAGE = "swiftkernels.ops.conv_mlp"

CONV_MLP = Operator(
    "conv_mlp",
    inputs=("x",),
    weights=Weights,
    options=Options,
    reference=reference.conv_mlp,
    backends={
        "triton": Backend(
            f"{_PACKAGE}.triton.launch",
            lambda x, _: torch_state.why_not_triton(x.device),
            torch_state.triton_is_automatic,
            torch_gradients=True,
        ),
        "cpu": Backend(
            f"{_PACKAGE}.cpu", lambda x, _: library.why_not_for(x), torch_gradients=True
        ),
    },
    eager=lambda x, _: "reference",
    flops=_flops,
    function=f"{_PACKAGE}.op:conv_mlp",
    example=_example,
    variants={
        "residual": _residual,
        "without depthwise": _without_depthwise,
        "without scale": _without_scale,
        "convolutions": _convolutions,
        "5 x 5": functools.partial(_another, kernel=5),
        "7 x 7": functools.partial(_another, kernel=7),
        **{name: _with_activation(name) for name in reference.ACTIVATIONS if name != "gelu"},
    },
    layer=f"{_PACKAGE}.layer:ConvMlp",
)
OPERATORS = (CONV_MLP,)


def conv_mlp(
    x: Tensor,
    depthwise_weight: Tensor | None,
    depthwise_bias: Tensor | None,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    scale: Tensor | None = None,
    *,
    activation: str = "gelu",
    residual: bool = True,
    backend: str = "auto",
) -> Tensor:
    """x + scale * W2 activation(W1 depthwise(x)): a block of SwiftFormer as one operator.

    Args:
        x: images [B, C, H, W] of any strides.
        depthwise_weight, depthwise_bias: a convolution of every channel, [C, 1, k, k] with k 3, 5
            or 7, and [C] or None; of stride 1, with zeros around the image. None for both: none.
        weight1, bias1: a linear layer of every pixel, [H, C] (or, as a 1x1 convolution,
            [H, C, 1, 1]) and [H] or None.
        weight2, bias2: the same from H to D channels, [D, H] (or [D, H, 1, 1]) and [D] or None.
        scale: factors of the second layer's output, [D], or None.
        activation: between the two: "gelu", "gelu_tanh", "relu", "silu", "hardswish" or "none".
        residual: whether x is added; D must be C.
        backend: "auto", "triton", "cpu" or "reference". Only "auto" chooses; the others never
            fall back.

    Returns:
        The output [B, D, H, W]; that of "triton" and "cpu" is in channels_last memory format.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, with the
            remedy.

    For gradients, the kernels keep x and the weights alone and compute the hidden channels again.
    With a depthwise convolution that backward runs PyTorch's operators, which takes less memory and
    more time than the definition; there "auto" takes "reference" for gradients.

    Example:
        >>> x, w1, w2 = torch.randn(2, 48, 14, 14), torch.randn(192, 48), torch.randn(48, 192)
        >>> conv_mlp(x, torch.randn(48, 1, 3, 3), None, w1, None, w2, None).shape
        torch.Size([2, 48, 14, 14])
    """
    weights = Weights(depthwise_weight, depthwise_bias, weight1, bias1, weight2, bias2, scale)
    options = Options(activation, residual)
    checks.check_floating("x", x)
    if (dtype := torch_state.autocast_dtype(x)) is not None:
        cast = [None if w is None else w.to(dtype) for w in weights]
        x, weights = x.to(dtype), Weights(*cast)  # type: ignore[arg-type]
    check(x, weights, options)
    if backend == "auto" and depthwise_weight is not None and needs_gradient(x, *weights):
        backend = "reference"
    matrices = (weights.weight1, weights.weight2)
    make = functools.partial(
        planning.make_plan, CONV_MLP, x, weights, matrices, options, backend, None
    )
    return planning.run(make, x, weights, None, None)[0]


def check(x: Tensor, weights: Weights, options: Options) -> None:
    """Raise for bad arguments."""
    checks.check_option("activation", options.activation, tuple(reference.ACTIVATIONS))
    for name in ("weight1", "weight2"):
        checks.check_pointwise(name, getattr(weights, name))
    hidden, width = weights.weight1.shape[:2]
    out_dims, columns = weights.weight2.shape[:2]
    if columns != hidden:
        raise ValueError(
            f"weight2 must have H = {hidden} columns, one for each row of weight1; got {columns}. "
            "Check that both weights come from one block."
        )
    if options.residual and out_dims != width:
        raise ValueError(
            f"weight2 must have C = {width} rows, because x is added; got {out_dims}. Pass "
            "residual=False for an output of another width."
        )
    _check_depthwise(weights, width)
    for name, bias, length in (
        ("bias1", weights.bias1, hidden),
        ("bias2", weights.bias2, out_dims),
    ):
        if bias is not None:
            checks.check_shape(name, bias, (length,), "one number per row of the weight")
    if weights.scale is not None:
        checks.check_shape("scale", weights.scale, (out_dims,), "one number per output channel")
    if x.dim() != 4 or x.shape[1] != width:
        raise ValueError(
            f"x must be [B, {width}, H, W]; got shape {tuple(x.shape)}. Check the width of the "
            "block, or the order of the axes."
        )
    checks.check_alike("x", x, weights._asdict())


def _check_depthwise(weights: Weights, width: int) -> None:
    weight, bias = weights.depthwise_weight, weights.depthwise_bias
    if weight is None:
        if bias is not None:
            raise ValueError(
                "depthwise_bias must be None without depthwise_weight; got a tensor. Pass the "
                "weight as well."
            )
        return
    checks.check_tensor("depthwise_weight", weight)
    if weight.dim() != 4 or weight.shape[2:] not in [(k, k) for k in KERNEL_SIZES]:
        raise ValueError(
            f"depthwise_weight must be [{width}, 1, k, k] with k 3, 5 or 7; got shape "
            f"{tuple(weight.shape)}. Run other convolutions before, and pass None here."
        )
    if weight.shape[:2] != (width, 1):
        raise ValueError(
            f"depthwise_weight must have shape [{width}, 1, k, k], one kernel for each of the C = "
            f"{width} columns of weight1; got {tuple(weight.shape)}. Pass the weight of a "
            f"torch.nn.Conv2d with groups={width}."
        )
    if bias is not None:
        checks.check_shape("depthwise_bias", bias, (width,), "one number per channel")
