// Exported numbers that Python has to agree with.
#include "abi.h"

namespace swiftkernels::fusion {

/// `revision` is raised with every change of the interface that the other numbers do not show.
EXPORT const AbiEntry* swiftkernels_network_abi() {
  static constexpr AbiEntry entries[] = {{"revision", 1},
                                         {"sizeof(Product)", sizeof(Product)},
                                         {"sizeof(Stem)", sizeof(Stem)},
                                         {"sizeof(Step)", sizeof(Step)},
                                         {"sizeof(Program)", sizeof(Program)},
                                         {"sizeof(Call)", sizeof(Call)},
                                         {"STEM", STEM},
                                         {"CONVOLUTION", CONVOLUTION},
                                         {"CONV_MLP", CONV_MLP},
                                         {"ATTENTION", ATTENTION},
                                         {"POOL", POOL},
                                         {"LINEAR", LINEAR},
                                         {nullptr, 0}};
  return entries;
}

}  // namespace swiftkernels::fusion
