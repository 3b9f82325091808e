// Activation functions of vectors.
#pragma once

#include "simd.h"

namespace swiftkernels {

enum Activation : int64_t { IDENTITY, RELU, GELU, GELU_TANH, SILU, HARDSWISH, RELU6 };

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
    case RELU6:
      return for_each_vector(c, rows, width,
                             [](vec x) INLINE_LAMBDA { return min(broadcast(6.f), relu(x)); });
  }
}

/// An activation of x, and its derivative there.
struct Slope {
  vec value, slope;
};

/// With Phi(-a) = t P(t) exp(-a^2 / 2) / 2, t = 1 / (1 + p a), by Abramowitz and Stegun, 7.1.26:
/// the derivative needs the exponential in any case. Absolute errors are below 3e-7.
INLINE Slope gelu_slope(vec x) {
  const vec a = abs(x);
  const vec e = exp_of_negative(x * x * -0.5f);
  const vec t = reciprocal(a * 0.23164189f + 1.f);
  vec p = t * 0.5307027145f + -0.7265760135f;
  p = p * t + 0.7107068705f;
  p = p * t + -0.142248368f;
  p = p * t + 0.127414796f;
  const vec tail = p * t * e;
  const vec below = x < 0.f ? tail : 1.f - tail;
  return {relu(x) - a * tail, below + x * e * 0.39894228f};
}

/// sigmoid(x) and its derivative. The difference of 1 and a sigmoid would lose digits.
INLINE Slope sigmoid_slope(vec x) {
  const vec e = exp_of_negative(-abs(x));
  const vec of_absolute = reciprocal(1.f + e);
  const vec complement = e * of_absolute;
  return {x < 0.f ? complement : of_absolute, complement * of_absolute};
}

INLINE Slope silu_slope(vec x) {
  const Slope s = sigmoid_slope(x);
  return {x * s.value, s.value + x * s.slope};
}

INLINE Slope gelu_tanh_slope(vec x) {
  const vec squared = x * x;
  const Slope s = sigmoid_slope(1.59576912f * x * (1.f + 0.044715f * squared));
  return {x * s.value, s.value + x * s.slope * (1.59576912f + 0.214063986f * squared)};
}

/// As PyTorch: at the ends of the parabola, that is at -3 and 3, the slopes are 0 and 1.
INLINE Slope hardswish_slope(vec x) {
  const vec inside = x * (1.f / 3.f) + 0.5f;
  const vec right = x < 3.f ? inside : broadcast(1.f);
  return {hardswish(x), x > -3.f ? right : vec{}};
}

INLINE Slope relu_slope(vec x) { return {relu(x), x > 0.f ? broadcast(1.f) : vec{}}; }

/// c = activation(c) and gradients *= its derivative; sums += the columns of the gradients.
template <class Function>
INLINE void for_each_slope(Tile c, Tile gradients, int64_t rows, int64_t width, float* sums,
                           Function function) {
  for (int64_t j = 0; j < width; j += LANES) {
    vec sum{};
    for (int64_t r = 0; r < rows; r++) {
      const Slope at = function(load(c.row(r) + j));
      const vec gradient = load(gradients.row(r) + j) * at.slope;
      store(c.row(r) + j, at.value);
      store(gradients.row(r) + j, gradient);
      sum += gradient;
    }
    store(sums + j, load(sums + j) + sum);
  }
}

/// `for_each_slope` with an activation, for `width` columns, a multiple of LANES.
inline void differentiate(Activation activation, Tile c, Tile gradients, int64_t rows,
                          int64_t width, float* sums) {
  const auto run = [&](auto function)
                       INLINE_LAMBDA { for_each_slope(c, gradients, rows, width, sums, function); };
  switch (activation) {
    case IDENTITY:
      return run([](vec x) INLINE_LAMBDA { return Slope{x, broadcast(1.f)}; });
    case RELU:
      return run([](vec x) INLINE_LAMBDA { return relu_slope(x); });
    case GELU:
      return run([](vec x) INLINE_LAMBDA { return gelu_slope(x); });
    case GELU_TANH:
      return run([](vec x) INLINE_LAMBDA { return gelu_tanh_slope(x); });
    case SILU:
      return run([](vec x) INLINE_LAMBDA { return silu_slope(x); });
    case HARDSWISH:
      return run([](vec x) INLINE_LAMBDA { return hardswish_slope(x); });
    case RELU6:  // of fused networks only, which are not trained
      return;
  }
}

}  // namespace swiftkernels
