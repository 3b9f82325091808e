// Operations on rows that are padded to full vectors.
#pragma once

#include <algorithm>

#include "simd.h"

namespace swiftkernels {

/// total += vector
inline void add(const float* vector, int64_t width, float* total) {
  for (int64_t j = 0; j < padded(width); j += LANES)
    store(total + j, load(total + j) + load(vector + j));
}

/// to = from without its padding, unless they are the same memory.
inline void copy_rows(Tile from, int64_t rows, int64_t width, float* to) {
  if (!to || to == from.data) return;
  for (int64_t r = 0; r < rows; r++) std::copy(from.row(r), from.row(r) + width, to + r * width);
}

/// to = exp(scores - highest) * factor, where no score is above `highest`; others count as equal.
ONE_COPY inline void exponentials(const float* scores, int64_t n, float highest, float factor,
                                  float* to) {
  alignas(64) float lanes[LANES];
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t count = std::min<int64_t>(LANES, n - i);
    for (int64_t j = 0; j < LANES; j++)
      lanes[j] = std::min(0.f, scores[i + std::min(j, count - 1)] - highest);
    store(lanes, exp_of_negative(load(lanes)) * broadcast(factor));
    std::memcpy(to + i, lanes, count * sizeof(float));
  }
}

/// rows_sum += sum_n factors[n] rows[n], with the sums of four vectors of columns in registers.
inline void add_weighted_rows(const float* factors, Tile rows, int64_t n, int64_t width,
                              float* rows_sum) {
  int64_t j = 0;
  for (; j + 4 * LANES <= padded(width); j += 4 * LANES) {
    vec sums[4];
    for (int v = 0; v < 4; v++) sums[v] = load(rows_sum + j + v * LANES);
    for (int64_t i = 0; i < n; i++) {
      const vec factor = broadcast(factors[i]);
      for (int v = 0; v < 4; v++) sums[v] += factor * load(rows.row(i) + j + v * LANES);
    }
    for (int v = 0; v < 4; v++) store(rows_sum + j + v * LANES, sums[v]);
  }
  for (; j < padded(width); j += LANES) {
    vec total = load(rows_sum + j);
    for (int64_t i = 0; i < n; i++) total += broadcast(factors[i]) * load(rows.row(i) + j);
    store(rows_sum + j, total);
  }
}

/// The sums of the columns of rows, in full vectors: use(j, sum). For accuracy, `few` rows at a
/// time are summed first.
template <class Use>
INLINE void for_column_sums(Tile rows, int64_t count, int64_t width, int64_t few, Use use) {
  for (int64_t j = 0; j < padded(width); j += LANES) {
    vec total{};
    for (int64_t r = 0; r < count; r += few) {
      vec sum{};
      for (int64_t i = r; i < std::min(count, r + few); i++) sum += load(rows.row(i) + j);
      total += sum;
    }
    use(j, total);
  }
}

/// to[j] += sum_r rows[r, j], by sums of 16 rows.
inline void add_rows(Tile rows, int64_t count, int64_t width, float* to) {
  for_column_sums(rows, count, width, 16,
                  [&](int64_t j, vec sum) INLINE_LAMBDA { store(to + j, load(to + j) + sum); });
}

}  // namespace swiftkernels
