// The backward. q and k are taken from the forward or computed again; gradients of the scores need
// the gradient of G, which comes from all tokens, so there are two passes, as in the forward.
//
// With dy = dout Wf and dt = dy Wp, the gradients of y = t Wp^T + bp + qn and of t = G * kn:
//
//     dG  = sum_n dt_n * kn_n
//     dkn = dt * G                       dk = rk (dkn - kn (kn . dkn))
//     dqn = dy + a dG + ds scale w_g     dq = rq (dqn - qn (qn . dqn))      ds from qn . dG, below
//     dx  = dq Wq + dk Wk                dWq = dq^T x, dWk = dk^T x
//     U   = dout^T t, V = dout^T qn      of which dWp = Wf^T U and dWf = U Wp^T + V + dbf bp^T
//
// The moments U and V cost two products of E x E matrices at the end. For few tokens dWp = dy^T t
// and dWf = dout^T y are summed themselves ("direct"), for one more product per token.
#include <array>
#include <numeric>
#include <vector>

#include "folded_backward.h"

namespace {

/// Size of the tiles: of whole items together, and of parts of an item. Large ones, as every tile
/// is added to the sums of the weight gradients.
constexpr int64_t WHOLE_FLOATS = 1000000;
constexpr int64_t TILE_FLOATS = 200000;

/// Tiles that are summed before they are added to the sum of all: one long chain of additions would
/// lose more digits than PyTorch does.
constexpr int64_t CHAIN = 24;

/// Sums over tokens, rows of whole vectors.
struct Sums {
  Tile dWq, dWk;  // [E, C]
  Tile U, V;      // [D, E]; direct: dWp [E, E] and dWf [D, E]
  Tile dWp;       // [E, E] from U, in the end
  float *dbq, *dbk, *dw_g, *dbf, *dbp;
  int* tiles;  // in the sums of keys (dWk, U, dbk, dbf) and of queries (dWq, V, dbq, dw_g)

  /// Where rows need no padding, `gradients` are the memory of the sums themselves.
  static Sums make(const RawLayer& layer, bool direct, const Gradients& gradients, Pieces& pieces) {
    const int64_t C = layer.in_dims, E = layer.width, D = layer.token_dim;
    auto matrix = [&](int64_t rows, int64_t width, float* gradient) {
      const bool placed = gradient && padded(width) == width;
      return Tile{placed ? gradient : pieces.take(rows * padded(width)), padded(width)};
    };
    Sums s{};
    s.dWq = matrix(E, C, gradients.dwq);
    s.dWk = matrix(E, C, gradients.dwk);
    s.U = direct ? matrix(E, E, gradients.dwp) : matrix(D, E, nullptr);
    s.V = matrix(D, E, gradients.dwf);
    s.dWp = direct ? s.U : matrix(E, E, gradients.dwp);
    s.dbq = pieces.take(padded(E));
    s.dbk = pieces.take(padded(E));
    s.dw_g = pieces.take(padded(E));
    s.dbf = pieces.take(padded(D));
    s.dbp = pieces.take(padded(E));
    return s;
  }
};

/// What a thread needs for a tile of tokens.
struct Workspace {
  Tile x, dout;
  Tile q, k;    // unit rows; k becomes t
  Tile dy, dt;  // become dq and dk
  Tile y, dx;
  float* factors;      // one number for each row
  float *G, *vectors;  // two
  float* panel;        // of a matrix that is not packed
  float* columns;      // of a large tile
};

class Backward {
 public:
  Backward(const RawLayer& layer, const Prepared& weights, const BackwardCall& call)
      : layer_(layer),
        matrices_(weights),
        call_(call),
        C_(layer.in_dims),
        E_(layer.width),
        D_(layer.token_dim),
        N_(call.tokens),
        slice_(slice_rows(N_)),
        threads_(usable_threads(call.threads)),
        by_items_(by_items(call.batch, threads_)),
        division_(divide()),
        x_(tokens_of(call.x, call.x_strides, call.type)),
        dout_(tokens_of(call.dout, call.dout_strides, call.type)),
        dx_(tokens_of(call.dx, call.dx_strides, call.type)),
        unit_q_(unit_rows(call.kept, 0, call.batch, N_, E_, call.type)),
        unit_k_(unit_rows(call.kept, 1, call.batch, N_, E_, call.type)),
        weights_(call.kept.statistics),
        query_norms_(weights_ + call.batch * N_),
        key_norms_(query_norms_ + call.batch * N_),
        normalisers_(key_norms_ + call.batch * N_),
        limit_(inverse_eps(layer)) {}

  Status run() {
    Pieces sums_size(nullptr), workspace_size(nullptr);
    const bool needs_weights = call_.needs_weights;
    if (needs_weights) Sums::make(layer_, call_.direct, Gradients{}, sums_size);
    make_workspace(workspace_size);
    // For each item at work: partial sums of dG, one for each slice.
    const int64_t partial_floats = slices_of(N_) * padded(E_);
    const int64_t items = by_items_ ? threads_ : 1;
    const int64_t dG_floats = round_up(division_.whole ? threads_ * division_.items * padded(E_)
                                                       : items * (partial_floats + padded(E_)),
                                       16);
    // Where a thread has many tiles, it sums them in two steps.
    const int64_t tiles = division_.whole ? division_.blocks : division_.blocks * call_.batch;
    const int levels = tiles > CHAIN * threads_ ? 2 : 1;
    const Scratch scratch(threads_ * (workspace_size.used() + levels * sums_size.used()) +
                          dG_floats);
    if (!scratch) return OUT_OF_MEMORY;
    float* dG = scratch.data() + threads_ * workspace_size.used();
    auto workspace = [&](int thread) {
      Pieces pieces(scratch.data() + thread * workspace_size.used());
      return make_workspace(pieces);
    };
    // The last level, of the first thread, becomes the gradients.
    std::vector<Sums> all_sums(levels * threads_);
    std::vector<std::array<int, 2>> counts(levels * threads_);
    for (int i = 0; i < levels * threads_ && needs_weights; i++) {
      Pieces pieces(dG + dG_floats + i * sums_size.used());
      const bool last = i == (levels - 1) * threads_;
      all_sums[i] = Sums::make(layer_, call_.direct, last ? call_.gradients : Gradients{}, pieces);
      all_sums[i].tiles = counts[i].data();
      clear_vectors(all_sums[i], KEYS);
      clear_vectors(all_sums[i], QUERIES);
    }
    const Sums* const totals = all_sums.data() + (levels - 1) * threads_;
    auto put_away = [&](int thread, int side) {
      if (levels == 2 && all_sums[thread].tiles[side] >= CHAIN)
        move(all_sums[thread], totals[thread], side);
    };

    if (division_.whole) {
      parallel_for(division_.blocks, threads_, [&](int64_t block, int thread) {
        const int64_t first = block * division_.items;
        const int64_t count = std::min(division_.items, call_.batch - first);
        whole_items(workspace(thread), all_sums[thread], dG + thread * division_.items * padded(E_),
                    first, count);
        put_away(thread, KEYS);
        put_away(thread, QUERIES);
      });
    } else if (by_items_) {
      parallel_for(call_.batch, threads_, [&](int64_t item, int thread) {
        float* partials = dG + thread * (partial_floats + padded(E_));
        float* total = partials + partial_floats;
        const Workspace w = workspace(thread);
        const Sums s = all_sums[thread];
        for (int64_t i = 0; i < division_.blocks; i++) {
          key_pass(w, s, partials, item, i);
          put_away(thread, KEYS);
        }
        add_partials(partials, total);
        float residues = 0.f;
        for (int64_t i = 0; i < division_.blocks; i++) {
          residues += query_pass(w, s, total, item, i);
          put_away(thread, QUERIES);
        }
        if (needs_weights) remove_residues(w, totals[thread], item, residues);
      });
    } else {
      float* total = dG + partial_floats;
      std::vector<float> residues(division_.blocks);
      for (int64_t item = 0; item < call_.batch; item++) {
        parallel_for(division_.blocks, threads_, [&](int64_t i, int thread) {
          key_pass(workspace(thread), all_sums[thread], dG, item, i);
          put_away(thread, KEYS);
        });
        add_partials(dG, total);
        parallel_for(division_.blocks, threads_, [&](int64_t i, int thread) {
          residues[i] = query_pass(workspace(thread), all_sums[thread], total, item, i);
          put_away(thread, QUERIES);
        });
        if (needs_weights)
          remove_residues(workspace(0), totals[0], item,
                          std::accumulate(residues.begin(), residues.end(), 0.f));
      }
    }
    if (needs_weights) {
      for (int i = 0; i < threads_ && levels == 2; i++) {
        move(all_sums[i], totals[i], KEYS);
        move(all_sums[i], totals[i], QUERIES);
      }
      add_up(totals);
      parallel_for(threads_, threads_, [&](int64_t i, int thread) {
        finish(totals[0], workspace(thread), D_ * i / threads_, D_ * (i + 1) / threads_,
               E_ * i / threads_, E_ * (i + 1) / threads_);
      });
      copy_out(totals[0]);
    }
    return DONE;
  }

 private:
  Division divide() const {
    const int64_t floats_per_row = 2 * (C_ + D_ + 2 * E_);
    if (call_.whole) return divide_items(call_.batch, N_, WHOLE_FLOATS / floats_per_row, threads_);
    return divide_tokens(N_, tile_rows(TILE_FLOATS, floats_per_row), by_items_ ? 1 : threads_);
  }

  Workspace make_workspace(Pieces& pieces) const {
    Workspace w{};
    const int64_t rows = division_.rows;
    w.x = pieces.tile(rows, C_);
    w.dout = pieces.tile(rows, D_);
    w.k = pieces.tile(rows, E_);
    w.dt = pieces.tile(rows, E_);
    w.dx = pieces.tile(rows, C_);
    if (division_.whole) {
      w.q = pieces.tile(rows, E_);
      w.dy = pieces.tile(rows, E_);
    } else {  // one pass after the other
      w.q = w.k;
      w.dy = w.dt;
    }
    if (call_.direct || (!division_.whole && N_ <= WHOLE_ROWS)) w.y = pieces.tile(rows, E_);
    w.factors = pieces.take(rows);
    w.G = pieces.take(padded(E_));
    w.vectors = pieces.take(2 * padded(std::max(E_, D_)));
    const Tile widest = pieces.tile(0, std::max(E_, D_));
    if (rows * widest.stride > LARGE_TILE) w.columns = pieces.take(rows * widest.stride);
    w.panel = pieces.take(Matrix::panel_scratch(std::max({C_, D_, E_})));
    return w;
  }

  /// Short items: both passes on one tile.
  void whole_items(const Workspace& w, const Sums& s, float* dG, int64_t first,
                   int64_t count) const {
    const int64_t rows = count * N_;
    for (int64_t i = 0; i < count; i++) {
      load_tile(x_, first + i, 0, N_, C_, w.x.from(i * N_));
      load_tile(dout_, first + i, 0, N_, D_, w.dout.from(i * N_));
    }
    query_rows_again(w, first, count, 0, N_);
    key_rows_again(w, first, count, 0, N_);
    gemm(w.dout, rows, matrices_.final_rows, nullptr, w.dy, w.panel);
    gemm(w.dy, rows, matrices_.proj_rows, nullptr, w.dt, w.panel);
    std::fill(dG, dG + count * padded(E_), 0.f);
    for (int64_t i = 0; i < count; i++)
      for (int64_t n = 0; n < N_; n += slice_) {
        key_rows(w, i * N_ + n, std::min(slice_, N_ - n), first + i, n, w.vectors);
        add(w.vectors, E_, dG + i * padded(E_));
      }
    sum_key_gradients(w, s, rows);
    if (call_.direct && call_.needs_weights)
      gemm(w.k, rows, matrices_.plain.proj, matrices_.proj_bias, w.y, w.panel, w.q);
    if (call_.needs_tokens) gemm(w.dt, rows, matrices_.key_rows, nullptr, w.dx, w.panel);
    for (int64_t i = 0; i < count; i++) {
      const float residues = query_rows(w, i * N_, N_, first + i, 0, dG + i * padded(E_));
      if (call_.needs_weights) remove_residues(w, s, first + i, residues);
    }
    sum_query_gradients(w, s, rows);
    if (!call_.needs_tokens) return;
    gemm(w.dy, rows, matrices_.query_rows, nullptr, w.dx, w.panel, w.dx);
    for (int64_t i = 0; i < count; i++) store_tile(w.dx.from(i * N_), N_, C_, dx_, first + i, 0);
  }

  void key_pass(const Workspace& w, const Sums& s, float* partials, int64_t item,
                int64_t tile) const {
    const int64_t first = tile * division_.rows, rows = std::min(division_.rows, N_ - first);
    load_tile(x_, item, first, rows, C_, w.x);
    load_tile(dout_, item, first, rows, D_, w.dout);
    key_rows_again(w, item, 1, first, rows);
    if (N_ > WHOLE_ROWS) {
      gemm(w.dout, rows, matrices_.product_rows, nullptr, w.dt, w.panel);
    } else {  // as for whole items: results must not depend on how threads divide the tokens
      gemm(w.dout, rows, matrices_.final_rows, nullptr, w.y, w.panel);
      gemm(w.y, rows, matrices_.proj_rows, nullptr, w.dt, w.panel);
    }
    for (int64_t n = 0; n < rows; n += slice_)
      key_rows(w, n, std::min(slice_, rows - n), item, first + n,
               partials + (first + n) / slice_ * padded(E_));
    sum_key_gradients(w, s, rows);
    if (!call_.needs_tokens) return;
    gemm(w.dt, rows, matrices_.key_rows, nullptr, w.dx, w.panel);
    store_tile(w.dx, rows, C_, dx_, item, first);
  }

  /// Returns the sum of the residues.
  float query_pass(const Workspace& w, const Sums& s, const float* dG, int64_t item,
                   int64_t tile) const {
    const int64_t first = tile * division_.rows, rows = std::min(division_.rows, N_ - first);
    load_tile(x_, item, first, rows, C_, w.x);
    load_tile(dout_, item, first, rows, D_, w.dout);
    query_rows_again(w, item, 1, first, rows);
    gemm(w.dout, rows, matrices_.final_rows, nullptr, w.dy, w.panel);
    const float residues = query_rows(w, 0, rows, item, first, dG);
    sum_query_gradients(w, s, rows);
    if (!call_.needs_tokens) return residues;
    load_tile(dx_, item, first, rows, C_, w.dx);
    gemm(w.dy, rows, matrices_.query_rows, nullptr, w.dx, w.panel, w.dx);
    store_tile(w.dx, rows, C_, dx_, item, first);
    return residues;
  }

  /// Sums that the two passes make.
  enum Side { KEYS = 0, QUERIES = 1 };

  /// The matrices and vectors of a side.
  template <class Matrix, class Vector>
  void for_each(int side, Matrix matrix, Vector vector) const {
    if (side == KEYS) {
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

  void clear_vectors(const Sums& s, int side) const {
    for_each(
        side, [](Tile Sums::*, int64_t, int64_t) {},
        [&](float* Sums::* vector, int64_t width) {
          std::fill(s.*vector, s.*vector + padded(width), 0.f);
        });
  }

  /// to += from, which is empty then; matrices hold nothing yet where there are no tiles in them.
  void move(const Sums& from, const Sums& to, int side, int threads = 1) const {
    if (from.tiles[side] == 0) return;
    const bool fresh = to.tiles[side] == 0;
    for_each(
        side,
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
    clear_vectors(from, side);
    to.tiles[side] += from.tiles[side];
    from.tiles[side] = 0;
  }

  /// Add the sums of all threads, in their order, to those of the first.
  void add_up(const Sums* all) const {
    for (int side : {KEYS, QUERIES}) {
      for (int i = 1; i < threads_; i++) move(all[i], all[0], side, threads_);
      if (all[0].tiles[side] > 0) continue;
      for_each(
          side,
          [&](Tile Sums::* matrix, int64_t rows, int64_t) {
            std::fill((all[0].*matrix).data, (all[0].*matrix).row(rows), 0.f);
          },
          [](float* Sums::*, int64_t) {});
    }
  }

  /// Moments to gradients: rows of dWf from `f`, rows of dWp from `p` on.
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

  void add_partials(const float* partials, float* total) const {
    std::fill(total, total + padded(E_), 0.f);
    for (int64_t i = 0; i < slices_of(N_); i++) add(partials + i * padded(E_), E_, total);
  }

  void query_rows_again(const Workspace& w, int64_t item, int64_t count, int64_t first,
                        int64_t rows) const {
    unit_rows_again(w, item, count, first, rows, unit_q_, matrices_.plain.query,
                    matrices_.query_bias, query_norms_, w.q);
  }
  void key_rows_again(const Workspace& w, int64_t item, int64_t count, int64_t first,
                      int64_t rows) const {
    unit_rows_again(w, item, count, first, rows, unit_k_, matrices_.plain.key, matrices_.key_bias,
                    key_norms_, w.k);
  }

  /// The unit rows of q or k as the forward had them: kept, or computed again from x.
  void unit_rows_again(const Workspace& w, int64_t item, int64_t count, int64_t first, int64_t rows,
                       const Tokens& kept, const Matrix& matrix, const float* bias,
                       const float* norms, Tile unit) const {
    if (kept.data) {
      for (int64_t i = 0; i < count; i++)
        load_tile(kept, item + i, first, rows, E_, unit.from(i * rows));
      return;
    }
    gemm(w.x, count * rows, matrix, bias, unit, w.panel);
    if (layer_.qk_norm) scale_rows(unit, count * rows, E_, norms + item * N_ + first);
  }

  /// Rows of kn and dt become those of t and dk; a slice of them, whose part of dG is summed.
  ONE_COPY void key_rows(const Workspace& w, int64_t row, int64_t rows, int64_t item, int64_t first,
                         float* dG) const {
    load_G(item, w.G);
    std::fill(dG, dG + padded(E_), 0.f);
    for (int64_t r = row; r < row + rows; r++) {
      float* k = w.k.row(r);
      float* dt = w.dt.row(r);
      vec along{};
      for (int64_t j = 0; j < padded(E_); j += LANES) {
        const vec product = load(dt + j) * load(k + j);
        store(dG + j, load(dG + j) + product);
        along += product * load(w.G + j);
      }
      const float norm = key_norms_[item * N_ + first + r - row];
      const vec projection = broadcast(has_projection(norm) ? sum(along) : 0.f);
      const vec factor = broadcast(norm);
      for (int64_t j = 0; j < padded(E_); j += LANES) {
        const vec G = load(w.G + j), unit = load(k + j);
        store(dt + j, factor * (load(dt + j) * G - projection * unit));
        store(k + j, unit * G);
      }
    }
  }

  /// Rows of dy become those of dq; the gradients of their scores are left in `factors`. Returns
  /// the sum of the residues.
  ONE_COPY float query_rows(const Workspace& w, int64_t row, int64_t rows, int64_t item,
                            int64_t first, const float* dG) const {
    load_G(item, w.G);
    vec G_dG{};
    for (int64_t j = 0; j < padded(E_); j += LANES) G_dG += load(w.G + j) * load(dG + j);
    const float along_G = sum(G_dG), normaliser = normalisers_[item];
    const Mask mask = mask_of(call_, item);
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
        w_g_sum += unit * load(matrices_.w_g + j);
      }
      const float weight = weights_[item * N_ + n], d_weight = sum(dG_sum);
      const float d_score =
          score_gradient(layer_, mask.keeps(n), weight, d_weight, along_G, normaliser);
      w.factors[r] = d_score;
      residues += residue(layer_, weight, d_score, normaliser);
      const float norm = query_norms_[item * N_ + n];
      const float along = sum(dy_sum) + weight * d_weight + d_score * sum(w_g_sum);
      const vec projection = broadcast(has_projection(norm) ? along : 0.f);
      const vec factor = broadcast(norm), by_dG = broadcast(weight), by_w_g = broadcast(d_score);
      for (int64_t j = 0; j < padded(E_); j += LANES) {
        const vec d_unit = load(dy + j) + by_dG * load(dG + j) + by_w_g * load(matrices_.w_g + j);
        store(dy + j, factor * (d_unit - projection * load(q + j)));
      }
    }
    return residues;
  }

  /// Take what the residues of an item put into dw_g out again.
  void remove_residues(const Workspace& w, const Sums& s, int64_t item, float residues) const {
    load_G(item, w.G);
    add_scaled(w.G, -residues, E_, s.dw_g);
  }

  /// Whether a unit row has a gradient along the row: where it was divided by its norm, not by eps.
  bool has_projection(float inverse_norm) const { return layer_.qk_norm && inverse_norm < limit_; }

  void load_G(int64_t item, float* G) const {
    std::fill(G, G + padded(E_), 0.f);
    std::memcpy(G, call_.kept.global_query + item * E_, E_ * sizeof(float));
  }

  void sum_key_gradients(const Workspace& w, const Sums& s, int64_t rows) const {
    if (!call_.needs_weights) return;
    std::fill(w.factors, w.factors + rows, 1.f);
    add_rows(w.factors, w.dt, rows, E_, w.vectors, s.dbk);
    add_rows(w.factors, w.dout, rows, D_, w.vectors, s.dbf);
    gram(w.dt, E_, w.x, C_, rows, s.dWk, s.tiles[KEYS] > 0, w.columns);
    gram(call_.direct ? w.dy : w.dout, call_.direct ? E_ : D_, w.k, E_, rows, s.U,
         s.tiles[KEYS] > 0, w.columns);
    s.tiles[KEYS]++;
  }

  void sum_query_gradients(const Workspace& w, const Sums& s, int64_t rows) const {
    if (!call_.needs_weights) return;
    // The factors are those of the scores here.
    add_rows(w.factors, w.q, rows, E_, w.vectors, s.dw_g);
    std::fill(w.factors, w.factors + rows, 1.f);
    add_rows(w.factors, w.dy, rows, E_, w.vectors, s.dbq);
    gram(w.dy, E_, w.x, C_, rows, s.dWq, s.tiles[QUERIES] > 0, w.columns);
    gram(w.dout, D_, call_.direct ? w.y : w.q, E_, rows, s.V, s.tiles[QUERIES] > 0, w.columns);
    s.tiles[QUERIES]++;
  }

  const RawLayer& layer_;
  const Prepared& matrices_;
  const BackwardCall& call_;
  const int64_t C_, E_, D_, N_, slice_;
  const int threads_;
  const bool by_items_;
  const Division division_;
  const Tokens x_, dout_, dx_, unit_q_, unit_k_;
  const float *weights_, *query_norms_, *key_norms_, *normalisers_;
  const float limit_;
};

}  // namespace

EXPORT int swiftkernels_backward(const RawLayer* layer, const BackwardCall* call) {
  if (call->folded && !biases_cancel(*layer, *call)) return folded_backward(*layer, *call);
  Prepared weights(*layer, usable_threads(call->threads));
  if (!call->kept.unit_rows) {
    weights.add(weights.plain.query);
    weights.add(weights.plain.key);
  }
  weights.add(weights.final_rows);
  weights.add(call->tokens <= WHOLE_ROWS ? weights.proj_rows : weights.product_rows);
  if (call->direct) weights.add(weights.plain.proj);
  if (call->needs_tokens) {
    weights.add(weights.query_rows);
    weights.add(weights.key_rows);
  }
  if (!weights.finish(call->batch * call->tokens)) return OUT_OF_MEMORY;
  return Backward(*layer, weights, *call).run();
}
