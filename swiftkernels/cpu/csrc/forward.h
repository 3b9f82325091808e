// The stages of the forward on tiles of tokens; the backward recomputes with the same.
#pragma once

#include "pooling.h"

inline float norm2(const float* vector, int64_t width) {
  vec total{};
  for (int64_t j = 0; j < padded(width); j += LANES)
    total += load(vector + j) * load(vector + j);
  return sum(total);
}

/// 1 / max(norm, eps), as torch.nn.functional.normalize divides.
inline float inverse_norm(const Layer& layer, float norm2) {
  return 1.f / std::max(std::sqrt(norm2), static_cast<float>(layer.eps));
}

/// For rows q: 1/|q| (1 without norms) and the scores of the unit rows.
inline void norms_and_scores(const Layer& layer, Tile q, int64_t rows, float* inverse_norms,
                             float* scores) {
  for (int64_t r = 0; r < rows; r++) {
    vec norm2{}, score{};
    const float* row = q.row(r);
    for (int64_t j = 0; j < padded(layer.width); j += LANES) {
      const vec value = load(row + j);
      norm2 += value * value;
      score += value * load(layer.w_g + j);
    }
    inverse_norms[r] = layer.qk_norm ? inverse_norm(layer, sum(norm2)) : 1.f;
    scores[r] = static_cast<float>(layer.scale) * inverse_norms[r] * sum(score);
  }
}

/// For rows: 1/|row| (1 without norms).
inline void inverse_norms_of(const Layer& layer, Tile tile, int64_t rows, int64_t width,
                             float* inverse_norms) {
  if (!layer.qk_norm) return std::fill(inverse_norms, inverse_norms + rows, 1.f);
  for (int64_t r = 0; r < rows; r++) {
    inverse_norms[r] = inverse_norm(layer, norm2(tile.row(r), width));
  }
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
