// The three forms of the forward. They differ in what they compute from x, and in the last
// products. The output of a token with the normalised rows qn = rq q and kn = rk k is
//
//     plain       out = ((G * kn) Wp^T + bp + qn) Wf^T + bf
//     triangular  out = rk (G * k) M^T + rq (C x + c0) + c
//     folded      out = rk (A x + a) + rq (C x + c0) + c      A = M diag(G) Wk, a = M diag(G) bk
//
// with M = Wf Wp, C = Wf Wq, c0 = Wf bq and c = Wf bp + bf, which depend on the weights only.
//
// The functions of a form, with the workspace w of a thread and the state s of batch elements:
//
//     lay_out(w, arena, rows), lay_out(s, arena, elements)
//         take the scratch,
//     score(w, s, block)
//         computes the scores of a block of tokens w.x, and the norms,
//     pooled(w), pooled_norms(s)
//         are the rows to pool, and their inverse norms unless they are normalised,
//     global_query(w, s, element, count, normalisers)
//         computes G from the sums of these rows, and
//     output(w, s, block)
//         computes the output; if grouped, right after `score` for the same block.
#pragma once

#include <atomic>

#include "pooling.h"
#include "train_weights.h"

namespace swiftkernels::additive {

/// What batch elements need in both passes, one element after another.
struct State {
  float* scores;       // [elements, N], later token weights; null if not needed after pooling
  float* query_norms;  // inverse ones [elements, N]
  float* key_norms;    // [elements, N] or null
  float* partials;     // one for each slice
  float* G;            // [elements, padded(E)]
  float* folded;       // panels of the output matrix of one element
  float* folded_bias;
};

/// What a thread needs for a block of tokens.
struct Workspace {
  Tile x, q, t, operand, out, fold;
  float *scores, *key_norms;  // one float for each row
  float* vectors;             // one vector for each row
  float* mean;                // of some tokens, and scratch for one of them
  float* panel;               // of a matrix that is not packed
};

/// Squares of norms to 1 / max(norm, eps), as torch.nn.functional.normalize divides.
inline void invert_norms(const PackedWeights& layer, float* norms2, int64_t rows) {
  const float eps = static_cast<float>(layer.eps);
  for (int64_t r = 0; r < rows; r++) norms2[r] = 1.f / std::max(std::sqrt(norms2[r]), eps);
}

/// inverse_norms[r] = 1 / |row r|, or 1 if the layer has no norms.
inline void inverse_norms_of(const PackedWeights& layer, Tile tile, int64_t rows, int64_t width,
                             float* inverse_norms) {
  if (!layer.qk_norm) return std::fill(inverse_norms, inverse_norms + rows, 1.f);
  sum_each_row(rows, inverse_norms, [&](int64_t r) {
    vec total{};
    for (int64_t j = 0; j < padded(width); j += LANES) {
      const vec value = load(tile.row(r) + j);
      total += value * value;
    }
    return total;
  });
  invert_norms(layer, inverse_norms, rows);
}

/// scores[r] = scale * inverse_norms[r] * (row r . w + bias)
inline void score_rows(const PackedWeights& layer, Tile tile, int64_t rows, int64_t width,
                       const float* w, float bias, const float* inverse_norms, float* scores) {
  sum_each_row(rows, scores, [&](int64_t r) {
    vec score{};
    for (int64_t j = 0; j < padded(width); j += LANES) score += load(tile.row(r) + j) * load(w + j);
    return score;
  });
  const float scale = static_cast<float>(layer.scale);
  for (int64_t r = 0; r < rows; r++) scores[r] = scale * inverse_norms[r] * (scores[r] + bias);
}

/// Base of the forms.
class Form {
 public:
  /// Whether every batch element has its own output matrix.
  static constexpr bool FOLDS = false;

  Form(const PackedWeights& layer, const PlainMatrices& matrices, const Call& call, bool grouped,
       int64_t pooled_width, int64_t operand_width)
      : pooled_width(pooled_width),
        operand_width(operand_width),
        partial_floats(slices_of(call.tokens) * Partial::floats(pooled_width)),
        layer_(layer),
        matrices_(matrices),
        call_(call),
        C_(layer.in_dims),
        E_(layer.width),
        D_(layer.token_dim),
        N_(call.tokens),
        grouped_(grouped),
        out_(tokens_of(call.out, call.out_strides, call.type)) {}

  const int64_t pooled_width;    // of the rows that are pooled
  const int64_t operand_width;   // of the left operand of the last product
  const int64_t partial_floats;  // of the sums of a batch element

  void lay_out(Workspace& w, Arena& arena, int64_t rows) const {
    w.x = arena.tile(rows, C_);
    w.out = arena.tile(rows, D_);
    w.scores = arena.take(rows);
    w.key_norms = arena.take(rows);
  }

  void lay_out(State& s, Arena& arena, int64_t elements) const {
    if (!call_.saved.statistics) s.query_norms = arena.take(elements * N_);
    s.partials = arena.take(elements * partial_floats);
    s.G = arena.take(elements * padded(E_));
  }

  Status status() const { return DONE; }

 protected:
  Partial total_of(const State& s, int64_t i) const {
    return Partial{s.partials + i * partial_floats};
  }

  /// out = operand times matrix + bias, plus the input rows if the call has a residual.
  void store_output(const Workspace& w, Tile operand, Tile input, const Matrix& matrix,
                    const float* bias, const TokenBlock& b) const {
    const Tile residual = call_.residual ? input : Tile{nullptr, 0};
    const bool joined = b.count == 1 || out_.batch_stride == b.rows * out_.token_stride;
    if (has_plain_rows(out_) && joined)
      return gemm(operand, b.all_rows(), matrix, bias, rows_of(out_, b.element, b.first), w.panel,
                  residual, false);
    gemm(operand, b.all_rows(), matrix, bias, w.out, w.panel, residual);
    store_elements(w.out, D_, out_, b);
  }

  static void store_elements(Tile tile, int64_t width, const Tokens& to, const TokenBlock& b) {
    for (int64_t i = 0; i < b.count; i++)
      store_tile(tile.from(i * b.rows), b.rows, width, to, b.element + i, b.first);
  }

  const PackedWeights& layer_;
  const PlainMatrices& matrices_;
  const Call& call_;
  const int64_t C_, E_, D_, N_;
  const bool grouped_;
  const Tokens out_;
};

/// Computes q and k. The form of training, which may save normalised rows, and of raw weights.
class Plain : public Form {
 public:
  Plain(const PackedWeights& layer, const PlainMatrices& matrices, const Call& call, bool grouped)
      : Form(layer, matrices, call, grouped, layer.width, layer.width),
        unit_k_(unit_rows(call.saved, 1, call.batch, N_, E_, call.type)) {
    // Normalised queries are kept for the second pass where there is memory for them: where they
    // are saved, or in the rows of the output. Elsewhere they are computed again.
    kept_q_ = unit_rows(call.saved, 0, call.batch, N_, E_, call.type);
    if (!kept_q_.data && !grouped && D_ >= E_ && has_plain_rows(out_)) kept_q_ = out_;
  }

  using Form::lay_out;
  void lay_out(Workspace& w, Arena& arena, int64_t rows) const {
    Form::lay_out(w, arena, rows);
    w.panel = arena.take(Matrix::panel_scratch(std::max(C_, E_)));
    w.q = arena.tile(rows, E_);
    w.t = arena.tile(rows, E_);
  }

  void score(const Workspace& w, const State& s, const TokenBlock& b) const {
    float* query_norms = s.query_norms + b.first;
    const int64_t rows = b.all_rows();
    gemm(w.x, rows, matrices_.query, layer_.query_bias, w.q, w.panel);
    inverse_norms_of(layer_, w.q, rows, E_, query_norms);
    score_rows(layer_, w.q, rows, E_, layer_.w_g, 0.f, query_norms,
               s.scores ? s.scores + b.first : w.scores);
    if (layer_.qk_norm) scale_rows(w.q, rows, E_, query_norms);
    if (kept_q_.data) store_elements(w.q, E_, kept_q_, b);
  }

  Tile pooled(const Workspace& w) const { return w.q; }
  const float* pooled_norms(const State&) const { return nullptr; }

  void global_query(const Workspace&, const State& s, int64_t, int64_t count,
                    const float* normalisers) const {
    for (int64_t i = 0; i < count; i++)
      for (int64_t j = 0; j < padded(E_); j += LANES)
        store(s.G + i * padded(E_) + j,
              load(total_of(s, i).rows() + j) * broadcast(normalisers[i]));
  }

  void output(const Workspace& w, const State& s, const TokenBlock& b) const {
    const int64_t rows = b.all_rows();
    if (!grouped_) queries_again(w, s, b);
    gemm(w.x, rows, matrices_.key, layer_.key_bias, w.t, w.panel);
    float* key_norms = s.key_norms ? s.key_norms + b.first : w.key_norms;
    inverse_norms_of(layer_, w.t, rows, E_, key_norms);
    if (unit_k_.data) {
      scale_rows(w.t, rows, E_, key_norms);
      store_elements(w.t, E_, unit_k_, b);
    }
    for (int64_t i = 0; i < b.count; i++) {
      const float* G = s.G + i * padded(E_);
      for (int64_t r = i * b.rows; r < (i + 1) * b.rows; r++) {
        const vec norm = broadcast(unit_k_.data ? 1.f : key_norms[r]);
        for (int64_t j = 0; j < padded(E_); j += LANES)
          store(w.t.row(r) + j, load(w.t.row(r) + j) * (norm * load(G + j)));
      }
    }
    gemm(w.t, rows, matrices_.proj, layer_.proj_bias, w.operand, w.panel, w.q);
    store_output(w, w.operand, w.x, matrices_.final, layer_.final_bias, b);
  }

 private:
  void queries_again(const Workspace& w, const State& s, const TokenBlock& b) const {
    if (kept_q_.data) return load_tile(kept_q_, b.element, b.first, b.rows, E_, w.q);
    gemm(w.x, b.rows, matrices_.query, layer_.query_bias, w.q, w.panel);
    scale_rows(w.q, b.rows, E_, s.query_norms + b.first);
  }

  const Tokens unit_k_;
  Tokens kept_q_;
};

/// Computes norms, scores and sums from x, without rows of q; weights are packed. Sums that are
/// linear in x lose digits where a bias cancels most of q or k; `status` reports that.
class FromTokens : public Form {
 public:
  /// `norms`: 2 where it computes those of q and k, 1 for those of q.
  FromTokens(const PackedWeights& layer, const PlainMatrices& matrices, const Call& call,
             bool grouped, int64_t operand_width, int norms)
      : Form(layer, matrices, call, grouped, layer.in_dims, operand_width),
        norms_(norms),
        bias_norms2_{norm2(layer.query_bias, E_), norm2(layer.key_bias, E_)} {}

  using Form::lay_out;
  void lay_out(Workspace& w, Arena& arena, int64_t rows) const {
    Form::lay_out(w, arena, rows);
    w.vectors = arena.take(rows * norms_ * LANES);
    w.mean = arena.take(2 * padded(C_));
  }

  void score(const Workspace& w, const State& s, const TokenBlock& b) const {
    float* query_norms = s.query_norms + b.first;
    const int64_t rows = b.all_rows();
    if (layer_.qk_norm)
      norms_from_tokens(w, rows, query_norms, norms_ == 2 ? s.key_norms + b.first : nullptr);
    else
      std::fill(query_norms, query_norms + rows, 1.f);
    score_rows(layer_, w.x, rows, C_, layer_.query_scores,
               static_cast<float>(layer_.query_score_bias), query_norms, w.scores);
  }

  Tile pooled(const Workspace& w) const { return w.x; }
  const float* pooled_norms(const State& s) const { return s.query_norms; }

  /// The query layer is linear: sums of x become sums of q.
  void global_query(const Workspace& w, const State& s, int64_t element, int64_t count,
                    const float* normalisers) const {
    for (int64_t i = 0; i < count; i++) check_mean_query(w, s.G, element + i);
    const Tile G{s.G, padded(E_)};
    gemm({total_of(s, 0).rows(), partial_floats}, count, matrices_.query, nullptr, G, nullptr);
    for (int64_t i = 0; i < count; i++) {
      const float factors = total_of(s, i).factor_sum();
      for (int64_t j = 0; j < padded(E_); j += LANES) {
        const vec q = load(G.row(i) + j) + broadcast(factors) * load(layer_.query_bias + j);
        store(G.row(i) + j, q * broadcast(normalisers[i]));
      }
      // The sum of queries may be short even if all queries are long.
      if (layer_.pooling == SUM) check(norm2(G.row(i), E_), factors * factors * bias_norms2_[0]);
    }
  }

  Status status() const { return cancellation_ ? CANCELLATION : DONE; }

 private:
  /// Inverse norms |triangle x + bias| of the rows of q, and of k if there are two triangles.
  void norms_from_tokens(const Workspace& w, int64_t rows, float* query_norms,
                         float* key_norms) const {
    float* const norms[] = {query_norms, key_norms};
    triangular_norms2(w.x, rows, layer_.triangles, layer_.triangle_biases, C_,
                      std::min(E_, C_ + 1), norms_, w.vectors, norms);
    for (int i = 0; i < norms_; i++) {
      check(*std::min_element(norms[i], norms[i] + rows), bias_norms2_[i]);
      invert_norms(layer_, norms[i], rows);
    }
  }

  /// Tokens of a batch element in the mean that `check_mean_query` uses.
  static constexpr int64_t SAMPLE = 16;

  /// Record a cancellation if a bias cancels most of a vector, from the squares of their norms.
  void check(float norm2, float bias_norm2) const {
    if (bias_norm2 > 4 * norm2) cancellation_.store(true, std::memory_order_relaxed);
  }

  /// The check without norms. Sums of x lose digits where the bias cancels most of the mean query;
  /// the mean of some tokens shows that. `q` is scratch.
  void check_mean_query(const Workspace& w, float* q, int64_t element) const {
    if (layer_.qk_norm || bias_norms2_[0] == 0.f) return;
    mean_of_some(call_, element, 1, SAMPLE, C_, w.mean + padded(C_), w.mean);
    gemm({w.mean, padded(C_)}, 1, matrices_.query, layer_.query_bias, {q, padded(E_)}, nullptr);
    check(norm2(q, E_), bias_norms2_[0]);
  }

  const int norms_;
  const float bias_norms2_[2];  // of q and k
  mutable std::atomic<bool> cancellation_{false};
};

/// Computes k, and one product of [t | rq x | rq] with [M; C; c0].
class Triangular : public FromTokens {
 public:
  Triangular(const PackedWeights& layer, const PlainMatrices& matrices, const Call& call,
             bool grouped)
      : FromTokens(layer, matrices, call, grouped,
                   layer.width + layer.in_dims + (layer.qk_norm ? 1 : 0), 1) {}

  using Form::lay_out;
  void lay_out(Workspace& w, Arena& arena, int64_t rows) const {
    FromTokens::lay_out(w, arena, rows);
    w.t = arena.tile(rows, E_);
  }

  void output(const Workspace& w, const State& s, const TokenBlock& b) const {
    const int64_t rows = b.all_rows();
    gemm(w.x, rows, matrices_.key, layer_.key_bias, w.t, w.panel);
    inverse_norms_of(layer_, w.t, rows, E_, w.key_norms);
    for (int64_t i = 0; i < b.count; i++) {
      const float* G = s.G + i * padded(E_);
      for (int64_t r = i * b.rows; r < (i + 1) * b.rows; r++) {
        const vec norm = broadcast(w.key_norms[r]);
        const float query_norm = s.query_norms[b.first + r];
        float* operand = w.operand.row(r);
        for (int64_t j = 0; j < padded(E_); j += LANES)
          store(operand + j, load(w.t.row(r) + j) * (norm * load(G + j)));
        copy_scaled(w.x.row(r), query_norm, C_, operand + E_);
        if (layer_.qk_norm) operand[E_ + C_] = query_norm;
      }
    }
    store_output(w, w.operand, w.x, Matrix::packed(layer_.output, operand_width, D_),
                 layer_.output_bias, b);
  }
};

/// Computes neither q nor k: one product of [rk x | rk | rq x | rq] with [A; a; C; c0], where A and
/// a are computed for every batch element. Without norms, one product of x with A + C.
class Folded : public FromTokens {
 public:
  static constexpr bool FOLDS = true;

  Folded(const PackedWeights& layer, const PlainMatrices& matrices, const Call& call, bool grouped)
      : FromTokens(layer, matrices, call, grouped,
                   layer.qk_norm ? 2 * layer.in_dims + 2 : layer.in_dims, 2) {}

  void lay_out(Workspace& w, Arena& arena, int64_t rows) const {
    FromTokens::lay_out(w, arena, rows);
    w.fold = arena.tile(FOLD_ROWS, E_);
  }

  void lay_out(State& s, Arena& arena, int64_t elements) const {
    Form::lay_out(s, arena, elements);
    s.key_norms = arena.take(elements * N_);
    s.folded = arena.take(panel_floats(operand_width, D_));
    s.folded_bias = arena.take(padded(D_));
  }

  /// Copy the rows of the output matrix that all batch elements share.
  void initialise(const State& s) const {
    if (layer_.qk_norm)
      std::memcpy(s.folded, layer_.folded_output, panel_floats(operand_width, D_) * sizeof(float));
  }

  /// Part `part` of `parts` of the rows [A; a] = M diag(G) [Wk | bk] of the output matrix.
  void fold(const Workspace& w, const State& s, const float* G, int64_t part, int64_t parts) const {
    const Matrix product = Matrix::packed(layer_.product, E_, D_);
    const int64_t end = (C_ + 1) * (part + 1) / parts;
    for (int64_t k = (C_ + 1) * part / parts; k < end; k += FOLD_ROWS) {
      int64_t rows = std::min(FOLD_ROWS, end - k);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < padded(E_); j += LANES)
          store(w.fold.row(r) + j, load(layer_.key_rows + (k + r) * padded(E_) + j) * load(G + j));
      if (!layer_.qk_norm && k + rows == C_ + 1) {
        rows--;
        gemm(w.fold.from(rows), 1, product, layer_.output_bias, {s.folded_bias, padded(D_)},
             nullptr);
      }
      if (rows > 0)
        gemm_to_panels(w.fold, rows, product, s.folded, operand_width, k, nullptr,
                       layer_.qk_norm ? nullptr : layer_.folded_output);
    }
  }

  void output(const Workspace& w, const State& s, const TokenBlock& b) const {
    for (int64_t i = 0; i < b.count; i++) {
      if (grouped_) fold(w, s, s.G + i * padded(E_), 0, 1);
      output_of_one(w, s, w.x.from(i * b.rows), i * N_ + b.first, b.of(i));
    }
  }

 private:
  static constexpr int64_t FOLD_ROWS = 64;

  /// `x`: the tokens of the block; `first`: the index of their first norm.
  void output_of_one(const Workspace& w, const State& s, Tile x, int64_t first,
                     const TokenBlock& b) const {
    const Matrix folded = Matrix::packed(s.folded, operand_width, D_);
    if (!layer_.qk_norm) return store_output(w, x, x, folded, s.folded_bias, b);
    for (int64_t r = 0; r < b.rows; r++) {
      float* operand = w.operand.row(r);
      const float key_norm = s.key_norms[first + r], query_norm = s.query_norms[first + r];
      copy_scaled(x.row(r), key_norm, C_, operand);
      operand[C_] = key_norm;
      copy_scaled(x.row(r), query_norm, C_, operand + C_ + 1);
      operand[2 * C_ + 1] = query_norm;
    }
    store_output(w, w.operand, x, folded, layer_.output_bias, b);
  }
};

}  // namespace swiftkernels::additive
