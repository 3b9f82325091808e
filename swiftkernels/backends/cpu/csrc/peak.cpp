// Exported function that measures nothing itself: a loop in registers, to be timed. Its rate is the
// most that a kernel with these vectors can reach.
#include "exports.h"
#include "simd.h"

namespace swiftkernels {

/// Run `steps` steps of multiply-adds in registers; returns the floating-point operations of them all.
EXPORT int64_t swiftkernels_peak_flops(int64_t steps) {
  // As many sums as a block of two vectors has: more than a multiply-add takes cycles, times the
  // number of units that compute them.
  constexpr int SUMS = 2 * BLOCK_ROWS[2];
  volatile float start = 1.f, growth = 1e-9f;  // values that the compiler does not know
  const vec factor = broadcast(growth);
  vec sums[SUMS];
  unrolled<SUMS>([&](auto i) INLINE_LAMBDA { sums[i] = broadcast(start) + static_cast<float>(i); });
  for (int64_t step = 0; step < steps; step++)
    unrolled<SUMS>([&](auto i) INLINE_LAMBDA { sums[i] = multiply_add(sums[i], sums[i], factor); });
  unrolled<SUMS - 1>([&](auto i) INLINE_LAMBDA { sums[0] += sums[i + 1]; });
  start = sum(sums[0]);  // so that the loop is not removed
  return steps * SUMS * LANES * 2;
}

}  // namespace swiftkernels
