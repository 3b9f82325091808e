// What else chains do with maps: partial and depthwise convolutions, norms, averages of neighbours,
// and squeeze and excitation.
#pragma once

#include <cmath>

#include "convolution.h"
#include "row_ops.h"

namespace swiftkernels::fusion {

/// out = the pixels [first, end) of a partial convolution.
inline void partial_tile(const Map& x, const PartialWeights& w, int64_t first, int64_t end,
                         Tile out, Tile patches) {
  convolve_tile(w.product, x, 0, x.height, first, end, out, patches);
  // The product has written full vectors, so the first channels of these follow it.
  for (int64_t pixel = first; pixel < end; pixel++)
    std::copy(x.pixel(pixel) + w.product.out_dims, x.pixel(pixel) + padded(w.channels),
              out.row(pixel - first) + w.product.out_dims);
}

/// out = the pixels [first, end) with each channel `multiplier` times.
inline void repeat_tile(const Map& x, const DepthwiseWeights& d, int64_t first, int64_t end,
                        Tile out) {
  for (int64_t pixel = first; pixel < end; pixel++) {
    const float* in = x.pixel(pixel);
    float* row = out.row(pixel - first);
    for (int64_t c = 0; c < d.channels / d.multiplier; c++)
      for (int64_t i = 0; i < d.multiplier; i++) *row++ = in[c];
    std::fill(row, out.row(pixel - first) + padded(d.channels), 0.f);
  }
}

/// The sum of function(numbers) over a row of `channels` numbers.
template <class Function>
INLINE float sum_of_row(const float* row, int64_t channels, Function function) {
  vec total{};
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES) total += function(load(row + c));
  if (c < channels) {
    alignas(sizeof(vec)) float last[LANES];
    store(last, function(load(row + c)));
    std::fill(last + (channels - c), last + LANES, 0.f);
    total += load(last);
  }
  return sum(total);
}

/// Mean and 1 / sqrt(variance + eps) of some pixels.
inline void moments(const Map& x, const NormaliseWeights& w, int64_t first, int64_t end,
                    float* mean, float* scale) {
  const double count = static_cast<double>(end - first) * static_cast<double>(w.channels);
  double total = 0., squares = 0.;
  for (int64_t pixel = first; pixel < end; pixel++)
    total += sum_of_row(x.pixel(pixel), w.channels, [](vec v) INLINE_LAMBDA { return v; });
  const float m = static_cast<float>(total / count);
  for (int64_t pixel = first; pixel < end; pixel++)
    squares += sum_of_row(x.pixel(pixel), w.channels,
                          [&](vec v) INLINE_LAMBDA { return (v - m) * (v - m); });
  *mean = m;
  *scale = static_cast<float>(1. / std::sqrt(squares / count + w.eps));
}

/// out = the pixels [first, end), normalised; `of_image`: mean and scale of the image, or null.
inline void normalise_tile(const Map& x, const NormaliseWeights& w, const float* of_image,
                           int64_t first, int64_t end, Tile out) {
  for (int64_t pixel = first; pixel < end; pixel++) {
    float mean, scale;
    if (of_image)
      mean = of_image[0], scale = of_image[1];
    else
      moments(x, w, pixel, pixel + 1, &mean, &scale);
    const float* in = x.pixel(pixel);
    float* row = out.row(pixel - first);
    for (int64_t c = 0; c < padded(w.channels); c += LANES)
      store(row + c, (load(in + c) - mean) * scale * load(w.weight + c) + load(w.bias + c));
  }
}

/// Pixels of a depthwise convolution that are computed together.
constexpr int PIXELS = 4;

/// P pixels of a row of the output, of which all neighbours in the rows [first, end) of the kernel
/// exist. `in`: the first number that the first pixel reads.
template <int P>
inline void strided_pixels(const Map& x, const DepthwiseWeights& d, const float* in, int64_t first,
                           int64_t end, int64_t left, int64_t right, Tile out) {
  const int64_t width = padded(d.channels), row = x.width * x.stride, step = d.stride * x.stride;
  for (int64_t c = 0; c < width; c += LANES) {
    vec sums[P];
    const vec bias = load(d.bias + c);
    unrolled<P>([&](auto p) INLINE_LAMBDA { sums[p] = bias; });
    for (int64_t i = first; i < end; i++)
      for (int64_t j = left; j < right; j++) {
        const vec weight = load(d.weights + (i * d.kernel + j) * width + c);
        const float* from = in + i * row + j * x.stride + c;
        unrolled<P>([&](auto p) INLINE_LAMBDA {
          sums[p] = multiply_add(sums[p], load(from + p * step), weight);
        });
      }
    unrolled<P>([&](auto p) INLINE_LAMBDA { store(out.row(p) + c, sums[p]); });
  }
}

/// out = the output pixels [first, end) of a depthwise convolution of stride 2.
inline void convolve_strided(const Map& x, const DepthwiseWeights& d, int64_t first, int64_t end,
                             Tile out) {
  const int64_t k = d.kernel, reach = k / 2;
  const int64_t width = convolved(x.width, k, d.stride, reach);
  for (int64_t pixel = first; pixel < end;) {
    const int64_t above = pixel / width * d.stride - reach, at = pixel % width;
    const int64_t before = at * d.stride - reach;
    const int64_t top = std::max<int64_t>(0, -above), bottom = std::min(k, x.height - above);
    const float* in = x.data + (above * x.width + before) * x.stride;
    const Tile to = out.from(pixel - first);
    const int64_t last = before + (PIXELS - 1) * d.stride + k;
    if (before >= 0 && at + PIXELS <= width && last <= x.width && pixel + PIXELS <= end) {
      strided_pixels<PIXELS>(x, d, in, top, bottom, 0, k, to);
      pixel += PIXELS;
    } else {
      strided_pixels<1>(x, d, in, top, bottom, std::max<int64_t>(0, -before),
                        std::min(k, x.width - before), to);
      pixel++;
    }
  }
}

/// out = the output pixels [first, end) of a depthwise convolution and its activation.
inline void depthwise_tile(const Map& x, const DepthwiseWeights& d, int64_t first, int64_t end,
                           Tile out) {
  if (d.stride == 1)
    conv_mlp::convolve(x, {d.weights, d.bias, d.kernel, d.channels}, first, end, out);
  else
    convolve_strided(x, d, first, end, out);
  activate(static_cast<Activation>(d.activation), out, end - first, padded(d.channels));
}

/// out = the pixels [first, end) of `added` + scale (mean - x).
inline void average_tile(const Map& x, const AverageWeights& a, int64_t first, int64_t end,
                         Tile out, Tile added) {
  const int64_t reach = a.kernel / 2;
  for (int64_t pixel = first; pixel < end; pixel++) {
    const int64_t y = pixel / x.width, column = pixel % x.width;
    const int64_t top = std::max<int64_t>(0, y - reach), bottom = std::min(x.height, y + reach + 1);
    const int64_t left = std::max<int64_t>(0, column - reach);
    const int64_t right = std::min(x.width, column + reach + 1);
    const float share = 1.f / static_cast<float>((bottom - top) * (right - left));
    for (int64_t c = 0; c < padded(a.channels); c += LANES) {
      vec sum{};
      for (int64_t i = top; i < bottom; i++)
        for (int64_t j = left; j < right; j++) sum += load(x.pixel(i * x.width + j) + c);
      const vec difference = sum * share - load(x.pixel(pixel) + c);
      const vec base = added.data ? load(added.row(pixel - first) + c) : vec{};
      store(out.row(pixel - first) + c, base + load(a.scale + c) * difference);
    }
  }
}

/// The mean over the pixels; sums of 64 pixels are summed.
inline void pool(const Map& in, int64_t channels, float* mean) {
  const int64_t pixels = in.pixels();
  for_column_sums({in.data, in.stride}, pixels, channels, MAX_CHAIN,
                  [&](int64_t c, vec sum)
                      INLINE_LAMBDA { store(mean + c, sum / static_cast<float>(pixels)); });
}

/// Floats of memory for `squeeze`: the gates, the mean, and the channels between.
inline int64_t squeeze_floats(const SqueezeExciteWeights& w) {
  return 2 * padded(w.second.out_dims) + padded(w.first.out_dims);
}

/// The gates of all channels, at the start of `memory`.
inline void squeeze(const Map& x, const SqueezeExciteWeights& w, float* memory) {
  const int64_t width = padded(w.second.out_dims);
  float *mean = memory + width, *hidden = mean + width;
  pool(x, w.first.in_dims, mean);
  const auto product = [](const Product& p, float* in, float* out) {
    gemm({in, 0}, 1, Matrix::packed(p.panels, p.in_dims, p.out_dims), p.bias, {out, 0}, nullptr);
    activate(static_cast<Activation>(p.activation), {out, 0}, 1, padded(p.out_dims));
  };
  product(w.first, mean, hidden);
  product(w.second, hidden, memory);
  for (int64_t c = 0; c < width; c += LANES) {
    const vec x = load(memory + c);
    const vec clipped = min(broadcast(1.f), max(vec{}, x * (1.f / 6.f) + 0.5f));
    store(memory + c, w.gate == SIGMOID ? sigmoid(x) : clipped);
  }
}

/// out = the pixels [first, end) times the gates.
inline void excite_tile(const Map& x, int64_t channels, const float* gates, int64_t first,
                        int64_t end, Tile out) {
  for (int64_t pixel = first; pixel < end; pixel++)
    for (int64_t c = 0; c < padded(channels); c += LANES)
      store(out.row(pixel - first) + c, load(x.pixel(pixel) + c) * load(gates + c));
}

}  // namespace swiftkernels::fusion
