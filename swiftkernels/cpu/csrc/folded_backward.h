// The backward for items of many tokens, without their queries and keys.
#pragma once

#include "training.h"

/// Whether the bias cancels most of some unit row of q or k. What is linear in x then loses more
/// digits than the rows themselves would. Without norms, a few short rows are a small part of every
/// sum, and what cancels most of all rows is dealt with in the folded backward.
bool biases_cancel(const RawLayer& layer, const BackwardCall& call);

/// Gradients from x, dout and the statistics of the forward alone.
Status folded_backward(const RawLayer& layer, const BackwardCall& call);
