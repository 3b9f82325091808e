"""The activations and their derivatives, on tiles in the accumulator type.

GELU is x cdf(x) as in PyTorch, with the cumulative distribution function cdf(x) = (1 + erf(x /
sqrt(2))) / 2. The erf is that of libdevice or OCML, whose authors give an error of 2 ulp or less.
For float16 and bfloat16 it is a polynomial, see `normal_cdf`. NaN stays NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normal_cdf(x, DTYPE: tl.constexpr):
    """(1 + erf(x / sqrt(2))) / 2, as accurate as numbers in DTYPE need.

    In 16 bits it is 1/2 + x p(x^2) for |x| <= 4, and its values at -4 and 4, 0 and 1, beyond. The
    error is at most 3.4e-5, that of x cdf(x) at most 1.4e-4: a third of a rounding of 1 in float16.
    It takes half the instructions of erf, of which a block computes more than of anything else.
    """
    if DTYPE.primitive_bitwidth == 16:
        y = tl.minimum(tl.maximum(x, -4.0), 4.0)
        square = y * y
        p = square * -1.33971152e-09 + 1.07464873e-07
        p = p * square - 3.76539412e-06
        p = p * square + 7.66718514e-05
        p = p * square - 1.0230018e-03
        p = p * square + 9.58457266e-03
        p = p * square - 6.60649923e-02
        p = p * square + 0.398804842
        # Rounding must not make it negative, which would count times a large x < 0.
        cdf = tl.maximum(y * p + 0.5, 0.0)
    else:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return cdf


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))"""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def gelu_tanh_argument(x):
    """y with gelu_tanh(x) = x sigmoid(y): 2 sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x * (1.5957691216057308 + 0.07135481627260025 * x * x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """The activation of every number, which will be rounded to DTYPE."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "gelu":
        x = x * normal_cdf(x, DTYPE)
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
def activation_backward(grad, x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """The gradient of the argument x of the activation, from that of its value.

    It will be rounded to DTYPE.
    """
    if ACTIVATION == "relu":
        grad = tl.where(x <= 0.0, 0.0, grad)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        grad = grad * (normal_cdf(x, DTYPE) + x * density)
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
