// Exported functions that pack weights and compute their fingerprints, for all operators.
#include "exports.h"
#include "fingerprint.h"
#include "gemm.h"

namespace swiftkernels {

/// Floats in a vector; panels and vectors are padded to a multiple of it.
EXPORT int64_t swiftkernels_lanes() { return LANES; }

/// Pack B [K, columns], B[k, j] = b[k * k_stride + j * j_stride].
EXPORT void swiftkernels_pack(const float* b, int64_t K, int64_t columns, int64_t k_stride,
                              int64_t j_stride, float* panels) {
  Matrix{K, columns, nullptr, b, k_stride, j_stride}.pack(panels);
}

/// The value of `Fingerprint::full` if `all`, else of `Fingerprint::sampled`.
EXPORT uint64_t swiftkernels_fingerprint(const Fingerprint* fingerprint, int64_t all) {
  return fingerprint->compute(all);
}

}  // namespace swiftkernels
