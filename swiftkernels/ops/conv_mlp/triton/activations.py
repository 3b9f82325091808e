"""The activations and their derivatives, on tiles in the accumulator type.

GELU is x (1 + erf(x / sqrt(2))) / 2 as in PyTorch, with the erf of libdevice or OCML, whose authors
give an error of 2 ulp or less. NaN stays NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))"""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def gelu_tanh_argument(x):
    """y with gelu_tanh(x) = x sigmoid(y): 2 sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x * (1.5957691216057308 + 0.07135481627260025 * x * x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of every number."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * sigmoid(gelu_tanh_argument(x))
    elif ACTIVATION == "silu":
        x = x * sigmoid(x)
    elif ACTIVATION == "hardswish":
        gate = x * 0.16666666666666666 + 0.5
        gate = tl.where(gate < 0.0, 0.0, gate)
        x = x * tl.where(gate > 1.0, 1.0, gate)
    return x


@triton.jit
def activation_backward(grad, x, ACTIVATION: tl.constexpr):
    """The gradient of the argument x of the activation, from that of its value."""
    if ACTIVATION == "relu":
        grad = tl.where(x <= 0.0, 0.0, grad)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        grad = grad * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density)
    elif ACTIVATION == "gelu_tanh":
        gate = sigmoid(gelu_tanh_argument(x))
        slope = x * (1.5957691216057308 + 0.21406444881780074 * x * x)
        grad = grad * (gate + gate * (1.0 - gate) * slope)
    elif ACTIVATION == "silu":
        gate = sigmoid(x)
        grad = grad * (gate + x * gate * (1.0 - gate))
    elif ACTIVATION == "hardswish":
        slope = tl.where(x >= 3.0, 1.0, x * 0.3333333333333333 + 0.5)
        grad = grad * tl.where(x <= -3.0, 0.0, slope)
    return grad
