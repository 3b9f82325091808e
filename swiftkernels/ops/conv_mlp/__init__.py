"""Depthwise convolution, pointwise convolution, activation, pointwise convolution, residual."""
