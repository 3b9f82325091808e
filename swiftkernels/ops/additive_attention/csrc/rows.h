// More operations on rows that are padded to full vectors.
#pragma once

#include "abi.h"
#include "gemm.h"
#include "row_ops.h"

namespace swiftkernels::additive {

inline float dot(const float* a, const float* b, int64_t width) {
  vec total{};
  for (int64_t j = 0; j < padded(width); j += LANES) total += load(a + j) * load(b + j);
  return sum(total);
}

inline float norm2(const float* vector, int64_t width) { return dot(vector, vector, width); }

/// to += factor * from
inline void add_scaled(const float* from, float factor, int64_t width, float* to) {
  const vec by = broadcast(factor);
  for (int64_t j = 0; j < padded(width); j += LANES)
    store(to + j, load(to + j) + by * load(from + j));
}

/// Multiply every row with its factor.
inline void scale_rows(Tile tile, int64_t rows, int64_t width, const float* factors) {
  for (int64_t r = 0; r < rows; r++) {
    const vec factor = broadcast(factors[r]);
    for (int64_t j = 0; j < padded(width); j += LANES)
      store(tile.row(r) + j, load(tile.row(r) + j) * factor);
  }
}

/// to = from * factor, in full vectors: up to LANES - 1 floats beyond `width` are overwritten.
INLINE void copy_scaled(const float* from, float factor, int64_t width, float* to) {
  const vec by = broadcast(factor);
  for (int64_t j = 0; j < padded(width); j += LANES) store(to + j, load(from + j) * by);
}

/// total += sum_r factors[r] tile[r]. For accuracy, 16 rows at a time are summed, then these sums
/// are added, then their sum is added to the total. `scratch` holds two rows.
inline void add_rows(const float* factors, Tile tile, int64_t rows, int64_t width, float* scratch,
                     float* total) {
  constexpr int64_t CHAIN = 16;
  float *chain = scratch, *all = scratch + padded(width);
  std::fill(all, all + padded(width), 0.f);
  for (int64_t r = 0; r < rows; r += CHAIN) {
    std::fill(chain, chain + padded(width), 0.f);
    add_weighted_rows(factors + r, tile.from(r), std::min(CHAIN, rows - r), width, chain);
    add(chain, width, all);
  }
  add(all, width, total);
}

/// to += sum_r factors[r] rows[r] for rows of a weight, without padding and `stride` apart. For
/// accuracy, MAX_CHAIN rows at a time are summed first. `scratch` holds a row.
inline void add_weight_rows(const float* factors, const float* rows, int64_t stride, int64_t count,
                            int64_t width, float* scratch, float* to) {
  for (int64_t r = 0; r < count; r += MAX_CHAIN) {
    std::fill(scratch, scratch + width, 0.f);
    for (int64_t i = r; i < std::min(count, r + MAX_CHAIN); i++)
      for (int64_t j = 0; j < width; j++) scratch[j] += factors[i] * rows[i * stride + j];
    for (int64_t j = 0; j < width; j++) to[j] += scratch[j];
  }
}

/// The mean of up to `count` tokens that are spread evenly over some batch elements; masked tokens
/// are skipped. `row` is scratch for one token.
template <class AnyCall>
inline void mean_of_some(const AnyCall& call, int64_t element, int64_t elements, int64_t count,
                         int64_t width, float* row, float* mean) {
  const Tokens x = tokens_of(call.x, call.x_strides, call.type);
  const int64_t all = elements * call.tokens;
  int64_t found = 0;
  std::fill(mean, mean + padded(width), 0.f);
  count = std::min(count, all);
  for (int64_t i = 0; i < count; i++) {
    const int64_t token = (2 * i + 1) * all / (2 * count);
    const int64_t own = element + token / call.tokens, n = token % call.tokens;
    if (!mask_of(call, own).keeps(n)) continue;
    load_tile(x, own, n, 1, width, {row, padded(width)});
    add(row, width, mean);
    found++;
  }
  for (int64_t j = 0; j < width && found; j++) mean[j] /= static_cast<float>(found);
}

}  // namespace swiftkernels::additive
