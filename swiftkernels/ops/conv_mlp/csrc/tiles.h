// The operator on a tile of pixels. The tile passes the depthwise convolution, then block by block
// of hidden channels the first product with the activation and the second product, which adds to
// the output. The hidden channels of a tile stay in the second-level cache.
#pragma once

#include "abi.h"
#include "depthwise.h"
#include "gemm.h"
#include "scratch.h"

namespace swiftkernels::conv_mlp {

/// Pixels in a tile. The exact number hardly matters: with 24 to 200, times of whole networks
/// differ by 2 %.
constexpr int64_t TILE = 96;

/// Tiles of up to `most` pixels, as many for each thread.
inline int64_t tiles_of(int64_t pixels, int64_t most, int64_t threads) {
  constexpr int64_t SMALLEST = 12;
  const int64_t tiles = round_up((pixels + most - 1) / most, threads);
  return std::min(tiles, (pixels + SMALLEST - 1) / SMALLEST);
}

/// The scratch of a thread.
struct Workspace {
  Tile convolved;  // [pixels, C]
  Tile hidden;     // [pixels, block]

  static Workspace make(const PackedWeights& w, int64_t pixels, Arena& arena) {
    Workspace s;
    if (w.kernel) s.convolved = arena.tile(pixels, w.in_dims);
    s.hidden = arena.tile(pixels, w.block);
    return s;
  }
};

/// out = the pixels [first, end) of the operator on an image, in rows of full vectors. `added`: of
/// a map that is added without being the input.
inline void run_tile(const PackedWeights& w, const Map& x, int64_t first, int64_t end, Tile out,
                     const Workspace& s, Tile added = {}) {
  const int64_t pixels = end - first;
  const Tile input{x.pixel(first), x.stride};
  if (w.kernel)
    convolve(x, {w.depthwise, w.depthwise_bias, w.kernel, w.in_dims}, first, end, s.convolved);
  const float* panels = w.matrices;
  for (int64_t at = 0; at < w.hidden; at += w.block) {
    const int64_t count = std::min(w.block, w.hidden - at);
    const Matrix up = Matrix::packed(panels, w.in_dims, count);
    panels += panel_floats(w.in_dims, count);
    const Matrix down = Matrix::packed(panels, count, w.out_dims);
    panels += panel_floats(count, w.out_dims);
    gemm_and(w.kernel ? s.convolved : input, pixels, up, w.first_bias + at, s.hidden, nullptr, {},
             true, [&](Tile part, int64_t rows, int64_t width) INLINE_LAMBDA {
               activate(static_cast<Activation>(w.activation), part, rows, width);
             });
    const Tile so_far = at > 0 ? out : w.residual ? input : added;
    gemm(s.hidden, pixels, down, at > 0 ? nullptr : w.second_bias, out, nullptr, so_far);
  }
}

}  // namespace swiftkernels::conv_mlp
