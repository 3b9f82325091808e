// The forward. A first pass over the tokens pools them, a second computes the output. A block of
// tokens passes all stages while it is in the cache; the only result of the size of the tokens is
// the output.
#include "stages.h"

namespace swiftkernels::separable {
namespace {

/// Floats in the tiles of a block (160 KB), and of a group of short sequences (800 KB).
constexpr int64_t BLOCK_FLOATS = 40000, GROUP_FLOATS = 200000;

/// What a thread needs for a block.
struct Workspace {
  Tile x, values, out;
  float *scores, *panel;
};

/// What some sequences need in both passes.
struct State {
  float* partials;  // one for each slice of each sequence
  float* contexts;  // [sequences, C]
};

class Forward {
 public:
  Forward(const Weights& weights, const Call& call)
      : w_(weights),
        call_(call),
        C_(weights.width),
        D_(weights.out_width),
        N_(call.tokens),
        partial_floats_(slices_of(N_) * Partial::floats(C_)),
        schedule_(schedule_of(call, 2 * C_ + D_, GROUP_FLOATS, BLOCK_FLOATS)) {}

  Status run() {
    Arena workspace_size, state_size;
    make_workspace(workspace_size);
    make_state(state_size);
    workspace_floats_ = workspace_size.used(), state_floats_ = state_size.used();
    const int threads = schedule_.threads;
    const Scratch scratch(threads * workspace_floats_ + schedule_.states() * state_floats_);
    if (!scratch) return OUT_OF_MEMORY;
    workspaces_ = scratch.data();
    states_ = workspaces_ + threads * workspace_floats_;
    schedule_.run(*this);
    return DONE;
  }

  void begin(const Team&) const {}

  void first_pass(const TokenBlock& b) const { pool(with_tokens(b), state(b.state), b); }

  void between(const Team& team) const { finish(state(team.thread), team.element, 1); }

  void second_pass(const TokenBlock& b) const { attend(with_tokens(b), state(b.state), b); }

  void end(const Team&) const {}

  /// x is read once.
  void both_passes(const TokenBlock& b) const {
    const Workspace w = with_tokens(b);
    const State s = state(b.state);
    pool(w, s, b);
    finish(s, b.element, b.count);
    attend(w, s, b);
  }

 private:
  Workspace make_workspace(Arena& arena) const {
    Workspace w{};
    w.x = arena.tile(schedule_.rows, C_);
    w.values = arena.tile(schedule_.rows, C_);
    w.out = arena.tile(schedule_.rows, D_);
    w.scores = arena.take(schedule_.rows);
    w.panel = arena.take(Matrix::panel_scratch(C_));
    return w;
  }

  State make_state(Arena& arena) const {
    State s{};
    s.partials = arena.take(schedule_.elements * partial_floats_);
    s.contexts = arena.take(schedule_.elements * padded(C_));
    return s;
  }

  /// A thread's workspace with the tokens of a block.
  Workspace with_tokens(const TokenBlock& b) const {
    Arena arena(workspaces_ + b.thread * workspace_floats_);
    Workspace w = make_workspace(arena);
    w.x = load_block(call_, call_.x, b, C_, w.x);
    return w;
  }

  State state(int i) const {
    Arena arena(states_ + i * state_floats_);
    return make_state(arena);
  }

  /// The sums of every slice.
  void pool(const Workspace& w, const State& s, const TokenBlock& b) const {
    const int64_t slice = slice_rows(N_);
    score_rows(w_, w.x, b.all_rows(), w.scores);
    for (int64_t i = 0; i < b.count; i++)
      for (int64_t n = 0; n < b.rows; n += slice) {
        const int64_t row = i * b.rows + n, index = (b.first + n) / slice;
        pool_slice(w_, w.scores + row, w.x.from(row), std::min(slice, b.rows - n),
                   {s.partials + i * partial_floats_ + index * Partial::floats(C_)});
      }
  }

  /// The contexts of `count` sequences from the sums of their slices.
  void finish(const State& s, int64_t sequence, int64_t count) const {
    for (int64_t i = 0; i < count; i++) {
      const Partial pooled{s.partials + i * partial_floats_};
      float* context = s.contexts + i * padded(C_);
      combine(pooled.data, slices_of(N_), C_);
      context_of(w_, pooled.rows(), context);
      if (!call_.saved.context) continue;
      std::copy(context, context + C_, call_.saved.context + (sequence + i) * C_);
      std::copy(pooled.rows(), pooled.rows() + C_, call_.saved.pooled + (sequence + i) * C_);
      call_.saved.softmax[2 * (sequence + i)] = pooled.highest();
      call_.saved.softmax[2 * (sequence + i) + 1] = pooled.total();
    }
  }

  void attend(const Workspace& w, const State& s, const TokenBlock& b) const {
    gated_values(w_, w.x, b.count, b.rows, s.contexts, w.values, w.panel);
    const Tokens out = sequence_of(call_.out, b.element, call_.groups, call_.type);
    if (has_plain_rows(out) && b.count == 1)
      return gemm(w.values, b.rows, w_.proj, w_.proj_bias, rows_of(out, 0, b.first), w.panel,
                  {nullptr, 0}, false);
    gemm(w.values, b.all_rows(), w_.proj, w_.proj_bias, w.out, w.panel);
    store_block(call_, w.out, call_.out, b, D_);
  }

  const Weights& w_;
  const Call& call_;
  const int64_t C_, D_, N_, partial_floats_;
  const Schedule schedule_;
  int64_t workspace_floats_ = 0, state_floats_ = 0;
  float *workspaces_ = nullptr, *states_ = nullptr;
};

}  // namespace

/// The forward in inference, with packed weights.
EXPORT int swiftkernels_separable_forward(const PackedWeights* packed, const Call* call) {
  const int64_t tokens = call->batch * call->groups * call->tokens;
  if (!packed->fingerprint.matches(tokens, usable_threads(call->threads))) return STALE;
  const int64_t C = packed->width, D = packed->out_width;
  Weights weights{};
  weights.width = C, weights.out_width = D;
  weights.query = packed->query;
  weights.key = {const_cast<float*>(packed->key), padded(C)};
  weights.value = Matrix::packed(packed->value, C, C);
  weights.proj = Matrix::packed(packed->proj, C, D);
  weights.key_bias = packed->key_bias, weights.value_bias = packed->value_bias;
  weights.proj_bias = packed->proj_bias;
  return Forward(weights, *call).run();
}

/// The forward with weights that are not packed. Saves for a backward unless `call->saved` is null.
EXPORT int swiftkernels_separable_forward_training(const RawWeights* raw, const Call* call) {
  TrainWeights train(*raw, false, call->batch * call->groups * call->tokens,
                     usable_threads(call->threads));
  if (!train.prepare()) return OUT_OF_MEMORY;
  return Forward(train.weights, *call).run();
}

}  // namespace swiftkernels::separable
