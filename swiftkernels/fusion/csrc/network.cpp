// Runs a chain of steps on a batch of images, in one parallel region.
//
// An image passes all steps before the next one: its maps stay in the cache. Threads take whole
// images, and share those that are left over. The steps of a shared image are divided into tiles,
// which the threads take in order. A tile waits only for the tiles of the step before that it
// reads, or whose input it overwrites. Neither the tiles nor the threads change how a number is
// computed, so the result is the same for any number of threads.
#include <deque>
#include <new>
#include <vector>

#include "../../ops/additive_attention/csrc/passes.h"
#include "../../ops/conv_mlp/csrc/tiles.h"
#include "maps.h"
#include "parallel.h"
#include "tasks.h"
#if !defined(_WIN32)
#include <time.h>
#endif

namespace swiftkernels::fusion {
namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

/// What threads do between two waits for all tiles: a step, or a pass of an attention.
enum class Work {
  LOAD,
  STEM,
  CONVOLUTION,
  PARTIAL,
  REPEAT,
  DEPTHWISE,
  MOMENTS,
  NORMALISE,
  CONV_MLP,
  AVERAGE,
  SQUEEZE,
  EXCITE,
  SCORE,
  FINISH,
  FOLD,
  OUTPUT,
  POOL,
  LINEAR,
  STORE
};

struct Phase {
  Work work;
  int64_t step;  // -1 for LOAD and STORE
  const void* weights;
  additive::Passes* passes;  // of an attention
  int64_t tiles;
  Map in, out;
  int64_t out_dims;
  int64_t reach;  // rows around a tile that it reads
  bool local;     // waits only for the tiles before that it reads or whose input it overwrites
  int64_t first_task;
  float* state;  // gates of a squeeze and excitation; mean and scale of an image
  Map added;     // a map that is added to the output, or without data

  /// The first row of a tile of complete rows; of the number of tiles, the end.
  int64_t first_row(int64_t tile) const { return out.height * tile / tiles; }

  /// The same for a pixel of another tile.
  int64_t first_pixel(int64_t tile) const {
    return passes ? passes->first_token(tile) : out.pixels() * tile / tiles;
  }
};

/// One image at a time on some threads, with their memory.
class Lane {
 public:
  Lane(const Program& program, const Call& call, int threads)
      : program_(program), call_(call), threads_(threads) {
    Arena size;
    lay_out(size);
    floats_ = size.used();
  }

  int64_t floats() const { return floats_; }

  void use(float* memory) {
    phases_.clear(), attentions_.clear(), calls_.clear();
    Arena arena(memory);
    lay_out(arena);
  }

  /// Tiles of all phases.
  int64_t task_count() const { return phases_.back().first_task + phases_.back().tiles; }

  /// Run an image on one thread.
  void run(int64_t image, double* seconds) const {
    for (const Phase& phase : phases_) {
      const double start = seconds ? now() : 0.;
      for (int64_t tile = 0; tile < phase.tiles; tile++) run_tile(phase, tile, image, 0);
      if (seconds && phase.step >= 0) seconds[phase.step] += now() - start;
    }
  }

  /// Take part in an image that several threads share.
  void share(int64_t image, Tasks& tasks, int thread) const {
    size_t at = 0;
    for (int64_t task; (task = tasks.take()) >= 0;) {
      while (task >= phases_[at].first_task + phases_[at].tiles) at++;
      const Phase& phase = phases_[at];
      const int64_t tile = task - phase.first_task;
      if (at > 0) wait_for_inputs(phases_[at - 1], phase, tile, tasks);
      run_tile(phase, tile, image, thread);
      tasks.finish(task);
    }
  }

  Status status() const {
    for (const auto& attention : attentions_)
      if (attention->status() != DONE) return attention->status();
    return DONE;
  }

 private:
  static void wait_for_inputs(const Phase& before, const Phase& phase, int64_t tile, Tasks& tasks) {
    int64_t first = 0, end = before.tiles;
    if (phase.local) {
      // To the pixels at the corners of the kernel.
      const int64_t reach = std::max(before.reach, phase.reach) * (phase.in.width + 1);
      while (before.first_pixel(first + 1) <= phase.first_pixel(tile) - reach) first++;
      while (before.first_pixel(end - 1) >= phase.first_pixel(tile + 1) + reach) end--;
    }
    tasks.wait(before.first_task + first, before.first_task + end);
  }

  template <class T>
  static const T& as(const void* weights) {
    return *static_cast<const T*>(weights);
  }

  /// Take the memory and list the phases; without memory in the arena they only count.
  void lay_out(Arena& arena) {
    int64_t channels = program_.in_dims, scratch = 0;
    const bool loads = program_.steps[0].kind != STEM;
    Map in{nullptr, call_.height, call_.width, padded(channels)};
    // The maps of all steps lie in two buffers in turn, or in more where maps are added later.
    int64_t largest = loads ? in.pixels() * in.stride : 0;
    for_each_map(
        [&](int64_t, const Map& map) { largest = std::max(largest, map.pixels() * map.stride); });
    const std::vector<int> places = places_of_maps();
    std::vector<float*> buffers;
    for (int i = *std::max_element(places.begin(), places.end()); i >= 0; i--)
      buffers.push_back(arena.take(largest));
    phases_.clear();
    in.data = buffers[places[0]];
    std::vector<Map> maps{in};
    last_in_.assign(buffers.size(), Map{});
    last_in_[places[0]] = in;
    const auto add = [&](Work work, int64_t step, Map out, int64_t dims, int64_t tiles) -> Phase& {
      const int64_t first = phases_.empty() ? 0 : phases_.back().first_task + phases_.back().tiles;
      const void* weights = step >= 0 ? program_.steps[step].weights : nullptr;
      phases_.push_back(
          {work, step, weights, nullptr, tiles, in, out, dims, 0, false, first, nullptr, {}});
      return phases_.back();
    };
    const auto scratch_of = [&](auto make) {
      Arena size;
      make(size);
      scratch = std::max(scratch, size.used());
    };
    if (loads) {
      add(Work::LOAD, -1, in, channels, std::min<int64_t>(in.height, 4 * threads_));
    }
    for_each_map([&](int64_t i, const Map& map) {
      const Step& step = program_.steps[i];
      Map out = map;
      out.data = buffers[places[i + 1]];
      before_ = last_in_[places[i + 1]];
      const int64_t dims = dims_of(step, channels), pixels = out.pixels();
      switch (step.kind) {
        case STEM: {
          const int64_t full = (out.height + StemRows::BAND - 1) / StemRows::BAND;
          const int64_t bands = std::min(out.height, round_up(full, threads_));
          add(Work::STEM, i, out, dims, bands);
          scratch_of([&](Arena& a) {
            stem_rows(step.weights).workspace(highest_band(phases_.back()), a);
          });
          break;
        }
        case CONVOLUTION: {
          const auto& p = as<Product>(step.weights);
          const int64_t most = p.is_pointwise() ? conv_mlp::TILE : convolution_tile(p.depth());
          const int64_t tiles = conv_mlp::tiles_of(pixels, most, threads_);
          add(Work::CONVOLUTION, i, out, dims, tiles).reach = p.kernel;
          if (p.is_pointwise()) keep_local(0);
          scratch_of([&](Arena& a) { patch_tile(p, (pixels + tiles - 1) / tiles, a); });
          break;
        }
        case PARTIAL_CONVOLUTION: {
          const auto& p = as<PartialWeights>(step.weights).product;
          const int64_t tiles = conv_mlp::tiles_of(pixels, convolution_tile(p.depth()), threads_);
          add(Work::PARTIAL, i, out, dims, tiles);
          keep_local(p.kernel / 2);
          scratch_of([&](Arena& a) { patch_tile(p, (pixels + tiles - 1) / tiles, a); });
          break;
        }
        case NORMALISE: {
          float* moments = nullptr;
          if (as<NormaliseWeights>(step.weights).over_image) {
            moments = arena.take(2);
            add(Work::MOMENTS, i, in, dims, 1).state = moments;
          }
          const int64_t tiles = conv_mlp::tiles_of(pixels, conv_mlp::TILE, threads_);
          add(Work::NORMALISE, i, out, dims, tiles).state = moments;
          keep_local(0);
          break;
        }
        case DEPTHWISE: {
          const auto& d = as<DepthwiseWeights>(step.weights);
          if (d.multiplier > 1) {
            const Map more{nullptr, in.height, in.width, padded(dims)};
            Map repeated = more;
            repeated.data = arena.take(more.pixels() * more.stride);
            add(Work::REPEAT, i, repeated, dims,
                conv_mlp::tiles_of(more.pixels(), conv_mlp::TILE, threads_));
            in = repeated;
          }
          const int64_t tiles = conv_mlp::tiles_of(pixels, conv_mlp::TILE, threads_);
          add(Work::DEPTHWISE, i, out, dims, tiles).reach = d.kernel;
          if (d.multiplier == 1 && d.stride == 1) keep_local(d.kernel / 2);
          break;
        }
        case CONV_MLP: {
          const auto& w = as<conv_mlp::PackedWeights>(step.weights);
          const int64_t tiles = conv_mlp::tiles_of(pixels, conv_mlp::TILE, threads_);
          add(Work::CONV_MLP, i, out, dims, tiles);
          keep_local(w.kernel / 2);
          scratch_of(
              [&](Arena& a) { conv_mlp::Workspace::make(w, (pixels + tiles - 1) / tiles, a); });
          break;
        }
        case AVERAGE:
          add(Work::AVERAGE, i, out, dims, conv_mlp::tiles_of(pixels, conv_mlp::TILE, threads_));
          keep_local(as<AverageWeights>(step.weights).kernel / 2);
          break;
        case SQUEEZE_EXCITE: {
          const int64_t tiles = conv_mlp::tiles_of(pixels, conv_mlp::TILE, threads_);
          float* gates = arena.take(squeeze_floats(as<SqueezeExciteWeights>(step.weights)));
          add(Work::SQUEEZE, i, in, dims, 1).state = gates;
          add(Work::EXCITE, i, out, dims, tiles).state = gates;
          break;
        }
        case ATTENTION:
          add_attention(step, i, in, out, dims, arena, add, scratch);
          break;
        case POOL:
          add(Work::POOL, i, out, dims, 1);
          break;
        default:
          add(Work::LINEAR, i, out, dims, 1);
      }
      if (step.adds) phases_.back().added = maps[i + 1 - step.adds];
      in = out, channels = dims;
      maps.push_back(out);
      last_in_[places[i + 1]] = out;
    });
    add(Work::STORE, -1, in, channels, std::min<int64_t>(in.height, 4 * threads_));
    scratch_ = round_up(scratch, 16);
    workspaces_ = arena.take(threads_ * scratch_);
    if (!workspaces_) return;
    for (size_t i = 0; i < attentions_.size(); i++)
      attentions_[i]->use(workspaces_, scratch_, states_[i]);
  }

  /// The buffer of each map: of the input, and of the output of each step. A buffer is used again
  /// when the last step that reads its map is done.
  std::vector<int> places_of_maps() const {
    std::vector<int64_t> last(program_.count + 1);
    for (int64_t i = 0; i < program_.count; i++) {
      last[i] = std::max(last[i], i);
      if (const int64_t adds = program_.steps[i].adds) last[i + 1 - adds] = i;
    }
    std::vector<int> places(program_.count + 1);
    for (int64_t i = 1; i <= program_.count; i++) {
      const auto taken = [&](int place) {
        for (int64_t j = 0; j < i; j++)
          if (places[j] == place && last[j] >= i - 1) return true;
        return false;
      };
      while (taken(places[i])) places[i]++;
    }
    return places;
  }

  /// Let the last phase wait only for the tiles of the phase before that it needs, where both have
  /// the same pixels, and the map that it overwrites has rows of the same length.
  void keep_local(int64_t reach) {
    Phase& phase = phases_.back();
    phase.reach = reach;
    if (phases_.size() < 2) return;
    const Phase& before = phases_[phases_.size() - 2];
    constexpr Work tiled[] = {Work::CONVOLUTION, Work::PARTIAL, Work::DEPTHWISE, Work::NORMALISE,
                              Work::CONV_MLP,    Work::AVERAGE, Work::EXCITE,    Work::OUTPUT};
    phase.local = std::find(std::begin(tiled), std::end(tiled), before.work) != std::end(tiled) &&
                  before.in.pixels() == phase.out.pixels() &&
                  before_.pixels() == phase.out.pixels() && before_.stride == phase.out.stride;
  }

  template <class Add>
  void add_attention(const Step& step, int64_t i, const Map& in, const Map& out, int64_t dims,
                     Arena& arena, Add add, int64_t& scratch) {
    const auto& w = as<additive::PackedWeights>(step.weights);
    auto call = std::make_unique<additive::Call>();
    call->batch = 1, call->tokens = in.pixels();
    call->form = step.form, call->threads = threads_, call->type = FLOAT32, call->residual = 1;
    call->x = in.data, call->out = out.data;
    call->x_strides[0] = in.pixels() * in.stride, call->out_strides[0] = out.pixels() * out.stride;
    call->x_strides[1] = in.stride, call->out_strides[1] = out.stride;
    call->x_strides[2] = call->out_strides[2] = 1;
    attentions_.push_back(additive::passes_of(w, *call));
    calls_.push_back(std::move(call));
    additive::Passes* passes = attentions_.back().get();
    states_.resize(attentions_.size());
    states_.back() = arena.take(passes->state_floats());
    scratch = std::max(scratch, passes->workspace_floats());
    const bool follows = !phases_.empty() && phases_.back().work == Work::CONV_MLP;
    Phase& score = add(Work::SCORE, i, in, dims, passes->blocks());
    score.passes = passes, score.local = follows;
    add(Work::FINISH, i, in, dims, 1).passes = passes;
    if (passes->parts() > 0) add(Work::FOLD, i, in, dims, passes->parts()).passes = passes;
    add(Work::OUTPUT, i, out, dims, passes->blocks()).passes = passes;
  }

  static int64_t dims_of(const Step& step, int64_t channels) {
    switch (step.kind) {
      case STEM:
        return as<Stem>(step.weights).second.out_dims;
      case CONVOLUTION:
      case LINEAR:
        return as<Product>(step.weights).out_dims;
      case PARTIAL_CONVOLUTION:
        return as<PartialWeights>(step.weights).channels;
      case DEPTHWISE:
        return as<DepthwiseWeights>(step.weights).channels;
      case CONV_MLP:
        return as<conv_mlp::PackedWeights>(step.weights).out_dims;
      default:
        return channels;
    }
  }

  /// Call use(step, map) for the output map of every step.
  template <class Use>
  void for_each_map(Use use) const {
    int64_t height = call_.height, width = call_.width, channels = program_.in_dims;
    for (int64_t i = 0; i < program_.count; i++) {
      const Step& step = program_.steps[i];
      channels = dims_of(step, channels);
      if (step.kind == STEM) height = halved(halved(height)), width = halved(halved(width));
      if (step.kind == CONVOLUTION) {
        const auto& p = as<Product>(step.weights);
        height = convolved(height, p.kernel, p.stride, p.padding);
        width = convolved(width, p.kernel, p.stride, p.padding);
      }
      if (step.kind == DEPTHWISE) {
        const auto& d = as<DepthwiseWeights>(step.weights);
        height = convolved(height, d.kernel, d.stride, d.kernel / 2);
        width = convolved(width, d.kernel, d.stride, d.kernel / 2);
      }
      if (step.kind == POOL) height = width = 1;
      use(i, Map{nullptr, height, width, padded(channels)});
    }
  }

  StemRows stem_rows(const void* weights) const {
    return {as<Stem>(weights), call_.x, call_.type, call_.height, call_.width};
  }
  static int64_t highest_band(const Phase& phase) {
    return (phase.out.height + phase.tiles - 1) / phase.tiles;
  }

  void run_tile(const Phase& phase, int64_t tile, int64_t image, int thread) const {
    Arena arena(workspaces_ + thread * scratch_);
    const Map &in = phase.in, &out = phase.out;
    const Tile rows{out.data, out.stride};
    const int64_t first = phase.first_pixel(tile), end = phase.first_pixel(tile + 1);
    const Tile added =
        phase.added.data ? Tile{phase.added.pixel(first), phase.added.stride} : Tile{};
    switch (phase.work) {
      case Work::LOAD:
        for (int64_t y = phase.first_row(tile); y < phase.first_row(tile + 1); y++)
          load_tile(call_.x.row(image, y, call_.type), 0, 0, out.width, phase.out_dims,
                    rows.from(y * out.width));
        return;
      case Work::STEM: {
        const StemRows stem = stem_rows(phase.weights);
        const auto workspace = stem.workspace(highest_band(phase), arena);
        return stem.run(image, phase.first_row(tile), phase.first_row(tile + 1), rows, workspace);
      }
      case Work::CONVOLUTION: {
        const auto& p = as<Product>(phase.weights);
        return convolve_tile(p, in, 0, in.height, first, end, rows.from(first),
                             patch_tile(p, end - first, arena), added);
      }
      case Work::PARTIAL: {
        const auto& w = as<PartialWeights>(phase.weights);
        return partial_tile(in, w, first, end, rows.from(first),
                            patch_tile(w.product, end - first, arena));
      }
      case Work::REPEAT:
        return repeat_tile(in, as<DepthwiseWeights>(phase.weights), first, end, rows.from(first));
      case Work::MOMENTS:
        return moments(in, as<NormaliseWeights>(phase.weights), 0, in.pixels(), phase.state,
                       phase.state + 1);
      case Work::NORMALISE:
        return normalise_tile(in, as<NormaliseWeights>(phase.weights), phase.state, first, end,
                              rows.from(first));
      case Work::DEPTHWISE:
        return depthwise_tile(in, as<DepthwiseWeights>(phase.weights), first, end,
                              rows.from(first));
      case Work::CONV_MLP: {
        const auto& w = as<conv_mlp::PackedWeights>(phase.weights);
        return conv_mlp::run_tile(w, in, first, end, rows.from(first),
                                  conv_mlp::Workspace::make(w, end - first, arena), added);
      }
      case Work::AVERAGE:
        return average_tile(in, as<AverageWeights>(phase.weights), first, end, rows.from(first),
                            added);
      case Work::SQUEEZE:
        return squeeze(in, as<SqueezeExciteWeights>(phase.weights), phase.state);
      case Work::EXCITE:
        return excite_tile(in, phase.out_dims, phase.state, first, end, rows.from(first));
      case Work::SCORE:
        return phase.passes->score(tile, thread);
      case Work::FINISH:
        return phase.passes->finish(thread);
      case Work::FOLD:
        return phase.passes->fold(tile, thread);
      case Work::OUTPUT:
        return phase.passes->output(tile, thread);
      case Work::POOL:
        return pool(in, phase.out_dims, out.data);
      case Work::LINEAR: {
        const auto& p = as<Product>(phase.weights);
        Matrix matrix = Matrix::packed(p.panels, p.in_dims, p.out_dims);
        // Of all steps, rounding errors of the last one count most. It is short of memory, not of
        // multipliers, so short chains cost nothing.
        matrix.chain = 2 * STEP;
        return gemm({in.data, in.stride}, in.pixels(), matrix, p.bias, rows, nullptr);
      }
      case Work::STORE:  // out is in
        for (int64_t y = phase.first_row(tile); y < phase.first_row(tile + 1); y++)
          store_tile(rows.from(y * out.width), out.width, phase.out_dims,
                     call_.out.row(image, y, call_.type), 0, 0);
        return;
    }
  }

  const Program& program_;
  const Call& call_;
  const int threads_;
  int64_t floats_ = 0, scratch_ = 0;
  float* workspaces_ = nullptr;
  std::vector<Phase> phases_;
  std::vector<Map> last_in_;  // while laying out: the last map in each buffer
  Map before_{};              // and that which the next step overwrites
  std::vector<std::unique_ptr<additive::Call>> calls_;
  std::vector<std::unique_ptr<additive::Passes>> attentions_;
  std::vector<float*> states_;
};

/// Memory that the calling thread keeps for its next call: new memory costs a page fault for every
/// 4 KB.
class KeptScratch {
 public:
  /// Null if there is not enough memory.
  float* take(int64_t floats) {
    if (floats > floats_) {
      scratch_ = nullptr;
      scratch_ = std::make_unique<Scratch>(floats);
      floats_ = *scratch_ ? floats : 0;
    }
    return floats_ ? scratch_->data() : nullptr;
  }
  void release() {
    if (floats_ > MOST) scratch_ = nullptr, floats_ = 0;
  }

 private:
  static constexpr int64_t MOST = 1 << 24;  // 64 MB
  std::unique_ptr<Scratch> scratch_;
  int64_t floats_ = 0;
};

thread_local KeptScratch kept;

Status run(const Program& program, const Call& call) {
  const int threads = usable_threads(call.threads);
  const int64_t single = call.batch >= threads ? call.batch / threads * threads : 0;
  std::vector<std::unique_ptr<Lane>> lanes;  // one for each thread, and one for shared images
  if (single > 0)
    for (int i = 0; i < threads; i++) lanes.push_back(std::make_unique<Lane>(program, call, 1));
  if (single < call.batch) lanes.push_back(std::make_unique<Lane>(program, call, threads));
  int64_t floats = 0;
  for (const auto& lane : lanes) floats += lane->floats();
  float* memory = kept.take(floats);
  if (!memory) return OUT_OF_MEMORY;
  for (const auto& lane : lanes) {
    lane->use(memory);
    memory += lane->floats();
  }
  std::deque<Tasks> tasks;  // of each shared image
  for (int64_t image = single; image < call.batch; image++)
    tasks.emplace_back(lanes.back()->task_count());
  std::atomic<int64_t> next{0};
  parallel_region(threads, [&](int thread) {
    for (int64_t image; (image = next.fetch_add(1)) < single;)
      lanes[thread]->run(image, thread == 0 ? call.seconds : nullptr);
    for (size_t i = 0; i < tasks.size(); i++) {
      if (i > 0) tasks[i - 1].wait_for_all();  // the images share one memory
      lanes.back()->share(single + static_cast<int64_t>(i), tasks[i], thread);
    }
  });
  kept.release();
  for (const auto& lane : lanes)
    if (lane->status() != DONE) return lane->status();
  return DONE;
}

}  // namespace

EXPORT int swiftkernels_network_forward(const Program* program, const Call* call) {
  try {
    return run(*program, *call);
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
}

}  // namespace swiftkernels::fusion
