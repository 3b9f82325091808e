// Exported functions that the loader calls before any kernel.
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

#include "exports.h"

namespace swiftkernels {
namespace {

#if defined(__x86_64__) || defined(__i386__)
/// x86-64-v3. False if the operating system does not save the registers.
bool has_avx2() {
  unsigned eax, ebx, ecx = 0, edx, extended = 0;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  __get_cpuid(0x80000001u, &eax, &ebx, &extended, &edx);
  // __builtin_cpu_supports of older compilers does not know these three. A processor without LZCNT
  // would run another instruction instead.
  const bool f16c = ecx & (1u << 29), movbe = ecx & (1u << 22), lzcnt = extended & (1u << 5);
  return f16c && movbe && lzcnt && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}

/// x86-64-v4.
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

/// Whether the processor can run the library for an instruction set of isas.json. Python calls the
/// function of a library that every processor can run.
EXPORT int swiftkernels_processor_runs(const char* isa) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  if (std::strcmp(isa, "avx512") == 0) return has_avx512();
  if (std::strcmp(isa, "avx2") == 0) return has_avx2();
#endif
  return std::strcmp(isa, "portable") == 0 || std::strcmp(isa, "neon") == 0;
}

/// The numbers that belong to no operator. `revision` is raised with every change of the interface
/// that the other numbers do not show.
EXPORT const AbiEntry* swiftkernels_cpu_abi() {
  static constexpr AbiEntry entries[] = {{"revision", 5},
                                         {"FLOAT32", FLOAT32},
                                         {"BFLOAT16", BFLOAT16},
                                         {"FLOAT16", FLOAT16},
                                         {"DONE", DONE},
                                         {"OUT_OF_MEMORY", OUT_OF_MEMORY},
                                         {"STALE", STALE},
                                         {"CANCELLATION", CANCELLATION},
                                         {nullptr, 0}};
  return entries;
}

}  // namespace swiftkernels
