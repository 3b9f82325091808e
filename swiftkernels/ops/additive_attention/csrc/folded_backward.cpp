// Queries and keys are linear in x. Apart from a few factors per token, their gradients are linear
// in x and dout too. The gradients of the weights need only sums over outer products of dout and x.
// With
//
//     M = Wf Wp    C = Wf Wq    A = Wq^T Wq    B = Wk^T Wk    F = M diag(G) Wk (by batch element)
//
// and pq = C^T dout, pk = F^T dout, the gradients of x are (without biases)
//
//     dx    = rq pq + rk pk + rq a Wq^T dG + rq ds Wq^T w_g - alpha rq^2 A x - beta rk^2 B x
//     alpha = qn . dqn = rq x . pq + a (qn . dG) + ds (qn . w_g)
//     beta  = kn . dkn = rk x . pk
//
// where qn . dG = rq x . Wq^T dG, and so on. With the sums over all tokens, Zk and xa by batch
// element and the others of the whole batch,
//
//     Zq = sum rq dout x^T    Sq = sum -alpha rq^2 x x^T    xs = sum rq ds x
//     Zk = sum rk dout x^T    Sk = sum -beta rk^2 x x^T     xa = sum rq a x
//
// the gradients of the weights are
//
//     dWq  = Wf^T Zq + sum_b dG xa^T + w_g xs^T + Wq Sq        (sum_b: over batch elements)
//     dWk  = sum_b diag(G) M^T Zk + Wk Sk
//     dG   = column sums of M * (Zk Wk^T)
//     dw_g = Wq xs
//     dWf  = U Wp^T + V, dWp = Wf^T U    with U = sum_b Zk Wk^T diag(G), V = Zq Wq^T
//
// Where the biases cancel most of Wq x or Wk x, sums of x lose the remaining digits of q or k.
// There x is replaced by x - x0, where x0 is the mean of some tokens,
//
//     q = Wq (x - x0) + (Wq x0 + bq)
//
// so that the new bias, in parentheses, is as small as q. All formulas above hold for x - x0 and
// the new bias, except that dWq lacks dbq x0^T, which is added at the end. The same holds for the
// keys.
//
// This takes 7 products of N E^2 (a symmetric one counts half), where the other backward takes 8,
// or 10 if it computes q and k again, and 3 E^3 more for each batch element.
#include "folded_backward.h"

#include <vector>

#include "pooling.h"

namespace swiftkernels::additive {
namespace {

/// Floats in the tiles (0.8 MB).
constexpr int64_t TILE_FLOATS = 200000;

/// Fewest tokens in a block. Every block has its own sums, which are added in order. So results
/// depend on the blocks, but not on how threads share them.
constexpr int64_t MIN_BLOCK = 512;

/// c [a_columns, b_columns] = a^T b, or c += a^T b (`more`), for many rows. A chain sums at most
/// MAX_CHAIN rows, and only rows that are close together in memory.
void gram_of_weights(Tile a, int64_t a_columns, Tile b, int64_t b_columns, int64_t rows, Tile c,
                     bool more = false) {
  const int64_t step = std::max<int64_t>(1, std::min(MAX_CHAIN, LARGE_TILE / a.stride));
  for (int64_t r = 0; r < rows; r += step, more = true)
    gram(a.from(r), a_columns, b.from(r), b_columns, std::min(step, rows - r), c, more, nullptr);
}

/// The factors of x in xq, xk, xs and xa, and the residue: floats that are summed over tokens.
enum Number { XQ = 0, XK = 1, XS = 2, XA = 3, RESIDUE = 4, NUMBERS = 5 };

/// Sums over tokens, in rows of full vectors.
struct Sums {
  Tile Zq, Zk;               // [D, C]
  Tile Sq, Sk;               // [C, C], upper triangles
  float *zq, *zk, *dbf;      // sums of rq dout, rk dout, dout
  float *xq, *xk, *xs, *xa;  // sums of x times the factors of a token
  float* numbers;            // sums of these factors, and of the residues

  static Sums lay_out(int64_t C, int64_t D, Arena& arena) {
    Sums s{};
    for (Tile* t : {&s.Zq, &s.Zk}) *t = arena.matrix(D, C);
    for (Tile* t : {&s.Sq, &s.Sk}) *t = arena.matrix(C, C);
    for (float** v : {&s.zq, &s.zk, &s.dbf}) *v = arena.take(padded(D));
    for (float** v : {&s.xq, &s.xk, &s.xs, &s.xa}) *v = arena.take(padded(C));
    s.numbers = arena.take(NUMBERS);
    return s;
  }
};

/// Sums over batch elements.
struct Totals {
  Sums tokens;
  Tile U;            // [D, E]
  Tile dWq, dWk;     // [E, C]
  float *dbq, *dbk;  // [E]
};

/// What a batch element needs in both passes.
struct State {
  Sums tokens;     // Zk, zk, xa and numbers
  float *G, *dG;   // [E]
  float* panels;   // of F [D, C]
  float* bias;     // F's: M (G * bk) [D]
  float* dG_rows;  // Wq^T dG [C]
  float dG_bias;   // bq . dG
  float G_dG;      // G . dG
};

/// What a thread needs for a tile of tokens, and for the matrices of a batch element.
struct Workspace {
  Tile x, dout;
  Tile scaled;  // dout or x times a factor
  Tile pq, pk;
  float* factors[4];  // of x in xq, xk, xs, xa
  // For each row, x . pq + dout . (Wf bq), x . pk + dout . (F's bias), x . Wq^T dG, x . Wq^T w_g.
  float *x_pq, *x_pk, *x_dG, *x_w_g;
  float* vectors;  // two
  float* panel;    // of a matrix that is not packed
  float* columns;  // of a large tile
};

float norm2_of(const float* bias, int64_t width) {
  float total = 0.f;
  for (int64_t j = 0; j < width && bias; j++) total += bias[j] * bias[j];
  return total;
}

/// x0, and the biases for x - x0.
class Origin {
 public:
  const float* token = nullptr;  // null if x0 = 0, because the biases cancel nothing
  float *query_bias, *key_bias;  // Wq x0 + bq, Wk x0 + bk

  Origin(const RawWeights& layer, const BackwardCall& call)
      : memory_(4 * round_up(padded(std::max(layer.in_dims, layer.width)), 16)) {
    if (!memory_) return;
    const int64_t C = layer.in_dims, E = layer.width;
    Arena arena(memory_.data());
    float* mean = arena.take(padded(C));
    query_bias = arena.take(padded(E)), key_bias = arena.take(padded(E));
    mean_of_some(call, 0, call.batch, SAMPLE, C, arena.take(padded(C)), mean);
    project(layer.wq, layer.bq, mean, C, E, query_bias);
    project(layer.wk, layer.bk, mean, C, E, key_bias);
    if (cancels(layer.bq, query_bias, E) || cancels(layer.bk, key_bias, E)) {
      token = mean;
    } else {
      project(layer.wq, layer.bq, nullptr, C, E, query_bias);
      project(layer.wk, layer.bk, nullptr, C, E, key_bias);
    }
  }
  explicit operator bool() const { return static_cast<bool>(memory_); }

 private:
  /// Tokens in the mean x0. It differs from the mean of all by an eighth of their spread.
  static constexpr int64_t SAMPLE = 64;

  /// to [E] = weight [E, C] token + bias, each 0 if null; in double, as most of it may cancel.
  static void project(const float* weight, const float* bias, const float* token, int64_t C,
                      int64_t E, float* to) {
    std::fill(to, to + padded(E), 0.f);
    for (int64_t j = 0; j < E; j++) {
      double sum = bias ? bias[j] : 0.;
      for (int64_t c = 0; c < C && token; c++)
        sum += static_cast<double>(weight[j * C + c]) * token[c];
      to[j] = static_cast<float>(sum);
    }
  }

  static bool cancels(const float* bias, const float* rest, int64_t E) {
    return norm2_of(bias, E) > 4 * norm2(rest, E);
  }

  const Scratch memory_;
};

/// The first pass computes dG, the second needs it.
class FoldedBackward {
 public:
  FoldedBackward(const RawWeights& layer, const TrainWeights& weights, const BackwardCall& call,
                 const Origin& origin)
      : layer_(layer),
        weights_(weights),
        call_(call),
        origin_(origin),
        C_(layer.in_dims),
        E_(layer.width),
        D_(layer.token_dim),
        N_(call.tokens),
        schedule_(Schedule::evenly(
            call.batch, N_, std::max<int64_t>(1, N_ / std::max(MIN_BLOCK, 2 * std::max(C_, D_))),
            usable_threads(call.threads))),
        tile_rows_(block_rows(TILE_FLOATS, 5 * C_ + 2 * D_)),
        x_(tokens_of(call.x, call.x_strides, call.type)),
        dout_(tokens_of(call.dout, call.dout_strides, call.type)),
        dx_(tokens_of(call.dx, call.dx_strides, call.type)),
        saved_(call.saved, call.batch, N_),
        M_{const_cast<float*>(weights.product_rows.raw), weights.product_rows.k_stride} {}

  Status run() {
    Arena size;
    lay_out(size);
    const Scratch scratch(size.used());
    if (!scratch) return OUT_OF_MEMORY;
    Arena arena(scratch.data());
    lay_out(arena);
    prepare();
    for (const Totals& total : totals_) clear(total);
    schedule_.run(*this);
    if (!call_.needs_weights) return DONE;
    for (size_t i = 1; i < totals_.size(); i++) add_totals(totals_[i], totals_[0]);
    finish(workspaces_[0], totals_[0]);
    return DONE;
  }

  void begin(const Team& team) const {
    const State& state = states_[team.thread];
    const float* G = call_.saved.global_query + team.element * E_;
    std::fill(state.G, state.G + padded(E_), 0.f);
    std::copy(G, G + E_, state.G);
    std::fill(state.tokens.Zk.data, state.tokens.Zk.row(D_), 0.f);
    std::fill(state.tokens.zk, state.tokens.zk + padded(D_), 0.f);
    std::fill(state.tokens.xa, state.tokens.xa + padded(C_), 0.f);
    std::fill(state.tokens.numbers, state.tokens.numbers + NUMBERS, 0.f);
  }

  void first_pass(const TokenBlock& b) const {
    first_sums(workspaces_[b.thread], sums_of(b), b);
    if (!is_shared()) add_first(sums_of(b), states_[b.state], totals_[b.state]);
  }

  void between(const Team& team) {
    State& state = states_[team.thread];
    const Totals& total = totals_[team.thread];
    if (is_shared())
      for (const Sums& s : sums_) add_first(s, state, total);
    make_element_matrices(workspaces_[team.thread], state, total);
  }

  void second_pass(const TokenBlock& b) const {
    second_sums(workspaces_[b.thread], sums_of(b), states_[b.state], b);
    if (!is_shared()) add_second(sums_of(b), states_[b.state], totals_[b.state]);
  }

  void end(const Team& team) const {
    const State& state = states_[team.thread];
    const Totals& total = totals_[team.thread];
    if (!call_.needs_weights) return;
    if (is_shared())
      for (const Sums& s : sums_) add_second(s, state, total);
    for (int64_t j = 0; j < E_; j++) add_scaled(state.tokens.xa, state.dG[j], C_, total.dWq.row(j));
    add_scaled(state.dG, state.tokens.numbers[XA], E_, total.dbq);
    const float residue = state.tokens.numbers[RESIDUE];
    add_scaled(state.tokens.xa, -residue, C_, total.tokens.xs);
    total.tokens.numbers[XS] -= residue * state.tokens.numbers[XA];
  }

  void both_passes(const TokenBlock&) const {}  // never called: sequences are long

 private:
  /// Whether threads share a batch element. Then each of its blocks has sums, added in order.
  bool is_shared() const { return schedule_.division == Division::SHARED; }
  const Sums& sums_of(const TokenBlock& b) const { return sums_[is_shared() ? b.index : b.thread]; }

  void lay_out(Arena& arena) {
    for (Tile* t : {&wq_, &wk_}) *t = arena.matrix(E_, C_);
    square_ = arena.matrix(std::max(C_, D_), C_);
    output_panels_ = arena.take(panel_floats(D_, C_));
    for (float** v : {&query_panels_, &key_panels_}) *v = arena.take(panel_floats(C_, C_));
    for (float** v : {&query_bias_, &key_bias_, &scores_}) *v = arena.take(padded(C_));
    output_bias_ = arena.take(padded(D_));
    states_.resize(schedule_.states()), totals_.resize(schedule_.states());
    workspaces_.resize(schedule_.threads);
    sums_.resize(is_shared() ? schedule_.blocks : schedule_.threads);
    for (Sums& s : sums_) s = Sums::lay_out(C_, D_, arena);
    for (State& state : states_) {
      state.tokens.Zk = arena.matrix(D_, C_);
      state.tokens.zk = arena.take(padded(D_));
      state.tokens.xa = arena.take(padded(C_));
      state.tokens.numbers = arena.take(NUMBERS);
      for (float** v : {&state.G, &state.dG}) *v = arena.take(padded(E_));
      state.panels = arena.take(panel_floats(D_, C_));
      state.bias = arena.take(padded(D_));
      state.dG_rows = arena.take(padded(C_));
    }
    for (Totals& total : totals_) {
      total.tokens = Sums::lay_out(C_, D_, arena);
      total.U = arena.matrix(D_, E_);
      for (Tile* t : {&total.dWq, &total.dWk}) *t = arena.matrix(E_, C_);
      for (float** v : {&total.dbq, &total.dbk}) *v = arena.take(padded(E_));
    }
    for (Workspace& w : workspaces_) {
      w.x = arena.tile(tile_rows_, C_);
      w.dout = arena.tile(tile_rows_, D_);
      w.scaled = arena.tile(tile_rows_, std::max(C_, D_));
      w.pq = arena.tile(std::max({tile_rows_, D_, E_}), std::max(C_, E_));
      w.pk = arena.tile(tile_rows_, C_);
      for (float*& factors : w.factors) factors = arena.take(tile_rows_);
      for (float** v : {&w.x_pq, &w.x_pk, &w.x_dG, &w.x_w_g}) *v = arena.take(tile_rows_);
      w.vectors = arena.take(2 * padded(std::max({C_, D_, E_})));
      w.panel = arena.take(Matrix::panel_scratch(std::max({C_, D_, E_})));
      const int64_t floats = tile_rows_ * w.scaled.stride;
      w.columns = floats > LARGE_TILE ? arena.take(floats) : nullptr;
    }
  }

  /// Compute what depends on the weights only.
  void prepare() {
    copy_weight(layer_.wq, wq_);
    copy_weight(layer_.wk, wk_);
    gemm(final_rows(), D_, weights_.query_rows, nullptr, square_, workspaces_[0].panel);
    (output_ = matrix_of(square_, D_)).pack(output_panels_);
    gram_of_weights(wq_, C_, wq_, C_, E_, square_);
    (query_square_ = matrix_of(square_, C_)).pack(query_panels_);
    gram_of_weights(wk_, C_, wk_, C_, E_, square_);
    (key_square_ = matrix_of(square_, C_)).pack(key_panels_);
    times_weight(wq_, origin_.query_bias, query_bias_);
    times_weight(wk_, origin_.key_bias, key_bias_);
    times_weight(wq_, weights_.w_g, scores_);
    score_bias_ = dot(origin_.query_bias, weights_.w_g, E_);
    std::fill(output_bias_, output_bias_ + padded(D_), 0.f);
    for (int64_t d = 0; d < D_; d++)
      for (int64_t j = 0; j < E_; j++)
        output_bias_[d] += layer_.wf[d * E_ + j] * origin_.query_bias[j];
  }

  /// Scratch for a matrix [D, E] or [E, C]: the memory of a tile that is not in use meanwhile.
  Tile matrix_scratch(const Workspace& w) const { return {w.pq.data, padded(std::max(C_, E_))}; }

  Tile final_rows() const { return {const_cast<float*>(layer_.wf), E_}; }

  void copy_weight(const float* weight, Tile to) const {
    for (int64_t r = 0; r < E_; r++) {
      std::fill(to.row(r), to.row(r) + padded(C_), 0.f);
      std::copy(weight + r * C_, weight + (r + 1) * C_, to.row(r));
    }
  }

  /// A matrix [K, C] of these rows, not packed.
  Matrix matrix_of(Tile rows, int64_t K) const {
    return {K, C_, nullptr, rows.data, rows.stride, 1};
  }

  /// to [C] = weight^T vector [E]
  void times_weight(Tile weight, const float* vector, float* to) const {
    std::fill(to, to + padded(C_), 0.f);
    for (int64_t r = 0; r < E_; r++) add_scaled(weight.row(r), vector[r], C_, to);
  }

  void clear(const Totals& total) const {
    auto fill = [](Tile tile, int64_t rows) { std::fill(tile.data, tile.row(rows), 0.f); };
    const Sums& s = total.tokens;
    fill(s.Zq, D_), fill(s.Sq, C_), fill(s.Sk, C_), fill(total.U, D_);
    fill(total.dWq, E_), fill(total.dWk, E_);
    for (float* v : {s.zq, s.dbf}) std::fill(v, v + padded(D_), 0.f);
    for (float* v : {s.xq, s.xk, s.xs}) std::fill(v, v + padded(C_), 0.f);
    for (float* v : {total.dbq, total.dbk}) std::fill(v, v + padded(E_), 0.f);
    std::fill(s.numbers, s.numbers + NUMBERS, 0.f);
  }

  static void add_matrix(Tile from, int64_t rows, int64_t width, Tile to) {
    for (int64_t r = 0; r < rows; r++) add(from.row(r), width, to.row(r));
  }

  void add_totals(const Totals& from, const Totals& to) const {
    const Sums &a = from.tokens, &b = to.tokens;
    add_matrix(a.Zq, D_, C_, b.Zq), add_matrix(a.Sq, C_, C_, b.Sq), add_matrix(a.Sk, C_, C_, b.Sk);
    add_matrix(from.U, D_, E_, to.U);
    add_matrix(from.dWq, E_, C_, to.dWq), add_matrix(from.dWk, E_, C_, to.dWk);
    add(a.zq, D_, b.zq), add(a.dbf, D_, b.dbf);
    add(a.xq, C_, b.xq), add(a.xk, C_, b.xk), add(a.xs, C_, b.xs);
    add(from.dbq, E_, to.dbq), add(from.dbk, E_, to.dbk);
    for (int i = 0; i < NUMBERS; i++) b.numbers[i] += a.numbers[i];
  }

  /// Call visit(w, first, rows) for the tiles of a block, with their tokens in w.
  template <class Visit>
  void for_tiles(const Workspace& workspace, const TokenBlock& b, Visit visit) const {
    const int64_t end = b.first + b.rows;
    for (int64_t n = b.first; n < end; n += tile_rows_) {
      const int64_t rows = std::min(tile_rows_, end - n);
      visit(with_tokens(workspace, b.element, n, rows), n, rows);
    }
  }

  Workspace with_tokens(Workspace w, int64_t element, int64_t first, int64_t rows) const {
    if (origin_.token) {
      load_tile(x_, element, first, rows, C_, w.x);
      for (int64_t r = 0; r < rows; r++) add_scaled(origin_.token, -1.f, C_, w.x.row(r));
    } else {
      w.x = tile_of(x_, element, 1, first, rows, C_, w.x);
    }
    w.dout = tile_of(dout_, element, 1, first, rows, D_, w.dout);
    return w;
  }

  static void scale(Tile from, const float* factors, int64_t rows, int64_t width, Tile to) {
    for (int64_t r = 0; r < rows; r++) copy_scaled(from.row(r), factors[r], width, to.row(r));
  }

  /// Zk, zk, Zq, zq and dbf of a block.
  void first_sums(const Workspace& workspace, const Sums& s, const TokenBlock& b) const {
    for (float* v : {s.zk, s.zq, s.dbf}) std::fill(v, v + padded(D_), 0.f);
    bool more = false;
    for_tiles(workspace, b, [&](const Workspace& w, int64_t first, int64_t rows) {
      const float* key_norms = saved_.key_norms + b.element * N_ + first;
      scale(w.dout, key_norms, rows, D_, w.scaled);
      gram(w.scaled, D_, w.x, C_, rows, s.Zk, more, w.columns);
      add_rows(key_norms, w.dout, rows, D_, w.vectors, s.zk);
      if (call_.needs_weights) {
        const float* query_norms = saved_.query_norms + b.element * N_ + first;
        scale(w.dout, query_norms, rows, D_, w.scaled);
        gram(w.scaled, D_, w.x, C_, rows, s.Zq, more, w.columns);
        add_rows(query_norms, w.dout, rows, D_, w.vectors, s.zq);
        std::fill(w.factors[0], w.factors[0] + rows, 1.f);
        add_rows(w.factors[0], w.dout, rows, D_, w.vectors, s.dbf);
      }
      more = true;
    });
  }

  void add_first(const Sums& block, const State& state, const Totals& total) const {
    add_matrix(block.Zk, D_, C_, state.tokens.Zk);
    add(block.zk, D_, state.tokens.zk);
    if (!call_.needs_weights) return;
    add_matrix(block.Zq, D_, C_, total.tokens.Zq);
    add(block.zq, D_, total.tokens.zq);
    add(block.dbf, D_, total.tokens.dbf);
  }

  /// From Zk: dG, F, and the terms of the batch element in U, dWk and dbk.
  void make_element_matrices(const Workspace& w, State& state, const Totals& total) const {
    const Tile Zk = state.tokens.Zk;
    const float *zk = state.tokens.zk, *G = state.G;
    const Tile product = matrix_scratch(w);
    // dout^T kn [D, E]
    gemm(Zk, D_, weights_.plain.key, nullptr, product, w.panel);
    std::fill(state.dG, state.dG + padded(E_), 0.f);
    for (int64_t d = 0; d < D_; d++) {
      add_scaled(origin_.key_bias, zk[d], E_, product.row(d));
      for (int64_t j = 0; j < padded(E_); j += LANES) {
        const vec t = load(product.row(d) + j);
        store(state.dG + j, load(state.dG + j) + load(M_.row(d) + j) * t);
        store(total.U.row(d) + j, load(total.U.row(d) + j) + t * load(G + j));
      }
    }
    state.G_dG = dot(G, state.dG, E_);
    state.dG_bias = dot(origin_.query_bias, state.dG, E_);
    times_weight(wq_, state.dG, state.dG_rows);
    if (call_.needs_weights) {  // dkn^T x / rk [E, C]
      gram_of_weights(M_, E_, Zk, C_, D_, product);
      for (int64_t j = 0; j < E_; j++) add_scaled(product.row(j), G[j], C_, total.dWk.row(j));
      std::fill(w.vectors, w.vectors + padded(E_), 0.f);
      for (int64_t d = 0; d < D_; d++) add_scaled(M_.row(d), zk[d], E_, w.vectors);
      for (int64_t j = 0; j < E_; j++) total.dbk[j] += G[j] * w.vectors[j];
    }
    // F and its bias, from M diag(G).
    std::fill(state.bias, state.bias + padded(D_), 0.f);
    for (int64_t d = 0; d < D_; d++) {
      for (int64_t j = 0; j < padded(E_); j += LANES)
        store(product.row(d) + j, load(M_.row(d) + j) * load(G + j));
      state.bias[d] = dot(product.row(d), origin_.key_bias, E_);
    }
    gemm_to_panels(product, D_, weights_.key_rows, state.panels, D_, 0, w.panel);
  }

  /// The gradient of x, and Sq, Sk, xq, xk, xs, xa and numbers of a block.
  void second_sums(const Workspace& workspace, const Sums& s, const State& state,
                   const TokenBlock& b) const {
    float* const sums[] = {s.xq, s.xk, s.xs, s.xa};
    for (float* v : sums) std::fill(v, v + padded(C_), 0.f);
    std::fill(s.numbers, s.numbers + NUMBERS, 0.f);
    const Matrix F = Matrix::packed(state.panels, D_, C_);
    bool more = false;
    for_tiles(workspace, b, [&](const Workspace& w, int64_t first, int64_t rows) {
      gemm(w.dout, rows, output_, nullptr, w.pq, nullptr);
      gemm(w.dout, rows, F, nullptr, w.pk, nullptr);
      token_factors(w, state, b.element, first, rows, s.numbers);
      combine(w, state, b.element, first, rows);
      for (int which = 0; which < 4 && call_.needs_weights; which++)
        add_rows(w.factors[which], w.x, rows, C_, w.vectors, sums[which]);
      for (int which : {XQ, XK}) {
        scale(w.x, w.factors[which], rows, C_, w.scaled);
        if (call_.needs_weights)
          gram_upper(w.scaled, w.x, C_, rows, which == XQ ? s.Sq : s.Sk, more);
        if (call_.needs_tokens)
          gemm(w.scaled, rows, which == XQ ? query_square_ : key_square_, nullptr, w.pq, nullptr,
               w.pq);
      }
      if (call_.needs_tokens) store_tile(w.pq, rows, C_, dx_, b.element, first);
      more = true;
    });
  }

  /// The factors of x in xq, xk, xs and xa: -alpha rq^2, -beta rk^2, rq ds, rq a.
  ONE_COPY void token_factors(const Workspace& w, const State& state, int64_t element,
                              int64_t first, int64_t rows, float* numbers) const {
    auto x_and_dout_dot = [&](Tile tile, const float* bias, float* to) {  // x . p + dout . bias
      sum_each_row(rows, to, [&](int64_t r) {
        vec total{};
        for (int64_t j = 0; j < padded(C_); j += LANES)
          total += load(w.x.row(r) + j) * load(tile.row(r) + j);
        for (int64_t j = 0; j < padded(D_); j += LANES)
          total += load(w.dout.row(r) + j) * load(bias + j);
        return total;
      });
    };
    x_and_dout_dot(w.pq, output_bias_, w.x_pq);
    x_and_dout_dot(w.pk, state.bias, w.x_pk);
    auto x_dot = [&](const float* vector, float* to) {
      sum_each_row(rows, to, [&](int64_t r) {
        vec total{};
        for (int64_t j = 0; j < padded(C_); j += LANES)
          total += load(w.x.row(r) + j) * load(vector + j);
        return total;
      });
    };
    x_dot(state.dG_rows, w.x_dG);
    x_dot(scores_, w.x_w_g);
    const Mask mask = mask_of(call_, element);
    const float limit = inverse_eps(layer_), normaliser = saved_.normalisers[element];
    for (int64_t r = 0; r < rows; r++) {
      const int64_t n = first + r;
      const float rq = saved_.query_norms[element * N_ + n],
                  rk = saved_.key_norms[element * N_ + n];
      const float weight = saved_.token_weights[element * N_ + n];
      const float d_weight = rq * (w.x_dG[r] + state.dG_bias);
      const float d_score =
          score_gradient(layer_, mask.keeps(n), weight, d_weight, state.G_dG, normaliser);
      float alpha = 0.f, beta = 0.f;  // without a norm, or below eps, there is no projection
      if (layer_.qk_norm && rq < limit)
        alpha = rq * w.x_pq[r] + weight * d_weight + d_score * (rq * (w.x_w_g[r] + score_bias_));
      if (layer_.qk_norm && rk < limit) beta = rk * w.x_pk[r];
      const float factors[] = {-alpha * rq * rq, -beta * rk * rk, rq * d_score, rq * weight};
      for (int which = 0; which < 4; which++) {
        w.factors[which][r] = factors[which];
        numbers[which] += factors[which];
      }
      numbers[RESIDUE] += residue(layer_, weight, d_score, normaliser);
    }
  }

  /// pq = dx without the terms of A x and B x
  void combine(const Workspace& w, const State& state, int64_t element, int64_t first,
               int64_t rows) const {
    if (!call_.needs_tokens) return;
    for (int64_t r = 0; r < rows; r++) {
      const vec rq = broadcast(saved_.query_norms[element * N_ + first + r]);
      const vec rk = broadcast(saved_.key_norms[element * N_ + first + r]);
      const vec fq = broadcast(w.factors[XQ][r]), fk = broadcast(w.factors[XK][r]);
      const vec fs = broadcast(w.factors[XS][r]), fa = broadcast(w.factors[XA][r]);
      float *pq = w.pq.row(r), *pk = w.pk.row(r);
      for (int64_t j = 0; j < padded(C_); j += LANES)
        store(pq + j, rq * load(pq + j) + rk * load(pk + j) + fq * load(query_bias_ + j) +
                          fk * load(key_bias_ + j) + fs * load(scores_ + j) +
                          fa * load(state.dG_rows + j));
    }
  }

  void add_second(const Sums& block, const State& state, const Totals& total) const {
    if (!call_.needs_weights) return;
    add(block.xa, C_, state.tokens.xa);
    for (int which : {XA, RESIDUE}) state.tokens.numbers[which] += block.numbers[which];
    const Sums& s = total.tokens;
    add_matrix(block.Sq, C_, C_, s.Sq);
    add_matrix(block.Sk, C_, C_, s.Sk);
    add(block.xq, C_, s.xq), add(block.xk, C_, s.xk), add(block.xs, C_, s.xs);
    for (int which : {XQ, XK, XS}) s.numbers[which] += block.numbers[which];
  }

  /// to [E] += weight vector, + bias * number
  void add_product(Tile weight, const float* vector, const float* bias, float number,
                   float* to) const {
    for (int64_t j = 0; j < E_; j++) to[j] += dot(weight.row(j), vector, C_) + bias[j] * number;
  }

  void mirror(Tile square) const {
    for (int64_t r = 0; r < C_; r++)
      for (int64_t c = 0; c < r; c++) square.row(r)[c] = square.row(c)[r];
  }

  /// Sums to gradients.
  void finish(const Workspace& w, const Totals& total) const {
    const Gradients& g = call_.gradients;
    const Sums& s = total.tokens;
    mirror(s.Sq), mirror(s.Sk);
    auto add_square = [&](Tile weight, Tile square, Tile to) {
      gemm(weight, E_, matrix_of(square, C_), nullptr, to, w.panel, to);
    };
    gram_of_weights(final_rows(), E_, s.Zq, C_, D_, total.dWq, true);
    add_square(wq_, s.Sq, total.dWq);
    add_square(wk_, s.Sk, total.dWk);
    for (int64_t j = 0; j < E_; j++) {
      add_scaled(s.xs, weights_.w_g[j], C_, total.dWq.row(j));
      add_scaled(s.xq, origin_.query_bias[j], C_, total.dWq.row(j));
      add_scaled(s.xk, origin_.key_bias[j], C_, total.dWk.row(j));
    }
    add_weight_rows(s.zq, layer_.wf, E_, D_, E_, w.vectors, total.dbq);
    add_scaled(weights_.w_g, s.numbers[XS], E_, total.dbq);
    add_product(wq_, s.xq, origin_.query_bias, s.numbers[XQ], total.dbq);
    add_product(wk_, s.xk, origin_.key_bias, s.numbers[XK], total.dbk);
    for (int64_t j = 0; j < E_ && origin_.token; j++) {
      add_scaled(origin_.token, total.dbq[j], C_, total.dWq.row(j));
      add_scaled(origin_.token, total.dbk[j], C_, total.dWk.row(j));
    }
    copy_rows(total.dWq, E_, C_, g.dwq);
    copy_rows(total.dWk, E_, C_, g.dwk);
    copy_rows({total.dbq, 0}, 1, E_, g.dbq);
    copy_rows({total.dbk, 0}, 1, E_, g.dbk);
    for (int64_t j = 0; j < E_; j++)
      w.vectors[j] = dot(wq_.row(j), s.xs, C_) + origin_.query_bias[j] * s.numbers[XS];
    copy_rows({w.vectors, 0}, 1, E_, g.dw_g);
    const Tile matrix = matrix_scratch(w);
    gram_of_weights(final_rows(), E_, total.U, E_, D_, matrix);
    copy_rows(matrix, E_, E_, g.dwp);
    gemm(s.Zq, D_, weights_.plain.query, nullptr, matrix, w.panel);  // V
    gemm(total.U, D_, weights_.plain.proj, nullptr, matrix, w.panel, matrix);
    for (int64_t d = 0; d < D_; d++) {
      add_scaled(origin_.query_bias, s.zq[d], E_, matrix.row(d));
      add_scaled(weights_.proj_bias, s.dbf[d], E_, matrix.row(d));
    }
    copy_rows(matrix, D_, E_, g.dwf);
    float* dbp = total.dbk;  // no longer needed
    std::fill(dbp, dbp + padded(E_), 0.f);
    add_weight_rows(s.dbf, layer_.wf, E_, D_, E_, w.vectors, dbp);
    copy_rows({dbp, 0}, 1, E_, g.dbp);
    copy_rows({s.dbf, 0}, 1, D_, g.dbf);
  }

  const RawWeights& layer_;
  const TrainWeights& weights_;
  const BackwardCall& call_;
  const Origin& origin_;
  const int64_t C_, E_, D_, N_;
  const Schedule schedule_;
  const int64_t tile_rows_;
  const Tokens x_, dout_, dx_;
  const Statistics saved_;
  const Tile M_;  // [D, E]

  Tile wq_, wk_;  // [E, C]
  Tile square_;   // scratch for a matrix of C columns
  float *output_panels_, *query_panels_, *key_panels_;
  Matrix output_, query_square_, key_square_;     // C [D, C], A, B [C, C]
  float *output_bias_, *query_bias_, *key_bias_;  // Wf bq [D], Wq^T bq, Wk^T bk [C]
  float* scores_;                                 // Wq^T w_g [C]
  float score_bias_;                              // bq . w_g
  std::vector<Sums> sums_;
  std::vector<State> states_;
  std::vector<Totals> totals_;
  std::vector<Workspace> workspaces_;
};

float largest(const float* numbers, int64_t count) {
  float found = 0.f;
  for (int64_t i = 0; i < count; i++) found = std::max(found, numbers[i]);
  return found;
}

}  // namespace

bool biases_cancel(const RawWeights& layer, const BackwardCall& call) {
  if (!layer.qk_norm) return false;
  const int64_t tokens = call.batch * call.tokens;
  const Statistics saved(call.saved, call.batch, call.tokens);
  const float q = largest(saved.query_norms, tokens), k = largest(saved.key_norms, tokens);
  return norm2_of(layer.bq, layer.width) * q * q > 4 || norm2_of(layer.bk, layer.width) * k * k > 4;
}

Status folded_backward(const RawWeights& layer, const BackwardCall& call) {
  const Origin origin(layer, call);
  if (!origin) return OUT_OF_MEMORY;
  TrainWeights weights(layer, usable_threads(call.threads));
  weights.use(weights.plain.key);
  weights.use(weights.query_rows);
  weights.use(weights.key_rows);
  weights.use(weights.product_rows);
  if (!weights.prepare(call.batch * call.tokens)) return OUT_OF_MEMORY;
  return FoldedBackward(layer, weights, call, origin).run();
}

}  // namespace swiftkernels::additive
