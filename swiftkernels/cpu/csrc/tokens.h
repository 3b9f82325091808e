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
typedef uint32_t bits_vec __attribute__((vector_size(LANES * 4)));

template <>
inline vec load_vector(const BFloat16* p) {
  const half_vec halves = *reinterpret_cast<const half_vec*>(p);
  return reinterpret_cast<vec>(__builtin_convertvector(halves, bits_vec) << 16);
}
template <>
inline void store_vector(BFloat16* p, vec v) {
  const bits_vec bits = reinterpret_cast<bits_vec>(v);
  const bits_vec rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bits_vec nan = reinterpret_cast<bits_vec>(v != v);
  const bits_vec chosen = (nan & 0x7FC0u) | (~nan & rounded);
  *reinterpret_cast<half_vec*>(p) = __builtin_convertvector(chosen, half_vec);
}

/// block(r, c) for every block of LANES rows and columns where all of them are there, and
/// single(r, c) for every other place.
template <class Block, class Single>
INLINE void for_each_block(int64_t rows, int64_t width, Block block, Single single) {
  const int64_t whole_rows = rows / LANES * LANES, whole_width = width / LANES * LANES;
  for (int64_t r = 0; r < whole_rows; r += LANES) {
    for (int64_t c = 0; c < whole_width; c += LANES) block(r, c);
    for (int64_t c = whole_width; c < width; c++)
      for (int64_t i = r; i < r + LANES; i++) single(i, c);
  }
  for (int64_t c = 0; c < width; c++)
    for (int64_t r = whole_rows; r < rows; r++) single(r, c);
}

template <class T>
inline void load_rows(const T* in, int64_t token_stride, int64_t channel_stride, int64_t rows,
                      int64_t width, Tile tile) {
  const int64_t whole = width / LANES * LANES;
  auto single = [&](int64_t r, int64_t c) {
    tile.row(r)[c] = T::load(in[r * token_stride + c * channel_stride]);
  };
  if (channel_stride == 1) {
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t c = 0; c < whole; c += LANES)
        store(tile.row(r) + c, load_vector(in + r * token_stride + c));
      for (int64_t c = whole; c < width; c++) single(r, c);
    }
  } else if (token_stride == 1) {  // channels first
    auto block = [&](int64_t r, int64_t c) {
      vec vectors[LANES];
      for (int i = 0; i < LANES; i++) vectors[i] = load_vector(in + (c + i) * channel_stride + r);
      transpose(vectors);
      for (int i = 0; i < LANES; i++) store(tile.row(r + i) + c, vectors[i]);
    };
    for_each_block(rows, width, block, single);
  } else {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < width; c++) single(r, c);
  }
  if (whole == width) return;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = width; c < padded(width); c++) tile.row(r)[c] = 0.f;
}

template <class T>
inline void store_rows(Tile tile, int64_t rows, int64_t width, T* out, int64_t token_stride,
                       int64_t channel_stride) {
  const int64_t whole = width / LANES * LANES;
  auto single = [&](int64_t r, int64_t c) {
    out[r * token_stride + c * channel_stride] = T::make(tile.row(r)[c]);
  };
  if (channel_stride == 1) {
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t c = 0; c < whole; c += LANES)
        store_vector(out + r * token_stride + c, load(tile.row(r) + c));
      for (int64_t c = whole; c < width; c++) single(r, c);
    }
  } else if (token_stride == 1) {
    auto block = [&](int64_t r, int64_t c) {
      vec vectors[LANES];
      for (int i = 0; i < LANES; i++) vectors[i] = load(tile.row(r + i) + c);
      transpose(vectors);
      for (int i = 0; i < LANES; i++) store_vector(out + (c + i) * channel_stride + r, vectors[i]);
    };
    for_each_block(rows, width, block, single);
  } else {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < width; c++) single(r, c);
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

/// Narrow rows need no copy. Wide ones do better with one: it reads them faster than products do.
constexpr int64_t IN_PLACE_WIDTH = 96;

/// Rows [first, first + rows) of `count` items, one item after the other, as float32 rows of whole
/// vectors: where they are, if they are such rows there, else copied to `room`.
inline Tile tile_of(const Tokens& t, int64_t item, int64_t count, int64_t first, int64_t rows,
                    int64_t width, Tile room) {
  const bool joined = count == 1 || t.batch_stride == rows * t.token_stride;
  if (has_plain_rows(t) && width == padded(width) && width <= IN_PLACE_WIDTH && joined)
    return rows_of(t, item, first);
  for (int64_t i = 0; i < count; i++)
    load_tile(t, item + i, first, rows, width, room.from(i * rows));
  return room;
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
