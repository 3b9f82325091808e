// Vectors of floats by the compiler's vector extensions: one source for all instruction sets. The
// differences between instruction sets are at the top.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace swiftkernels {

// LANES: floats in a vector. A matrix product keeps in registers the sums of a block of
// BLOCK_ROWS[v] rows times v vectors of columns, v <= MAX_VECTORS, next to v vectors of columns and
// one row. With SWIFTKERNELS_LANES=16, tests compile the blocks of AVX-512 for other processors.
#if defined(__AVX512F__) || SWIFTKERNELS_LANES == 16
constexpr int LANES = 16, MAX_VECTORS = 4;
constexpr int BLOCK_ROWS[MAX_VECTORS + 1] = {0, 10, 10, 8, 6};  // of 32 registers
#elif defined(__aarch64__)
constexpr int LANES = 4, MAX_VECTORS = 4;
constexpr int BLOCK_ROWS[MAX_VECTORS + 1] = {0, 14, 10, 8, 6};  // of 32 registers
#else
#if defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int MAX_VECTORS = 3;
constexpr int BLOCK_ROWS[MAX_VECTORS + 1] = {0, 10, 6, 4};  // of 16 registers
#endif

constexpr int MAX_BLOCK_ROWS = BLOCK_ROWS[1];
constexpr int MAX_BLOCK_FLOATS = 32 * LANES;  // more than any block has

// For functions that sum single floats: in every inlined copy the compiler may fuse other products
// and sums, so results would depend on the caller.
#define ONE_COPY __attribute__((noinline))
#define INLINE static inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

// `vec` lives in registers; `unaligned_vec` is the same in memory, at any address.
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float unaligned_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t int_vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t word_vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t unaligned_words __attribute__((vector_size(LANES * 4), aligned(1), may_alias));

template <class Use, int... I>
INLINE void unrolled(std::integer_sequence<int, I...>, Use use) {
  (use(std::integral_constant<int, I>{}), ...);
}
/// use(0), ..., use(N - 1) with constants. Unlike a loop, which gcc unrolls too late to see that, it
/// lets arrays stay in registers.
template <int N, class Use>
INLINE void unrolled(Use use) {
  unrolled(std::make_integer_sequence<int, N>{}, use);
}

INLINE vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
INLINE void store(float* p, vec v) { *reinterpret_cast<unaligned_vec*>(p) = v; }
INLINE word_vec load_words(const char* p) { return *reinterpret_cast<const unaligned_words*>(p); }
INLINE vec broadcast(float x) { return x - vec{}; }

/// sum + a b, computed in the register of `sum`: gcc would move sums between registers.
INLINE vec multiply_add(vec sum, vec a, vec b) {
#if defined(__AVX512F__)
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#elif defined(__FMA__) && SWIFTKERNELS_LANES != 16
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
#elif defined(__aarch64__) && SWIFTKERNELS_LANES != 16
  asm("fmla %0.4s, %1.4s, %2.4s" : "+w"(sum) : "w"(a), "w"(b));
  return sum;
#else
  return sum + a * b;
#endif
}

/// The smaller and the larger of two numbers; b where one is NaN.
INLINE vec min(vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX__) && SWIFTKERNELS_LANES != 16
  return (vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
INLINE vec max(vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__) && SWIFTKERNELS_LANES != 16
  return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

INLINE vec abs(vec a) {
  return reinterpret_cast<vec>(reinterpret_cast<int_vec>(a) & 0x7fffffff);
}

/// 1 / a within an ulp or two, for 1 <= a < 2^126.
INLINE vec reciprocal(vec a) {
#if defined(__AVX512F__)
  // A division of 16 numbers takes 16 cycles; 14 bits and a step of Newton's method take 3.
  const vec estimate = (vec)_mm512_rcp14_ps((__m512)a);
  return estimate * (2.f - a * estimate);
#else
  return 1.f / a;
#endif
}

INLINE float sum(vec v) {
  alignas(sizeof(vec)) float lanes[LANES];
  store(lanes, v);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

// exp(x) for x <= 0, within 2 ulp; below -87.3, where exp leaves the normal numbers, 0.
INLINE vec exp_of_negative(vec x) {
  const vec in_range = reinterpret_cast<vec>(x > -87.3f);
  x = reinterpret_cast<vec>(reinterpret_cast<int_vec>(x) & reinterpret_cast<int_vec>(in_range));
  // x = n log 2 + f with |f| <= log(2) / 2. Adding 1.5 * 2^23 rounds to an integer.
  const vec shifted = x * 1.44269504f + 12582912.f;
  const vec n = shifted - 12582912.f;
  const vec f = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.f;
  const int_vec exponent = (reinterpret_cast<int_vec>(shifted) - 0x4B400000 + 127) << 23;
  const vec result = p * reinterpret_cast<vec>(exponent);
  return reinterpret_cast<vec>(reinterpret_cast<int_vec>(result) &
                               reinterpret_cast<int_vec>(in_range));
}

// The first (HIGH = 0) or last (HIGH = 1) half of a0 b0 a1 b1 ...
template <int HIGH, size_t... I>
INLINE vec interleave(vec a, vec b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((I + HIGH * LANES) / 2 + (I % 2) * LANES)...);
#else
  return __builtin_shuffle(
      a, b, int_vec{static_cast<int32_t>((I + HIGH * LANES) / 2 + (I % 2) * LANES)...});
#endif
}

/// Transpose LANES vectors of LANES numbers.
INLINE void transpose(vec (&rows)[LANES]) {
  constexpr auto indices = std::make_index_sequence<LANES>{};
#pragma GCC unroll 4
  for (int round = 1; round < LANES; round *= 2) {
    vec mixed[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES / 2; i++) {
      mixed[2 * i] = interleave<0>(rows[i], rows[i + LANES / 2], indices);
      mixed[2 * i + 1] = interleave<1>(rows[i], rows[i + LANES / 2], indices);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = mixed[i];
  }
}

/// The sum of the lanes of each of LANES vectors, in one vector. Overwrites the vectors.
INLINE vec sums_of(vec (&vectors)[LANES]) {
  transpose(vectors);
#pragma GCC unroll 4
  for (int width = LANES / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; i++) vectors[i] += vectors[i + width];
  return vectors[0];
}

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
/// The length of a row of n floats, padded to full vectors.
constexpr int64_t padded(int64_t n) { return round_up(n, LANES); }

/// Rows in memory, `stride` floats apart.
struct Tile {
  float* data = nullptr;
  int64_t stride = 0;
  float* row(int64_t r) const { return data + r * stride; }
  /// The rows from r on.
  Tile from(int64_t r) const { return {row(r), stride}; }
};

}  // namespace swiftkernels
