// The backward for long sequences, which does not compute queries and keys.
#pragma once

#include "rows.h"
#include "schedule.h"
#include "train_weights.h"

namespace swiftkernels::additive {

/// Whether the bias cancels most of a row of q or k. Then sums that are linear in x lose more
/// digits than the row. Without norms a few such rows do not matter, because they are a small part
/// of every sum; and the folded backward can handle biases that cancel most of all rows.
bool biases_cancel(const RawWeights& layer, const BackwardCall& call);

/// Gradients from x, dout and the statistics of the forward.
Status folded_backward(const RawWeights& layer, const BackwardCall& call);

}  // namespace swiftkernels::additive
