// The arguments from Python: the steps of a chain, and the images of a call. Python writes these
// structs with the struct module: every field has eight bytes, in this order.
#pragma once

#include "exports.h"
#include "strided.h"

namespace swiftkernels::fusion {

enum StepKind : int64_t {
  STEM,
  CONVOLUTION,
  PARTIAL_CONVOLUTION,
  DEPTHWISE,
  NORMALISE,
  CONV_MLP,
  ATTENTION,
  AVERAGE,
  SQUEEZE_EXCITE,
  POOL,
  LINEAR
};

/// A convolution k x k with zeros around the image, or a linear layer (k = 1): panels (gemm.h) of
/// [k k C, D], and a bias of full vectors. The rows of a stem's first convolution are ordered
/// (channel, y, x), of others (y, x, channel).
struct Product {
  int64_t in_dims, out_dims;
  int64_t kernel, stride, padding;
  int64_t activation;  // Activation
  const float* panels;
  const float* bias;

  /// Numbers that an output pixel reads.
  int64_t depth() const { return kernel * kernel * in_dims; }
  bool is_pointwise() const { return kernel == 1 && stride == 1; }
};

/// Two convolutions 3 x 3 of stride 2 with one row of zeros around the image.
struct Stem {
  Product first, second;
};

/// A convolution of the first channels; the others stay.
struct PartialWeights {
  Product product;
  int64_t channels;  // of all
};

/// A convolution of every channel to `multiplier` channels, with k / 2 zeros around the image.
struct DepthwiseWeights {
  int64_t channels;  // of the output
  int64_t kernel, stride, multiplier;
  int64_t activation;    // Activation
  const float* weights;  // [k, k, C]
  const float* bias;     // [C]
};

/// weight (x - mean) / sqrt(variance + eps) + bias, over the channels of a pixel or a whole image.
struct NormaliseWeights {
  int64_t channels;
  int64_t over_image;
  double eps;
  const float* weight;  // [C]
  const float* bias;    // [C]
};

/// scale (mean - x), with the mean of the k x k pixels around, as far as they are in the image.
struct AverageWeights {
  int64_t channels, kernel;
  const float* scale;  // [C]
};

enum Gate : int64_t { SIGMOID, HARDSIGMOID };

/// x gate(second(first(mean of x)))
struct SqueezeExciteWeights {
  Product first, second;
  int64_t gate;
};

struct Step {
  int64_t kind;
  /// Stem; Product; PartialWeights; DepthwiseWeights; NormaliseWeights; conv_mlp::PackedWeights;
  /// additive::PackedWeights; AverageWeights; SqueezeExciteWeights; null; Product.
  const void* weights;
  int64_t form;  // of an attention, additive::FormCode
  int64_t adds;  // the input of the step adds - 1 steps before is added to the output; 0: nothing
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
