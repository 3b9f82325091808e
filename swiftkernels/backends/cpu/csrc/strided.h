// Loads tokens of any strides and element type to tiles of float32 rows, and stores such tiles.
#pragma once

#include <algorithm>

#include "exports.h"
#include "half.h"

namespace swiftkernels {

/// [B, N, width] of any strides, in elements.
struct Tokens {
  void* data;
  int64_t batch_stride, token_stride, channel_stride;
  int32_t type;
};

/// [B, H, W, width] of any strides, in elements.
struct Images {
  void* data;
  int64_t batch_stride, row_stride, column_stride, channel_stride;

  /// The pixels of a row as tokens.
  Tokens row(int64_t image, int64_t y, int64_t type) const {
    const int64_t offset = image * batch_stride + y * row_stride;
    char* begin = static_cast<char*>(data) + offset * (type == FLOAT32 ? 4 : 2);
    return {begin, 0, column_stride, channel_stride, static_cast<int32_t>(type)};
  }
};

INLINE Tokens tokens_of(void* data, const int64_t (&strides)[3], int64_t type) {
  return {data, strides[0], strides[1], strides[2], static_cast<int32_t>(type)};
}

/// Call block(r, c) for every complete block of LANES rows and columns, and single(r, c) for every
/// element outside of them.
template <class Block, class Single>
INLINE void for_each_block(int64_t rows, int64_t width, Block block, Single single) {
  const int64_t full_rows = rows / LANES * LANES, full_width = width / LANES * LANES;
  for (int64_t r = 0; r < full_rows; r += LANES) {
    for (int64_t c = 0; c < full_width; c += LANES) block(r, c);
    for (int64_t c = full_width; c < width; c++)
      for (int64_t i = r; i < r + LANES; i++) single(i, c);
  }
  for (int64_t c = 0; c < width; c++)
    for (int64_t r = full_rows; r < rows; r++) single(r, c);
}

template <class T>
inline void load_rows(const T* in, int64_t token_stride, int64_t channel_stride, int64_t rows,
                      int64_t width, Tile tile) {
  const int64_t full = width / LANES * LANES;
  auto single = [&](int64_t r, int64_t c) {
    tile.row(r)[c] = T::load(in[r * token_stride + c * channel_stride]);
  };
  if (channel_stride == 1) {
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t c = 0; c < full; c += LANES)
        store(tile.row(r) + c, load_vector(in + r * token_stride + c));
      for (int64_t c = full; c < width; c++) single(r, c);
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
  if (full == width) return;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = width; c < padded(width); c++) tile.row(r)[c] = 0.f;
}

template <class T>
inline void store_rows(Tile tile, int64_t rows, int64_t width, T* out, int64_t token_stride,
                       int64_t channel_stride) {
  const int64_t full = width / LANES * LANES;
  auto single = [&](int64_t r, int64_t c) {
    out[r * token_stride + c * channel_stride] = T::make(tile.row(r)[c]);
  };
  if (channel_stride == 1) {
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t c = 0; c < full; c += LANES)
        store_vector(out + r * token_stride + c, load(tile.row(r) + c));
      for (int64_t c = full; c < width; c++) single(r, c);
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

/// use(pointer) with a pointer to a token, of the tokens' element type.
template <class Use>
INLINE void with_type(const Tokens& t, int64_t element, int64_t token, Use use) {
  const int64_t offset = element * t.batch_stride + token * t.token_stride;
  switch (t.type) {
    case FLOAT32:
      return use(static_cast<Float32*>(t.data) + offset);
    case BFLOAT16:
      return use(static_cast<BFloat16*>(t.data) + offset);
    default:
      return use(static_cast<Float16*>(t.data) + offset);
  }
}

/// Tokens [first, first + rows) of a batch element as float32 rows, padded with zeros.
inline void load_tile(const Tokens& x, int64_t element, int64_t first, int64_t rows, int64_t width,
                      Tile tile) {
  with_type(x, element, first, [&](const auto* in) {
    load_rows(in, x.token_stride, x.channel_stride, rows, width, tile);
  });
}

inline void store_tile(Tile tile, int64_t rows, int64_t width, const Tokens& out, int64_t element,
                       int64_t first) {
  with_type(out, element, first, [&](auto* to) {
    store_rows(tile, rows, width, to, out.token_stride, out.channel_stride);
  });
}

/// Whether the tokens are float32 rows, which kernels can write without a copy.
inline bool has_plain_rows(const Tokens& t) { return t.type == FLOAT32 && t.channel_stride == 1; }

inline Tile rows_of(const Tokens& t, int64_t element, int64_t first) {
  return {static_cast<float*>(t.data) + element * t.batch_stride + first * t.token_stride,
          t.token_stride};
}

/// Wider rows are copied even if they need no conversion: a copy reads them faster than products.
constexpr int64_t MAX_IN_PLACE_WIDTH = 96;

/// Tokens [first, first + rows) of `count` batch elements, one element after the other, as float32
/// rows of full vectors: in place if they are such rows, else copied to `scratch`.
inline Tile tile_of(const Tokens& t, int64_t element, int64_t count, int64_t first, int64_t rows,
                    int64_t width, Tile scratch) {
  const bool joined = count == 1 || t.batch_stride == rows * t.token_stride;
  if (has_plain_rows(t) && width == padded(width) && width <= MAX_IN_PLACE_WIDTH && joined)
    return rows_of(t, element, first);
  for (int64_t i = 0; i < count; i++)
    load_tile(t, element + i, first, rows, width, scratch.from(i * rows));
  return scratch;
}

}  // namespace swiftkernels
