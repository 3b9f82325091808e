// Exported numbers that Python has to agree with.
#include "abi.h"

#include <vector>

#include "pooling.h"
#include "schedule.h"

namespace swiftkernels::additive {

/// `revision` is raised with every change of the interface that the other numbers do not show.
EXPORT const AbiEntry* swiftkernels_additive_abi() {
  static const std::vector<AbiEntry> entries = [] {
    std::vector<AbiEntry> all = {{"revision", 5},
                                 {"sizeof(PackedWeights)", sizeof(PackedWeights)},
                                 {"sizeof(RawWeights)", sizeof(RawWeights)},
                                 {"sizeof(Call)", sizeof(Call)},
                                 {"sizeof(BackwardCall)", sizeof(BackwardCall)},
                                 {"sizeof(Fingerprint)", sizeof(Fingerprint)},
                                 {"MAX_SOURCES", Fingerprint::MAX_SOURCES},
                                 {"PLAIN", PLAIN},
                                 {"TRIANGULAR", TRIANGULAR},
                                 {"FOLDED", FOLDED},
                                 {"SHORT_SEQUENCE", SHORT_SEQUENCE}};
    all.insert(all.end(), std::begin(POOLINGS), std::end(POOLINGS));
    all.push_back({nullptr, 0});
    return all;
  }();
  return entries.data();
}

}  // namespace swiftkernels::additive
