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
// dp depends on all tokens of a sequence, so there are two passes: the first computes all products
// of matrices, the second everything that depends on dp.
#include <vector>

#include "stages.h"

namespace swiftkernels::separable {
namespace {

/// Floats in the tiles of a block (800 KB), and of a group of short sequences (4 MB). They are
/// large, because every tile is added to the sums of the weight gradients.
constexpr int64_t BLOCK_FLOATS = 200000, GROUP_FLOATS = 1000000;

/// Most tiles that are added one after another. Longer sums are sums of such chains: a single chain
/// would lose more digits than PyTorch does.
constexpr int64_t CHAIN = 24;

/// Sums over tokens, in rows of full vectors and one block of memory.
struct Sums {
  Tile dWv, dWp;
  float *dquery, *dbv, *dbp;
  int64_t floats;

  static Sums make(int64_t C, int64_t D, float* memory) {
    Arena arena(memory);
    Sums s{};
    s.dWv = arena.matrix(C, C);
    s.dWp = arena.matrix(D, C);
    s.dquery = arena.take(padded(C));
    s.dbv = arena.take(padded(C));
    s.dbp = arena.take(padded(D));
    s.floats = arena.used();
    return s;
  }
  float* memory() const { return dWv.data; }
};

/// The sums of a thread: of the last few tiles, and of all tiles before. Both are the same memory
/// if there are only a few tiles.
struct ThreadSums {
  Sums few, all;
  int64_t tiles = 0;

  void flush() {
    if (few.memory() == all.memory()) return;
    add(few.memory(), few.floats, all.memory());
    std::fill(few.memory(), few.memory() + few.floats, 0.f);
    tiles = 0;
  }
};

/// to = from, padded with zeros to full vectors.
inline void copy_padded(const float* from, int64_t width, float* to) {
  std::fill(to + width, to + padded(width), 0.f);
  std::copy(from, from + width, to);
}

/// What a thread needs for a block.
struct Workspace {
  Tile x, dout;
  Tile values;  // become u
  Tile du;      // becomes dv
  Tile dx;
  float *scores, *panel;
  float* columns;     // of a large tile
  float *row, *sums;  // of C numbers
};

/// What some sequences need in both passes.
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
        N_(call.tokens),
        partial_floats_(slices_of(N_) * padded(C_)),
        schedule_(schedule_of(call, 4 * C_ + D_, GROUP_FLOATS, BLOCK_FLOATS)) {}

  Status run() {
    Arena workspace_size, state_size, shared_size;
    make_workspace(workspace_size);
    make_state(state_size);
    make_shared(shared_size);
    workspace_floats_ = workspace_size.used(), state_floats_ = state_size.used();
    const int threads = schedule_.threads, states = schedule_.states();
    const int64_t tiles = schedule_.blocks * (schedule_.is_grouped() ? 1 : schedule_.batch);
    const int levels = tiles > CHAIN * threads ? 2 : 1;
    const int64_t sum_floats = call_.needs_weights ? Sums::make(C_, D_, nullptr).floats : 0;
    const Scratch scratch(threads * (workspace_floats_ + levels * sum_floats) +
                          states * state_floats_ + shared_size.used());
    if (!scratch) return OUT_OF_MEMORY;
    workspaces_ = scratch.data();
    states_ = workspaces_ + threads * workspace_floats_;
    Arena shared(states_ + states * state_floats_);
    make_shared(shared);
    float* const sums = states_ + states * state_floats_ + shared_size.used();
    std::fill(sums, sums + levels * threads * sum_floats, 0.f);
    sums_.resize(threads);
    for (int i = 0; i < threads; i++) {
      float* few = sums + levels * i * sum_floats;
      sums_[i] = {Sums::make(C_, D_, few), Sums::make(C_, D_, few + (levels - 1) * sum_floats)};
    }
    schedule_.run(*this);
    if (!call_.needs_weights) return DONE;
    for (ThreadSums& s : sums_) s.flush();
    for (int i = 1; i < threads; i++) add(sums_[i].all.memory(), sum_floats, sums_[0].all.memory());
    write_gradients(sums_[0].all);
    return DONE;
  }

  void begin(const Team&) const {}

  void first_pass(const TokenBlock& b) {
    const Workspace w = with_tokens(b);
    products(w, state(b.state), b);
    if (call_.dx.data) store_block(call_, w.dx, call_.dx, b, C_);
  }

  void between(const Team& team) const {
    context_gradient(workspace(team.thread), state(team.thread), 0, team.element);
  }

  void second_pass(const TokenBlock& b) {
    const Workspace w = with_tokens(b);
    if (call_.dx.data)
      load_tile(sequence_of(call_.dx, b.element, call_.groups, call_.type), 0, b.first, b.rows, C_,
                w.dx);
    pooling_gradient(w, state(b.state), b);
  }

  void end(const Team&) const {}

  /// x is read once.
  void both_passes(const TokenBlock& b) {
    const Workspace w = with_tokens(b);
    const State s = state(b.state);
    products(w, s, b);
    for (int64_t i = 0; i < b.count; i++) context_gradient(w, s, i, b.element + i);
    pooling_gradient(w, s, b);
  }

 private:
  Workspace make_workspace(Arena& arena) const {
    Workspace w{};
    const int64_t rows = schedule_.rows;
    w.x = arena.tile(rows, C_);
    w.dout = arena.tile(rows, D_);
    w.values = arena.tile(rows, C_);
    w.du = arena.tile(rows, C_);
    w.dx = arena.tile(rows, C_);
    w.scores = arena.take(rows);
    w.row = arena.take(padded(C_));
    w.sums = arena.take(padded(C_));
    w.panel = arena.take(Matrix::panel_scratch(std::max(C_, D_)));
    const Tile widest = arena.tile(0, std::max(C_, D_));
    if (rows * widest.stride > LARGE_TILE) w.columns = arena.take(rows * widest.stride);
    return w;
  }

  State make_state(Arena& arena) const {
    State s{};
    s.partials = arena.take(schedule_.elements * partial_floats_);
    s.dpooled = arena.take(schedule_.elements * padded(C_));
    return s;
  }

  /// Memory that all threads share, for the gradients of the keys.
  void make_shared(Arena& arena) {
    dcontexts_ = arena.matrix(schedule_.batch, C_);
    if (!call_.needs_weights) return;
    pooled_ = arena.matrix(schedule_.batch, C_);
    dWk_ = arena.matrix(C_, C_);
    dbk_ = arena.take(padded(C_));
  }

  Workspace workspace(int thread) const {
    Arena arena(workspaces_ + thread * workspace_floats_);
    return make_workspace(arena);
  }

  /// A thread's workspace with the tokens of a block.
  Workspace with_tokens(const TokenBlock& b) const {
    Workspace w = workspace(b.thread);
    w.x = load_block(call_, call_.x, b, C_, w.x);
    return w;
  }

  State state(int i) const {
    Arena arena(states_ + i * state_floats_);
    return make_state(arena);
  }

  /// All products of matrices: sums for the gradients of weights, dv Wv in dx, and the share of
  /// every slice in dcontext.
  void products(const Workspace& w, const State& s, const TokenBlock& b) {
    const int64_t rows = b.all_rows(), slice = slice_rows(N_);
    const Tile dout = load_block(call_, call_.dout, b, D_, w.dout);
    gemm(w.x, rows, w_.value, w_.value_bias, w.values, w.panel);
    gemm(dout, rows, w_.proj_rows, nullptr, w.du, w.panel);
    for (int64_t i = 0; i < b.count; i++) {
      copy_padded(call_.saved.context + (b.element + i) * C_, C_, w.row);
      for (int64_t n = 0; n < b.rows; n += slice)
        gate_rows(w, i * b.rows + n, std::min(slice, b.rows - n),
                  s.partials + i * partial_floats_ + (b.first + n) / slice * padded(C_));
    }
    if (call_.needs_weights) {
      ThreadSums& sums = sums_[b.thread];
      gram(w.du, C_, w.x, C_, rows, sums.few.dWv, true, w.columns);
      gram(dout, D_, w.values, C_, rows, sums.few.dWp, true, w.columns);
      add_rows(w.du, rows, C_, sums.few.dbv);
      add_rows(dout, rows, D_, sums.few.dbp);
      if (++sums.tiles >= CHAIN) sums.flush();
    }
    if (call_.dx.data) gemm(w.du, rows, w_.value_rows, nullptr, w.dx, w.panel);
  }

  /// Overwrite the rows values and du of a slice with u and dv; dcontext = the share of the slice
  /// in dcontext. `w.row` holds the context.
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

  /// dcontext and dp of a sequence, the i-th of the block.
  ONE_COPY void context_gradient(const Workspace& w, const State& s, int64_t i,
                                 int64_t sequence) const {
    float *dcontext = dcontexts_.row(sequence), *dpooled = s.dpooled + i * padded(C_);
    std::fill(dcontext, dcontext + padded(C_), 0.f);
    for (int64_t slice = 0; slice < slices_of(N_); slice++)
      add(s.partials + i * partial_floats_ + slice * padded(C_), padded(C_), dcontext);
    std::fill(dpooled, dpooled + padded(C_), 0.f);
    for (int64_t r = 0; r < C_; r += MAX_CHAIN) {
      std::fill(w.row, w.row + padded(C_), 0.f);
      add_weighted_rows(dcontext + r, w_.key.from(r), std::min(MAX_CHAIN, C_ - r), C_, w.row);
      add(w.row, padded(C_), dpooled);
    }
    if (call_.needs_weights)
      copy_padded(call_.saved.pooled + sequence * C_, C_, pooled_.row(sequence));
  }

  /// Add the gradient of x by the pooling to dx, and store dx.
  void pooling_gradient(const Workspace& w, const State& s, const TokenBlock& b) const {
    const int64_t slice = slice_rows(N_);
    score_rows(w_, w.x, b.all_rows(), w.scores);
    for (int64_t i = 0; i < b.count; i++) {
      const int64_t sequence = b.element + i, row = i * b.rows;
      const float* softmax = call_.saved.softmax + 2 * sequence;
      exponentials(w.scores + row, b.rows, softmax[0], 1.f / softmax[1], w.scores + row);
      copy_padded(call_.saved.pooled + sequence * C_, C_, w.row);
      for (int64_t n = 0; n < b.rows; n += slice)
        pooling_rows(w, row + n, std::min(slice, b.rows - n), s.dpooled + i * padded(C_),
                     sums_[b.thread].few.dquery);
    }
    if (call_.dx.data) store_block(call_, w.dx, call_.dx, b, C_);
  }

  /// The same for the rows of a slice; adds their share to dquery. `w.scores` has the token
  /// weights, `w.row` the pooled token.
  ONE_COPY void pooling_rows(const Workspace& w, int64_t row, int64_t rows, const float* dpooled,
                             float* dquery) const {
    std::fill(w.sums, w.sums + padded(C_), 0.f);
    for (int64_t r = row; r < row + rows; r++) {
      vec x_dp{};  // dp . (x_n - p)
      for (int64_t j = 0; j < padded(C_); j += LANES)
        x_dp += load(dpooled + j) * (load(w.x.row(r) + j) - load(w.row + j));
      const vec weight = broadcast(w.scores[r]), d_score = weight * broadcast(sum(x_dp));
      for (int64_t j = 0; j < padded(C_) && call_.needs_weights; j += LANES)
        store(w.sums + j, load(w.sums + j) + d_score * (load(w.x.row(r) + j) - load(w.row + j)));
      for (int64_t j = 0; j < padded(C_) && call_.dx.data; j += LANES)
        store(w.dx.row(r) + j,
              load(w.dx.row(r) + j) + weight * load(dpooled + j) + d_score * load(w_.query + j));
    }
    if (call_.needs_weights) add(w.sums, padded(C_), dquery);
  }

  void write_gradients(const Sums& sums) const {
    parallel_for(schedule_.threads, schedule_.threads, [&](int64_t i, int) {
      const int64_t first = C_ * i / schedule_.threads, end = C_ * (i + 1) / schedule_.threads;
      if (first == end) return;
      for (int64_t s = 0; s < schedule_.batch; s += MAX_CHAIN) {
        const Tile dcontexts{dcontexts_.row(s) + first, dcontexts_.stride};
        gram(dcontexts, end - first, pooled_.from(s), C_, std::min(MAX_CHAIN, schedule_.batch - s),
             dWk_.from(first), s > 0, nullptr);
      }
    });
    std::fill(dbk_, dbk_ + padded(C_), 0.f);
    add_rows(dcontexts_, schedule_.batch, C_, dbk_);
    const Gradients& g = call_.gradients;
    copy_rows({sums.dquery, 0}, 1, C_, g.qkv);
    copy_rows(dWk_, C_, C_, g.qkv + C_);
    copy_rows(sums.dWv, C_, C_, g.qkv + C_ + C_ * C_);
    copy_rows(sums.dWp, D_, C_, g.proj);
    copy_rows({sums.dbp, 0}, 1, D_, g.proj_bias);
    if (!g.qkv_bias) return;
    g.qkv_bias[0] = 0.f;  // cancels in the softmax
    copy_rows({dbk_, 0}, 1, C_, g.qkv_bias + 1);
    copy_rows({sums.dbv, 0}, 1, C_, g.qkv_bias + 1 + C_);
  }

  const Weights& w_;
  const BackwardCall& call_;
  const int64_t C_, D_, N_, partial_floats_;
  const Schedule schedule_;
  int64_t workspace_floats_ = 0, state_floats_ = 0;
  float *workspaces_ = nullptr, *states_ = nullptr;
  Tile dcontexts_{}, pooled_{}, dWk_{};
  float* dbk_ = nullptr;
  std::vector<ThreadSums> sums_;
};

}  // namespace

EXPORT int swiftkernels_separable_backward(const RawWeights* raw, const BackwardCall* call) {
  TrainWeights train(*raw, true, call->batch * call->groups * call->tokens,
                     usable_threads(call->threads));
  if (!train.prepare()) return OUT_OF_MEMORY;
  return Backward(train.weights, *call).run();
}

}  // namespace swiftkernels::separable
