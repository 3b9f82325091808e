// What the loader asks every library: the number of its interface and what the processor can do.

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

// Raised with every change of an exported function's arguments or meaning, and with it ABI in
// swiftkernels/cpu/library.py.
EXPORT int swiftkernels_abi(void) { return 3; }

// Bit 0: x86-64-v3 (AVX2, FMA, F16C). Bit 1: x86-64-v4 (AVX-512 F, BW, CD, DQ, VL). Asked of the
// library that was compiled without any of them.
EXPORT unsigned swiftkernels_cpu_features(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  unsigned eax, ebx, ecx = 0, edx, extended = 0;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  __get_cpuid(0x80000001u, &eax, &ebx, &extended, &edx);
  // Three names that __builtin_cpu_supports of older compilers does not know. Without LZCNT the
  // processor would run another instruction in its place.
  const bool f16c = ecx & (1u << 29), movbe = ecx & (1u << 22), lzcnt = extended & (1u << 5);
  // Registers that the operating system does not save count as missing here.
  const bool v3 = f16c && movbe && lzcnt && __builtin_cpu_supports("avx2") &&
                  __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return unsigned(v3) | unsigned(v4) << 1;
#else
  return 0;
#endif
}
