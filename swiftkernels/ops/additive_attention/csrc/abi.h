// The arguments from Python: the weights, and the tensors of a call. Python writes these structs
// with the struct module: every field has eight bytes, in this order.
#pragma once

#include "exports.h"
#include "fingerprint.h"
#include "strided.h"

namespace swiftkernels::additive {

/// How the output is computed (forms.h).
enum FormCode : int64_t { PLAIN = 0, TRIANGULAR = 1, FOLDED = 2 };

/// The packed weights of a layer. Matrices are panels (gemm.h), vectors are padded with zeros to
/// full vectors. Fields that the form does not need are null; biases are never null.
struct PackedWeights {
  int64_t in_dims;    // C
  int64_t width;      // E
  int64_t token_dim;  // D
  int64_t pooling;
  int64_t qk_norm;
  double scale;
  double eps;
  const float* query;  // Wq^T [C, E]
  const float* query_bias;
  const float* key;  // Wk^T [C, E]
  const float* key_bias;
  // Plain.
  const float* w_g;   // [E]
  const float* proj;  // Wp^T [E, E]
  const float* proj_bias;
  const float* final;  // Wf^T [E, D]
  const float* final_bias;
  // Triangular and folded.
  const float* triangles;        // Rq^T [C, min(E, C + 1)], folded also Rk^T (triangular_norms2)
  const float* triangle_biases;
  const float* query_scores;  // Wq^T w_g [C]
  double query_score_bias;    // bq . w_g
  const float* output;        // [M; C; c0] [E + C + 1, D], without qk_norm [M; C]
  const float* output_bias;
  // Folded.
  const float* key_rows;       // [Wk^T; bk] [C + 1, E], rows of whole vectors
  const float* product;        // M^T [E, D]
  const float* folded_output;  // [0; 0; C; c0] [2 C + 2, D], without qk_norm C alone
  Fingerprint fingerprint;
};

/// The weights of a layer in training, contiguous float32. A bias may be null.
struct RawWeights {
  int64_t in_dims, width, token_dim;
  int64_t pooling;
  int64_t qk_norm;
  double scale;
  double eps;
  const float *wq, *bq;  // [E, C], [E]
  const float *wk, *bk;
  const float* w_g;      // [E]
  const float *wp, *bp;  // [E, E], [E]
  const float *wf, *bf;  // [D, E], [D]
};

/// What a forward saves for the backward.
struct Saved {
  float* global_query;  // [B, E]
  float* statistics;    // a, 1/|q|, 1/|k| [3, B, N], then 1/|s| [B]; null if nothing is saved
  void* unit_rows;      // qn and kn [2, B, N, E] in the type of x; null if they are not saved
};

struct Call {
  int64_t batch, tokens;
  int64_t form;
  int64_t threads;
  int64_t type;
  int64_t residual;  // out = x + attention
  void* x;
  int64_t x_strides[3];
  void* out;
  int64_t out_strides[3];
  const uint8_t* mask;  // null if all tokens take part
  int64_t mask_strides[2];
  Saved saved;
};

/// Gradients of the weights, contiguous float32, shaped as in `RawWeights`; null if not needed.
struct Gradients {
  float *dwq, *dbq, *dwk, *dbk, *dw_g, *dwp, *dbp, *dwf, *dbf;
};

struct BackwardCall {
  int64_t batch, tokens;
  int64_t grouped;  // groups of complete batch elements, else blocks of tokens
  int64_t threads;
  int64_t type;
  int64_t direct;  // sum dWp and dWf, not the moments U and V; only if grouped
  int64_t folded;  // without queries and keys (folded_backward.cpp)
  int64_t needs_tokens, needs_weights;
  void* x;
  int64_t x_strides[3];
  void* dout;
  int64_t dout_strides[3];
  void* dx;
  int64_t dx_strides[3];
  const uint8_t* mask;
  int64_t mask_strides[2];
  Saved saved;
  Gradients gradients;
};

/// The mask of the tokens of a batch element.
struct Mask {
  const uint8_t* data;
  int64_t stride;
  bool keeps(int64_t n) const { return !data || data[n * stride]; }
  Mask from(int64_t n) const { return {data ? data + n * stride : nullptr, stride}; }
};

template <class AnyCall>
inline Mask mask_of(const AnyCall& call, int64_t element) {
  return {call.mask ? call.mask + element * call.mask_strides[0] : nullptr, call.mask_strides[1]};
}

/// `Saved::statistics` by its parts.
struct Statistics {
  float *token_weights, *query_norms, *key_norms;  // a, 1/|q|, 1/|k| [B, N]
  float* normalisers;                              // 1/|s| [B]

  Statistics(const Saved& saved, int64_t batch, int64_t tokens)
      : token_weights(saved.statistics),
        query_norms(token_weights + batch * tokens),
        key_norms(query_norms + batch * tokens),
        normalisers(key_norms + batch * tokens) {}
};

/// The saved qn (which = 0) or kn (1), [B, N, E]; without data if they are not saved.
inline Tokens unit_rows(const Saved& saved, int which, int64_t batch, int64_t tokens, int64_t width,
                        int64_t type) {
  if (!saved.unit_rows) return {};
  const int64_t bytes = which * batch * tokens * width * (type == FLOAT32 ? 4 : 2);
  return {static_cast<char*>(saved.unit_rows) + bytes, tokens * width, width, 1,
          static_cast<int32_t>(type)};
}

}  // namespace swiftkernels::additive
