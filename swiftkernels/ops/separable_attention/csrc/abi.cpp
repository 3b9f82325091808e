// Exported numbers that Python has to agree with.
#include "abi.h"

namespace swiftkernels::separable {

/// `revision` is raised with every change of the interface that the other numbers do not show.
EXPORT const AbiEntry* swiftkernels_separable_abi() {
  static constexpr AbiEntry entries[] = {{"revision", 1},
                                         {"sizeof(PackedWeights)", sizeof(PackedWeights)},
                                         {"sizeof(RawWeights)", sizeof(RawWeights)},
                                         {"sizeof(Call)", sizeof(Call)},
                                         {"sizeof(BackwardCall)", sizeof(BackwardCall)},
                                         {nullptr, 0}};
  return entries;
}

}  // namespace swiftkernels::separable
