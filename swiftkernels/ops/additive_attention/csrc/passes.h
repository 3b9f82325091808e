// The forward for one image, pass by pass, for callers with a parallel region of their own.
#pragma once

#include <memory>

#include "abi.h"

namespace swiftkernels::additive {

/// The order: `score` for all blocks of tokens, `finish` once, `fold` for all parts, `output` for
/// all blocks. Calls of one pass may run at the same time on different threads.
class Passes {
 public:
  virtual ~Passes() = default;
  virtual int64_t workspace_floats() const = 0;  // of a thread
  virtual int64_t state_floats() const = 0;      // shared, from `score` to `output`
  /// Set the scratch; workspaces of threads are `stride` floats apart.
  virtual void use(float* workspaces, int64_t stride, float* state) = 0;

  virtual int64_t blocks() const = 0;
  virtual int64_t parts() const = 0;
  /// The first token of a block; of the number of blocks, the end.
  virtual int64_t first_token(int64_t block) const = 0;

  virtual void score(int64_t block, int thread) const = 0;
  virtual void finish(int thread) const = 0;
  virtual void fold(int64_t part, int thread) const = 0;
  virtual void output(int64_t block, int thread) const = 0;
  virtual Status status() const = 0;
};

/// For a call with a batch of one image and packed weights; both have to outlive the result.
std::unique_ptr<Passes> passes_of(const PackedWeights& layer, const Call& call);

}  // namespace swiftkernels::additive
