// What Python hands over: the layer's packed weights, and the tensors of one call. Both are packed
// by the struct module in `swiftkernels.cpu.weights` and `swiftkernels.cpu.launch`: eight bytes a
// field, in this order.
#pragma once

#include "tokens.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

/// What a call returns.
enum Status : int {
  DONE = 0,
  OUT_OF_MEMORY = 1,
  STALE = 2,         // the weights are no longer those that were packed
  CANCELLATION = 3,  // done, but the plain form is more accurate for these numbers
};

enum Pooling : int64_t { L2 = 0, SOFTMAX = 1, SUM = 2, LINEAR = 3 };

/// How the output is computed; the algebra is in `swiftkernels.cpu.weights`.
enum Form : int64_t { PLAIN = 0, TRIANGULAR = 1, FOLDED = 2 };

/// Notices writes to the weights that went past PyTorch's version counters.
///
/// `compute(true)` looks at every byte. `compute(false)` looks at all of the vectors and at lines of
/// 64 bytes of the matrices: at least one in every row, and in any 16 rows one over every column. So
/// it misses no write to a row, a column or 16 rows of a tile, but may miss one to a few elements.
struct Fingerprint {
  static constexpr int64_t LINE = 64, ROWS = 16;
  struct Source {
    const char* bytes;
    int64_t rows, row_bytes, row_stride;
  } sources[10];
  int64_t source_count;
  int64_t always_whole;  // never sample
  uint64_t whole, sampled;

  bool matches(bool all) const {
    return all || always_whole ? compute(true) == whole : compute(false) == sampled;
  }

  ONE_COPY uint64_t compute(bool all) const {
    Sums sums;
    for (int64_t i = 0; i < source_count; i++) {
      const auto [bytes, rows, row_bytes, row_stride] = sources[i];
      if (all || rows == 1 || row_bytes <= LINE) {
        const bool dense = row_stride == row_bytes;
        for (int64_t row = 0; row < (dense ? 1 : rows); row++)
          sums.add(bytes + row * row_stride, dense ? rows * row_bytes : row_bytes);
        continue;
      }
      const int64_t lines = (row_bytes + LINE - 1) / LINE;
      const int64_t fewest = std::min(rows, ROWS), lines_per_row = (lines + fewest - 1) / fewest;
      for (int64_t row = 0, line = 0; row < rows; row++)
        for (int64_t j = 0; j < lines_per_row; j++, line = line + 1 == lines ? 0 : line + 1)
          sums.add(bytes + row * row_stride + std::min(line * LINE, row_bytes - LINE), LINE);
    }
    return sums.hash();
  }

 private:
  /// Of all words, and of these sums: exchanged words change the second. A word is added to its own
  /// upper half, or else two changed signs would cancel.
  struct Sums {
    word_vec words{}, sums{};

    INLINE_MEMBER void add(word_vec word) {
      words += word ^ (word >> 15);
      sums += words;
    }
    INLINE_MEMBER void add(const char* bytes, int64_t count) {
      constexpr int64_t STEP = sizeof(word_vec);
      for (; count >= STEP; bytes += STEP, count -= STEP) add(load_words(bytes));
      if (count == 0) return;
      alignas(STEP) char rest[STEP] = {};
      std::memcpy(rest, bytes, count);
      add(load_words(rest));
    }
    uint64_t hash() const {
      uint64_t hash = 0;
      for (int i = 0; i < LANES; i++)
        for (const uint32_t word : {words[i], sums[i]}) hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
      return hash;
    }
  };
};

/// Matrices are panels (gemm.h), vectors are padded with zeros to whole vectors. Null: not packed
/// for the forms in use; biases are never null.
struct Layer {
  int64_t in_dims;    // C
  int64_t width;      // E
  int64_t token_dim;  // D
  int64_t pooling;
  int64_t qk_norm;
  double scale;
  double eps;
  const float* query;  // Wq^T [C, E]
  const float* query_bias;
  const float* key;  // Wk^T [C, E]
  const float* key_bias;
  // Plain.
  const float* w_g;   // [E]
  const float* proj;  // Wp^T [E, E]
  const float* proj_bias;
  const float* final;  // Wf^T [E, D]
  const float* final_bias;
  // Triangular and folded.
  const float* query_triangle;  // Rq^T [C, min(E, C + 1)]
  const float* query_triangle_bias;
  const float* query_scores;  // Wq^T w_g [C]
  double query_score_bias;    // bq . w_g
  const float* output;        // [M; C; c0] [E + C + 1, D], without qk_norm [M; C]
  const float* output_bias;
  // Folded.
  const float* key_triangle;
  const float* key_triangle_bias;
  const float* key_rows;       // [Wk^T; bk] [C + 1, E], rows of whole vectors
  const float* product;        // M^T [E, D]
  const float* folded_output;  // [0; 0; C; c0] [2 C + 2, D], without qk_norm C alone
  Fingerprint fingerprint;
};

/// The layer as it is trained: its weights in memory, contiguous float32; null: no bias.
struct RawLayer {
  int64_t in_dims, width, token_dim;
  int64_t pooling;
  int64_t qk_norm;
  double scale;
  double eps;
  const float *wq, *bq;  // [E, C], [E]
  const float *wk, *bk;
  const float* w_g;      // [E]
  const float *wp, *bp;  // [E, E], [E]
  const float *wf, *bf;  // [D, E], [D]
};

/// What a forward keeps for the backward.
struct Kept {
  float* global_query;  // [B, E]
  float* statistics;    // a, 1/|q|, 1/|k| [3, B, N], then 1/|s| [B]; null: nothing is kept
  void* unit_rows;      // qn and kn [2, B, N, E] in the type of x; null: not kept
};

INLINE Tokens tokens_of(void* data, const int64_t (&strides)[3], int64_t type) {
  return {data, strides[0], strides[1], strides[2], static_cast<int32_t>(type)};
}

/// The kept qn (which = 0) or kn (1), [B, N, E]; without data if they are not kept.
inline Tokens unit_rows(const Kept& kept, int which, int64_t batch, int64_t tokens, int64_t width,
                        int64_t type) {
  if (!kept.unit_rows) return {};
  const int64_t bytes = which * batch * tokens * width * (type == FLOAT32 ? 4 : 2);
  return {static_cast<char*>(kept.unit_rows) + bytes, tokens * width, width, 1,
          static_cast<int32_t>(type)};
}

struct Call {
  int64_t batch, tokens;
  int64_t form;
  int64_t threads;
  int64_t type;
  int64_t add_input;  // out = x + attention
  void* x;
  int64_t x_strides[3];
  void* out;
  int64_t out_strides[3];
  const uint8_t* mask;  // null: all tokens take part
  int64_t mask_strides[2];
  Kept kept;
};

/// Gradients of the weights, contiguous float32, shaped as in `RawLayer`; null: not asked for.
struct Gradients {
  float *dwq, *dbq, *dwk, *dbk, *dw_g, *dwp, *dbp, *dwf, *dbf;
};

struct BackwardCall {
  int64_t batch, tokens;
  int64_t whole;  // whole items at a time, else tiles
  int64_t threads;
  int64_t type;
  int64_t direct;  // sum dWp and dWf themselves (whole items only), not the moments U and V
  int64_t folded;  // without queries and keys (folded_backward.h)
  int64_t needs_tokens, needs_weights;
  void* x;
  int64_t x_strides[3];
  void* dout;
  int64_t dout_strides[3];
  void* dx;
  int64_t dx_strides[3];
  const uint8_t* mask;
  int64_t mask_strides[2];
  Kept kept;
  Gradients gradients;
};

/// The mask of some tokens of an item.
struct Mask {
  const uint8_t* data;
  int64_t stride;
  bool keeps(int64_t n) const { return !data || data[n * stride]; }
  Mask from(int64_t n) const { return {data ? data + n * stride : nullptr, stride}; }
};

template <class AnyCall>
inline Mask mask_of(const AnyCall& call, int64_t item) {
  return {call.mask ? call.mask + item * call.mask_strides[0] : nullptr, call.mask_strides[1]};
}

/// The mean of up to `count` evenly spread tokens of some items, without masked ones. `row` is
/// scratch for one token.
template <class AnyCall>
inline void mean_of_some(const AnyCall& call, int64_t first, int64_t items, int64_t count,
                         int64_t width, float* row, float* mean) {
  const Tokens x = tokens_of(call.x, call.x_strides, call.type);
  const int64_t all = items * call.tokens;
  int64_t found = 0;
  std::fill(mean, mean + padded(width), 0.f);
  count = std::min(count, all);
  for (int64_t i = 0; i < count; i++) {
    const int64_t token = (2 * i + 1) * all / (2 * count);
    const int64_t item = first + token / call.tokens, n = token % call.tokens;
    if (!mask_of(call, item).keeps(n)) continue;
    load_tile(x, item, n, 1, width, {row, padded(width)});
    for (int64_t j = 0; j < padded(width); j += LANES)
      store(mean + j, load(mean + j) + load(row + j));
    found++;
  }
  for (int64_t j = 0; j < width && found; j++) mean[j] /= static_cast<float>(found);
}

/// Items up to this length are worked on in one piece.
constexpr int64_t WHOLE_ROWS = 256;
/// Pooled sums are formed slice by slice: they depend neither on tiles nor on threads.
constexpr int64_t SLICE = 64;
/// Tokens of a slice; two slices at least, so that two threads can share a short item.
inline int64_t slice_rows(int64_t tokens) { return std::min(SLICE, (tokens + 1) / 2); }

inline int64_t slices_of(int64_t tokens) {
  return (tokens + slice_rows(tokens) - 1) / slice_rows(tokens);
}

/// Rows of a tile of which at most that many floats should be in the cache.
inline int64_t tile_rows(int64_t floats, int64_t floats_per_row) {
  const int64_t rows = floats / floats_per_row / SLICE * SLICE;
  return std::min<int64_t>(192, std::max<int64_t>(64, rows));
}

/// Whether threads take items, not tiles of one item after another.
inline bool by_items(int64_t batch, int threads) {
  return batch >= threads && (batch % threads == 0 || batch >= 4 * threads);
}

/// How the tokens are divided.
struct Division {
  bool whole;      // blocks of whole items, else tiles of an item
  int64_t items;   // per block, if whole
  int64_t rows;    // of a block or tile, at most
  int64_t blocks;  // of the batch if whole, else of an item
};

/// Blocks of whole items, a few at a time as long as their rows stay in the cache.
inline Division divide_items(int64_t batch, int64_t tokens, int64_t rows, int threads) {
  const int64_t room =
      std::max<int64_t>(1, std::min(WHOLE_ROWS, rows) / std::max<int64_t>(1, tokens));
  // As many blocks as keep all threads busy to the end.
  const int64_t rounds = (batch + room * threads - 1) / (room * threads);
  const int64_t items = (batch + rounds * threads - 1) / (rounds * threads);
  return {true, items, items * tokens, (batch + items - 1) / items};
}

/// Tiles of an item of at most that many rows; small enough for `threads` to share it.
inline Division divide_tokens(int64_t tokens, int64_t most_rows, int threads) {
  const int64_t slice = slice_rows(tokens), share = (tokens + threads - 1) / threads;
  const int64_t rows = round_up(std::min(most_rows, share), slice);
  return {false, 1, rows, (tokens + rows - 1) / rows};
}
