// Exported numbers that Python has to agree with.
#include "abi.h"

#include "activation.h"

namespace swiftkernels::fusion {

/// `revision` is raised with every change of the interface that the other numbers do not show.
EXPORT const AbiEntry* swiftkernels_network_abi() {
  static constexpr AbiEntry entries[] = {
      {"revision", 2},
      {"sizeof(Product)", sizeof(Product)},
      {"sizeof(Stem)", sizeof(Stem)},
      {"sizeof(DepthwiseWeights)", sizeof(DepthwiseWeights)},
      {"sizeof(PartialWeights)", sizeof(PartialWeights)},
      {"sizeof(NormaliseWeights)", sizeof(NormaliseWeights)},
      {"sizeof(AverageWeights)", sizeof(AverageWeights)},
      {"sizeof(SqueezeExciteWeights)", sizeof(SqueezeExciteWeights)},
      {"sizeof(Step)", sizeof(Step)},
      {"sizeof(Program)", sizeof(Program)},
      {"sizeof(Call)", sizeof(Call)},
      {"STEM", STEM},
      {"CONVOLUTION", CONVOLUTION},
      {"PARTIAL_CONVOLUTION", PARTIAL_CONVOLUTION},
      {"DEPTHWISE", DEPTHWISE},
      {"NORMALISE", NORMALISE},
      {"CONV_MLP", CONV_MLP},
      {"ATTENTION", ATTENTION},
      {"AVERAGE", AVERAGE},
      {"SQUEEZE_EXCITE", SQUEEZE_EXCITE},
      {"sigmoid", SIGMOID},
      {"hardsigmoid", HARDSIGMOID},
      {"none", IDENTITY},
      {"relu", RELU},
      {"gelu", GELU},
      {"gelu_tanh", GELU_TANH},
      {"silu", SILU},
      {"hardswish", HARDSWISH},
      {"relu6", RELU6},
      {"POOL", POOL},
      {"LINEAR", LINEAR},
      {nullptr, 0}};
  return entries;
}

}  // namespace swiftkernels::fusion
