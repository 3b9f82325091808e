// Elements in memory: float32, bfloat16 and float16, converted to and from float32.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace swiftkernels {

INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
  static float load(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
  static BFloat16 make(float x) {
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, even
    return {static_cast<uint16_t>(x != x ? 0x7FC0 : rounded)};
  }
};

struct Float16 {
  uint16_t bits;
#if defined(__F16C__)
  static float load(Float16 x) { return _cvtsh_ss(x.bits); }
  static Float16 make(float x) { return {static_cast<uint16_t>(_cvtss_sh(x, 0))}; }
#elif defined(__aarch64__)
  static float load(Float16 x) {
    __fp16 half;
    std::memcpy(&half, &x.bits, 2);
    return half;
  }
  static Float16 make(float x) {
    const __fp16 half = static_cast<__fp16>(x);
    Float16 out;
    std::memcpy(&out.bits, &half, 2);
    return out;
  }
#else
  static float load(Float16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7FFFu;
    if (rest >= 0x7C00) return from_bits(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
    // The exponents differ by 112. The product is right for subnormal numbers too.
    const float magnitude = from_bits(rest << 13) * 0x1p112f;
    return from_bits(sign | to_bits(magnitude));
  }
  static Float16 make(float x) {
    const uint32_t sign = to_bits(x) >> 16 & 0x8000u, magnitude = to_bits(x) & 0x7FFFFFFFu;
    uint32_t rest;
    if (magnitude > 0x7F800000u) {
      rest = 0x7E00;  // NaN
    } else if (magnitude >= 0x477FF000u) {
      rest = 0x7C00;  // rounds to infinity
    } else if (magnitude < 0x38800000u) {
      // Subnormal: adding 0.5 puts the rounded multiple of 2^-24 into the last bits.
      rest = to_bits(from_bits(magnitude) + 0.5f) - 0x3F000000u;
    } else {
      rest = (magnitude - 0x38000000u + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    }
    return {static_cast<uint16_t>(sign | rest)};
  }
#endif
};

struct Float32 {
  float value;
  static float load(Float32 x) { return x.value; }
  static Float32 make(float x) { return {x}; }
};

template <class T>
inline vec load_vector(const T* p) {
  alignas(sizeof(vec)) float lanes[LANES];
  for (int i = 0; i < LANES; i++) lanes[i] = T::load(p[i]);
  return load(lanes);
}
template <class T>
inline void store_vector(T* p, vec v) {
  alignas(sizeof(vec)) float lanes[LANES];
  store(lanes, v);
  for (int i = 0; i < LANES; i++) p[i] = T::make(lanes[i]);
}

typedef uint16_t half_vec __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

template <>
inline vec load_vector(const BFloat16* p) {
  const half_vec halves = *reinterpret_cast<const half_vec*>(p);
  return reinterpret_cast<vec>(__builtin_convertvector(halves, word_vec) << 16);
}
template <>
inline void store_vector(BFloat16* p, vec v) {
  const word_vec bits = reinterpret_cast<word_vec>(v);
  const word_vec rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const word_vec nan = reinterpret_cast<word_vec>(v != v);
  const word_vec chosen = (nan & 0x7FC0u) | (~nan & rounded);
  *reinterpret_cast<half_vec*>(p) = __builtin_convertvector(chosen, half_vec);
}

}  // namespace swiftkernels
