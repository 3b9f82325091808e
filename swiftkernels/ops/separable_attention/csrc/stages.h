// The stages of separable attention on tiles of tokens. The backward computes some of them again.
#pragma once

#include "abi.h"
#include "activation.h"
#include "gemm.h"
#include "row_ops.h"
#include "schedule.h"
#include "scratch.h"

namespace swiftkernels::separable {

/// The weights as the stages read them.
struct Weights {
  int64_t width, out_width;
  const float* query;
  Tile key;  // rows
  Matrix value, proj;
  Matrix value_rows, proj_rows;  // Wv, Wp, for the gradients of tokens
  const float *key_bias, *value_bias, *proj_bias;
};

/// The weights of a layer in training. They change with every step, so they are packed for one
/// call.
class TrainWeights {
 public:
  Weights weights;

  TrainWeights(const RawWeights& raw, bool backward, int64_t tokens, int threads)
      : raw_(raw), backward_(backward), pack_(tokens >= PACK_FROM), threads_(threads) {
    const int64_t C = raw.width, D = raw.out_width;
    const float *key = raw.qkv + C, *value = key + C * C;
    weights.width = C, weights.out_width = D;
    weights.key = {const_cast<float*>(key), C};
    weights.value = Matrix::transposed(value, C, C);
    weights.proj = Matrix::transposed(raw.proj, C, D);
    weights.value_rows = Matrix::rows(value, C, C);
    weights.proj_rows = Matrix::rows(raw.proj, D, C);
  }

  /// Pad the vectors, pack the matrices. False: out of memory.
  bool prepare() {
    Arena size;
    lay_out(size);
    memory_ = Scratch(size.used());
    if (!memory_) return false;
    Arena arena(memory_.data());
    lay_out(arena);
    return true;
  }

 private:
  void lay_out(Arena& arena) {
    const int64_t C = raw_.width, D = raw_.out_width;
    const float* bias = raw_.qkv_bias;
    weights.query = copy_padded_rows(raw_.qkv, 1, C, arena);
    weights.key_bias = copy_padded_rows(bias ? bias + 1 : nullptr, 1, C, arena);
    weights.value_bias = copy_padded_rows(bias ? bias + 1 + C : nullptr, 1, C, arena);
    weights.proj_bias = copy_padded_rows(raw_.proj_bias, 1, D, arena);
    if (padded(C) != C) {
      float* key = copy_padded_rows(raw_.qkv + C, C, C, arena);
      if (key) weights.key = {key, padded(C)};
    }
    if (!pack_) return;
    Matrix* const forward[] = {&weights.value, &weights.proj};
    Matrix* const backward[] = {&weights.value, &weights.value_rows, &weights.proj_rows};
    Matrix* const* matrices = backward_ ? backward : forward;
    const int64_t count = backward_ ? 3 : 2;
    float* panels[3];
    for (int64_t i = 0; i < count; i++)
      panels[i] = arena.take(panel_floats(matrices[i]->K, matrices[i]->columns));
    if (panels[0])
      parallel_for(count, threads_, [&](int64_t i, int) { matrices[i]->pack(panels[i]); });
  }

  const RawWeights& raw_;
  const bool backward_, pack_;
  const int threads_;
  Scratch memory_{0};
};

/// Groups of short sequences whose rows take up to `group_floats` floats, or blocks of one sequence
/// that take up to `block_floats`.
template <class AnyCall>
inline Schedule schedule_of(const AnyCall& call, int64_t floats_per_row, int64_t group_floats,
                            int64_t block_floats) {
  const int64_t sequences = call.batch * call.groups;
  const int threads = usable_threads(call.threads);
  if (call.tokens <= SHORT_SEQUENCE && Schedule::separates(sequences, threads))
    return Schedule::grouped(sequences, call.tokens, group_floats / floats_per_row, threads);
  return Schedule::tiled(sequences, call.tokens, block_rows(block_floats, floats_per_row), threads);
}

/// One sequence, as tokens of a batch of one.
inline Tokens sequence_of(const Sequences& t, int64_t sequence, int64_t groups, int64_t type) {
  const int64_t offset = sequence / groups * t.batch_stride + sequence % groups * t.group_stride;
  return {static_cast<char*>(t.data) + offset * (type == FLOAT32 ? 4 : 2), 0, t.token_stride,
          t.channel_stride, static_cast<int32_t>(type)};
}

/// The tokens of a block of sequences, one sequence after the other, as float32 rows of full
/// vectors: in place if they are such rows, else copied to `scratch`.
template <class AnyCall>
inline Tile load_block(const AnyCall& call, const Sequences& t, const TokenBlock& b, int64_t width,
                       Tile scratch) {
  if (b.count == 1)
    return tile_of(sequence_of(t, b.element, call.groups, call.type), 0, 1, b.first, b.rows, width,
                   scratch);
  for (int64_t i = 0; i < b.count; i++)
    load_tile(sequence_of(t, b.element + i, call.groups, call.type), 0, b.first, b.rows, width,
              scratch.from(i * b.rows));
  return scratch;
}

template <class AnyCall>
inline void store_block(const AnyCall& call, Tile tile, const Sequences& t, const TokenBlock& b,
                        int64_t width) {
  for (int64_t i = 0; i < b.count; i++)
    store_tile(tile.from(i * b.rows), b.rows, width,
               sequence_of(t, b.element + i, call.groups, call.type), 0, b.first);
}

/// The result of pooling a slice: two numbers, then sum_n exp(score_n - highest) x_n.
struct Partial {
  static constexpr int64_t HEADER = 16;
  float* data;
  float& highest() const { return data[0]; }
  float& total() const { return data[1]; }  // sum_n exp(score_n - highest)
  float* rows() const { return data + HEADER; }
  static int64_t floats(int64_t width) { return HEADER + round_up(width, 16); }
};

/// scores[r] = query . tile[r]. The bias of the scores cancels in the softmax.
ONE_COPY inline void score_rows(const Weights& w, Tile tile, int64_t rows, float* scores) {
  sum_each_row(rows, scores, [&](int64_t r) {
    vec score{};
    for (int64_t j = 0; j < padded(w.width); j += LANES)
      score += load(tile.row(r) + j) * load(w.query + j);
    return score;
  });
}

/// Pool up to MAX_SLICE rows; their scores are overwritten.
ONE_COPY inline void pool_slice(const Weights& w, float* scores, Tile tile, int64_t rows,
                                Partial partial) {
  float highest = -INFINITY, total = 0.f;
  for (int64_t r = 0; r < rows; r++) highest = std::max(highest, scores[r]);
  exponentials(scores, rows, highest, 1.f, scores);
  for (int64_t r = 0; r < rows; r++) total += scores[r];
  partial.highest() = highest;
  partial.total() = total;
  std::fill(partial.rows(), partial.rows() + padded(w.width), 0.f);
  add_weighted_rows(scores, tile, rows, w.width, partial.rows());
}

/// Add the partials of a sequence, in order, to the first; then its rows are the weighted mean.
ONE_COPY inline void combine(float* partials, int64_t count, int64_t width) {
  const int64_t floats = Partial::floats(width);
  const Partial first{partials};
  float highest = first.highest();
  for (int64_t i = 1; i < count; i++)
    highest = std::max(highest, Partial{partials + i * floats}.highest());
  float total = 0.f;
  for (int64_t i = 0; i < count; i++) {
    const Partial partial{partials + i * floats};
    const float rescale = std::exp(partial.highest() - highest);
    total += rescale * partial.total();
    for (int64_t j = 0; j < padded(width); j += LANES) {
      const vec before = i == 0 ? vec{} : load(first.rows() + j);
      store(first.rows() + j, before + broadcast(rescale) * load(partial.rows() + j));
    }
  }
  first.highest() = highest;
  first.total() = total;
  const vec normaliser = broadcast(1.f / total);
  for (int64_t j = 0; j < padded(width); j += LANES)
    store(first.rows() + j, load(first.rows() + j) * normaliser);
}

/// context = Wk pooled + bk
ONE_COPY inline void context_of(const Weights& w, const float* pooled, float* context) {
  sum_each_row(w.width, context, [&](int64_t r) {
    vec total{};
    for (int64_t j = 0; j < padded(w.width); j += LANES)
      total += load(w.key.row(r) + j) * load(pooled + j);
    return total;
  });
  for (int64_t j = 0; j < w.width; j++) context[j] += w.key_bias[j];
  for (int64_t j = w.width; j < padded(w.width); j++) context[j] = 0.f;
}

/// out = relu(x Wv^T + bv) * context, for sequences of `tokens` rows in x, one after the other,
/// each with its own context.
inline void gated_values(const Weights& w, Tile x, int64_t sequences, int64_t tokens,
                         const float* contexts, Tile out, float* panel) {
  const Panels groups(w.width);
  for (int64_t i = 0; i < groups.count(); i++) {
    const Panel group = groups[i];
    const float* b = w.value.panel(group, panel);
    for (int64_t s = 0; s < sequences; s++) {
      const float* context = contexts + s * padded(w.width) + group.column;
      const int64_t width = group.vectors * LANES;
      const Block block{x.row(s * tokens),
                        x.stride,
                        b,
                        w.width,
                        chain_length(w.width),
                        w.value_bias + group.column,
                        {},
                        {out.row(s * tokens) + group.column, out.stride},
                        width,
                        after(w.value, group)};
      multiply_panel(block, group.vectors, tokens, [&](Tile c, int64_t rows) {
        for (int64_t r = 0; r < rows; r++)
          for (int64_t j = 0; j < width; j += LANES)
            store(c.row(r) + j, relu(load(c.row(r) + j)) * load(context + j));
      });
    }
  }
}

}  // namespace swiftkernels::separable
