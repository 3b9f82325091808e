// The forward: a pass over the tokens that pools them, then one that makes the output. Nothing of
// the size of the tokens is written but the output.
#include <vector>

#include "stages.h"

namespace swiftkernels::separable {
namespace {

/// Floats of a tile of whole sequences, and of a part of one.
constexpr int64_t WHOLE_FLOATS = 200000, TILE_FLOATS = 40000;

/// What a thread needs for a tile.
struct Workspace {
  Tile x, values, out;
  float *scores, *panel;
};

/// What a block of sequences needs between its passes.
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
        slice_(slice_rows(call.tokens)),
        schedule_(call.batch * call.groups, call.tokens, usable_threads(call.threads),
                  WHOLE_FLOATS / (2 * C_ + D_), tile_rows(TILE_FLOATS, 2 * C_ + D_)),
        partial_floats_(slices_of(call.tokens) * Partial::floats(C_)) {}

  Status run() {
    Pieces workspace_size(nullptr), state_size(nullptr);
    make_workspace(workspace_size);
    make_state(state_size);
    const int threads = schedule_.threads, states = schedule_.by_blocks ? threads : 1;
    const Scratch scratch(threads * workspace_size.used() + states * state_size.used());
    if (!scratch) return OUT_OF_MEMORY;
    auto workspace = [&](int thread) {
      Pieces pieces(scratch.data() + thread * workspace_size.used());
      return make_workspace(pieces);
    };
    auto state = [&](int i) {
      Pieces pieces(scratch.data() + threads * workspace_size.used() + i * state_size.used());
      return make_state(pieces);
    };
    // A block of one tile is still there in the second pass.
    std::vector<Tile> loaded(threads);
    auto load = [&](const Workspace& w, Range sequences, Range tokens) {
      return load_sequences(call_, call_.x, sequences, tokens, C_, w.x);
    };
    schedule_.run(
        [&](Range sequences, Range tokens, int thread, int i) {
          const Workspace w = workspace(thread);
          loaded[thread] = load(w, sequences, tokens);
          pool(w, state(i), loaded[thread], sequences, tokens);
        },
        [&](Range sequences, int, int i) { finish(state(i), sequences); },
        [&](Range sequences, Range tokens, int thread, int i) {
          const Workspace w = workspace(thread);
          const Tile x = schedule_.tiles == 1 ? loaded[thread] : load(w, sequences, tokens);
          attend(w, state(i), x, sequences, tokens);
        });
    return DONE;
  }

 private:
  Workspace make_workspace(Pieces& pieces) const {
    Workspace w{};
    w.x = pieces.tile(schedule_.rows, C_);
    w.values = pieces.tile(schedule_.rows, C_);
    w.out = pieces.tile(schedule_.rows, D_);
    w.scores = pieces.take(schedule_.rows);
    w.panel = pieces.take(Matrix::panel_scratch(C_));
    return w;
  }

  State make_state(Pieces& pieces) const {
    State s{};
    s.partials = pieces.take(schedule_.block * partial_floats_);
    s.contexts = pieces.take(schedule_.block * padded(C_));
    return s;
  }

  void pool(const Workspace& w, const State& s, Tile x, Range sequences, Range tokens) const {
    score_rows(w_, x, sequences.count * tokens.count, w.scores);
    for (int64_t i = 0; i < sequences.count; i++)
      for (int64_t n = 0; n < tokens.count; n += slice_) {
        const int64_t row = i * tokens.count + n, slice = (tokens.first + n) / slice_;
        pool_slice(w_, w.scores + row, x.from(row), std::min(slice_, tokens.count - n),
                   {s.partials + i * partial_floats_ + slice * Partial::floats(C_)});
      }
  }

  void finish(const State& s, Range sequences) const {
    for (int64_t i = 0; i < sequences.count; i++) {
      const Partial pooled{s.partials + i * partial_floats_};
      float* context = s.contexts + i * padded(C_);
      combine(pooled.data, slices_of(call_.tokens), C_);
      context_of(w_, pooled.rows(), context);
      if (!call_.saved.context) continue;
      const int64_t sequence = sequences.first + i;
      std::copy(context, context + C_, call_.saved.context + sequence * C_);
      std::copy(pooled.rows(), pooled.rows() + C_, call_.saved.pooled + sequence * C_);
      call_.saved.softmax[2 * sequence] = pooled.highest();
      call_.saved.softmax[2 * sequence + 1] = pooled.total();
    }
  }

  void attend(const Workspace& w, const State& s, Tile x, Range sequences, Range tokens) const {
    gated_values(w_, x, sequences.count, tokens.count, s.contexts, w.values, w.panel);
    const Tokens out = sequence_of(call_.out, sequences.first, call_.groups, call_.type);
    if (has_plain_rows(out) && sequences.count == 1)
      return gemm(w.values, tokens.count, w_.proj, w_.proj_bias, rows_of(out, 0, tokens.first),
                  w.panel, {nullptr, 0}, false);
    gemm(w.values, sequences.count * tokens.count, w_.proj, w_.proj_bias, w.out, w.panel);
    store_sequences(call_, w.out, call_.out, sequences, tokens, D_);
  }

  const Weights& w_;
  const Call& call_;
  const int64_t C_, D_, slice_;
  const Schedule schedule_;
  const int64_t partial_floats_;
};

}  // namespace

/// In inference, with packed weights.
EXPORT int swiftkernels_separable_forward(const PackedWeights* packed, const Call* call) {
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

/// With the weights as they are, and all that a backward needs if `call->saved` has room for it.
EXPORT int swiftkernels_separable_forward_training(const RawWeights* raw, const Call* call) {
  PreparedWeights prepared(*raw, false, call->batch * call->groups * call->tokens,
                           usable_threads(call->threads));
  if (!prepared.finish()) return OUT_OF_MEMORY;
  return Forward(prepared.weights, *call).run();
}

}  // namespace swiftkernels::separable
