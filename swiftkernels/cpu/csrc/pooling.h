// Scores to token weights to the global query, slice by slice.
#pragma once

#include "layer.h"

/// What pooling a slice leaves: these numbers, then the weighted sum of the rows.
struct Partial {
  static constexpr int64_t HEADER = 16;
  float* data;
  float& highest() const { return data[0]; }     // score: softmax weights are relative to it
  float& normaliser() const { return data[1]; }  // sum of s^2 (l2) or of weights (softmax)
  float& factor_sum() const { return data[2]; }  // sum of what the rows were weighted with
  float* rows() const { return data + HEADER; }
  static int64_t floats(int64_t width) { return HEADER + round_up(width, 16); }
};

/// Token weights before their normalisation, from scores; softmax: exp(s - highest).
ONE_COPY inline void raw_weights(const Layer& layer, const float* scores, int64_t n, Mask mask,
                                 float highest, float* weights) {
  if (layer.pooling == SOFTMAX) {
    alignas(64) float lanes[LANES];
    for (int64_t i = 0; i < n; i += LANES) {
      const int64_t count = std::min<int64_t>(LANES, n - i);
      for (int64_t j = 0; j < LANES; j++)
        lanes[j] = std::min(0.f, scores[i + std::min(j, count - 1)] - highest);
      store(lanes, exp_of_negative(load(lanes)));
      std::memcpy(weights + i, lanes, count * sizeof(float));
    }
  } else {
    for (int64_t i = 0; i < n; i++) weights[i] = layer.pooling == SUM ? 1.f : scores[i];
  }
  if (mask.data)
    for (int64_t i = 0; i < n; i++)
      if (!mask.keeps(i)) weights[i] = 0.f;
}

/// rows_sum += sum_n factors[n] rows[n], several vectors of columns at a time in registers.
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

/// Pool up to SLICE rows. The rows are weighted with weight * inverse_norms[i], or weight alone.
ONE_COPY inline void pool_slice(const Layer& layer, const float* scores, const float* inverse_norms,
                                Tile rows, int64_t n, int64_t width, Mask mask, Partial partial) {
  float weights[SLICE];
  float highest = -INFINITY;
  for (int64_t i = 0; i < n; i++)
    if (mask.keeps(i)) highest = std::max(highest, scores[i]);
  raw_weights(layer, scores, n, mask, highest, weights);
  float normaliser = 0, factor_sum = 0;
  for (int64_t i = 0; i < n; i++) {
    normaliser += layer.pooling == L2 ? weights[i] * weights[i] : weights[i];
    if (inverse_norms) weights[i] *= inverse_norms[i];
    factor_sum += weights[i];
  }
  partial.highest() = highest;
  partial.normaliser() = normaliser;
  partial.factor_sum() = factor_sum;
  std::fill(partial.rows(), partial.rows() + padded(width), 0.f);
  add_weighted_rows(weights, rows, n, width, partial.rows());
}

/// Add up the partials of an item, in their order, into the first; returns the factor that
/// normalises weights made with the highest score of all.
ONE_COPY inline float combine(const Layer& layer, float* partials, int64_t count, int64_t width) {
  const int64_t floats = Partial::floats(width);
  const Partial total{partials};
  float highest = total.highest();
  for (int64_t i = 1; i < count; i++)
    highest = std::max(highest, Partial{partials + i * floats}.highest());
  for (int64_t i = 0; i < count; i++) {
    const Partial partial{partials + i * floats};
    float scale = 1.f;
    // A slice whose tokens are all masked has nothing to add, and -inf - -inf is no number.
    if (layer.pooling == SOFTMAX)
      scale = partial.highest() == -INFINITY ? 0.f : std::exp(partial.highest() - highest);
    const float keep = i == 0 ? 0.f : 1.f;
    total.normaliser() = keep * total.normaliser() + scale * partial.normaliser();
    total.factor_sum() = keep * total.factor_sum() + scale * partial.factor_sum();
    for (int64_t j = 0; j < padded(width); j += LANES) {
      const vec sum_before = i == 0 ? vec{} : load(total.rows() + j);
      store(total.rows() + j, sum_before + broadcast(scale) * load(partial.rows() + j));
    }
  }
  total.highest() = highest;
  if (layer.pooling == L2)
    return 1.f / std::max(std::sqrt(total.normaliser()), static_cast<float>(layer.eps));
  if (layer.pooling == SOFTMAX) return total.normaliser() > 0 ? 1.f / total.normaliser() : 0.f;
  return 1.f;
}
