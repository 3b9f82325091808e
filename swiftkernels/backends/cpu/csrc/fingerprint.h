// Detects writes to weights, after they were packed, that PyTorch's version counters did not count.
#pragma once

#include <algorithm>

#include "simd.h"

namespace swiftkernels {

/// `compute(true)` reads every byte. `compute(false)` reads all bytes of vectors, and of matrices
/// only some lines of 64 bytes: at least one in every row, and in any 16 rows one in every column.
/// So it detects every write to a row, a column or 16 rows of a tile, but may miss a write to a few
/// elements.
struct Fingerprint {
  static constexpr int64_t MAX_SOURCES = 12, LINE = 64, ROWS = 16;
  struct Source {
    const char* bytes;
    int64_t rows, row_bytes, row_stride;
  } sources[MAX_SOURCES];
  int64_t source_count;
  int64_t never_sample;
  uint64_t full, sampled;  // what `compute` returned when the weights were packed

  /// From so many tokens per thread on, a call reads all bytes. That takes less than 3 % of its
  /// time: 0.1 to 0.4 ns for a word of the weights, 0.02 ns for a product with it.
  static constexpr int64_t READ_ALL_FROM = 512;

  /// Whether the weights are as they were packed, for a call with so many tokens.
  bool matches(int64_t tokens, int threads) const {
    const bool all = never_sample || tokens >= READ_ALL_FROM * threads;
    return all ? compute(true) == full : compute(false) == sampled;
  }

  ONE_COPY uint64_t compute(bool all) const {
    Sums sums;
    for (int64_t i = 0; i < source_count; i++) {
      const auto [bytes, rows, row_bytes, row_stride] = sources[i];
      if (all || rows == 1 || row_bytes <= LINE) {
        const bool dense = row_stride == row_bytes;
        for (int64_t row = 0; row < (dense ? 1 : rows); row++)
          sums.add(bytes + row * row_stride, dense ? rows * row_bytes : row_bytes);
        continue;
      }
      const int64_t lines = (row_bytes + LINE - 1) / LINE;
      const int64_t fewest = std::min(rows, ROWS), lines_per_row = (lines + fewest - 1) / fewest;
      for (int64_t row = 0, line = 0; row < rows; row++)
        for (int64_t j = 0; j < lines_per_row; j++, line = line + 1 == lines ? 0 : line + 1)
          sums.add(bytes + row * row_stride + std::min(line * LINE, row_bytes - LINE), LINE);
    }
    return sums.hash();
  }

 private:
  /// The sum of a hash of each word and its place. The hash is not linear: with sums of the words
  /// themselves, weighted or not, changes of many equal words (signs of a matrix of ones) cancel.
  struct Sums {
    word_vec sum{}, place{};

    INLINE_MEMBER void add(word_vec word) {
      place += 0x9E3779B9u;
      word ^= place;
      word ^= word >> 16;
      word *= 0x7FEB352Du;
      sum += word ^ (word >> 15);
    }
    INLINE_MEMBER void add(const char* bytes, int64_t count) {
      constexpr int64_t STEP = sizeof(word_vec);
      for (; count >= STEP; bytes += STEP, count -= STEP) add(load_words(bytes));
      if (count == 0) return;
      alignas(STEP) char rest[STEP] = {};
      std::memcpy(rest, bytes, count);
      add(load_words(rest));
    }
    uint64_t hash() const {
      uint64_t hash = 0;
      for (int i = 0; i < LANES; i++) hash = (hash ^ sum[i]) * 0x9E3779B97F4A7C15u;
      return hash;
    }
  };
};

}  // namespace swiftkernels
