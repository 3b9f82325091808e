// Pooling, slice by slice: from scores to token weights to the global query; and its gradient.
#pragma once

#include "abi.h"
#include "rows.h"
#include "schedule.h"

namespace swiftkernels::additive {

enum Pooling : int64_t { L2 = 0, SOFTMAX = 1, SUM = 2, LINEAR = 3 };

/// The codes of the poolings; Python compares them with the order of its poolings.
inline constexpr AbiEntry POOLINGS[] = {
    {"L2", L2}, {"SOFTMAX", SOFTMAX}, {"SUM", SUM}, {"LINEAR", LINEAR}};

/// The result of pooling a slice: three numbers, then the weighted sum of the rows.
struct Partial {
  static constexpr int64_t HEADER = 16;
  float* data;
  float& highest() const { return data[0]; }     // score, which softmax subtracts
  float& normaliser() const { return data[1]; }  // sum of s^2 (l2) or of weights (softmax)
  float& factor_sum() const { return data[2]; }  // sum of the factors of the rows
  float* rows() const { return data + HEADER; }
  static int64_t floats(int64_t width) { return HEADER + round_up(width, 16); }
};

/// Token weights from scores, without the normalisation; for softmax exp(s - highest).
ONE_COPY inline void unnormalised_weights(const PackedWeights& layer, const float* scores,
                                          int64_t n, Mask mask, float highest, float* weights) {
  if (layer.pooling == SOFTMAX)
    exponentials(scores, n, highest, 1.f, weights);
  else
    for (int64_t i = 0; i < n; i++) weights[i] = layer.pooling == SUM ? 1.f : scores[i];
  if (mask.data)
    for (int64_t i = 0; i < n; i++)
      if (!mask.keeps(i)) weights[i] = 0.f;
}

/// Pool up to MAX_SLICE rows. The factor of row i is its weight, times inverse_norms[i] if that is
/// not null.
ONE_COPY inline void pool_slice(const PackedWeights& layer, const float* scores,
                                const float* inverse_norms, Tile rows, int64_t n, int64_t width,
                                Mask mask, Partial partial) {
  float weights[MAX_SLICE];
  float highest = -INFINITY;
  for (int64_t i = 0; i < n; i++)
    if (mask.keeps(i)) highest = std::max(highest, scores[i]);
  unnormalised_weights(layer, scores, n, mask, highest, weights);
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

/// Add the partials of a batch element, in order, to the first. Returns the factor that normalises
/// weights relative to the highest score of all.
ONE_COPY inline float combine(const PackedWeights& layer, float* partials, int64_t count,
                              int64_t width) {
  const int64_t floats = Partial::floats(width);
  const Partial total{partials};
  float highest = total.highest();
  for (int64_t i = 1; i < count; i++)
    highest = std::max(highest, Partial{partials + i * floats}.highest());
  for (int64_t i = 0; i < count; i++) {
    const Partial partial{partials + i * floats};
    float rescale = 1.f;
    // A slice of masked tokens adds nothing, and -inf - -inf is NaN.
    if (layer.pooling == SOFTMAX)
      rescale = partial.highest() == -INFINITY ? 0.f : std::exp(partial.highest() - highest);
    const float keep = i == 0 ? 0.f : 1.f;
    total.normaliser() = keep * total.normaliser() + rescale * partial.normaliser();
    total.factor_sum() = keep * total.factor_sum() + rescale * partial.factor_sum();
    for (int64_t j = 0; j < padded(width); j += LANES) {
      const vec sum_before = i == 0 ? vec{} : load(total.rows() + j);
      store(total.rows() + j, sum_before + broadcast(rescale) * load(partial.rows() + j));
    }
  }
  total.highest() = highest;
  if (layer.pooling == L2)
    return 1.f / std::max(std::sqrt(total.normaliser()), static_cast<float>(layer.eps));
  if (layer.pooling == SOFTMAX) return total.normaliser() > 0 ? 1.f / total.normaliser() : 0.f;
  return 1.f;
}

/// The inverse norm of rows that were divided by eps, and the largest one.
inline float inverse_eps(const RawWeights& layer) { return 1.f / static_cast<float>(layer.eps); }

/// Whether the divisor of l2 is the norm of the scores; below eps it is a constant.
inline bool has_score_norm(const RawWeights& layer, float normaliser) {
  return layer.pooling == L2 && normaliser < inverse_eps(layer);
}

/// The gradient of a token's score, times the scale. `d_weight` is the gradient of its weight a,
/// `G_dG` = G . dG = sum a da, `normaliser` the inverse norm of the scores of the batch element.
inline float score_gradient(const RawWeights& layer, bool kept, float weight, float d_weight,
                            float G_dG, float normaliser) {
  float gradient = 0.f;
  if (layer.pooling == SOFTMAX)
    gradient = weight * (d_weight - G_dG);
  else if (layer.pooling != SUM && kept)
    gradient = (d_weight - (has_score_norm(layer, normaliser) ? weight * G_dG : 0.f)) * normaliser;
  return gradient * static_cast<float>(layer.scale);
}

/// A token's term of the rounding error c. The exact score gradients, for l2 times the weights, sum
/// to zero over a batch element, because the weights sum to one (softmax) or have norm one (l2).
/// The computed ones sum to c, mostly the error of G . dG; d_score - c weight sums to zero again.
/// This matters where the tokens are almost equal.
inline float residue(const RawWeights& layer, float weight, float d_score, float normaliser) {
  if (layer.pooling == SOFTMAX) return d_score;
  return has_score_norm(layer, normaliser) ? weight * d_score : 0.f;
}

}  // namespace swiftkernels::additive
