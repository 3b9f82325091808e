// The forward. Every tile of tokens passes all stages while it is in the cache; nothing of the size
// of the tokens is written but the output (and what a backward asked to be kept).
#include <atomic>

#include "training.h"

namespace {

/// Whole items are worked on together up to this size of their tiles.
constexpr int64_t WHOLE_FLOATS = 120000;
/// Tiles of longer items take that much.
constexpr int64_t TILE_FLOATS = 40000;
/// From so many tokens a thread on, all bytes of the weights are compared at every call: less than
/// 3 % of its time, as a word of the weights takes 0.1 to 0.4 ns and a product with it 0.02.
constexpr int64_t WATCH_ALL_FROM = 512;

/// Tokens of an item whose mean is checked.
constexpr int64_t SAMPLE = 16;

/// What some items need between the two passes over their tokens, one after another.
struct State {
  float* scores;       // [items, N]; token weights in the end. Null: not needed after pooling
  float* query_norms;  // inverse ones [items, N]
  float* key_norms;    // [items, N] or null
  float* partials;     // one for each slice
  float* G;            // [items, E]
  float* folded;       // panels of the folded output matrix
  float* folded_bias;
};

/// What a thread needs for a tile.
struct Workspace {
  Tile x, q, t, operand, out, fold;
  float *scores, *key_norms;  // one number for each row
  float* vectors;             // one vector for each row
  float* mean;                // of some tokens, and one of them
  float* panel;               // of a matrix that is not packed
};

class Forward {
 public:
  /// `matrices` holds what `layer` has in panels, or the same matrices not packed.
  Forward(const Layer& layer, const PlainMatrices& matrices, const Call& call)
      : layer_(layer),
        matrices_(matrices),
        call_(call),
        form_(static_cast<Form>(call.form)),
        C_(layer.in_dims),
        E_(layer.width),
        D_(layer.token_dim),
        N_(call.tokens),
        slice_(slice_rows(N_)),
        threads_(usable_threads(call.threads)),
        x_(tokens_of(call.x, call.x_strides, call.type)),
        out_(tokens_of(call.out, call.out_strides, call.type)),
        unit_q_(unit_rows(call.kept, 0, call.batch, N_, E_, call.type)),
        unit_k_(unit_rows(call.kept, 1, call.batch, N_, E_, call.type)),
        by_items_(by_items(call.batch, threads_)),
        division_(divide()) {
    pool_width_ = form_ == PLAIN ? E_ : C_;
    partial_floats_ = slices_of(N_) * Partial::floats(pool_width_);
    // Rows of the last product's left operand: y, [t | x rq | rq] or [x rk | rk | x rq | rq].
    if (form_ == PLAIN)
      operand_width_ = E_;
    else if (form_ == TRIANGULAR)
      operand_width_ = E_ + C_ + (layer.qk_norm ? 1 : 0);
    else
      operand_width_ = layer.qk_norm ? 2 * C_ + 2 : C_;
    query_bias_norm2_ = norm2(layer.query_bias, E_);
    key_bias_norm2_ = norm2(layer.key_bias, E_);
    // Unit queries wait for the second pass where there is room for them anyway: with what is kept,
    // or in the rows of the output. Else they are computed again.
    waiting_q_ = unit_q_;
    if (!waiting_q_.data && D_ >= E_ && has_plain_rows(out_)) waiting_q_ = out_;
  }

  Status run() {
    Pieces workspace_size(nullptr), state_size(nullptr);
    make_workspace(workspace_size);
    make_state(state_size);
    const int states = by_items_ ? threads_ : 1;
    const Scratch scratch(threads_ * workspace_size.used() + states * state_size.used());
    if (!scratch) return OUT_OF_MEMORY;
    auto workspace = [&](int thread) {
      Pieces pieces(scratch.data() + thread * workspace_size.used());
      return make_workspace(pieces);
    };
    auto state = [&](int thread) {
      Pieces pieces(scratch.data() + threads_ * workspace_size.used() + thread * state_size.used());
      return make_state(pieces);
    };
    if (form_ == FOLDED && layer_.qk_norm)
      for (int i = 0; i < states; i++)
        std::memcpy(state(i).folded, layer_.folded_output,
                    panel_floats(operand_width_, D_) * sizeof(float));

    if (division_.whole) {
      parallel_for(division_.blocks, threads_, [&](int64_t block, int thread) {
        const int64_t first = block * division_.items;
        const int64_t count = std::min(division_.items, call_.batch - first);
        whole_items(workspace(thread), of_items(state(thread), first), first, count);
      });
    } else if (by_items_) {
      parallel_for(call_.batch, threads_, [&](int64_t item, int thread) {
        const Workspace w = workspace(thread);
        const State s = of_items(state(thread), item);
        for (int64_t i = 0; i < division_.blocks; i++) first_pass(w, s, item, i);
        check_mean_query(w, s.G, item);
        finish(s, item, 1);
        if (form_ == FOLDED) fold(w, s, s.G, 0, C_ + 1);
        for (int64_t i = 0; i < division_.blocks; i++) second_pass(w, s, item, i);
      });
    } else {
      for (int64_t item = 0; item < call_.batch; item++) {
        const State s = of_items(state(0), item);
        parallel_for(division_.blocks, threads_,
                     [&](int64_t i, int thread) { first_pass(workspace(thread), s, item, i); });
        check_mean_query(workspace(0), s.G, item);
        finish(s, item, 1);
        if (form_ == FOLDED)
          parallel_for(threads_, threads_, [&](int64_t i, int thread) {
            fold(workspace(thread), s, s.G, (C_ + 1) * i / threads_, (C_ + 1) * (i + 1) / threads_);
          });
        parallel_for(division_.blocks, threads_,
                     [&](int64_t i, int thread) { second_pass(workspace(thread), s, item, i); });
      }
    }
    return cancellation_ ? CANCELLATION : DONE;
  }

 private:
  Division divide() const {
    const int64_t floats_per_row = 3 * (C_ + E_);
    if (N_ <= WHOLE_ROWS && by_items_)
      return divide_items(call_.batch, N_, WHOLE_FLOATS / floats_per_row, threads_);
    return divide_tokens(N_, tile_rows(TILE_FLOATS, floats_per_row), by_items_ ? 1 : threads_);
  }

  State make_state(Pieces& pieces) const {
    State s{};
    const int64_t items = division_.whole ? division_.items : 1;
    if (!call_.kept.statistics) {
      s.query_norms = pieces.take(items * N_);
      if (form_ == FOLDED) s.key_norms = pieces.take(items * N_);
    }
    s.partials = pieces.take(items * partial_floats_);
    s.G = pieces.take(items * padded(E_));
    if (form_ == FOLDED) {
      s.folded = pieces.take(panel_floats(operand_width_, D_));
      s.folded_bias = pieces.take(padded(D_));
    }
    return s;
  }

  /// The state for items from `first` on: what is kept lies where the caller wants it.
  State of_items(State s, int64_t first) const {
    if (float* statistics = call_.kept.statistics) {
      s.scores = statistics + first * N_;
      s.query_norms = statistics + (call_.batch + first) * N_;
      s.key_norms = statistics + (2 * call_.batch + first) * N_;
    }
    return s;
  }

  Workspace make_workspace(Pieces& pieces) const {
    Workspace w{};
    const int64_t rows = division_.rows;
    w.x = pieces.tile(rows, C_);
    w.out = pieces.tile(rows, D_);
    w.scores = pieces.take(rows);
    w.key_norms = pieces.take(rows);
    if (form_ == PLAIN) w.panel = pieces.take(Matrix::panel_scratch(std::max(C_, E_)));
    if (form_ == PLAIN) w.q = pieces.tile(rows, E_);
    if (form_ != FOLDED) w.t = pieces.tile(rows, E_);
    if (form_ != PLAIN) w.vectors = pieces.take(rows * LANES);
    if (form_ != PLAIN) w.mean = pieces.take(2 * padded(C_));
    if (form_ == FOLDED) w.fold = pieces.tile(SLICE, E_);
    // Room for two more vectors: parts of a row are written in whole vectors from any column on.
    w.operand = pieces.tile(rows, operand_width_ + 2 * LANES);
    return w;
  }

  /// Short items, both passes on one tile: x is read once.
  void whole_items(Workspace w, const State& s, int64_t first, int64_t count) const {
    w.x = tile_of(x_, first, count, 0, N_, C_, w.x);
    score(w, s, 0, count * N_);
    for (int64_t i = 0; i < count; i++) {
      if (unit_q_.data) store_tile(w.q.from(i * N_), N_, E_, unit_q_, first + i, 0);
      pool(w, s, i * N_, i * N_, N_, mask_of(call_, first + i), s.partials + i * partial_floats_);
    }
    for (int64_t i = 0; i < count; i++) check_mean_query(w, s.G, first + i);
    finish(s, first, count);
    if (form_ != FOLDED) return attend(w, s, first, count, 0, N_);
    for (int64_t i = 0; i < count; i++) {
      fold(w, s, s.G + i * padded(E_), 0, C_ + 1);
      attend_folded(w, s, first + i, i * N_, i * N_, 0, N_);
    }
  }

  void first_pass(Workspace w, const State& s, int64_t item, int64_t tile) const {
    const int64_t first = tile * division_.rows, rows = std::min(division_.rows, N_ - first);
    w.x = tile_of(x_, item, 1, first, rows, C_, w.x);
    score(w, s, first, rows);
    if (form_ == PLAIN && waiting_q_.data) store_tile(w.q, rows, E_, waiting_q_, item, first);
    pool(w, s, 0, first, rows, mask_of(call_, item).from(first),
         s.partials + first / slice_ * Partial::floats(pool_width_));
  }

  void second_pass(Workspace w, const State& s, int64_t item, int64_t tile) const {
    const int64_t first = tile * division_.rows, rows = std::min(division_.rows, N_ - first);
    w.x = tile_of(x_, item, 1, first, rows, C_, w.x);
    if (form_ == FOLDED) return attend_folded(w, s, item, 0, first, first, rows);
    if (form_ == PLAIN && waiting_q_.data) {
      load_tile(waiting_q_, item, first, rows, E_, w.q);
    } else if (form_ == PLAIN) {
      gemm(w.x, rows, matrices_.query, layer_.query_bias, w.q, w.panel);
      scale_rows(w.q, rows, E_, s.query_norms + first);
    }
    attend(w, s, item, 1, first, rows);
  }

  /// Norms and scores of the tile's rows, whose state starts at `first`; plain: unit queries too.
  void score(const Workspace& w, const State& s, int64_t first, int64_t rows) const {
    float* query_norms = s.query_norms + first;
    float* scores = s.scores ? s.scores + first : w.scores;
    if (form_ == PLAIN) {
      gemm(w.x, rows, matrices_.query, layer_.query_bias, w.q, w.panel);
      inverse_norms_of(layer_, w.q, rows, E_, query_norms);
      score_rows(layer_, w.q, rows, E_, layer_.w_g, 0.f, query_norms, scores);
      if (layer_.qk_norm) scale_rows(w.q, rows, E_, query_norms);
      return;
    }
    const int64_t triangle = std::min(E_, C_ + 1);
    if (layer_.qk_norm) {
      triangular_norms2(w.x, rows, layer_.query_triangle, C_, triangle, layer_.query_triangle_bias,
                        w.vectors, query_norms);
      invert_and_check(query_norms, rows, query_bias_norm2_);
    } else {
      std::fill(query_norms, query_norms + rows, 1.f);
    }
    if (form_ == FOLDED && layer_.qk_norm) {
      float* key_norms = s.key_norms + first;
      triangular_norms2(w.x, rows, layer_.key_triangle, C_, triangle, layer_.key_triangle_bias,
                        w.vectors, key_norms);
      invert_and_check(key_norms, rows, key_bias_norm2_);
    }
    score_rows(layer_, w.x, rows, C_, layer_.query_scores,
               static_cast<float>(layer_.query_score_bias), query_norms, scores);
  }

  /// Squares of norms to inverse norms. Where a row is much shorter than the bias in it, the bias
  /// cancels what comes from x; what is linear in x then loses more digits than the plain form.
  void invert_and_check(float* norms2, int64_t rows, float bias_norm2) const {
    float shortest = INFINITY;
    for (int64_t r = 0; r < rows; r++) shortest = std::min(shortest, norms2[r]);
    check(shortest, bias_norm2);
    invert_norms(layer_, norms2, rows);
  }

  /// Notice that a bias cancels most of a vector, from the squares of their norms.
  void check(float norm2, float bias_norm2) const {
    if (bias_norm2 > 4 * norm2) cancellation_.store(true, std::memory_order_relaxed);
  }

  /// Without norms there are no lengths of rows to check. Sums of x, and what is linear in x, lose
  /// digits where the bias cancels most of the mean query; some tokens are enough to see that, and
  /// cost one product of a row. `q` is scratch.
  void check_mean_query(const Workspace& w, float* q, int64_t item) const {
    if (form_ == PLAIN || layer_.qk_norm || query_bias_norm2_ == 0.f) return;
    mean_of_some(call_, item, 1, SAMPLE, C_, w.mean + padded(C_), w.mean);
    gemm({w.mean, padded(C_)}, 1, matrices_.query, layer_.query_bias, {q, padded(E_)}, nullptr);
    check(norm2(q, E_), query_bias_norm2_);
  }

  /// Partial sums of rows of the tile from `row` on, whose state starts at `first`.
  void pool(const Workspace& w, const State& s, int64_t row, int64_t first, int64_t rows, Mask mask,
            float* partials) const {
    const Tile pooled = form_ == PLAIN ? w.q : w.x;
    const float* scores = s.scores ? s.scores + first : w.scores + row;
    for (int64_t i = 0; i < rows; i += slice_) {
      pool_slice(layer_, scores + i, form_ == PLAIN ? nullptr : s.query_norms + first + i,
                 pooled.from(row + i), std::min(slice_, rows - i), pool_width_, mask.from(i),
                 Partial{partials + i / slice_ * Partial::floats(pool_width_)});
    }
  }

  /// G of some items from the partial sums of their slices.
  void finish(const State& s, int64_t first, int64_t count) const {
    const float* sums = s.partials + Partial::HEADER;
    float normalisers[WHOLE_ROWS];
    for (int64_t i = 0; i < count; i++)
      normalisers[i] =
          combine(layer_, s.partials + i * partial_floats_, slices_of(N_), pool_width_);
    const Tile G{s.G, padded(E_)};
    // Sums of x become sums of q: the query layer is linear.
    if (form_ != PLAIN)
      gemm({const_cast<float*>(sums), partial_floats_}, count, matrices_.query, nullptr, G,
           nullptr);
    for (int64_t i = 0; i < count; i++) {
      const Partial total{s.partials + i * partial_floats_};
      const vec normaliser = broadcast(normalisers[i]), factors = broadcast(total.factor_sum());
      for (int64_t j = 0; j < padded(E_); j += LANES) {
        const vec q = form_ == PLAIN ? load(total.rows() + j)
                                     : load(G.row(i) + j) + factors * load(layer_.query_bias + j);
        store(G.row(i) + j, q * normaliser);
      }
      // The sum of queries may be short even where all of them are long.
      if (form_ != PLAIN && layer_.pooling == SUM)
        check(norm2(G.row(i), E_), total.factor_sum() * total.factor_sum() * query_bias_norm2_);
      if (!call_.kept.statistics) continue;
      std::memcpy(call_.kept.global_query + (first + i) * E_, G.row(i), E_ * sizeof(float));
      call_.kept.statistics[3 * call_.batch * N_ + first + i] = normalisers[i];
      float* weights = s.scores + i * N_;
      raw_weights(layer_, weights, N_, mask_of(call_, first + i), total.highest(), weights);
      for (int64_t n = 0; n < N_; n++) weights[n] *= normalisers[i];
    }
  }

  /// The rows of the folded output matrix that depend on G: M diag(G) [Wk | bk].
  void fold(const Workspace& w, const State& s, const float* G, int64_t begin, int64_t end) const {
    const Matrix product = Matrix::packed(layer_.product, E_, D_);
    for (int64_t k = begin; k < end; k += SLICE) {
      int64_t rows = std::min(SLICE, end - k);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < padded(E_); j += LANES)
          store(w.fold.row(r) + j, load(layer_.key_rows + (k + r) * padded(E_) + j) * load(G + j));
      if (!layer_.qk_norm && k + rows == C_ + 1) {
        rows--;
        gemm(w.fold.from(rows), 1, product, layer_.output_bias, {s.folded_bias, padded(D_)},
             nullptr);
      }
      if (rows > 0)
        gemm_to_panels(w.fold, rows, product, s.folded, operand_width_, k, nullptr,
                       layer_.qk_norm ? nullptr : layer_.folded_output);
    }
  }

  /// Output rows of a tile of `count` items, `rows` of each from their row `first` on.
  void attend(const Workspace& w, const State& s, int64_t item, int64_t count, int64_t first,
              int64_t rows) const {
    gemm(w.x, count * rows, matrices_.key, layer_.key_bias, w.t, w.panel);
    float* key_norms = s.key_norms ? s.key_norms + first : w.key_norms;
    inverse_norms_of(layer_, w.t, count * rows, E_, key_norms);
    if (unit_k_.data) {
      scale_rows(w.t, count * rows, E_, key_norms);
      for (int64_t i = 0; i < count; i++)
        store_tile(w.t.from(i * rows), rows, E_, unit_k_, item + i, first);
    }
    for (int64_t i = 0; i < count; i++) {
      const float* G = s.G + i * padded(E_);
      for (int64_t r = i * rows; r < (i + 1) * rows; r++) {
        const vec norm = broadcast(unit_k_.data ? 1.f : key_norms[r]);
        float* t = form_ == PLAIN ? w.t.row(r) : w.operand.row(r);
        for (int64_t j = 0; j < padded(E_); j += LANES)
          store(t + j, load(w.t.row(r) + j) * (norm * load(G + j)));
        if (form_ == TRIANGULAR) {
          const float query_norm = s.query_norms[first + r];
          copy_scaled(w.x.row(r), query_norm, C_, t + E_);
          if (layer_.qk_norm) t[E_ + C_] = query_norm;
        }
      }
    }
    if (form_ == PLAIN) {
      gemm(w.t, count * rows, matrices_.proj, layer_.proj_bias, w.operand, w.panel, w.q);
      emit(w, w.operand, matrices_.final, layer_.final_bias, item, count, 0, first, rows);
    } else {
      emit(w, w.operand, Matrix::packed(layer_.output, operand_width_, D_), layer_.output_bias,
           item, count, 0, first, rows);
    }
  }

  /// The same for one item whose output matrix is folded; its rows stand at `row` of the tile.
  void attend_folded(const Workspace& w, const State& s, int64_t item, int64_t row,
                     int64_t state_first, int64_t first, int64_t rows) const {
    const Matrix folded = Matrix::packed(s.folded, operand_width_, D_);
    if (!layer_.qk_norm)
      return emit(w, w.x.from(row), folded, s.folded_bias, item, 1, row, first, rows);
    for (int64_t r = 0; r < rows; r++) {
      const float* x = w.x.row(row + r);
      float* operand = w.operand.row(r);
      const float key_norm = s.key_norms[state_first + r];
      const float query_norm = s.query_norms[state_first + r];
      copy_scaled(x, key_norm, C_, operand);
      operand[C_] = key_norm;
      copy_scaled(x, query_norm, C_, operand + C_ + 1);
      operand[2 * C_ + 1] = query_norm;
    }
    emit(w, w.operand, folded, layer_.output_bias, item, 1, row, first, rows);
  }

  /// out = operand times matrix + bias, and the input on top if asked for; `row` is where the tile
  /// of x has the first of these tokens.
  void emit(const Workspace& w, Tile operand, const Matrix& matrix, const float* bias, int64_t item,
            int64_t count, int64_t row, int64_t first, int64_t rows) const {
    const Tile input = call_.add_input ? w.x.from(row) : Tile{nullptr, 0};
    const bool joined = count == 1 || out_.batch_stride == rows * out_.token_stride;
    if (has_plain_rows(out_) && joined)
      return gemm(operand, count * rows, matrix, bias, rows_of(out_, item, first), w.panel, input,
                  false);
    gemm(operand, count * rows, matrix, bias, w.out, w.panel, input);
    for (int64_t i = 0; i < count; i++)
      store_tile(w.out.from(i * rows), rows, D_, out_, item + i, first);
  }

  const Layer& layer_;
  const PlainMatrices& matrices_;
  const Call& call_;
  const Form form_;
  const int64_t C_, E_, D_, N_, slice_;
  const int threads_;
  const Tokens x_, out_, unit_q_, unit_k_;
  const bool by_items_;
  const Division division_;
  mutable std::atomic<bool> cancellation_{false};
  float query_bias_norm2_, key_bias_norm2_;
  Tokens waiting_q_;
  int64_t pool_width_, partial_floats_, operand_width_;
};

}  // namespace

/// Lanes of the vectors that this library works with: panels and vectors are padded to them.
EXPORT int64_t swiftkernels_lanes() { return LANES; }

EXPORT void swiftkernels_pack(const float* b, int64_t K, int64_t columns, int64_t k_stride,
                              int64_t j_stride, float* panels) {
  Matrix{K, columns, nullptr, b, k_stride, j_stride}.pack(panels);
}

/// What `Fingerprint::whole` (`all`) or `sampled` has to be.
EXPORT uint64_t swiftkernels_fingerprint(const Layer* layer, int64_t all) {
  return layer->fingerprint.compute(all);
}

/// In inference, with packed weights.
EXPORT int swiftkernels_forward(const Layer* layer, const Call* call) {
  // Where a weight serves many tokens, a look at all weights is a small part of the work.
  const bool all = call->batch * call->tokens >= WATCH_ALL_FROM * usable_threads(call->threads);
  if (!layer->fingerprint.matches(all)) return STALE;
  const int64_t C = layer->in_dims, E = layer->width, D = layer->token_dim;
  const PlainMatrices matrices{Matrix::packed(layer->query, C, E), Matrix::packed(layer->key, C, E),
                               Matrix::packed(layer->proj, E, E),
                               Matrix::packed(layer->final, E, D)};
  return Forward(*layer, matrices, *call).run();
}

/// In training, with the weights as they are. Always in the plain form.
EXPORT int swiftkernels_forward_training(const RawLayer* raw, const Call* call) {
  Prepared prepared(*raw, usable_threads(call->threads));
  prepared.add(prepared.plain.query);
  prepared.add(prepared.plain.key);
  prepared.add(prepared.plain.proj);
  prepared.add(prepared.plain.final);
  if (!prepared.finish(call->batch * call->tokens)) return OUT_OF_MEMORY;
  Layer layer{};
  layer.in_dims = raw->in_dims, layer.width = raw->width, layer.token_dim = raw->token_dim;
  layer.pooling = raw->pooling, layer.qk_norm = raw->qk_norm;
  layer.scale = raw->scale, layer.eps = raw->eps;
  layer.query_bias = prepared.query_bias, layer.key_bias = prepared.key_bias;
  layer.w_g = prepared.w_g;
  layer.proj_bias = prepared.proj_bias, layer.final_bias = prepared.final_bias;
  return Forward(layer, prepared.plain, *call).run();
}
