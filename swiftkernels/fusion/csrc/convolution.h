// Convolutions as products: the pixels that a tile of output pixels reads are gathered to rows of
// k k C numbers.
#pragma once

#include "../../ops/conv_mlp/csrc/depthwise.h"
#include "abi.h"
#include "activation.h"
#include "gemm.h"
#include "scratch.h"

namespace swiftkernels::fusion {

using conv_mlp::Map;

/// Rows or columns of the output of a convolution.
constexpr int64_t convolved(int64_t n, int64_t kernel, int64_t stride, int64_t padding) {
  return (n + 2 * padding - kernel) / stride + 1;
}
constexpr int64_t halved(int64_t n) { return convolved(n, 3, 2, 1); }

/// Pixels of a tile: their patches (384 KB) stay in the second-level cache.
inline int64_t convolution_tile(int64_t depth) {
  return std::min<int64_t>(96, std::max<int64_t>(12, 98304 / depth / 12 * 12));
}

/// A tile of patches; full vectors are written, so rows need room for one more.
inline Tile patch_tile(const Product& p, int64_t pixels, Arena& arena) {
  return p.is_pointwise() ? Tile{} : arena.tile(pixels, p.depth() + LANES);
}

/// to[i] = the k k C numbers that the output pixel first + i reads. `above`: rows of the image
/// above the map, `height`: of the image.
inline void gather(const Product& p, const Map& map, int64_t above, int64_t height, int64_t first,
                   int64_t end, Tile to) {
  const int64_t width = convolved(map.width, p.kernel, p.stride, p.padding);
  for (int64_t pixel = first; pixel < end; pixel++) {
    const int64_t y = pixel / width * p.stride - p.padding;
    const int64_t x = pixel % width * p.stride - p.padding;
    float* row = to.row(pixel - first);
    for (int64_t i = 0; i < p.kernel; i++)
      for (int64_t j = 0; j < p.kernel; j++, row += p.in_dims) {
        const int64_t from_y = y + i, from_x = x + j;
        if (from_y < 0 || from_y >= height || from_x < 0 || from_x >= map.width) {
          for (int64_t c = 0; c < p.in_dims; c += LANES) store(row + c, vec{});
          continue;
        }
        const float* from = map.pixel((from_y - above) * map.width + from_x);
        for (int64_t c = 0; c < p.in_dims; c += LANES) store(row + c, load(from + c));
      }
  }
}

/// out = `added` + the output pixels [first, end); arguments as in `gather`.
inline void convolve_tile(const Product& p, const Map& map, int64_t above, int64_t height,
                          int64_t first, int64_t end, Tile out, Tile patches, Tile added = {}) {
  const Tile pixels{map.pixel(first), map.stride};
  if (!p.is_pointwise()) gather(p, map, above, height, first, end, patches);
  gemm_and(p.is_pointwise() ? pixels : patches, end - first,
           Matrix::packed(p.panels, p.depth(), p.out_dims), p.bias, out, nullptr, added, true,
           [&](Tile part, int64_t rows, int64_t width) INLINE_LAMBDA {
             activate(static_cast<Activation>(p.activation), part, rows, width);
           });
}

/// The stem on bands of output rows. The rows between its convolutions stay in the cache; the two
/// at the border of a band are computed twice.
class StemRows {
 public:
  /// Output rows in a band.
  static constexpr int64_t BAND = 8;

  StemRows(const Stem& stem, const Images& x, int64_t type, int64_t height, int64_t width)
      : stem_(stem), x_(x), type_(type), height_(height), width_(width) {}

  struct Workspace {
    Tile lines;  // [channels of x, 3 rows of the image]
    Tile middle;
    Tile patches;
  };

  Workspace workspace(int64_t band, Arena& arena) const {
    Workspace s;
    s.lines = arena.matrix(3 * stem_.first.in_dims, width_ + 2 + LANES);
    s.middle = arena.matrix((2 * band + 1) * halved(width_), stem_.first.out_dims);
    s.patches = patch_tile(stem_.second, group() * out_width(), arena);
    return s;
  }

  /// Output rows [first, end) of an image; `out` begins at the image's first output pixel.
  void run(int64_t image, int64_t first, int64_t end, Tile out, const Workspace& s) const {
    const int64_t above = std::max<int64_t>(0, 2 * first - 1);
    const int64_t below = std::min(halved(height_), 2 * end);
    const Map middle{s.middle.data, below - above, halved(width_), s.middle.stride};
    for (int64_t y = above; y < below; y++) middle_row(image, y, s, middle, y - above);
    for (int64_t y = first; y < end; y += group()) {
      const int64_t last = std::min(end, y + group());
      convolve_tile(stem_.second, middle, above, halved(height_), y * out_width(),
                    last * out_width(), out.from(y * out_width()), s.patches);
    }
  }

 private:
  int64_t out_width() const { return halved(halved(width_)); }
  /// Output rows whose patches are gathered together.
  int64_t group() const { return std::max<int64_t>(1, 96 / out_width()); }

  /// Row y after the first convolution. Each channel and row of the kernel is a run of three
  /// columns, and the next pixel reads two columns further.
  void middle_row(int64_t image, int64_t y, const Workspace& s, const Map& middle,
                  int64_t row) const {
    const Product& p = stem_.first;
    for (int64_t c = 0; c < p.in_dims; c++)
      for (int64_t i = 0; i < 3; i++) copy_line(image, c, 2 * y - 1 + i, s.lines.row(c * 3 + i));
    const Rows patches(s.lines.data, 2, 3 * p.in_dims, s.lines.stride);
    const Tile out{middle.pixel(row * middle.width), middle.stride};
    gemm_and(patches, middle.width, Matrix::packed(p.panels, p.depth(), p.out_dims), p.bias, out,
             nullptr, {}, true, [&](Tile part, int64_t rows, int64_t width) INLINE_LAMBDA {
               activate(static_cast<Activation>(p.activation), part, rows, width);
             });
  }

  /// A channel of row y of the image, with a zero before and after it; zeros outside of the image.
  void copy_line(int64_t image, int64_t channel, int64_t y, float* line) const {
    line[0] = line[width_ + 1] = 0.f;
    if (y < 0 || y >= height_) return std::fill(line + 1, line + 1 + width_, 0.f);
    const Tokens row = x_.row(image, y, type_);
    with_type(row, 0, 0, [&](const auto* in) {
      using Element = std::decay_t<decltype(*in)>;
      in += channel * row.channel_stride;
      for (int64_t i = 0; i < width_; i++) line[1 + i] = Element::load(in[i * row.token_stride]);
    });
  }

  const Stem& stem_;
  const Images& x_;
  const int64_t type_, height_, width_;
};

}  // namespace swiftkernels::fusion
