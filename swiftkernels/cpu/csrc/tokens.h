// Tokens in memory, of any strides and type, to and from tiles of float32 rows; scratch memory;
// work in parallel.
#pragma once

#include <cstdlib>
#include <memory>
#if defined(__F16C__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "gemm.h"

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/// [B, N, width] of any strides, in elements.
struct Tokens {
  void* data;
  int64_t batch_stride, token_stride, channel_stride;
  int32_t type;
};

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
    // The exponents differ by 112; a product does that for subnormal numbers as well.
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
      // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the last bits.
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
inline void load_rows(const T* in, int64_t token_stride, int64_t channel_stride, int64_t rows,
                      int64_t width, Tile tile) {
  if (channel_stride == 1) {
    const int64_t whole = width / LANES * LANES;
    for (int64_t r = 0; r < rows; r++) {
      float* out = tile.row(r);
      const T* row = in + r * token_stride;
      for (int64_t c = 0; c < whole; c += LANES)
        for (int i = 0; i < LANES; i++) out[c + i] = T::load(row[c + i]);
      if (whole == width) continue;
      for (int64_t c = whole; c < width; c++) out[c] = T::load(row[c]);
      for (int64_t c = width; c < padded(width); c++) out[c] = 0.f;
    }
    return;
  }
  // Channels first: square blocks, so that every cache line of either side serves many numbers.
  constexpr int64_t SIDE = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += SIDE) {
    const int64_t height = std::min(SIDE, rows - r0);
    for (int64_t c = 0; c < width; c++) {
      const T* column = in + c * channel_stride + r0 * token_stride;
      float* out = tile.row(r0) + c;
      for (int64_t r = 0; r < height; r++) out[r * tile.stride] = T::load(column[r * token_stride]);
    }
    for (int64_t r = 0; r < height; r++)
      for (int64_t c = width; c < padded(width); c++) tile.row(r0 + r)[c] = 0.f;
  }
}

template <class T>
inline void store_rows(Tile tile, int64_t rows, int64_t width, T* out, int64_t token_stride,
                       int64_t channel_stride) {
  if (channel_stride == 1) {
    for (int64_t r = 0; r < rows; r++) {
      const float* row = tile.row(r);
      T* to = out + r * token_stride;
      for (int64_t c = 0; c < width; c++) to[c] = T::make(row[c]);
    }
    return;
  }
  constexpr int64_t SIDE = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += SIDE) {
    const int64_t height = std::min(SIDE, rows - r0);
    for (int64_t c = 0; c < width; c++) {
      T* column = out + c * channel_stride + r0 * token_stride;
      const float* in = tile.row(r0) + c;
      for (int64_t r = 0; r < height; r++) column[r * token_stride] = T::make(in[r * tile.stride]);
    }
  }
}

/// Rows [first, first + rows) of an item as float32, padded with zeros.
inline void load_tile(const Tokens& x, int64_t item, int64_t first, int64_t rows, int64_t width,
                      Tile tile) {
  const int64_t offset = item * x.batch_stride + first * x.token_stride;
  switch (x.type) {
    case FLOAT32:
      return load_rows(static_cast<const Float32*>(x.data) + offset, x.token_stride,
                       x.channel_stride, rows, width, tile);
    case BFLOAT16:
      return load_rows(static_cast<const BFloat16*>(x.data) + offset, x.token_stride,
                       x.channel_stride, rows, width, tile);
    default:
      return load_rows(static_cast<const Float16*>(x.data) + offset, x.token_stride,
                       x.channel_stride, rows, width, tile);
  }
}

inline void store_tile(Tile tile, int64_t rows, int64_t width, const Tokens& out, int64_t item,
                       int64_t first) {
  const int64_t offset = item * out.batch_stride + first * out.token_stride;
  switch (out.type) {
    case FLOAT32:
      return store_rows(tile, rows, width, static_cast<Float32*>(out.data) + offset,
                        out.token_stride, out.channel_stride);
    case BFLOAT16:
      return store_rows(tile, rows, width, static_cast<BFloat16*>(out.data) + offset,
                        out.token_stride, out.channel_stride);
    default:
      return store_rows(tile, rows, width, static_cast<Float16*>(out.data) + offset,
                        out.token_stride, out.channel_stride);
  }
}

/// Whether a kernel may write float32 rows right to their place, whole vectors aside.
inline bool has_plain_rows(const Tokens& t) { return t.type == FLOAT32 && t.channel_stride == 1; }

inline Tile rows_of(const Tokens& t, int64_t item, int64_t first) {
  return {static_cast<float*>(t.data) + item * t.batch_stride + first * t.token_stride,
          t.token_stride};
}

/// Memory for one call, handed out piece by piece, every piece at a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    if (floats == 0) return;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, static_cast<size_t>(round_up(floats, 16)) * 4) == 0)
      memory_.reset(static_cast<float*>(memory));
  }
  explicit operator bool() const { return static_cast<bool>(memory_); }
  float* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
};

/// Hands out pieces of a piece of scratch; without one, it only adds up what they would take.
class Pieces {
 public:
  explicit Pieces(float* begin) : begin_(begin) {}
  float* take(int64_t floats) {
    float* piece = begin_ ? begin_ + used_ : nullptr;
    used_ += round_up(floats, 16);
    return piece;
  }
  /// A tile with whole vectors in each row. Strides of a power of two would map the rows of a
  /// column to the same few places of the cache.
  Tile tile(int64_t rows, int64_t width) {
    const int64_t stride = padded(width) + (padded(width) % 64 == 0 ? 16 : 0);
    return {take(rows * stride), stride};
  }
  int64_t used() const { return used_; }

 private:
  float* begin_;
  int64_t used_ = 0;
};

#if !defined(_WIN32)
inline bool forked = false;
inline const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#else
constexpr bool forked = false;
#endif

/// How many threads to use of `wanted`: OpenMP's pool does not survive a fork, a child works alone.
inline int usable_threads(int64_t wanted) { return forked ? 1 : static_cast<int>(wanted); }

/// work(i, thread) for i in [0, count), each thread a contiguous share of them.
template <class Work>
inline void parallel_for(int64_t count, int threads, Work work) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
      for (int64_t i = count * thread / all; i < count * (thread + 1) / all; i++)
        work(i, static_cast<int>(thread));
    }
    return;
  }
#endif
  for (int64_t i = 0; i < count; i++) work(i, 0);
}
