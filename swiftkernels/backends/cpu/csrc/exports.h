// Types of the exported functions of all operators.
#pragma once

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace swiftkernels {

/// Element types.
enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/// What a call returns.
enum Status : int {
  DONE = 0,
  OUT_OF_MEMORY = 1,
  STALE = 2,         // not run: the weights changed after they were packed
  CANCELLATION = 3,  // run, but the plain form is more accurate for these values
};

/// A number that C++ and Python must agree on: a size, a code, a limit. An operator exports its
/// numbers as a table, `swiftkernels_<operator>_abi`, which ends with a null name. Python registers
/// the same numbers, and compares them when it loads the library.
struct AbiEntry {
  const char* name;
  int64_t value;
};

}  // namespace swiftkernels
