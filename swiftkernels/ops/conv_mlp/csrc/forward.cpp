// The operator on a batch of images of any strides and element type. Threads take bands of rows.
// Where pixels are float32 rows of full vectors they are read and written in place. Else a band is
// copied, that of x with the rows around it that the depthwise convolution reads.
#include <vector>

#include "parallel.h"
#include "tiles.h"

namespace swiftkernels::conv_mlp {
namespace {

/// Without a depthwise convolution, images that follow each other in memory are one: tiles of one
/// small image would be short, and every tile reads all weights.
Call joined(const PackedWeights& w, Call call) {
  const auto adjacent = [&](const Images& t) {
    return t.batch_stride == call.height * t.row_stride;
  };
  if (w.kernel == 0 && adjacent(call.x) && adjacent(call.out))
    call.height *= call.batch, call.batch = 1;
  return call;
}

class Forward {
 public:
  Forward(const PackedWeights& w, const Call& call)
      : w_(w),
        call_(joined(w, call)),
        threads_(usable_threads(call.threads)),
        reach_(w.kernel / 2),
        reads_in_place_(has_full_rows(call_.x, w.in_dims)),
        writes_in_place_(has_full_rows(call_.out, w.out_dims)),
        bands_(std::max(bands_of_one(),
                        std::min(rows(), (threads_ + call_.batch - 1) / call_.batch))) {}

  Status run() {
    Arena size;
    make_workspace(size);
    const Scratch scratch(threads_ * size.used());
    if (!scratch) return OUT_OF_MEMORY;
    parallel_for(call_.batch * bands_, threads_, [&](int64_t i, int thread) {
      Arena arena(scratch.data() + thread * size.used());
      run_band(i / bands_, i % bands_, make_workspace(arena));
    });
    return DONE;
  }

 private:
  struct BandWorkspace {
    Tile x, out;
    Workspace tile;
  };

  int64_t rows() const { return call_.height; }

  /// Bands of about TILE pixels: copies of rows around a band cost less if it is higher than the
  /// convolution reaches.
  int64_t bands_of_one() const {
    const int64_t height = std::max((TILE + call_.width - 1) / call_.width, 2 * reach_);
    return (rows() + height - 1) / height;
  }
  int64_t highest() const { return (rows() + bands_ - 1) / bands_; }

  BandWorkspace make_workspace(Arena& arena) const {
    BandWorkspace s;
    const int64_t pixels = highest() * call_.width;
    if (!reads_in_place_) s.x = arena.matrix((highest() + 2 * reach_) * call_.width, w_.in_dims);
    if (!writes_in_place_) s.out = arena.tile(pixels, w_.out_dims);
    s.tile = Workspace::make(w_, std::min(pixels, TILE), arena);
    return s;
  }

  /// Whether pixels are full vectors of float32, in rows without gaps.
  bool has_full_rows(const Images& t, int64_t width) const {
    return call_.type == FLOAT32 && t.channel_stride == 1 && width == padded(width) &&
           t.column_stride >= width && t.row_stride == call_.width * t.column_stride;
  }

  /// Pixels in place, from the first of an image on.
  Tile pixels_of(const Images& t, int64_t image) const {
    return {static_cast<float*>(t.data) + image * t.batch_stride, t.column_stride};
  }

  void run_band(int64_t image, int64_t band, const BandWorkspace& s) const {
    const int64_t width = call_.width;
    const int64_t first = rows() * band / bands_, end = rows() * (band + 1) / bands_;
    Map x{};
    int64_t above = 0;  // rows of x that are not in `map`
    if (reads_in_place_) {
      const Tile pixels = pixels_of(call_.x, image);
      x = {pixels.data, rows(), width, pixels.stride};
    } else {
      above = std::max<int64_t>(0, first - reach_);
      const int64_t below = std::min(rows(), end + reach_);
      for (int64_t y = above; y < below; y++)
        load_tile(call_.x.row(image, y, call_.type), 0, 0, width, w_.in_dims,
                  s.x.from((y - above) * width));
      x = {s.x.data, below - above, width, s.x.stride};
    }
    const int64_t pixels = (end - first) * width, tiles = tiles_of(pixels, TILE, 1);
    const int64_t offset = (first - above) * width;
    const Tile out = writes_in_place_ ? pixels_of(call_.out, image).from(first * width) : s.out;
    for (int64_t i = 0; i < tiles; i++) {
      const int64_t from = pixels * i / tiles, to = pixels * (i + 1) / tiles;
      run_tile(w_, x, offset + from, offset + to, out.from(from), s.tile);
    }
    if (writes_in_place_) return;
    for (int64_t y = first; y < end; y++)
      store_tile(s.out.from((y - first) * width), width, w_.out_dims,
                 call_.out.row(image, y, call_.type), 0, 0);
  }

  const PackedWeights& w_;
  const Call call_;
  const int64_t threads_, reach_;
  const bool reads_in_place_, writes_in_place_;
  const int64_t bands_;
};

}  // namespace

/// Pack the matrices, with the scale multiplied in.
EXPORT int swiftkernels_conv_mlp_pack(const RawWeights* weights, const PackCall* call) {
  const RawWeights& w = *weights;
  std::vector<float> scale(padded(w.out_dims));
  if (w.scale) std::copy(w.scale, w.scale + w.out_dims, scale.data());
  float* panels = call->matrices;
  for (int64_t at = 0; at < w.hidden; at += call->block) {
    const int64_t count = std::min(call->block, w.hidden - at);
    Matrix up = Matrix::transposed(w.weight1 + at * w.in_dims, w.in_dims, count);
    up.pack(panels);
    panels += panel_floats(w.in_dims, count);
    Matrix down{count, w.out_dims, nullptr, w.weight2 + at, 1, w.hidden};
    down.pack(panels);
    if (w.scale) down.scale_columns(panels, scale.data());
    panels += panel_floats(count, w.out_dims);
  }
  return DONE;
}

/// The forward in inference.
EXPORT int swiftkernels_conv_mlp_forward(const PackedWeights* weights, const Call* call) {
  const int threads = usable_threads(call->threads);
  if (!weights->fingerprint.matches(call->batch * call->height * call->width, threads))
    return STALE;
  return Forward(*weights, *call).run();
}

}  // namespace swiftkernels::conv_mlp
