// The backward without a depthwise convolution, in one pass over tiles of pixels. A tile computes
// its hidden channels again from x, block by block:
//
//     h = x W1^T + b1          dg = dout S W2        dh = dg * activation'(h)
//     dx = sum over the blocks of dh W1              (+ dout if x was added)
//     dW1 = dh^T x             db1 = sum of dh       (of all tiles)
//     dW2^T = activation(h)^T dout S                 db2 = sum of dout S
//
// S has the scale on its diagonal. Its gradient follows from those of S W2 and S b2.
//
// Both products with the hidden channels of a tile stay in the second-level cache. Each thread adds
// up the weight gradients of its tiles; those of the threads are added in order.
#include <array>
#include <vector>

#include "abi.h"
#include "gemm.h"
#include "parallel.h"
#include "row_ops.h"
#include "scratch.h"

namespace swiftkernels::conv_mlp {
namespace {

/// Most pixels in a tile, and most hidden channels that are computed together.
constexpr int64_t TILE = 200, BLOCK = 128;

/// Batch elements that follow each other in memory are one: tiles of one small image would be
/// short, and every tile reads all weights and adds to all their gradients.
BackwardCall joined(BackwardCall call) {
  const auto adjacent = [&](const int64_t* strides) {
    return strides[0] == call.tokens * strides[1];
  };
  if (adjacent(call.x_strides) && adjacent(call.dout_strides) &&
      (!call.dx || adjacent(call.dx_strides)))
    call.tokens *= call.batch, call.batch = 1;
  return call;
}

/// Tiles of a batch element: an even number if there are several, which two threads share evenly.
int64_t tiles_of(int64_t tokens) {
  const int64_t tiles = (tokens + TILE - 1) / TILE;
  return tiles > 1 ? round_up(tiles, 2) : 1;
}

/// Most tiles that are added one after another. Longer sums are sums of such chains: a single chain
/// would lose more digits than PyTorch does.
constexpr int64_t MAX_TILE_CHAIN = 24;

/// Sums over pixels.
struct Sums {
  Tile dW1, dW2;  // [H, C] and [H, D], in rows of full vectors
  float *db1, *db2;
  int64_t* tiles;  // added so far; matrices are undefined before the first
};

/// What a thread needs for a tile.
struct Workspace {
  Tile x, dout, dx;
  Tile hidden, gradients;  // of a block of hidden channels
  Tile dW2;                // [LANES, H]
};

/// The dot product of a row and `other`; then row *= factor. No vector of them is padded.
float dot_and_scale(float* row, const float* other, int64_t width, float factor) {
  vec products{};
  int64_t j = 0;
  for (; j + LANES <= width; j += LANES) {
    const vec values = load(row + j);
    products += values * load(other + j);
    store(row + j, values * broadcast(factor));
  }
  float total = sum(products);
  for (; j < width; row[j++] *= factor) total += row[j] * other[j];
  return total;
}

class Backward {
 public:
  Backward(const RawWeights& weights, const BackwardCall& call)
      : weights_(weights),
        call_(joined(call)),
        C_(weights.in_dims),
        H_(weights.hidden),
        D_(weights.out_dims),
        tiles_(tiles_of(call_.tokens)),
        blocks_((H_ + BLOCK - 1) / BLOCK),
        block_(round_up((H_ + blocks_ - 1) / blocks_, LANES)),
        threads_(usable_threads(call.threads)),
        x_(tokens_of(call.x, call.x_strides, call.type)),
        dout_(tokens_of(call.dout, call.dout_strides, call.type)),
        dx_(tokens_of(call.dx, call.dx_strides, call.type)) {}

  Status run() {
    const int64_t tiles = call_.batch * tiles_;
    const int levels = tiles > MAX_TILE_CHAIN * threads_ ? 2 : 1;
    const int64_t sums = call_.dw1 ? levels * threads_ : 0;
    std::vector<int64_t> counts(sums);
    workspaces_.resize(threads_), sums_.resize(sums);
    const auto lay_out = [&](Arena& arena) {
      panels_ = arena.take(blocks_ * block_floats());
      bias1_ = arena.take(blocks_ * block_);
      for (Workspace& w : workspaces_) w = make_workspace(arena);
      if (sums > 0)
        for (Workspace& w : workspaces_) w.dW2 = arena.matrix(LANES, H_);
      for (int64_t i = 0; i < sums; i++) {
        // The last level of the first thread ends as the gradients.
        const bool in_place = i == (levels - 1) * threads_ && sums_in_place();
        const Tile dW1 = in_place ? Tile{static_cast<float*>(call_.dw1), C_} : arena.matrix(H_, C_);
        sums_[i] = {dW1, arena.matrix(H_, D_), arena.take(blocks_ * block_), arena.take(padded(D_)),
                    &counts[i]};
      }
    };
    Arena size;
    lay_out(size);
    const Scratch scratch(size.used());
    if (!scratch) return OUT_OF_MEMORY;
    Arena arena(scratch.data());
    lay_out(arena);
    std::fill(bias1_, bias1_ + blocks_ * block_, 0.f);
    if (weights_.bias1) std::copy(weights_.bias1, weights_.bias1 + H_, bias1_);
    for (const Sums& s : sums_) clear_vectors(s);
    totals_ = sums_.data() + (levels - 1) * threads_;
    parallel_for(blocks_, threads_, [&](int64_t i, int) {
      auto [up, back, down] = matrices(i);
      for (Matrix* matrix : {&up, &back, &down}) matrix->pack(const_cast<float*>(matrix->panels));
      if (weights_.scale) back.scale_rows(const_cast<float*>(back.panels), weights_.scale);
    });
    parallel_for(tiles, threads_, [&](int64_t i, int thread) { run_tile(i, thread); });
    if (call_.dw1) finish(levels > 1);
    return DONE;
  }

 private:
  bool sums_in_place() const { return call_.type == FLOAT32 && C_ == padded(C_); }
  int64_t count(int64_t block) const { return std::min(block_, H_ - block * block_); }
  int64_t block_floats() const { return (C_ + D_ + padded(C_)) * block_; }

  /// W1^T [C, block], W2 [D, block] and W1 [block, C] of a block of hidden channels, whose panels
  /// lie one after the other.
  std::array<Matrix, 3> matrices(int64_t block) const {
    const int64_t n = count(block), at = block * block_;
    Matrix up = Matrix::transposed(weights_.weight1 + at * C_, C_, n);
    Matrix back{D_, n, nullptr, weights_.weight2 + at, H_, 1};
    Matrix down = Matrix::rows(weights_.weight1 + at * C_, n, C_);
    up.panels = panels_ + block * block_floats();
    back.panels = up.panels + panel_floats(C_, n);
    down.panels = back.panels + panel_floats(D_, n);
    return {up, back, down};
  }

  Workspace make_workspace(Arena& arena) const {
    const int64_t rows = (call_.tokens + tiles_ - 1) / tiles_;
    return {arena.tile(rows, C_), arena.tile(rows, D_), arena.tile(rows, C_),
            arena.tile(rows, block_), arena.tile(rows, block_)};
  }

  void run_tile(int64_t i, int thread) const {
    const Workspace& w = workspaces_[thread];
    const int64_t element = i / tiles_, part = i % tiles_;
    const int64_t first = call_.tokens * part / tiles_;
    const int64_t rows = call_.tokens * (part + 1) / tiles_ - first;
    const Tile x = tile_of(x_, element, 1, first, rows, C_, w.x);
    const Tile dout = tile_of(dout_, element, 1, first, rows, D_, w.dout);
    const bool in_place = call_.dx && has_plain_rows(dx_) && C_ == padded(C_);
    const Tile dx = in_place ? rows_of(dx_, element, first) : w.dx;
    const Sums* sums = call_.dw1 ? &sums_[thread] : nullptr;
    alignas(64) float sums_of_block[BLOCK];
    for (int64_t block = 0; block < blocks_; block++) {
      const int64_t n = count(block), at = block * block_;
      const auto [up, back, down] = matrices(block);
      gemm(x, rows, up, bias1_ + at, w.hidden, nullptr);
      std::fill(sums_of_block, sums_of_block + block_, 0.f);
      gemm_and(dout, rows, back, nullptr, w.gradients, nullptr, {}, true,
               [&](Tile part, int64_t height, int64_t width) INLINE_LAMBDA {
                 const int64_t offset = part.data - w.gradients.data;
                 const Tile hidden{w.hidden.data + offset, w.hidden.stride};
                 differentiate(static_cast<Activation>(weights_.activation), hidden, part, height,
                               width, sums_of_block + offset % w.gradients.stride);
               });
      if (sums) {
        const bool more = *sums->tiles > 0;
        add(sums_of_block, n, sums->db1 + at);
        gram(w.gradients, n, x, C_, rows, sums->dW1.from(at), more, nullptr);
        gram(w.hidden, n, dout, D_, rows, sums->dW2.from(at), more, nullptr);
      }
      const Tile so_far = block > 0 ? dx : weights_.residual ? dout : Tile{};
      if (call_.dx) gemm(w.gradients, rows, down, nullptr, dx, nullptr, so_far);
    }
    if (call_.dx && !in_place) store_tile(dx, rows, C_, dx_, element, first);
    if (!sums) return;
    add_rows(dout, rows, D_, sums->db2);
    if (++*sums->tiles >= MAX_TILE_CHAIN && totals_ != sums_.data()) move(*sums, totals_[thread]);
  }

  void clear_vectors(const Sums& s) const {
    std::fill(s.db1, s.db1 + blocks_ * block_, 0.f);
    std::fill(s.db2, s.db2 + padded(D_), 0.f);
  }

  /// to += from; then clear `from`.
  void move(const Sums& from, const Sums& to, int threads = 1) const {
    if (*from.tiles == 0) return;
    const bool fresh = *to.tiles == 0;
    parallel_for(H_, threads, [&](int64_t r, int) {
      for (auto matrix : {&Sums::dW1, &Sums::dW2}) {
        const float* row = (from.*matrix).row(r);
        const int64_t width = (from.*matrix).stride;
        if (fresh)
          std::copy(row, row + width, (to.*matrix).row(r));
        else
          add(row, width, (to.*matrix).row(r));
      }
    });
    add(from.db1, blocks_ * block_, to.db1);
    add(from.db2, D_, to.db2);
    clear_vectors(from);
    *to.tiles += *from.tiles;
    *from.tiles = 0;
  }

  /// Add the sums of all threads to those of the first, in order, and store these.
  void finish(bool two_levels) const {
    for (int i = 0; i < threads_; i++) {
      if (two_levels) move(sums_[i], totals_[i]);
      if (i > 0) move(totals_[i], totals_[0], threads_);
    }
    const Sums& s = totals_[0];
    const auto type = static_cast<int32_t>(call_.type);
    if (!sums_in_place()) store_tile(s.dW1, H_, C_, {call_.dw1, 0, C_, 1, type}, 0, 0);
    finish_second_layer(s.dW2, s.db2);
    store_vector(s.db1, H_, call_.db1);
    store_vector(s.db2, D_, call_.db2);
  }

  void store_vector(float* vector, int64_t width, void* to) const {
    const auto type = static_cast<int32_t>(call_.type);
    if (to) store_tile({vector, 0}, 1, width, {to, 0, width, 1, type}, 0, 0);
  }

  /// From the gradients of S W2, transposed, and of S b2: those of W2 and of the scale are stored,
  /// that of b2 replaces the latter.
  void finish_second_layer(Tile dW2, float* db2) const {
    const auto type = static_cast<int32_t>(call_.type);
    if (!weights_.scale) return store_tile(dW2, H_, D_, {call_.dw2, 0, 1, H_, type}, 0, 0);
    std::vector<float> dscale(D_);
    parallel_for((D_ + LANES - 1) / LANES, threads_, [&](int64_t group, int thread) {
      const int64_t first = group * LANES, count = std::min<int64_t>(LANES, D_ - first);
      const Tile rows = workspaces_[thread].dW2;
      store_tile({dW2.data + first, dW2.stride}, H_, count, {rows.data, 0, 1, rows.stride, FLOAT32},
                 0, 0);
      for (int64_t r = 0; r < count; r++) {
        const int64_t d = first + r;
        const float factor = weights_.scale[d];
        dscale[d] = dot_and_scale(rows.row(r), weights_.weight2 + d * H_, H_, factor);
        if (weights_.bias2) dscale[d] += db2[d] * weights_.bias2[d];
        db2[d] *= factor;
      }
      store_tile(rows, count, H_, {call_.dw2, 0, H_, 1, type}, 0, first);
    });
    store_vector(dscale.data(), D_, call_.dscale);
  }

  const RawWeights& weights_;
  const BackwardCall call_;
  const int64_t C_, H_, D_;
  const int64_t tiles_;  // of a batch element
  const int64_t blocks_, block_;
  const int threads_;
  const Tokens x_, dout_, dx_;
  float *panels_, *bias1_;
  std::vector<Workspace> workspaces_;
  std::vector<Sums> sums_;  // of the threads: the chains, then the sums of chains, if two levels
  const Sums* totals_;      // the last level
};

}  // namespace

EXPORT int swiftkernels_conv_mlp_backward(const RawWeights* weights, const BackwardCall* call) {
  return Backward(*weights, *call).run();
}

}  // namespace swiftkernels::conv_mlp
