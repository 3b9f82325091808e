// A depthwise convolution k x k of stride 1, with zeros around the image.
#pragma once

#include <algorithm>

#include "simd.h"

namespace swiftkernels::conv_mlp {

/// An image in memory: float32 rows of full vectors, one for each pixel, without gaps.
struct Map {
  float* data;
  int64_t height, width;
  int64_t stride;  // floats from a pixel to the next
  float* pixel(int64_t i) const { return data + i * stride; }
  int64_t pixels() const { return height * width; }
};

/// The convolution of some channels: weights [k, k, padded C] and bias [padded C].
struct Depthwise {
  const float *weights, *bias;
  int64_t kernel, channels;
};

/// P pixels of a row from column x on. Their neighbours to the left and right exist; above and
/// below there are some of the rows [first, end) of the kernel. `row`: the first of these rows of
/// the image.
template <int K, int P>
INLINE void inner_pixels(const Map& image, const Depthwise& d, const float* row, int64_t first,
                         int64_t end, int64_t x, Tile out) {
  const int64_t width = padded(d.channels);
  for (int64_t c = 0; c < width; c += LANES) {
    vec sums[P];
    const vec bias = load(d.bias + c);
    unrolled<P>([&](auto p) INLINE_LAMBDA { sums[p] = bias; });
    const float* in = row + (x - K / 2) * image.stride + c;
    for (int64_t y = first; y < end; y++, in += image.width * image.stride) {
      vec weights[K];
      unrolled<K>([&](auto i)
                      INLINE_LAMBDA { weights[i] = load(d.weights + (y * K + i) * width + c); });
      unrolled<P + K - 1>([&](auto i) INLINE_LAMBDA {
        const vec value = load(in + i * image.stride);
        unrolled<K>([&](auto k) INLINE_LAMBDA {
          constexpr int pixel = decltype(i)::value - decltype(k)::value;
          if constexpr (pixel >= 0 && pixel < P)
            sums[pixel] = multiply_add(sums[pixel], value, weights[k]);
        });
      });
    }
    unrolled<P>([&](auto p) INLINE_LAMBDA { store(out.row(p) + c, sums[p]); });
  }
}

/// A pixel at column x with neighbours outside of the image.
template <int K>
inline void edge_pixel(const Map& image, const Depthwise& d, const float* row, int64_t first,
                       int64_t end, int64_t x, float* out) {
  const int64_t width = padded(d.channels);
  const int64_t left = std::max<int64_t>(0, K / 2 - x);
  const int64_t right = std::min<int64_t>(K, image.width + K / 2 - x);
  for (int64_t c = 0; c < width; c += LANES) {
    vec sum = load(d.bias + c);
    const float* in = row + (x - K / 2) * image.stride + c;
    for (int64_t y = first; y < end; y++, in += image.width * image.stride)
      for (int64_t i = left; i < right; i++)
        sum = multiply_add(sum, load(in + i * image.stride),
                           load(d.weights + (y * K + i) * width + c));
    store(out + c, sum);
  }
}

/// Columns [x, end) of row y.
template <int K>
inline void part_of_row(const Map& image, const Depthwise& d, int64_t y, int64_t x, int64_t end,
                        Tile out) {
  const int64_t above = y - K / 2;
  const int64_t first = std::max<int64_t>(0, -above);
  const int64_t last = std::min<int64_t>(K, image.height - above);
  const float* row = image.pixel((above + first) * image.width);
  const int64_t begin = x, inner_end = std::min(end, image.width - K / 2);
  for (; x < std::min<int64_t>(end, K / 2); x++)
    edge_pixel<K>(image, d, row, first, last, x, out.row(x - begin));
  constexpr int PIXELS = K == 3 ? 4 : 3;
  for (; x + PIXELS <= inner_end; x += PIXELS)
    inner_pixels<K, PIXELS>(image, d, row, first, last, x, out.from(x - begin));
  if (x + 2 <= inner_end)
    inner_pixels<K, 2>(image, d, row, first, last, x, out.from(x - begin)), x += 2;
  for (; x < inner_end; x++) inner_pixels<K, 1>(image, d, row, first, last, x, out.from(x - begin));
  for (; x < end; x++) edge_pixel<K>(image, d, row, first, last, x, out.row(x - begin));
}

template <int K>
inline void convolve(const Map& image, const Depthwise& d, int64_t first, int64_t end, Tile out) {
  for (int64_t pixel = first; pixel < end;) {
    const int64_t y = pixel / image.width, x = pixel - y * image.width;
    const int64_t row_end = std::min(image.width, x + end - pixel);
    part_of_row<K>(image, d, y, x, row_end, out.from(pixel - first));
    pixel += row_end - x;
  }
}

/// out = the pixels [first, end) of the convolution.
inline void convolve(const Map& image, const Depthwise& d, int64_t first, int64_t end, Tile out) {
  switch (d.kernel) {
    case 3:
      return convolve<3>(image, d, first, end, out);
    case 5:
      return convolve<5>(image, d, first, end, out);
    default:
      return convolve<7>(image, d, first, end, out);
  }
}

}  // namespace swiftkernels::conv_mlp
