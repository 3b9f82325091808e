// Exported numbers that Python has to agree with.
#include "abi.h"

namespace swiftkernels::conv_mlp {

/// `revision` is raised with every change of the interface that the other numbers do not show.
EXPORT const AbiEntry* swiftkernels_conv_mlp_abi() {
  static constexpr AbiEntry entries[] = {{"revision", 4},
                                         {"sizeof(PackedWeights)", sizeof(PackedWeights)},
                                         {"sizeof(Call)", sizeof(Call)},
                                         {"sizeof(PackCall)", sizeof(PackCall)},
                                         {"sizeof(RawWeights)", sizeof(RawWeights)},
                                         {"sizeof(BackwardCall)", sizeof(BackwardCall)},
                                         {"none", IDENTITY},
                                         {"relu", RELU},
                                         {"gelu", GELU},
                                         {"gelu_tanh", GELU_TANH},
                                         {"silu", SILU},
                                         {"hardswish", HARDSWISH},
                                         {nullptr, 0}};
  return entries;
}

}  // namespace swiftkernels::conv_mlp
