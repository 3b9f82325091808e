// The backward. q and k of the forward were saved, or are computed again. The gradients of the
// scores need that of G, which is a sum over all tokens. So there are two passes, as in the
// forward.
//
// dy = dout Wf and dt = dy Wp are the gradients of y = t Wp^T + bp + qn and of t = G * kn. Then
//
//     dG  = sum_n dt_n * kn_n
//     dkn = dt * G                       dk = rk (dkn - kn (kn . dkn))
//     dqn = dy + a dG + ds scale w_g     dq = rq (dqn - qn (qn . dqn))      ds from qn . dG, below
//     dx  = dq Wq + dk Wk                dWq = dq^T x, dWk = dk^T x
//     U   = dout^T t, V = dout^T qn      of which dWp = Wf^T U and dWf = U Wp^T + V + dbf bp^T
//
// The moments U and V cost two products of E x E matrices at the end. For few tokens, the kernel
// sums dWp = dy^T t and dWf = dout^T y instead ("direct"), which costs one more product per token.
#include <array>
#include <numeric>
#include <vector>

#include "folded_backward.h"
#include "pooling.h"

namespace swiftkernels::additive {
namespace {

/// Floats in the tiles of a block (0.8 MB), and of a group of short batch elements (4 MB). They are
/// larger than in the forward, because every block is added to the sums of the weight gradients.
constexpr int64_t BLOCK_FLOATS = 200000, GROUP_FLOATS = 1000000;

/// Most blocks that are added one after another. Longer sums are sums of such chains: a single
/// chain would lose more digits than PyTorch does.
constexpr int64_t MAX_BLOCK_CHAIN = 24;

/// The sums of the first pass (KEYS), or of the second (QUERIES).
enum Pass { KEYS = 0, QUERIES = 1 };

/// Sums over tokens, in rows of full vectors.
struct Sums {
  Tile dWq, dWk;  // [E, C]
  Tile U, V;      // [D, E]; direct: dWp [E, E] and dWf [D, E]
  Tile dWp;       // [E, E] from U, in the end
  float *dbq, *dbk, *dw_g, *dbf, *dbp;
  int* blocks;  // added so far, by pass; matrices are undefined before the first block

  /// Matrices are in the memory of `gradients` where their rows need no padding.
  static Sums lay_out(const RawWeights& layer, bool direct, const Gradients& gradients,
                      Arena& arena) {
    const int64_t C = layer.in_dims, E = layer.width, D = layer.token_dim;
    auto matrix = [&](int64_t rows, int64_t width, float* gradient) {
      return gradient && padded(width) == width ? Tile{gradient, width} : arena.matrix(rows, width);
    };
    Sums s{};
    s.dWq = matrix(E, C, gradients.dwq);
    s.dWk = matrix(E, C, gradients.dwk);
    s.U = direct ? matrix(E, E, gradients.dwp) : matrix(D, E, nullptr);
    s.V = matrix(D, E, gradients.dwf);
    s.dWp = direct ? s.U : matrix(E, E, gradients.dwp);
    for (float** v : {&s.dbq, &s.dbk, &s.dw_g, &s.dbp}) *v = arena.take(padded(E));
    s.dbf = arena.take(padded(D));
    return s;
  }
};

/// What a thread needs for a block of tokens.
struct Workspace {
  Tile x, dout;
  Tile q, k;    // unit rows; k becomes t
  Tile dy, dt;  // become dq and dk
  Tile y, dx;
  float* factors;  // one float for each row
  float* G;
  float* vectors;  // two
  float* panel;    // of a matrix that is not packed
  float* columns;  // of a large tile
};

/// What some batch elements need in both passes.
struct State {
  float* dG;        // [elements, padded(E)]
  float* partials;  // of dG, one for each slice of a batch element
  float* residues;  // one for each block of a batch element
};

class Backward {
 public:
  Backward(const RawWeights& layer, const TrainWeights& weights, const BackwardCall& call)
      : layer_(layer),
        weights_(weights),
        call_(call),
        C_(layer.in_dims),
        E_(layer.width),
        D_(layer.token_dim),
        N_(call.tokens),
        slice_(slice_rows(N_)),
        schedule_(schedule()),
        x_(tokens_of(call.x, call.x_strides, call.type)),
        dout_(tokens_of(call.dout, call.dout_strides, call.type)),
        dx_(tokens_of(call.dx, call.dx_strides, call.type)),
        unit_q_(unit_rows(call.saved, 0, call.batch, N_, E_, call.type)),
        unit_k_(unit_rows(call.saved, 1, call.batch, N_, E_, call.type)),
        saved_(call.saved, call.batch, N_),
        limit_(inverse_eps(layer)) {}

  Status run() {
    const int threads = schedule_.threads, states = schedule_.states();
    // A thread with many blocks sums them in two levels: a chain, and the sum of its chains.
    const int64_t blocks = schedule_.blocks * (schedule_.is_grouped() ? 1 : call_.batch);
    const int levels = blocks > MAX_BLOCK_CHAIN * threads ? 2 : 1;
    const int sums = call_.needs_weights ? levels * threads : 0;
    std::vector<std::array<int, 2>> counts(sums);
    workspaces_.resize(threads), states_.resize(states), sums_.resize(sums);
    auto lay_out = [&](Arena& arena) {
      for (Workspace& w : workspaces_) w = make_workspace(arena);
      for (State& s : states_) s = make_state(arena);
      for (int i = 0; i < sums; i++) {
        // The last level of the first thread ends as the gradients.
        const bool last = i == (levels - 1) * threads;
        sums_[i] = Sums::lay_out(layer_, call_.direct, last ? call_.gradients : Gradients{}, arena);
        sums_[i].blocks = counts[i].data();
      }
    };
    Arena size;
    lay_out(size);
    const Scratch scratch(size.used());
    if (!scratch) return OUT_OF_MEMORY;
    Arena arena(scratch.data());
    lay_out(arena);
    for (const Sums& s : sums_)
      for (Pass pass : {KEYS, QUERIES}) clear_vectors(s, pass);
    totals_ = sums_.data() + (sums > threads ? threads : 0);
    schedule_.run(*this);
    if (!call_.needs_weights) return DONE;
    for (int i = 0; i < threads; i++)
      for (Pass pass : {KEYS, QUERIES}) flush(i, pass);
    add_up();
    parallel_for(threads, threads, [&](int64_t i, int thread) {
      finish(totals_[0], workspaces_[thread], D_ * i / threads, D_ * (i + 1) / threads,
             E_ * i / threads, E_ * (i + 1) / threads);
    });
    copy_out(totals_[0]);
    return DONE;
  }

  void begin(const Team&) const {}

  void first_pass(const TokenBlock& b) const {
    const Workspace& w = workspaces_[b.thread];
    load_tokens(w, b);
    unit_keys(w, b);
    if (N_ > SHORT_SEQUENCE) {
      gemm(w.dout, b.rows, weights_.product_rows, nullptr, w.dt, w.panel);
    } else {  // as in a group, so that results do not depend on how threads share the tokens
      gemm(w.dout, b.rows, weights_.final_rows, nullptr, w.y, w.panel);
      gemm(w.y, b.rows, weights_.proj_rows, nullptr, w.dt, w.panel);
    }
    for (int64_t n = 0; n < b.rows; n += slice_)
      key_rows(w, n, std::min(slice_, b.rows - n), b.element, b.first + n,
               states_[b.state].partials + (b.first + n) / slice_ * padded(E_));
    sum_key_gradients(w, b);
    if (!call_.needs_tokens) return;
    gemm(w.dt, b.rows, weights_.key_rows, nullptr, w.dx, w.panel);
    store_tile(w.dx, b.rows, C_, dx_, b.element, b.first);
  }

  /// dG, the sum of all slices.
  void between(const Team& team) const {
    const State& s = states_[team.thread];
    std::fill(s.dG, s.dG + padded(E_), 0.f);
    for (int64_t i = 0; i < slices_of(N_); i++) add(s.partials + i * padded(E_), E_, s.dG);
  }

  void second_pass(const TokenBlock& b) const {
    const Workspace& w = workspaces_[b.thread];
    const State& s = states_[b.state];
    load_tokens(w, b);
    unit_queries(w, b);
    gemm(w.dout, b.rows, weights_.final_rows, nullptr, w.dy, w.panel);
    s.residues[b.index] = query_rows(w, 0, b.rows, b.element, b.first, s.dG);
    sum_query_gradients(w, b);
    if (!call_.needs_tokens) return;
    load_tile(dx_, b.element, b.first, b.rows, C_, w.dx);
    gemm(w.dy, b.rows, weights_.query_rows, nullptr, w.dx, w.panel, w.dx);
    store_tile(w.dx, b.rows, C_, dx_, b.element, b.first);
  }

  void end(const Team& team) const {
    if (!call_.needs_weights) return;
    const float* residues = states_[team.thread].residues;
    remove_residues(workspaces_[team.thread], totals_[team.thread], team.element,
                    std::accumulate(residues, residues + schedule_.blocks, 0.f));
  }

  void both_passes(const TokenBlock& b) const {
    const Workspace& w = workspaces_[b.thread];
    float* const dG = states_[b.state].dG;
    const int64_t rows = b.all_rows();
    load_tokens(w, b);
    unit_queries(w, b);
    unit_keys(w, b);
    gemm(w.dout, rows, weights_.final_rows, nullptr, w.dy, w.panel);
    gemm(w.dy, rows, weights_.proj_rows, nullptr, w.dt, w.panel);
    std::fill(dG, dG + b.count * padded(E_), 0.f);
    for (int64_t i = 0; i < b.count; i++)
      for (int64_t n = 0; n < N_; n += slice_) {
        key_rows(w, i * N_ + n, std::min(slice_, N_ - n), b.element + i, n, w.vectors);
        add(w.vectors, E_, dG + i * padded(E_));
      }
    if (call_.direct && call_.needs_weights)
      gemm(w.k, rows, weights_.plain.proj, weights_.proj_bias, w.y, w.panel, w.q);
    sum_key_gradients(w, b);
    if (call_.needs_tokens) gemm(w.dt, rows, weights_.key_rows, nullptr, w.dx, w.panel);
    for (int64_t i = 0; i < b.count; i++) {
      const float residues = query_rows(w, i * N_, N_, b.element + i, 0, dG + i * padded(E_));
      if (call_.needs_weights) remove_residues(w, sums_[b.thread], b.element + i, residues);
    }
    sum_query_gradients(w, b);
    if (!call_.needs_tokens) return;
    gemm(w.dy, rows, weights_.query_rows, nullptr, w.dx, w.panel, w.dx);
    for (int64_t i = 0; i < b.count; i++)
      store_tile(w.dx.from(i * N_), N_, C_, dx_, b.element + i, 0);
  }

 private:
  Schedule schedule() const {
    const int threads = usable_threads(call_.threads);
    const int64_t floats_per_row = 2 * (C_ + D_ + 2 * E_);
    if (call_.grouped)
      return Schedule::grouped(call_.batch, N_, GROUP_FLOATS / floats_per_row, threads);
    return Schedule::tiled(call_.batch, N_, block_rows(BLOCK_FLOATS, floats_per_row), threads);
  }

  Workspace make_workspace(Arena& arena) const {
    Workspace w{};
    const int64_t rows = schedule_.rows;
    w.x = arena.tile(rows, C_);
    w.dout = arena.tile(rows, D_);
    w.k = arena.tile(rows, E_);
    w.dt = arena.tile(rows, E_);
    w.dx = arena.tile(rows, C_);
    // Without groups, a pass needs the rows of either queries or keys.
    w.q = schedule_.is_grouped() ? arena.tile(rows, E_) : w.k;
    w.dy = schedule_.is_grouped() ? arena.tile(rows, E_) : w.dt;
    if (call_.direct || (!schedule_.is_grouped() && N_ <= SHORT_SEQUENCE))
      w.y = arena.tile(rows, E_);
    w.factors = arena.take(rows);
    w.G = arena.take(padded(E_));
    w.vectors = arena.take(2 * padded(std::max(E_, D_)));
    const Tile widest = arena.tile(0, std::max(E_, D_));
    if (rows * widest.stride > LARGE_TILE) w.columns = arena.take(rows * widest.stride);
    w.panel = arena.take(Matrix::panel_scratch(std::max({C_, D_, E_})));
    return w;
  }

  State make_state(Arena& arena) const {
    State s{};
    s.dG = arena.take(schedule_.elements * padded(E_));
    if (schedule_.is_grouped()) return s;
    s.partials = arena.take(slices_of(N_) * padded(E_));
    s.residues = arena.take(schedule_.blocks);
    return s;
  }

  /// Call `matrix` and `vector` with the sums of a pass.
  template <class Matrix, class Vector>
  void for_each(Pass pass, Matrix matrix, Vector vector) const {
    if (pass == KEYS) {
      matrix(&Sums::dWk, E_, C_);
      matrix(&Sums::U, call_.direct ? E_ : D_, E_);
      vector(&Sums::dbk, E_);
      vector(&Sums::dbf, D_);
    } else {
      matrix(&Sums::dWq, E_, C_);
      matrix(&Sums::V, D_, E_);
      vector(&Sums::dbq, E_);
      vector(&Sums::dw_g, E_);
    }
  }

  void clear_vectors(const Sums& s, Pass pass) const {
    for_each(
        pass, [](Tile Sums::*, int64_t, int64_t) {},
        [&](float* Sums::* vector, int64_t width) {
          std::fill(s.*vector, s.*vector + padded(width), 0.f);
        });
  }

  /// to += from; then clear `from`.
  void move(const Sums& from, const Sums& to, Pass pass, int threads = 1) const {
    if (from.blocks[pass] == 0) return;
    const bool fresh = to.blocks[pass] == 0;
    for_each(
        pass,
        [&](Tile Sums::* matrix, int64_t rows, int64_t width) {
          parallel_for(rows, threads, [&](int64_t r, int) {
            const float* row = (from.*matrix).row(r);
            if (fresh)
              std::copy(row, row + padded(width), (to.*matrix).row(r));
            else
              add(row, width, (to.*matrix).row(r));
          });
        },
        [&](float* Sums::* vector, int64_t width) { add(from.*vector, width, to.*vector); });
    clear_vectors(from, pass);
    to.blocks[pass] += from.blocks[pass];
    from.blocks[pass] = 0;
  }

  /// Add a thread's chain of blocks to the sum of its chains, if it has two levels.
  void flush(int thread, Pass pass) const {
    if (totals_ != sums_.data()) move(sums_[thread], totals_[thread], pass);
  }

  /// Add the sums of all threads to those of the first, in order.
  void add_up() const {
    for (Pass pass : {KEYS, QUERIES}) {
      for (int i = 1; i < schedule_.threads; i++)
        move(totals_[i], totals_[0], pass, schedule_.threads);
      if (totals_[0].blocks[pass] > 0) continue;
      for_each(
          pass,
          [&](Tile Sums::* matrix, int64_t rows, int64_t) {
            std::fill((totals_[0].*matrix).data, (totals_[0].*matrix).row(rows), 0.f);
          },
          [](float* Sums::*, int64_t) {});
    }
  }

  /// Moments to gradients: rows [f, f_end) of dWf, and rows [p, p_end) of dWp and dbp.
  void finish(const Sums& s, const Workspace& w, int64_t f, int64_t f_end, int64_t p,
              int64_t p_end) const {
    const Tile wf{const_cast<float*>(layer_.wf), E_};
    if (!call_.direct) {
      const Tile dWf = s.V.from(f);
      gemm(s.U.from(f), f_end - f, Matrix::transposed(layer_.wp, E_, E_), nullptr, dWf, w.panel,
           dWf);
      for (int64_t d = f; d < f_end && layer_.bp; d++)
        for (int64_t j = 0; j < E_; j++) s.V.row(d)[j] += s.dbf[d] * layer_.bp[j];
      // A few rows at a time need no scratch.
      const int64_t step = std::max<int64_t>(1, LARGE_TILE / padded(E_));
      for (int64_t d = 0; d < D_; d += step)
        gram({wf.row(d) + p, E_}, p_end - p, s.U.from(d), E_, std::min(step, D_ - d), s.dWp.from(p),
             d > 0, nullptr);
    }
    std::fill(s.dbp + p, s.dbp + p_end, 0.f);
    add_weight_rows(s.dbf, wf.data + p, E_, D_, p_end - p, w.vectors, s.dbp + p);
  }

  void copy_out(const Sums& s) const {
    const Gradients& g = call_.gradients;
    copy_rows(s.dWq, E_, C_, g.dwq);
    copy_rows(s.dWk, E_, C_, g.dwk);
    copy_rows(s.dWp, E_, E_, g.dwp);
    copy_rows(s.V, D_, E_, g.dwf);
    copy_rows({s.dbq, 0}, 1, E_, g.dbq);
    copy_rows({s.dbk, 0}, 1, E_, g.dbk);
    copy_rows({s.dw_g, 0}, 1, E_, g.dw_g);
    copy_rows({s.dbp, 0}, 1, E_, g.dbp);
    copy_rows({s.dbf, 0}, 1, D_, g.dbf);
  }

  void load_tokens(const Workspace& w, const TokenBlock& b) const {
    for (int64_t i = 0; i < b.count; i++) {
      load_tile(x_, b.element + i, b.first, b.rows, C_, w.x.from(i * b.rows));
      load_tile(dout_, b.element + i, b.first, b.rows, D_, w.dout.from(i * b.rows));
    }
  }

  void unit_queries(const Workspace& w, const TokenBlock& b) const {
    unit_rows_again(w, b, unit_q_, weights_.plain.query, weights_.query_bias, saved_.query_norms,
                    w.q);
  }
  void unit_keys(const Workspace& w, const TokenBlock& b) const {
    unit_rows_again(w, b, unit_k_, weights_.plain.key, weights_.key_bias, saved_.key_norms, w.k);
  }

  /// The normalised rows of q or k: saved by the forward, or computed again from x.
  void unit_rows_again(const Workspace& w, const TokenBlock& b, const Tokens& saved,
                       const Matrix& matrix, const float* bias, const float* norms,
                       Tile unit) const {
    if (saved.data) {
      for (int64_t i = 0; i < b.count; i++)
        load_tile(saved, b.element + i, b.first, b.rows, E_, unit.from(i * b.rows));
      return;
    }
    gemm(w.x, b.all_rows(), matrix, bias, unit, w.panel);
    if (layer_.qk_norm) scale_rows(unit, b.all_rows(), E_, norms + b.element * N_ + b.first);
  }

  /// Overwrite the rows kn and dt of a slice with t and dk; dG = the share of the slice in dG.
  ONE_COPY void key_rows(const Workspace& w, int64_t row, int64_t rows, int64_t element,
                         int64_t first, float* dG) const {
    load_G(element, w.G);
    std::fill(dG, dG + padded(E_), 0.f);
    for (int64_t r = row; r < row + rows; r++) {
      float* k = w.k.row(r);
      float* dt = w.dt.row(r);
      vec k_dk{};
      for (int64_t j = 0; j < padded(E_); j += LANES) {
        const vec product = load(dt + j) * load(k + j);
        store(dG + j, load(dG + j) + product);
        k_dk += product * load(w.G + j);
      }
      const float norm = saved_.key_norms[element * N_ + first + r - row];
      const vec projection = broadcast(has_projection(norm) ? sum(k_dk) : 0.f);
      const vec factor = broadcast(norm);
      for (int64_t j = 0; j < padded(E_); j += LANES) {
        const vec G = load(w.G + j), unit = load(k + j);
        store(dt + j, factor * (load(dt + j) * G - projection * unit));
        store(k + j, unit * G);
      }
    }
  }

  /// Overwrite the rows dy with dq, and store the gradients of their scores in `factors`. Returns
  /// the sum of the residues.
  ONE_COPY float query_rows(const Workspace& w, int64_t row, int64_t rows, int64_t element,
                            int64_t first, const float* dG) const {
    load_G(element, w.G);
    vec G_dG_lanes{};
    for (int64_t j = 0; j < padded(E_); j += LANES) G_dG_lanes += load(w.G + j) * load(dG + j);
    const float G_dG = sum(G_dG_lanes), normaliser = saved_.normalisers[element];
    const Mask mask = mask_of(call_, element);
    float residues = 0.f;
    for (int64_t r = row; r < row + rows; r++) {
      const int64_t n = first + r - row;
      const float* q = w.q.row(r);
      float* dy = w.dy.row(r);
      vec dG_sum{}, dy_sum{}, w_g_sum{};
      for (int64_t j = 0; j < padded(E_); j += LANES) {
        const vec unit = load(q + j);
        dG_sum += unit * load(dG + j);
        dy_sum += unit * load(dy + j);
        w_g_sum += unit * load(weights_.w_g + j);
      }
      const float weight = saved_.token_weights[element * N_ + n], d_weight = sum(dG_sum);
      const float d_score =
          score_gradient(layer_, mask.keeps(n), weight, d_weight, G_dG, normaliser);
      w.factors[r] = d_score;
      residues += residue(layer_, weight, d_score, normaliser);
      const float norm = saved_.query_norms[element * N_ + n];
      const float q_dq = sum(dy_sum) + weight * d_weight + d_score * sum(w_g_sum);
      const vec projection = broadcast(has_projection(norm) ? q_dq : 0.f);
      const vec factor = broadcast(norm), by_dG = broadcast(weight), by_w_g = broadcast(d_score);
      for (int64_t j = 0; j < padded(E_); j += LANES) {
        const vec d_unit = load(dy + j) + by_dG * load(dG + j) + by_w_g * load(weights_.w_g + j);
        store(dy + j, factor * (d_unit - projection * load(q + j)));
      }
    }
    return residues;
  }

  /// Subtract the share of the residues of a batch element from dw_g.
  void remove_residues(const Workspace& w, const Sums& s, int64_t element, float residues) const {
    load_G(element, w.G);
    add_scaled(w.G, -residues, E_, s.dw_g);
  }

  /// Whether the gradient of a row has a projection: if the row was divided by its norm, not by
  /// eps.
  bool has_projection(float inverse_norm) const { return layer_.qk_norm && inverse_norm < limit_; }

  void load_G(int64_t element, float* G) const {
    std::fill(G, G + padded(E_), 0.f);
    std::memcpy(G, call_.saved.global_query + element * E_, E_ * sizeof(float));
  }

  void sum_key_gradients(const Workspace& w, const TokenBlock& b) const {
    if (!call_.needs_weights) return;
    const Sums& s = sums_[b.thread];
    const int64_t rows = b.all_rows();
    const bool more = s.blocks[KEYS] > 0;
    std::fill(w.factors, w.factors + rows, 1.f);
    add_rows(w.factors, w.dt, rows, E_, w.vectors, s.dbk);
    add_rows(w.factors, w.dout, rows, D_, w.vectors, s.dbf);
    gram(w.dt, E_, w.x, C_, rows, s.dWk, more, w.columns);
    gram(call_.direct ? w.dy : w.dout, call_.direct ? E_ : D_, w.k, E_, rows, s.U, more, w.columns);
    if (++s.blocks[KEYS] >= MAX_BLOCK_CHAIN) flush(b.thread, KEYS);
  }

  /// `factors` are the gradients of the scores.
  void sum_query_gradients(const Workspace& w, const TokenBlock& b) const {
    if (!call_.needs_weights) return;
    const Sums& s = sums_[b.thread];
    const int64_t rows = b.all_rows();
    const bool more = s.blocks[QUERIES] > 0;
    add_rows(w.factors, w.q, rows, E_, w.vectors, s.dw_g);
    std::fill(w.factors, w.factors + rows, 1.f);
    add_rows(w.factors, w.dy, rows, E_, w.vectors, s.dbq);
    gram(w.dy, E_, w.x, C_, rows, s.dWq, more, w.columns);
    gram(w.dout, D_, call_.direct ? w.y : w.q, E_, rows, s.V, more, w.columns);
    if (++s.blocks[QUERIES] >= MAX_BLOCK_CHAIN) flush(b.thread, QUERIES);
  }

  const RawWeights& layer_;
  const TrainWeights& weights_;
  const BackwardCall& call_;
  const int64_t C_, E_, D_, N_, slice_;
  const Schedule schedule_;
  const Tokens x_, dout_, dx_, unit_q_, unit_k_;
  const Statistics saved_;
  const float limit_;
  std::vector<Workspace> workspaces_;
  std::vector<State> states_;
  std::vector<Sums> sums_;  // of the threads: the chains, then the sums of chains, if two levels
  const Sums* totals_;      // the last level
};

}  // namespace

EXPORT int swiftkernels_additive_backward(const RawWeights* layer, const BackwardCall* call) {
  if (call->folded && !biases_cancel(*layer, *call)) return folded_backward(*layer, *call);
  TrainWeights weights(*layer, usable_threads(call->threads));
  if (!call->saved.unit_rows) {
    weights.use(weights.plain.query);
    weights.use(weights.plain.key);
  }
  weights.use(weights.final_rows);
  weights.use(call->tokens <= SHORT_SEQUENCE ? weights.proj_rows : weights.product_rows);
  if (call->direct) weights.use(weights.plain.proj);
  if (call->needs_tokens) {
    weights.use(weights.query_rows);
    weights.use(weights.key_rows);
  }
  if (!weights.prepare(call->batch * call->tokens)) return OUT_OF_MEMORY;
  return Backward(*layer, weights, *call).run();
}

}  // namespace swiftkernels::additive
