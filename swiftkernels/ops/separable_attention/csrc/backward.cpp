// The backward. With r = relu(x Wv^T + bv), u = r * context and du = dout Wp:
//
//     dcontext = sum_n du_n * r_n
//     dv       = du * context where r > 0
//     dp       = Wk^T dcontext                           of the pooled token p = sum_n a_n x_n
//     ds_n     = a_n dp . (x_n - p)                      of the score
//     dx_n     = dv_n Wv + a_n dp + ds_n query
//     dquery   = sum_n ds_n (x_n - p)                    as sum_n ds_n = 0
//     dWk = dcontext^T p, dbk = sum dcontext             over the sequences
//     dWv = dv^T x, dbv = sum_n dv_n, dWp = dout^T u, dbp = sum_n dout_n
//
// dp comes from all tokens of a sequence, so there are two passes: the first does all products of
// matrices, the second what hangs on dp.
#include <vector>

#include "stages.h"

namespace swiftkernels::separable {
namespace {

/// Floats of a tile of whole sequences, and of a part of one: large, as every tile is added to the
/// sums of the weight gradients.
constexpr int64_t WHOLE_FLOATS = 1000000, TILE_FLOATS = 200000;

/// Tiles that are summed before they are added to the sum of all: one long chain of additions would
/// lose more digits than PyTorch does.
constexpr int64_t CHAIN = 24;

/// Sums over tokens, rows of whole vectors, all in one piece of memory.
struct Sums {
  Tile dWv, dWp;
  float *dquery, *dbv, *dbp;
  int64_t floats;

  static Sums make(int64_t C, int64_t D, float* memory) {
    Pieces pieces(memory);
    Sums s{};
    s.dWv = {pieces.take(C * padded(C)), padded(C)};
    s.dWp = {pieces.take(D * padded(C)), padded(C)};
    s.dquery = pieces.take(padded(C));
    s.dbv = pieces.take(padded(C));
    s.dbp = pieces.take(padded(D));
    s.floats = pieces.used();
    return s;
  }
  float* memory() const { return dWv.data; }
};

/// to += from
inline void add(const float* from, int64_t floats, float* to) {
  for (int64_t j = 0; j < floats; j += LANES) store(to + j, load(to + j) + load(from + j));
}

/// The sums of a thread: those of a few tiles, and those of all tiles before.
struct ThreadSums {
  Sums few, all;
  int64_t floats;
  int64_t tiles = 0;

  void flush() {
    add(few.memory(), floats, all.memory());
    std::fill(few.memory(), few.memory() + floats, 0.f);
    tiles = 0;
  }
};

/// to[j] += sum_r rows[r, j]; a few rows are summed first, for accuracy.
inline void add_rows(Tile rows, int64_t count, int64_t width, float* to) {
  constexpr int64_t FEW = 16;
  for (int64_t j = 0; j < padded(width); j += LANES) {
    vec total{};
    for (int64_t r = 0; r < count; r += FEW) {
      vec few{};
      for (int64_t i = r; i < std::min(count, r + FEW); i++) few += load(rows.row(i) + j);
      total += few;
    }
    store(to + j, load(to + j) + total);
  }
}

/// to = from, padded with zeros to whole vectors.
inline void copy_padded(const float* from, int64_t width, float* to) {
  std::fill(to + width, to + padded(width), 0.f);
  std::copy(from, from + width, to);
}

/// to = from, without the padding.
inline void copy_rows(Tile from, int64_t rows, int64_t width, float* to) {
  for (int64_t r = 0; r < rows; r++) std::copy(from.row(r), from.row(r) + width, to + r * width);
}

/// What a thread needs for a tile.
struct Workspace {
  Tile x, dout;
  Tile values;  // become u
  Tile du;      // becomes dv
  Tile dx;
  float *scores, *panel;
  float* columns;     // of a large tile
  float *row, *sums;  // of C numbers
};

/// What a block of sequences needs between its passes.
struct State {
  float* partials;  // of dcontext, one for each slice of each sequence
  float* dpooled;   // [sequences, C]
};

class Backward {
 public:
  Backward(const Weights& weights, const BackwardCall& call)
      : w_(weights),
        call_(call),
        C_(weights.width),
        D_(weights.out_width),
        sequences_(call.batch * call.groups),
        slice_(slice_rows(call.tokens)),
        schedule_(sequences_, call.tokens, usable_threads(call.threads),
                  WHOLE_FLOATS / (4 * C_ + D_), tile_rows(TILE_FLOATS, 4 * C_ + D_)),
        partial_floats_(slices_of(call.tokens) * padded(C_)),
        sum_floats_(call.needs_weights ? Sums::make(C_, D_, nullptr).floats : 0) {}

  Status run() {
    Pieces workspace_size(nullptr), state_size(nullptr), shared_size(nullptr);
    make_workspace(workspace_size);
    make_state(state_size);
    make_shared(shared_size);
    const int threads = schedule_.threads, states = schedule_.by_blocks ? threads : 1;
    const Scratch scratch(threads * (workspace_size.used() + 2 * sum_floats_) +
                          states * state_size.used() + shared_size.used());
    if (!scratch) return OUT_OF_MEMORY;
    float* const state_memory = scratch.data() + threads * workspace_size.used();
    float* const shared_memory = state_memory + states * state_size.used();
    float* const sums_memory = shared_memory + shared_size.used();
    Pieces shared_pieces(shared_memory);
    make_shared(shared_pieces);
    auto workspace = [&](int thread) {
      Pieces pieces(scratch.data() + thread * workspace_size.used());
      return make_workspace(pieces);
    };
    auto state = [&](int i) {
      Pieces pieces(state_memory + i * state_size.used());
      return make_state(pieces);
    };
    std::fill(sums_memory, sums_memory + 2 * threads * sum_floats_, 0.f);
    std::vector<ThreadSums> sums(threads);
    for (int i = 0; i < threads; i++) {
      float* few = sums_memory + 2 * i * sum_floats_;
      sums[i] = {Sums::make(C_, D_, few), Sums::make(C_, D_, few + sum_floats_), sum_floats_};
    }

    // A block of one tile is still there in the second pass.
    std::vector<Tile> loaded(threads);
    schedule_.run(
        [&](Range sequences, Range tokens, int thread, int i) {
          const Workspace w = workspace(thread);
          loaded[thread] = load_sequences(call_, call_.x, sequences, tokens, C_, w.x);
          first_pass(w, state(i), sums[thread].few, loaded[thread], sequences, tokens);
          if (call_.needs_weights && ++sums[thread].tiles == CHAIN) sums[thread].flush();
        },
        [&](Range sequences, int thread, int i) {
          for (int64_t s = 0; s < sequences.count; s++)
            between_passes(workspace(thread), state(i), s, sequences.first + s);
        },
        [&](Range sequences, Range tokens, int thread, int i) {
          const Workspace w = workspace(thread);
          const bool whole = schedule_.tiles == 1;
          const Tile x = whole ? loaded[thread]
                               : load_sequences(call_, call_.x, sequences, tokens, C_, w.x);
          second_pass(w, state(i), sums[thread].few, x, sequences, tokens);
        });
    if (!call_.needs_weights) return DONE;
    for (ThreadSums& s : sums) s.flush();
    for (int i = 1; i < threads; i++)
      add(sums[i].all.memory(), sum_floats_, sums[0].all.memory());
    write_gradients(sums[0].all);
    return DONE;
  }

 private:
  Workspace make_workspace(Pieces& pieces) const {
    Workspace w{};
    const int64_t rows = schedule_.rows;
    w.x = pieces.tile(rows, C_);
    w.dout = pieces.tile(rows, D_);
    w.values = pieces.tile(rows, C_);
    w.du = pieces.tile(rows, C_);
    w.dx = pieces.tile(rows, C_);
    w.scores = pieces.take(rows);
    w.row = pieces.take(padded(C_));
    w.sums = pieces.take(padded(C_));
    w.panel = pieces.take(Matrix::panel_scratch(std::max(C_, D_)));
    const Tile widest = pieces.tile(0, std::max(C_, D_));
    if (rows * widest.stride > LARGE_TILE) w.columns = pieces.take(rows * widest.stride);
    return w;
  }

  State make_state(Pieces& pieces) const {
    State s{};
    s.partials = pieces.take(schedule_.block * partial_floats_);
    s.dpooled = pieces.take(schedule_.block * padded(C_));
    return s;
  }

  /// What all threads share: for the gradients of the keys.
  void make_shared(Pieces& pieces) {
    dcontexts_ = {pieces.take(sequences_ * padded(C_)), padded(C_)};
    if (!call_.needs_weights) return;
    pooled_ = {pieces.take(sequences_ * padded(C_)), padded(C_)};
    dWk_ = {pieces.take(C_ * padded(C_)), padded(C_)};
    dbk_ = pieces.take(padded(C_));
  }

  void first_pass(const Workspace& w, const State& s, const Sums& sums, Tile x, Range sequences,
                  Range tokens) const {
    const int64_t rows = sequences.count * tokens.count;
    const Tile dout = load_sequences(call_, call_.dout, sequences, tokens, D_, w.dout);
    gemm(x, rows, w_.value, w_.value_bias, w.values, w.panel);
    gemm(dout, rows, w_.proj_rows, nullptr, w.du, w.panel);
    for (int64_t i = 0; i < sequences.count; i++) {
      copy_padded(call_.saved.context + (sequences.first + i) * C_, C_, w.row);
      for (int64_t n = 0; n < tokens.count; n += slice_)
        gate_rows(w, i * tokens.count + n, std::min(slice_, tokens.count - n),
                  s.partials + i * partial_floats_ + (tokens.first + n) / slice_ * padded(C_));
    }
    if (call_.needs_weights) {
      gram(w.du, C_, x, C_, rows, sums.dWv, true, w.columns);
      gram(dout, D_, w.values, C_, rows, sums.dWp, true, w.columns);
      add_rows(w.du, rows, C_, sums.dbv);
      add_rows(dout, rows, D_, sums.dbp);
    }
    if (!call_.dx.data) return;
    gemm(w.du, rows, w_.value_rows, nullptr, w.dx, w.panel);
    if (schedule_.tiles > 1) store_sequences(call_, w.dx, call_.dx, sequences, tokens, C_);
  }

  /// Rows of values and du become those of u and dv; a slice of them, whose part of dcontext is
  /// summed. `w.row` holds the context.
  ONE_COPY void gate_rows(const Workspace& w, int64_t row, int64_t rows, float* dcontext) const {
    std::fill(dcontext, dcontext + padded(C_), 0.f);
    for (int64_t r = row; r < row + rows; r++) {
      float *values = w.values.row(r), *du = w.du.row(r);
      for (int64_t j = 0; j < padded(C_); j += LANES) {
        const vec value = load(values + j), context = load(w.row + j), d = load(du + j);
        const vec gated = relu(value);
        store(dcontext + j, load(dcontext + j) + d * gated);
        store(values + j, gated * context);
        const int_vec off = reinterpret_cast<int_vec>(value <= 0.f);
        store(du + j, reinterpret_cast<vec>(reinterpret_cast<int_vec>(d * context) & ~off));
      }
    }
  }

  /// dcontext and dp of the sequence `i` of a block.
  ONE_COPY void between_passes(const Workspace& w, const State& s, int64_t i,
                               int64_t sequence) const {
    float *dcontext = dcontexts_.row(sequence), *dpooled = s.dpooled + i * padded(C_);
    std::fill(dcontext, dcontext + padded(C_), 0.f);
    for (int64_t slice = 0; slice < slices_of(call_.tokens); slice++)
      add(s.partials + i * partial_floats_ + slice * padded(C_), padded(C_), dcontext);
    std::fill(dpooled, dpooled + padded(C_), 0.f);
    for (int64_t r = 0; r < C_; r += SUM_LENGTH) {
      std::fill(w.row, w.row + padded(C_), 0.f);
      add_weighted_rows(dcontext + r, w_.key.from(r), std::min(SUM_LENGTH, C_ - r), C_, w.row);
      add(w.row, padded(C_), dpooled);
    }
    if (call_.needs_weights)
      copy_padded(call_.saved.pooled + sequence * C_, C_, pooled_.row(sequence));
  }

  void second_pass(const Workspace& w, const State& s, const Sums& sums, Tile x, Range sequences,
                   Range tokens) const {
    const bool stored = call_.dx.data && schedule_.tiles > 1;
    const Tile dx = stored ? load_sequences(call_, call_.dx, sequences, tokens, C_, w.dx) : w.dx;
    score_rows(w_, x, sequences.count * tokens.count, w.scores);
    for (int64_t i = 0; i < sequences.count; i++) {
      const int64_t sequence = sequences.first + i, row = i * tokens.count;
      const float* softmax = call_.saved.softmax + 2 * sequence;
      exponentials(w.scores + row, tokens.count, softmax[0], 1.f / softmax[1]);
      copy_padded(call_.saved.pooled + sequence * C_, C_, w.row);
      for (int64_t n = 0; n < tokens.count; n += slice_)
        pooling_rows(w, x, dx, row + n, std::min(slice_, tokens.count - n),
                     s.dpooled + i * padded(C_), sums);
    }
    if (call_.dx.data && dx.data == w.dx.data)
      store_sequences(call_, dx, call_.dx, sequences, tokens, C_);
  }

  /// What reaches a slice of rows of x by the pooling, and their part of dquery. `w.scores` holds
  /// the weights of the tokens, `w.row` the pooled token.
  ONE_COPY void pooling_rows(const Workspace& w, Tile x, Tile dx, int64_t row, int64_t rows,
                             const float* dpooled, const Sums& sums) const {
    std::fill(w.sums, w.sums + padded(C_), 0.f);
    for (int64_t r = row; r < row + rows; r++) {
      vec along{};
      for (int64_t j = 0; j < padded(C_); j += LANES)
        along += load(dpooled + j) * (load(x.row(r) + j) - load(w.row + j));
      const vec weight = broadcast(w.scores[r]), d_score = weight * broadcast(sum(along));
      for (int64_t j = 0; j < padded(C_) && call_.needs_weights; j += LANES)
        store(w.sums + j, load(w.sums + j) + d_score * (load(x.row(r) + j) - load(w.row + j)));
      for (int64_t j = 0; j < padded(C_) && call_.dx.data; j += LANES)
        store(dx.row(r) + j,
              load(dx.row(r) + j) + weight * load(dpooled + j) + d_score * load(w_.query + j));
    }
    if (call_.needs_weights) add(w.sums, padded(C_), sums.dquery);
  }

  void write_gradients(const Sums& sums) const {
    parallel_for(schedule_.threads, schedule_.threads, [&](int64_t i, int) {
      const int64_t first = C_ * i / schedule_.threads, end = C_ * (i + 1) / schedule_.threads;
      if (first == end) return;
      for (int64_t s = 0; s < sequences_; s += SUM_LENGTH) {
        const Tile dcontexts{dcontexts_.row(s) + first, dcontexts_.stride};
        gram(dcontexts, end - first, pooled_.from(s), C_, std::min(SUM_LENGTH, sequences_ - s),
             dWk_.from(first), s > 0, nullptr);
      }
    });
    std::fill(dbk_, dbk_ + padded(C_), 0.f);
    add_rows(dcontexts_, sequences_, C_, dbk_);
    const Gradients& g = call_.gradients;
    copy_rows({sums.dquery, 0}, 1, C_, g.qkv);
    copy_rows(dWk_, C_, C_, g.qkv + C_);
    copy_rows(sums.dWv, C_, C_, g.qkv + C_ + C_ * C_);
    copy_rows(sums.dWp, D_, C_, g.proj);
    if (g.proj_bias) copy_rows({sums.dbp, 0}, 1, D_, g.proj_bias);
    if (!g.qkv_bias) return;
    g.qkv_bias[0] = 0.f;  // cancels in the softmax
    copy_rows({dbk_, 0}, 1, C_, g.qkv_bias + 1);
    copy_rows({sums.dbv, 0}, 1, C_, g.qkv_bias + 1 + C_);
  }

  const Weights& w_;
  const BackwardCall& call_;
  const int64_t C_, D_, sequences_, slice_;
  const Schedule schedule_;
  const int64_t partial_floats_, sum_floats_;
  Tile dcontexts_, pooled_, dWk_;
  float* dbk_;
};

}  // namespace

EXPORT int swiftkernels_separable_backward(const RawWeights* raw, const BackwardCall* call) {
  PreparedWeights prepared(*raw, true, call->batch * call->groups * call->tokens,
                           usable_threads(call->threads));
  if (!prepared.finish()) return OUT_OF_MEMORY;
  return Backward(prepared.weights, *call).run();
}

}  // namespace swiftkernels::separable
