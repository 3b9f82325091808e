// The arguments from Python: the weights, and the tensors of a call. Python writes these structs
// with the struct module: every field has eight bytes, in this order.
#pragma once

#include "activation.h"
#include "exports.h"
#include "fingerprint.h"
#include "strided.h"

namespace swiftkernels::conv_mlp {

/// The packed weights. Vectors and rows are padded with zeros to full vectors; panels are those of
/// gemm.h. The hidden channels are divided into blocks, whose weights lie in the order in which
/// they are read.
struct PackedWeights {
  int64_t in_dims;     // C
  int64_t hidden;      // H
  int64_t out_dims;    // D
  int64_t kernel;      // k of the depthwise convolution; 0 without
  int64_t activation;  // Activation
  int64_t residual;    // out = x + ...; D = C
  int64_t block;       // hidden channels in a block, a multiple of LANES; the last may be smaller
  const float* depthwise;       // [k, k, C]
  const float* depthwise_bias;  // [C]
  const float* matrices;        // for each block: panels of W1^T [C, block] and of W2^T [block, D]
  const float* first_bias;      // [H]
  const float* second_bias;     // [D]
  Fingerprint fingerprint;
};

/// Where the `matrices` of packed weights are written, and their block.
struct PackCall {
  int64_t block;
  float* matrices;
};

struct Call {
  int64_t batch, height, width;
  int64_t threads;
  int64_t type;
  Images x, out;
};

/// The weights without the depthwise convolution: float32, without padding.
struct RawWeights {
  int64_t in_dims, hidden, out_dims;  // C, H, D
  int64_t activation, residual;
  const float *weight1, *bias1, *weight2;  // [H, C], [H] or null, [D, H]
  const float *bias2, *scale;              // [D] or null
};

struct BackwardCall {
  int64_t batch, tokens;
  int64_t threads;
  int64_t type;  // of all tensors, those of the gradients of the weights too
  void* x;
  int64_t x_strides[3];
  void* dout;
  int64_t dout_strides[3];
  void* dx;  // null: not computed
  int64_t dx_strides[3];
  void *dw1, *db1, *dw2, *db2, *dscale;  // null: not computed; dw1 is null only if all are
};

}  // namespace swiftkernels::conv_mlp
