// The backward for long sequences, without their queries and keys.
#pragma once

#include "rows.h"
#include "schedule.h"
#include "train_weights.h"

namespace swiftkernels::additive {

/// Whether the bias cancels most of some row of q or k. What is linear in x then loses more digits
/// than the rows themselves do. Without norms this does not matter: a few short rows are a small
/// part of every sum, and the folded backward handles biases that cancel most of all rows.
bool biases_cancel(const RawLayer& layer, const BackwardCall& call);

/// Gradients from x, dout and the statistics of the forward alone.
Status folded_backward(const RawLayer& layer, const BackwardCall& call);

}  // namespace swiftkernels::additive
