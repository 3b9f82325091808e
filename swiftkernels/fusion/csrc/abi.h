// The arguments from Python: the steps of a chain, and the images of a call. Python writes these
// structs with the struct module: every field has eight bytes, in this order.
#pragma once

#include "exports.h"
#include "strided.h"

namespace swiftkernels::fusion {

enum StepKind : int64_t { STEM, CONVOLUTION, CONV_MLP, ATTENTION, POOL, LINEAR };

/// A convolution 3 x 3 of stride 2 with one row of zeros around the image, or a linear layer:
/// panels (gemm.h) of [9 C, D] or [C, D], and a bias of full vectors. The rows of a stem's first
/// convolution are ordered (channel, y, x), of others (y, x, channel).
struct Product {
  int64_t in_dims, out_dims;
  const float* panels;
  const float* bias;
};

/// Two convolutions, each with a ReLU.
struct Stem {
  Product first, second;
};

struct Step {
  int64_t kind;
  /// Stem; Product; conv_mlp::PackedWeights; additive::PackedWeights; null; Product.
  const void* weights;
  int64_t form;  // of an attention, additive::FormCode
};

struct Program {
  int64_t in_dims, out_dims;
  int64_t count;
  const Step* steps;
};

struct Call {
  int64_t batch, height, width;
  int64_t threads;
  int64_t type;
  Images x, out;
  double* seconds;  // of each step on the first thread, which are added to; or null
};

}  // namespace swiftkernels::fusion
