// Activation functions of vectors.
#pragma once

#include "simd.h"

namespace swiftkernels {

enum Activation : int64_t { IDENTITY, RELU, GELU, GELU_TANH, SILU, HARDSWISH };

/// max(x, 0); NaN stays NaN.
INLINE vec relu(vec x) { return max(vec{}, x); }

/// x Phi(x) = max(x, 0) - |x| Phi(-|x|), with Phi(-a) = q(a)^-8 for a polynomial q that was fitted
/// for the smallest largest error. Absolute errors are at most 3.5e-7, as PyTorch's are; relative
/// ones 8e-7 close to 0 and 1e-7 above 1.5. At infinity the result is infinity, from -12 on -1e-23.
INLINE vec gelu(vec x) {
  const vec a = min(broadcast(12.f), abs(x));  // beyond it, q^8 would leave the range of floats
  vec q = a * 2.562365791e-06f + -1.084383027e-05f;
  q = q * a + 7.191425409e-05f;
  q = q * a + 2.034653981e-04f;
  q = q * a + 9.630270679e-04f;
  q = q * a + 9.443256412e-03f;
  q = q * a + 4.881754556e-02f;
  q = q * a + 1.087621034e-01f;
  q = q * a + 1.090507736e+00f;
  q *= q;
  q *= q;
  q *= q;
  return relu(x) - a * reciprocal(q);
}

/// 1 / (1 + exp(-x))
INLINE vec sigmoid(vec x) {
  const vec e = exp_of_negative(-abs(x));
  const vec of_absolute = reciprocal(1.f + e);
  return x < 0.f ? e * of_absolute : of_absolute;
}

/// The usual approximation of GELU, x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.
INLINE vec gelu_tanh(vec x) { return x * sigmoid(1.59576912f * x * (1.f + 0.044715f * x * x)); }

INLINE vec hardswish(vec x) { return x * min(broadcast(1.f), max(vec{}, x * (1.f / 6.f) + 0.5f)); }

template <class Function>
INLINE void for_each_vector(Tile c, int64_t rows, int64_t width, Function function) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < width; j += LANES) store(c.row(r) + j, function(load(c.row(r) + j)));
}

/// Apply an activation to `width` columns, a multiple of LANES.
inline void activate(Activation activation, Tile c, int64_t rows, int64_t width) {
  switch (activation) {
    case IDENTITY:
      return;
    case RELU:
      return for_each_vector(c, rows, width, [](vec x) INLINE_LAMBDA { return relu(x); });
    case GELU:
      return for_each_vector(c, rows, width, [](vec x) INLINE_LAMBDA { return gelu(x); });
    case GELU_TANH:
      return for_each_vector(c, rows, width, [](vec x) INLINE_LAMBDA { return gelu_tanh(x); });
    case SILU:
      return for_each_vector(c, rows, width, [](vec x) INLINE_LAMBDA { return x * sigmoid(x); });
    case HARDSWISH:
      return for_each_vector(c, rows, width, [](vec x) INLINE_LAMBDA { return hardswish(x); });
  }
}

}  // namespace swiftkernels
