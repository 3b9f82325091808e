// Scratch memory of a call.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "simd.h"

namespace swiftkernels {

/// Memory of a call, aligned to cache lines. As a bool, false if there was not enough memory.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    if (floats == 0) return;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, static_cast<size_t>(round_up(floats, 16)) * 4) == 0)
      memory_.reset(static_cast<float*>(memory));
  }
  explicit operator bool() const { return static_cast<bool>(memory_); }
  float* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
};

/// Divides scratch into blocks, each aligned to a cache line. Without memory the blocks are null
/// and only counted, so that one function can both measure and lay out.
class Arena {
 public:
  explicit Arena(float* begin = nullptr) : begin_(begin) {}
  INLINE_MEMBER float* take(int64_t floats) {
    float* block = begin_ ? begin_ + used_ : nullptr;
    used_ += round_up(floats, 16);
    return block;
  }
  /// A tile with rows of full vectors. Its stride is no power of two, which would map a column of
  /// the tile to few sets of the cache.
  INLINE_MEMBER Tile tile(int64_t rows, int64_t width) {
    const int64_t stride = padded(width) + (padded(width) % 64 == 0 ? 16 : 0);
    return {take(rows * stride), stride};
  }
  /// A tile with rows of full vectors and no gaps between them.
  INLINE_MEMBER Tile matrix(int64_t rows, int64_t width) {
    return {take(rows * padded(width)), padded(width)};
  }
  /// Floats in the blocks so far.
  int64_t used() const { return used_; }

 private:
  float* begin_;
  int64_t used_ = 0;
};

/// A copy of rows, or zeros if `from` is null, padded with zeros to full vectors.
inline float* copy_padded_rows(const float* from, int64_t rows, int64_t width, Arena& arena) {
  float* to = arena.take(rows * padded(width));
  if (!to) return nullptr;
  std::fill(to, to + rows * padded(width), 0.f);
  for (int64_t r = 0; r < rows && from; r++)
    std::copy(from + r * width, from + (r + 1) * width, to + r * padded(width));
  return to;
}

}  // namespace swiftkernels
