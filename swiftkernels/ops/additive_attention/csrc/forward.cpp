// The forward. A block of tokens passes all stages while it is in the cache. The only results of
// the size of the tokens are the output and what the backward needs.
#include "forms.h"
#include "passes.h"

namespace swiftkernels::additive {
namespace {

/// Floats in the tiles of a block (160 KB), and of a group of short batch elements (480 KB).
constexpr int64_t BLOCK_FLOATS = 40000, GROUP_FLOATS = 120000;

template <class F>
class Forward {
 public:
  /// `matrices`: of `layer`; in training they may be not packed. `groups`: whether short batch
  /// elements may pass both passes in groups.
  Forward(const PackedWeights& layer, const PlainMatrices& matrices, const Call& call,
          bool groups = true)
      : layer_(layer),
        call_(call),
        N_(call.tokens),
        x_(tokens_of(call.x, call.x_strides, call.type)),
        schedule_(schedule(groups)),
        form_(layer, matrices, call, schedule_.is_grouped()) {
    Arena workspace_size, state_size;
    make_workspace(workspace_size);
    make_state(state_size);
    workspace_floats_ = workspace_size.used(), state_floats_ = state_size.used();
  }

  Status run() {
    const int threads = schedule_.threads, states = schedule_.states();
    const Scratch scratch(threads * workspace_floats_ + states * state_floats_);
    if (!scratch) return OUT_OF_MEMORY;
    use(scratch.data(), workspace_floats_, scratch.data() + threads * workspace_floats_);
    schedule_.run(*this);
    return form_.status();
  }

  void use(float* workspaces, int64_t stride, float* states) {
    workspaces_ = workspaces, workspace_stride_ = stride, states_ = states;
    if constexpr (F::FOLDS)
      for (int i = 0; i < schedule_.states(); i++) form_.initialise(state(i, 0));
  }

  void begin(const Team&) const {}

  void first_pass(const TokenBlock& b) const {
    first_pass(with_tokens(b), state(b.state, b.element), b);
  }

  void between(const Team& team) const {
    finish(workspace(team.thread), state(team.thread, team.element), team.element, 1);
    if constexpr (F::FOLDS)
      parallel_for(team.threads, team.threads,
                   [&](int64_t i, int thread) { fold(team, i, team.thread + thread); });
  }

  /// Part `part` of as many as the team has threads.
  void fold(const Team& team, int64_t part, int thread) const {
    const State s = state(team.thread, team.element);
    if constexpr (F::FOLDS) form_.fold(workspace(thread), s, s.G, part, team.threads);
  }

  /// Sums of blocks become G.
  void finish_all(int thread) const { finish(workspace(thread), state(0, 0), 0, 1); }

  const Schedule& blocks() const { return schedule_; }
  int64_t workspace_floats() const { return workspace_floats_; }
  int64_t state_floats() const { return state_floats_; }
  Status status() const { return form_.status(); }

  void second_pass(const TokenBlock& b) const {
    form_.output(with_tokens(b), state(b.state, b.element), b);
  }

  void end(const Team&) const {}

  /// x is read once.
  void both_passes(const TokenBlock& b) const {
    const Workspace w = with_tokens(b);
    const State s = state(b.state, b.element);
    first_pass(w, s, b);
    finish(w, s, b.element, b.count);
    form_.output(w, s, b);
  }

 private:
  Schedule schedule(bool groups) const {
    const int threads = usable_threads(call_.threads);
    const int64_t floats_per_row = 3 * (layer_.in_dims + layer_.width);
    if (groups && N_ <= SHORT_SEQUENCE && Schedule::separates(call_.batch, threads))
      return Schedule::grouped(call_.batch, N_, GROUP_FLOATS / floats_per_row, threads);
    return Schedule::tiled(call_.batch, N_, block_rows(BLOCK_FLOATS, floats_per_row), threads);
  }

  Workspace make_workspace(Arena& arena) const {
    Workspace w{};
    form_.lay_out(w, arena, schedule_.rows);
    // Parts of a row begin at any column and are written in full vectors, up to two beyond the end.
    w.operand = arena.tile(schedule_.rows, form_.operand_width + 2 * LANES);
    return w;
  }

  State make_state(Arena& arena) const {
    State s{};
    form_.lay_out(s, arena, schedule_.elements);
    return s;
  }

  Workspace workspace(int thread) const {
    Arena arena(workspaces_ + thread * workspace_stride_);
    return make_workspace(arena);
  }

  /// The i-th state, for batch elements from `element` on. Results to save are in the call's
  /// memory.
  State state(int i, int64_t element) const {
    Arena arena(states_ + i * state_floats_);
    State s = make_state(arena);
    if (call_.saved.statistics) {
      const Statistics saved(call_.saved, call_.batch, N_);
      s.scores = saved.token_weights + element * N_;
      s.query_norms = saved.query_norms + element * N_;
      s.key_norms = saved.key_norms + element * N_;
    }
    return s;
  }

  /// A thread's workspace with the tokens of a block.
  Workspace with_tokens(const TokenBlock& b) const {
    Workspace w = workspace(b.thread);
    w.x = tile_of(x_, b.element, b.count, b.first, b.rows, layer_.in_dims, w.x);
    return w;
  }

  /// Scores, and the sums of every slice.
  void first_pass(const Workspace& w, const State& s, const TokenBlock& b) const {
    form_.score(w, s, b);
    const Tile pooled = form_.pooled(w);
    const float* norms = form_.pooled_norms(s);
    const int64_t width = form_.pooled_width, slice = slice_rows(N_);
    for (int64_t i = 0; i < b.count; i++) {
      const Mask mask = mask_of(call_, b.element + i);
      for (int64_t n = 0; n < b.rows; n += slice) {
        const int64_t row = i * b.rows + n, index = i * N_ + b.first + n;
        pool_slice(layer_, s.scores ? s.scores + index : w.scores + row,
                   norms ? norms + index : nullptr, pooled.from(row), std::min(slice, b.rows - n),
                   width, mask.from(b.first + n),
                   Partial{s.partials + i * form_.partial_floats +
                           (b.first + n) / slice * Partial::floats(width)});
      }
    }
  }

  /// G from the sums of the slices of `count` batch elements.
  void finish(const Workspace& w, const State& s, int64_t element, int64_t count) const {
    float normalisers[SHORT_SEQUENCE];
    for (int64_t i = 0; i < count; i++)
      normalisers[i] =
          combine(layer_, s.partials + i * form_.partial_floats, slices_of(N_), form_.pooled_width);
    form_.global_query(w, s, element, count, normalisers);
    if (!call_.saved.statistics) return;
    const int64_t E = layer_.width;
    for (int64_t i = 0; i < count; i++) {
      const float* G = s.G + i * padded(E);
      std::copy(G, G + E, call_.saved.global_query + (element + i) * E);
      Statistics(call_.saved, call_.batch, N_).normalisers[element + i] = normalisers[i];
      float* weights = s.scores + i * N_;
      unnormalised_weights(layer_, weights, N_, mask_of(call_, element + i),
                           Partial{s.partials + i * form_.partial_floats}.highest(), weights);
      for (int64_t n = 0; n < N_; n++) weights[n] *= normalisers[i];
    }
  }

  const PackedWeights& layer_;
  const Call& call_;
  const int64_t N_;
  const Tokens x_;
  const Schedule schedule_;
  const F form_;
  float *workspaces_, *states_;
  int64_t workspace_floats_, workspace_stride_, state_floats_;
};

PlainMatrices packed_matrices(const PackedWeights& layer) {
  const int64_t C = layer.in_dims, E = layer.width, D = layer.token_dim;
  return {Matrix::packed(layer.query, C, E), Matrix::packed(layer.key, C, E),
          Matrix::packed(layer.proj, E, E), Matrix::packed(layer.final, E, D)};
}

template <class F>
class PassesOf final : public Passes {
 public:
  PassesOf(const PackedWeights& layer, const Call& call)
      : matrices_(packed_matrices(layer)),
        forward_(layer, matrices_, call, false),
        team_{0, 0, usable_threads(call.threads)} {}

  int64_t workspace_floats() const override { return forward_.workspace_floats(); }
  int64_t state_floats() const override { return forward_.state_floats(); }
  void use(float* workspaces, int64_t stride, float* state) override {
    forward_.use(workspaces, stride, state);
  }
  int64_t blocks() const override { return forward_.blocks().blocks; }
  int64_t parts() const override { return F::FOLDS ? team_.threads : 0; }
  int64_t first_token(int64_t i) const override {
    return std::min(forward_.blocks().tokens, i * forward_.blocks().rows);
  }
  void score(int64_t i, int thread) const override { forward_.first_pass(block(i, thread)); }
  void finish(int thread) const override { forward_.finish_all(thread); }
  void fold(int64_t part, int thread) const override { forward_.fold(team_, part, thread); }
  void output(int64_t i, int thread) const override { forward_.second_pass(block(i, thread)); }
  Status status() const override { return forward_.status(); }

 private:
  TokenBlock block(int64_t i, int thread) const {
    const int64_t first = first_token(i);
    return {0, 1, first, first_token(i + 1) - first, i, thread, 0};
  }

  const PlainMatrices matrices_;
  Forward<F> forward_;
  const Team team_;
};

}  // namespace

std::unique_ptr<Passes> passes_of(const PackedWeights& layer, const Call& call) {
  switch (call.form) {
    case PLAIN:
      return std::make_unique<PassesOf<Plain>>(layer, call);
    case TRIANGULAR:
      return std::make_unique<PassesOf<Triangular>>(layer, call);
    default:
      return std::make_unique<PassesOf<Folded>>(layer, call);
  }
}

/// The forward in inference, with packed weights.
EXPORT int swiftkernels_additive_forward(const PackedWeights* layer, const Call* call) {
  if (!layer->fingerprint.matches(call->batch * call->tokens, usable_threads(call->threads)))
    return STALE;
  const PlainMatrices matrices = packed_matrices(*layer);
  switch (call->form) {
    case PLAIN:
      return Forward<Plain>(*layer, matrices, *call).run();
    case TRIANGULAR:
      return Forward<Triangular>(*layer, matrices, *call).run();
    default:
      return Forward<Folded>(*layer, matrices, *call).run();
  }
}

/// The forward in training, in the plain form, with weights that are not packed.
EXPORT int swiftkernels_additive_forward_training(const RawWeights* raw, const Call* call) {
  TrainWeights weights(*raw, usable_threads(call->threads));
  PlainMatrices& plain = weights.plain;
  for (Matrix* matrix : {&plain.query, &plain.key, &plain.proj, &plain.final}) weights.use(*matrix);
  if (!weights.prepare(call->batch * call->tokens)) return OUT_OF_MEMORY;
  PackedWeights layer{};
  layer.in_dims = raw->in_dims, layer.width = raw->width, layer.token_dim = raw->token_dim;
  layer.pooling = raw->pooling, layer.qk_norm = raw->qk_norm;
  layer.scale = raw->scale, layer.eps = raw->eps;
  layer.query_bias = weights.query_bias, layer.key_bias = weights.key_bias;
  layer.w_g = weights.w_g;
  layer.proj_bias = weights.proj_bias, layer.final_bias = weights.final_bias;
  return Forward<Plain>(layer, plain, *call).run();
}

}  // namespace swiftkernels::additive
