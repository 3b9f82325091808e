// How threads share the tokens of a batch, for kernels with two passes over the tokens of a batch
// element. The second pass needs sums of the first.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace swiftkernels {

/// Most tokens of batch elements that may be grouped: a block has one or more of them.
constexpr int64_t SHORT_SEQUENCE = 256;

/// Tokens are summed slice by slice, and the sums of slices are added in order. So results depend
/// neither on blocks nor on threads.
constexpr int64_t MAX_SLICE = 64;

/// Tokens in a slice. There are at least two slices, so that two threads can share a short
/// sequence.
inline int64_t slice_rows(int64_t tokens) { return std::min(MAX_SLICE, (tokens + 1) / 2); }

inline int64_t slices_of(int64_t tokens) {
  return (tokens + slice_rows(tokens) - 1) / slice_rows(tokens);
}

/// Rows of a block of about `floats` floats: complete slices, at least one and at most three.
///
/// The exact size hardly matters. With all sizes in the kernels halved or doubled, the geometric
/// mean of the times at five shapes of 48 to 224 channels changed by less than 1 %, on one thread
/// of an Intel Xeon with AVX-512 and 2 MB of second-level cache.
inline int64_t block_rows(int64_t floats, int64_t floats_per_row) {
  const int64_t slices = floats / floats_per_row / MAX_SLICE;
  return std::min<int64_t>(3, std::max<int64_t>(1, slices)) * MAX_SLICE;
}

/// Tokens [first, first + rows) of each of `count` batch elements, and the thread for them.
struct TokenBlock {
  int64_t element, count;
  int64_t first, rows;
  int64_t index;  // of the block in its batch element
  int thread;
  int state;  // the index of the state of these batch elements

  int64_t all_rows() const { return count * rows; }
  /// The part of the i-th batch element.
  TokenBlock of(int64_t i) const { return {element + i, 1, first, rows, index, thread, state}; }
};

/// The threads [thread, thread + threads) for a batch element. `thread` is also the index of its
/// state.
struct Team {
  int64_t element;
  int thread, threads;
};

/// Which work a thread takes.
enum class Division {
  GROUPED,   // groups of short batch elements, both passes while they are in the cache
  SEPARATE,  // one batch element, block by block
  SHARED,    // some blocks of a batch element that all threads share
};

struct Schedule {
  Division division;
  int threads;
  int64_t batch, tokens;
  int64_t elements;   // batch elements in a block
  int64_t rows;       // tokens in a block, at most
  int64_t blocks;     // in the batch if grouped, else in each batch element
  bool even = false;  // blocks of almost equal size, not all but the last of `rows` tokens

  /// Blocks of complete batch elements, with up to `max_rows` tokens in each block.
  static Schedule grouped(int64_t batch, int64_t tokens, int64_t max_rows, int threads) {
    const int64_t most =
        std::max<int64_t>(1, std::min(SHORT_SEQUENCE, max_rows) / std::max<int64_t>(1, tokens));
    // A number of blocks that keeps all threads busy to the end.
    const int64_t rounds = (batch + most * threads - 1) / (most * threads);
    const int64_t elements = (batch + rounds * threads - 1) / (rounds * threads);
    const int64_t blocks = (batch + elements - 1) / elements;
    return {Division::GROUPED, threads, batch, tokens, elements, elements * tokens, blocks};
  }

  /// Blocks of complete slices of a batch element, with up to `max_rows` tokens.
  static Schedule tiled(int64_t batch, int64_t tokens, int64_t max_rows, int threads) {
    const Division division = division_of(batch, threads);
    const int64_t sharing = division == Division::SHARED ? threads : 1;
    const int64_t share = (tokens + sharing - 1) / sharing;
    const int64_t rows = round_up(std::min(max_rows, share), slice_rows(tokens));
    return {division, threads, batch, tokens, 1, rows, (tokens + rows - 1) / rows};
  }

  /// `blocks` almost equal blocks of each batch element.
  static Schedule evenly(int64_t batch, int64_t tokens, int64_t blocks, int threads) {
    const int64_t rows = (tokens + blocks - 1) / blocks;
    return {division_of(batch, threads), threads, batch, tokens, 1, rows, blocks, true};
  }

  /// Whether there are enough batch elements to give each thread its own.
  static bool separates(int64_t batch, int threads) {
    return batch >= threads && (batch % threads == 0 || batch >= 4 * threads);
  }

  bool is_grouped() const { return division == Division::GROUPED; }
  /// Batch elements, or groups of them, that are processed at the same time.
  int states() const { return division == Division::SHARED ? 1 : threads; }

  /// Call the kernel's `both_passes(TokenBlock)` for groups of batch elements, or for every batch
  /// element `begin(Team)`, `first_pass(TokenBlock)` for its blocks, `between(Team)`,
  /// `second_pass(TokenBlock)` for its blocks, and `end(Team)`.
  template <class Kernel>
  void run(Kernel& kernel) const {
    switch (division) {
      case Division::GROUPED:
        return parallel_for(blocks, threads, [&](int64_t i, int thread) {
          const int64_t element = i * elements, count = std::min(elements, batch - element);
          kernel.both_passes(TokenBlock{element, count, 0, tokens, 0, thread, thread});
        });
      case Division::SEPARATE:
        return parallel_for(batch, threads, [&](int64_t element, int thread) {
          run_element(kernel, {element, thread, 1});
        });
      case Division::SHARED:
        for (int64_t element = 0; element < batch; element++)
          run_element(kernel, {element, 0, threads});
    }
  }

 private:
  template <class Kernel>
  void run_element(Kernel& kernel, const Team& team) const {
    auto for_blocks = [&](auto pass) {
      parallel_for(blocks, team.threads, [&](int64_t i, int thread) {
        pass(block(team.element, i, team.thread + thread, team.thread));
      });
    };
    kernel.begin(team);
    for_blocks([&](const TokenBlock& b) { kernel.first_pass(b); });
    kernel.between(team);
    for_blocks([&](const TokenBlock& b) { kernel.second_pass(b); });
    kernel.end(team);
  }

  static Division division_of(int64_t batch, int threads) {
    return separates(batch, threads) ? Division::SEPARATE : Division::SHARED;
  }

  TokenBlock block(int64_t element, int64_t i, int thread, int state) const {
    const int64_t begin = even ? tokens * i / blocks : i * rows;
    const int64_t end = even ? tokens * (i + 1) / blocks : std::min(tokens, begin + rows);
    return {element, 1, begin, end - begin, i, thread, state};
  }
};

}  // namespace swiftkernels
