"""Poolings: from scores to token weights to the global query, and the gradient of the scores.

The forward computes two statistics of a sequence: for softmax the maximum of the scores and the sum
of their exponentials, for l2 the norm of the scores and the sum of their squares.
"""

from __future__ import annotations

import triton
import triton.language as tl

from swiftkernels.backends.triton.tiles import sum_partials
from swiftkernels.ops.additive_attention.triton.stages import at_least_eps

NORMALISED = ("l2", "softmax")
"""Poolings with normalised weights. A rounding error is subtracted from their score gradients:
see `residue_of`."""


@triton.jit
def pool_tile(q_tile, scores, valid, pooled, running_max, running_sum, POOLING: tl.constexpr):
    """Add some tokens to the pooled queries [BLOCK_E] and to the statistics [1], [1] of the scores.

    Softmax needs the maximum of the scores and the sum of the exponentials, l2 the sum of the
    squares.
    """
    if POOLING == "softmax":
        scores = tl.where(valid, scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores[None, :], 1))
        # There may be no valid token yet: keep exp() away from inf - inf.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp(running_max - safe_max)
        weights = tl.exp(scores - safe_max)
        running_sum = running_sum * rescale + tl.sum(weights[None, :], 1)
        pooled = pooled * rescale
        running_max = new_max
    elif POOLING == "sum":
        weights = tl.where(valid, scores * 0.0 + 1.0, 0.0)
    else:
        weights = tl.where(valid, scores, 0.0)
        if POOLING == "l2":
            running_sum += tl.sum((weights * weights)[None, :], 1)
    pooled += tl.sum(q_tile * weights[:, None], 0)
    return pooled, running_max, running_sum


@triton.jit
def first_statistic(running_max, running_sum, POOLING: tl.constexpr):
    """The first statistic of a split; the second is running_sum."""
    return running_max if POOLING == "softmax" else running_sum


@triton.jit
def combine_splits(
    pooled_ptr, stat_ptr, num_splits,
    E: tl.constexpr, EPS: tl.constexpr, POOLING: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """G and the two pooling statistics of a batch element, from its splits -> [BLOCK_E], [1], [1].

    The statistics are maximum and sum of the exponentials for softmax, norm and sum of the squares
    for l2.
    """
    first_stat = tl.full([1], float("-inf"), ACC)
    running_sum = tl.zeros([1], ACC)
    cols = tl.arange(0, BLOCK_E)
    if POOLING == "softmax":
        G = tl.zeros([BLOCK_E], ACC)
        for s0 in range(0, num_splits, BLOCK_S):
            splits = s0 + tl.arange(0, BLOCK_S)
            exists = splits < num_splits
            part_max = tl.load(stat_ptr + splits * 2, mask=exists, other=float("-inf"))
            part_sum = tl.load(stat_ptr + splits * 2 + 1, mask=exists, other=0.0)
            mask = exists[:, None] & (cols < E)[None, :]
            part = tl.load(pooled_ptr + splits[:, None] * E + cols[None, :], mask=mask, other=0.0)
            new_max = tl.maximum(first_stat, tl.max(part_max[None, :], 1))
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            rescale = tl.exp(first_stat - safe_max)
            part_scale = tl.exp(part_max - safe_max)
            running_sum = running_sum * rescale + tl.sum((part_sum * part_scale)[None, :], 1)
            G = G * rescale + tl.sum(part * part_scale[:, None], 0)
            first_stat = new_max
        # Without any valid token G is 0.
        G = G / tl.where(running_sum > 0.0, running_sum, 1.0)
        first_stat = tl.where(running_sum > 0.0, first_stat, 0.0)
    else:
        G = sum_partials(pooled_ptr, cols, num_splits, E, BLOCK_S, ACC)
        if POOLING == "l2":
            for s0 in range(0, num_splits, BLOCK_S):
                splits = s0 + tl.arange(0, BLOCK_S)
                squares = tl.load(stat_ptr + splits * 2, mask=splits < num_splits, other=0.0)
                running_sum += tl.sum(squares[None, :], 1)
            first_stat = tl.sqrt(running_sum)
            G = G / at_least_eps(first_stat, EPS)
        else:
            first_stat = running_sum
    return G, first_stat, running_sum


@triton.jit
def token_weights(scores, valid, stat_ptr, EPS: tl.constexpr, POOLING: tl.constexpr):
    """Token weights a from scores [R] and the two pooling statistics of the sequence -> [R]."""
    one = tl.arange(0, 1)
    if POOLING == "softmax":
        highest = tl.load(stat_ptr + one)
        total = tl.load(stat_ptr + 1 + one)
        # A token that is not valid may score above the highest; its exponential must not overflow.
        weights = tl.exp(tl.where(valid, scores - highest, 0.0)) / tl.where(total > 0.0, total, 1.0)
    elif POOLING == "l2":
        weights = scores / at_least_eps(tl.load(stat_ptr + one), EPS)
    elif POOLING == "sum":
        weights = scores * 0.0 + 1.0
    else:
        weights = scores
    return tl.where(valid, weights, 0.0)


@triton.jit
def score_gradients(
    grad_weights, weights, valid, G_dG, stat_ptr, EPS: tl.constexpr, POOLING: tl.constexpr
):
    """Gradients ds [R] of the scores, from those of the token weights, da = grad_weights [R].

    G_dG [1] is G . dG = sum_n a_n da_n.
    """
    if POOLING == "softmax":
        grad = weights * (grad_weights - G_dG)
    elif POOLING == "l2":
        norm = tl.load(stat_ptr + tl.arange(0, 1))
        # Below eps the norm is a constant: no projection.
        grad = (grad_weights - tl.where(norm >= EPS, weights * G_dG, 0.0)) / at_least_eps(norm, EPS)
    elif POOLING == "sum":
        grad = grad_weights * 0.0
    else:
        grad = grad_weights
    return tl.where(valid, grad, 0.0)


@triton.jit
def residue_of(grad_scores, weights, stat_ptr, EPS: tl.constexpr, POOLING: tl.constexpr):
    """The share of some tokens in the rounding error c of the score gradients -> [1].

    The exact score gradients, for l2 times the token weights, sum to zero over a batch element. The
    computed ones sum to c, mostly the error of G . dG. grad_scores - c weights sums to zero again.
    This matters where the tokens are almost equal.
    """
    if POOLING == "softmax":
        residue = tl.sum(grad_scores[None, :], 1)
    else:
        residue = tl.sum((weights * grad_scores)[None, :], 1)
        residue = tl.where(tl.load(stat_ptr + tl.arange(0, 1)) >= EPS, residue, 0.0)
    return residue
