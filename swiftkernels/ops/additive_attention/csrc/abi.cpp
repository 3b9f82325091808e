// Exported numbers that Python has to agree with.
#include "abi.h"

#include "schedule.h"

namespace swiftkernels::additive {

/// `revision` is raised with every change of the interface that the other numbers do not show.
EXPORT const AbiEntry* swiftkernels_additive_abi() {
  static constexpr AbiEntry entries[] = {{"revision", 4},
                                         {"sizeof(PackedWeights)", sizeof(PackedWeights)},
                                         {"sizeof(RawWeights)", sizeof(RawWeights)},
                                         {"sizeof(Call)", sizeof(Call)},
                                         {"sizeof(BackwardCall)", sizeof(BackwardCall)},
                                         {"sizeof(Fingerprint)", sizeof(Fingerprint)},
                                         {"MAX_SOURCES", Fingerprint::MAX_SOURCES},
                                         {"L2", L2},
                                         {"SOFTMAX", SOFTMAX},
                                         {"SUM", SUM},
                                         {"LINEAR", LINEAR},
                                         {"PLAIN", PLAIN},
                                         {"TRIANGULAR", TRIANGULAR},
                                         {"FOLDED", FOLDED},
                                         {"SHORT_SEQUENCE", SHORT_SEQUENCE},
                                         {nullptr, 0}};
  return entries;
}

}  // namespace swiftkernels::additive
