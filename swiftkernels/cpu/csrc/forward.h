// The stages of the forward on tiles of tokens; the backward recomputes with the same.
#pragma once

#include "pooling.h"

inline float dot(const float* a, const float* b, int64_t width) {
  vec total{};
  for (int64_t j = 0; j < padded(width); j += LANES) total += load(a + j) * load(b + j);
  return sum(total);
}

inline float norm2(const float* vector, int64_t width) { return dot(vector, vector, width); }

/// Squares of norms to 1 / max(norm, eps), as torch.nn.functional.normalize divides.
inline void invert_norms(const Layer& layer, float* norms2, int64_t rows) {
  const float eps = static_cast<float>(layer.eps);
  for (int64_t r = 0; r < rows; r++) norms2[r] = 1.f / std::max(std::sqrt(norms2[r]), eps);
}

/// scores[r] = scale * inverse_norms[r] * (rows[r] . w + bias)
inline void score_rows(const Layer& layer, Tile tile, int64_t rows, int64_t width, const float* w,
                       float bias, const float* inverse_norms, float* scores) {
  sum_each_row(rows, scores, [&](int64_t r) {
    vec score{};
    for (int64_t j = 0; j < padded(width); j += LANES) score += load(tile.row(r) + j) * load(w + j);
    return score;
  });
  const float scale = static_cast<float>(layer.scale);
  for (int64_t r = 0; r < rows; r++) scores[r] = scale * inverse_norms[r] * (scores[r] + bias);
}

/// For rows: 1/|row| (1 without norms).
inline void inverse_norms_of(const Layer& layer, Tile tile, int64_t rows, int64_t width,
                             float* inverse_norms) {
  if (!layer.qk_norm) return std::fill(inverse_norms, inverse_norms + rows, 1.f);
  sum_each_row(rows, inverse_norms, [&](int64_t r) {
    vec total{};
    for (int64_t j = 0; j < padded(width); j += LANES) {
      const vec value = load(tile.row(r) + j);
      total += value * value;
    }
    return total;
  });
  invert_norms(layer, inverse_norms, rows);
}

/// Multiply every row with its factor.
inline void scale_rows(Tile tile, int64_t rows, int64_t width, const float* factors) {
  for (int64_t r = 0; r < rows; r++) {
    const vec factor = broadcast(factors[r]);
    for (int64_t j = 0; j < padded(width); j += LANES)
      store(tile.row(r) + j, load(tile.row(r) + j) * factor);
  }
}

/// to = from * factor, whole vectors; a row of `to` may end in the middle of one.
INLINE void copy_scaled(const float* from, float factor, int64_t width, float* to) {
  const vec by = broadcast(factor);
  for (int64_t j = 0; j < padded(width); j += LANES) store(to + j, load(from + j) * by);
}
