// Scratch memory of one call.
#pragma once

#include <cstdlib>
#include <memory>

#include "simd.h"

namespace swiftkernels {

/// Memory of one call, aligned to cache lines. False as a bool if there was not enough.
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

/// Hands out blocks of scratch, each aligned to a cache line. Without memory it hands out null and
/// counts, so that one function both measures and lays out.
class Arena {
 public:
  explicit Arena(float* begin = nullptr) : begin_(begin) {}
  INLINE_MEMBER float* take(int64_t floats) {
    float* block = begin_ ? begin_ + used_ : nullptr;
    used_ += round_up(floats, 16);
    return block;
  }
  /// A tile with rows of whole vectors. Strides of a power of two would map a column of the tile to
  /// few sets of the cache.
  INLINE_MEMBER Tile tile(int64_t rows, int64_t width) {
    const int64_t stride = padded(width) + (padded(width) % 64 == 0 ? 16 : 0);
    return {take(rows * stride), stride};
  }
  /// A tile with rows of whole vectors and nothing between them.
  INLINE_MEMBER Tile matrix(int64_t rows, int64_t width) {
    return {take(rows * padded(width)), padded(width)};
  }
  /// Floats handed out so far.
  int64_t used() const { return used_; }

 private:
  float* begin_;
  int64_t used_ = 0;
};

}  // namespace swiftkernels
