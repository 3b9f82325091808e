// The weights of a layer in training. They change with every step, so they are packed for one call.
#pragma once

#include "abi.h"
#include "gemm.h"
#include "parallel.h"
#include "scratch.h"

namespace swiftkernels::additive {

/// The matrices of the plain form.
struct PlainMatrices {
  Matrix query, key;   // Wq^T, Wk^T [C, E]
  Matrix proj, final;  // Wp^T [E, E], Wf^T [E, D]
};

/// Pads the vectors, and packs the matrices where enough tokens use them.
class TrainWeights {
 public:
  PlainMatrices plain;
  Matrix query_rows, key_rows;   // Wq, Wk [E, C]: from dq and dk to dx
  Matrix final_rows, proj_rows;  // Wf [D, E], Wp [E, E]: from dout to dy, from dy to dt
  Matrix product_rows;           // Wf Wp [D, E]: from dout to dt
  const float *query_bias, *key_bias, *w_g, *proj_bias, *final_bias;

  TrainWeights(const RawWeights& raw, int threads) : raw_(raw), threads_(threads) {
    const int64_t C = raw.in_dims, E = raw.width, D = raw.token_dim;
    plain = {Matrix::transposed(raw.wq, C, E), Matrix::transposed(raw.wk, C, E),
             Matrix::transposed(raw.wp, E, E), Matrix::transposed(raw.wf, E, D)};
    query_rows = Matrix::rows(raw.wq, E, C);
    key_rows = Matrix::rows(raw.wk, E, C);
    final_rows = Matrix::rows(raw.wf, D, E);
    proj_rows = Matrix::rows(raw.wp, E, E);
    product_rows = Matrix::rows(nullptr, D, E);
  }

  /// Declare that a matrix will be needed.
  void use(Matrix& matrix) { matrices_[count_++] = &matrix; }

  /// Prepare the vectors and the matrices in use for so many tokens. False: out of memory.
  bool prepare(int64_t tokens) {
    const bool pack = tokens >= PACK_FROM;
    Arena size;
    lay_out(size, pack);
    memory_ = Scratch(size.used());
    if (!memory_) return false;
    Arena arena(memory_.data());
    lay_out(arena, pack);
    return true;
  }

 private:
  void lay_out(Arena& arena, bool pack) {
    const int64_t E = raw_.width, D = raw_.token_dim;
    query_bias = copy_padded_rows(raw_.bq, 1, E, arena);
    key_bias = copy_padded_rows(raw_.bk, 1, E, arena);
    w_g = copy_padded_rows(raw_.w_g, 1, E, arena);
    proj_bias = copy_padded_rows(raw_.bp, 1, E, arena);
    final_bias = copy_padded_rows(raw_.bf, 1, D, arena);
    float* panels[MAX_MATRICES];
    for (int i = 0; i < count_; i++) {
      if (matrices_[i] == &product_rows) {
        const Tile product = arena.matrix(D, E);
        float* scratch = arena.take(Matrix::panel_scratch(E));
        if (product.data) {
          gemm({const_cast<float*>(raw_.wf), E}, D, proj_rows, nullptr, product, scratch);
          product_rows.raw = product.data, product_rows.k_stride = product.stride;
        }
      }
      panels[i] = pack ? arena.take(panel_floats(matrices_[i]->K, matrices_[i]->columns)) : nullptr;
    }
    if (count_ > 0 && panels[0])
      parallel_for(count_, threads_, [&](int64_t i, int) { matrices_[i]->pack(panels[i]); });
  }

  static constexpr int MAX_MATRICES = 8;
  const RawWeights& raw_;
  const int threads_;
  Scratch memory_{0};
  Matrix* matrices_[MAX_MATRICES];
  int count_ = 0;
};

}  // namespace swiftkernels::additive
