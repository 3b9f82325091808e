// The arguments from Python: the weights, and the tensors of a call. Python writes these structs
// with the struct module: every field has eight bytes, in this order.
#pragma once

#include "exports.h"
#include "fingerprint.h"
#include "strided.h"

namespace swiftkernels::separable {

/// The packed weights of a layer. Vectors and rows are padded with zeros to full vectors; panels
/// are those of gemm.h.
struct PackedWeights {
  int64_t width;            // C
  int64_t out_width;        // D
  const float* query;       // row of the scores [C]
  const float* key;         // Wk [C, C], rows
  const float* key_bias;    // [C]
  const float* value;       // panels of Wv^T [C, C]
  const float* value_bias;  // [C]
  const float* proj;        // panels of Wp^T [C, D]
  const float* proj_bias;   // [D]
  Fingerprint fingerprint;
};

/// The weights of a layer in training, contiguous float32. A bias may be null.
struct RawWeights {
  int64_t width, out_width;
  const float* qkv;       // [1 + 2 C, C]: the row of the scores, Wk, Wv
  const float* qkv_bias;  // [1 + 2 C]; its first number cancels in the softmax
  const float* proj;      // [D, C]
  const float* proj_bias;
};

/// `batch` x `groups` sequences of tokens [N, width] of any strides, in elements. Each sequence is
/// pooled separately.
struct Sequences {
  void* data;
  int64_t batch_stride, group_stride, token_stride, channel_stride;
};

/// What a forward saves for the backward, contiguous float32; null in inference. B counts
/// sequences.
struct Saved {
  float* context;  // [B, C]
  float* pooled;   // [B, C]: sum_n a_n x_n
  float* softmax;  // [B, 2]: the highest score and the sum of exp(score - highest)
};

struct Call {
  int64_t batch, groups, tokens;
  int64_t threads;
  int64_t type;
  Sequences x, out;
  Saved saved;
};

/// Gradients, contiguous float32, shaped as in `RawWeights`; null if not needed.
struct Gradients {
  float *qkv, *qkv_bias, *proj, *proj_bias;
};

struct BackwardCall {
  int64_t batch, groups, tokens;
  int64_t threads;
  int64_t type;
  Sequences x, dout, dx;  // dx: null data if not needed
  Saved saved;
  int64_t needs_weights;
  Gradients gradients;
};

}  // namespace swiftkernels::separable
