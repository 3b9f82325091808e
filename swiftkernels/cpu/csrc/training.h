// The weights of a layer in training, prepared for one call: they change with every step, so that
// nothing can be kept of them.
#pragma once

#include "forward.h"

/// The matrices of the plain form.
struct PlainMatrices {
  Matrix query, key;   // Wq^T, Wk^T [C, E]
  Matrix proj, final;  // Wp^T [E, E], Wf^T [E, D]
};

/// Vectors padded; matrices packed where enough tokens use them.
class Prepared {
 public:
  PlainMatrices plain;
  Matrix query_rows, key_rows;   // Wq, Wk [E, C]: from dq and dk to dx
  Matrix final_rows, proj_rows;  // Wf [D, E], Wp [E, E]: from dout to dy, from dy to dt
  Matrix product_rows;           // Wf Wp [D, E]: from dout to dt
  const float *query_bias, *key_bias, *w_g, *proj_bias, *final_bias;

  Prepared(const RawLayer& raw, int threads) : raw_(raw), threads_(threads) {
    const int64_t C = raw.in_dims, E = raw.width, D = raw.token_dim;
    plain = {Matrix::transposed(raw.wq, C, E), Matrix::transposed(raw.wk, C, E),
             Matrix::transposed(raw.wp, E, E), Matrix::transposed(raw.wf, E, D)};
    query_rows = Matrix::rows(raw.wq, E, C);
    key_rows = Matrix::rows(raw.wk, E, C);
    final_rows = Matrix::rows(raw.wf, D, E);
    proj_rows = Matrix::rows(raw.wp, E, E);
    product_rows = Matrix::rows(nullptr, D, E);
  }

  /// Ask for a matrix.
  void add(Matrix& matrix) { matrices_[count_++] = &matrix; }

  /// Prepare what was asked for; whether there was memory enough.
  bool finish(int64_t tokens) {
    const bool pack = tokens >= MIN_TOKENS;
    Pieces size(nullptr);
    lay_out(size, pack);
    memory_ = Scratch(size.used());
    if (!memory_) return false;
    Pieces pieces(memory_.data());
    lay_out(pieces, pack);
    return true;
  }

 private:
  /// A matrix that fewer tokens use is packed as it is used.
  static constexpr int64_t MIN_TOKENS = 512;

  void lay_out(Pieces& pieces, bool pack) {
    const int64_t E = raw_.width, D = raw_.token_dim;
    query_bias = vector(raw_.bq, E, pieces);
    key_bias = vector(raw_.bk, E, pieces);
    w_g = vector(raw_.w_g, E, pieces);
    proj_bias = vector(raw_.bp, E, pieces);
    final_bias = vector(raw_.bf, D, pieces);
    float* panels[8];
    for (int i = 0; i < count_; i++) {
      if (matrices_[i] == &product_rows) {
        float* product = pieces.take(D * padded(E));
        float* scratch = pieces.take(Matrix::panel_scratch(E));
        if (product) {
          gemm({const_cast<float*>(raw_.wf), E}, D, proj_rows, nullptr, {product, padded(E)},
               scratch);
          product_rows.raw = product, product_rows.k_stride = padded(E);
        }
      }
      panels[i] =
          pack ? pieces.take(panel_floats(matrices_[i]->K, matrices_[i]->columns)) : nullptr;
    }
    if (count_ > 0 && panels[0])
      parallel_for(count_, threads_, [&](int64_t i, int) { matrices_[i]->pack(panels[i]); });
  }

  static const float* vector(const float* from, int64_t width, Pieces& pieces) {
    float* to = pieces.take(padded(width));
    if (!to) return nullptr;
    std::fill(to, to + padded(width), 0.f);
    if (from) std::copy(from, from + width, to);
    return to;
  }

  const RawLayer& raw_;
  const int threads_;
  Scratch memory_{0};
  Matrix* matrices_[8];
  int count_ = 0;
};

inline void add(const float* vector, int64_t width, float* total) {
  for (int64_t j = 0; j < padded(width); j += LANES)
    store(total + j, load(total + j) + load(vector + j));
}

/// to += factor * from
inline void add_scaled(const float* from, float factor, int64_t width, float* to) {
  const vec by = broadcast(factor);
  for (int64_t j = 0; j < padded(width); j += LANES)
    store(to + j, load(to + j) + by * load(from + j));
}

/// to = from, without the padding, unless they are the same.
inline void copy_rows(Tile from, int64_t rows, int64_t width, float* to) {
  if (!to || to == from.data) return;
  for (int64_t r = 0; r < rows; r++) std::copy(from.row(r), from.row(r) + width, to + r * width);
}

/// total += sum_r factors[r] tile[r]; a few rows are summed first, then the tile, for accuracy.
/// `scratch` holds two rows.
inline void add_rows(const float* factors, Tile tile, int64_t rows, int64_t width, float* scratch,
                     float* total) {
  constexpr int64_t FEW = 16;
  float *few = scratch, *all = scratch + padded(width);
  std::fill(all, all + padded(width), 0.f);
  for (int64_t r = 0; r < rows; r += FEW) {
    std::fill(few, few + padded(width), 0.f);
    add_weighted_rows(factors + r, tile.from(r), std::min(FEW, rows - r), width, few);
    add(few, width, all);
  }
  add(all, width, total);
}

/// to += sum_r factors[r] rows[r] for the rows of a weight, without padding and `stride` apart;
/// some rows are summed first, for accuracy. `scratch` holds a row.
inline void add_weight_rows(const float* factors, const float* rows, int64_t stride, int64_t count,
                            int64_t width, float* scratch, float* to) {
  for (int64_t r = 0; r < count; r += SUM_LENGTH) {
    std::fill(scratch, scratch + width, 0.f);
    for (int64_t i = r; i < std::min(count, r + SUM_LENGTH); i++)
      for (int64_t j = 0; j < width; j++) scratch[j] += factors[i] * rows[i * stride + j];
    for (int64_t j = 0; j < width; j++) to[j] += scratch[j];
  }
}

/// The inverse of a norm from which on it is that of eps, and no longer of the row.
inline float inverse_eps(const RawLayer& layer) { return 1.f / static_cast<float>(layer.eps); }

/// The gradient of a token's score, times the scale. `d_weight` is that of its weight, `along` is
/// G . dG = sum a da, `normaliser` the inverse norm of the item's scores.
inline float score_gradient(const RawLayer& layer, bool live, float weight, float d_weight,
                            float along, float normaliser) {
  float gradient = 0.f;
  if (layer.pooling == SOFTMAX) {
    gradient = weight * (d_weight - along);
  } else if (layer.pooling != SUM && live) {
    // Below eps the norm of the scores is a constant: no projection.
    const bool project = layer.pooling == L2 && normaliser < inverse_eps(layer);
    gradient = (d_weight - (project ? weight * along : 0.f)) * normaliser;
  }
  return gradient * static_cast<float>(layer.scale);
}

/// What is to sum up to nothing over the tokens of an item, whose weights have a fixed norm or sum.
/// With the sum c, d_score - c weight is right; c is what rounding left, mostly of `along`, and
/// matters where the tokens are almost the same.
inline float residue(const RawLayer& layer, float weight, float d_score, float normaliser) {
  if (layer.pooling == SOFTMAX) return d_score;
  return layer.pooling == L2 && normaliser < inverse_eps(layer) ? weight * d_score : 0.f;
}
