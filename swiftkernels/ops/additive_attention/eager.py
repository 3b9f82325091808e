"""The algorithm of the kernels in PyTorch's operators, as a backend (`ops/operator.py`).

It is for devices without kernels of ours, from tokens or from given queries and keys. One GEMM
computes queries and keys; norms and scores are applied in place. The backward needs only the inputs
and G from the forward: it computes q and k again, and the gradients of the two output layers from
second moments (derivation in README.md). The batch is processed in chunks that fit in the
processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftkernels.backends.layouts import accumulator
from swiftkernels.ops.additive_attention.reference import pool_weights
from swiftkernels.ops.additive_attention.weights import (
    AnyWeights,
    Options,
    Weights,
    pack_projections,
)
from swiftkernels.ops.operator import Needs

CHUNK_BYTES = 1 << 20
"""Bytes of the rows [q | k] of a chunk."""

POOL_TOKENS = 512
"""Tokens of a sum. A longer one, token by token, is less accurate than eager's."""


class Saved(NamedTuple):
    """What the backward needs besides the inputs."""

    global_query: Tensor
    """G, [B, E]"""


class _Rows(NamedTuple):
    """What forward and backward need of some batch elements, in the accumulator type."""

    q: Tensor
    """Normalised; without qk_norm, as it was; [b, N, E]."""
    k: Tensor
    q_norms: Tensor | None
    """Norms of the rows before, [b, N, 1]; None without qk_norm."""
    k_norms: Tensor | None
    scores: Tensor
    """[b, N]; 0 for masked tokens."""
    weights: Tensor
    """Token weights a, [b, N]."""


def _operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in the storage type. float16 saturates, so that no inf * 0 becomes NaN."""
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        t = torch.where(t.isinf(), t, t.clamp(-limit, limit))  # infinity was in the input
    return t.to(dtype)


def _chunks(q: Tensor, width: int) -> Iterator[slice]:
    element_bytes = 2 * q.shape[1] * width * q.element_size()
    step = max(1, CHUNK_BYTES // max(1, element_bytes))
    return (slice(start, start + step) for start in range(0, q.shape[0], step))


def _normalize_(rows: Tensor, options: Options) -> Tensor | None:
    """Divide the rows by max(norm, eps), in place; returns the norms."""
    if not options.qk_norm:
        return None
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    rows.mul_(norms.clamp_min(options.eps).reciprocal_())
    return norms


def _rows(q: Tensor, k: Tensor, w_g: Tensor, mask: Tensor | None, options: Options) -> _Rows:
    """Normalise q and k (in place) and score the queries."""
    q_norms, k_norms = _normalize_(q, options), _normalize_(k, options)
    scores = (q @ w_g.flatten().to(q.dtype)).mul_(options.scale)
    weights = pool_weights(scores, mask, options.pooling, options.eps)
    if mask is not None:
        scores = scores.masked_fill(~mask, 0)
    return _Rows(q, k, q_norms, k_norms, scores, weights)


def _pool(rows: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights_n rows_n, [b, N, E] -> [b, E]."""
    end = rows.shape[1] // POOL_TOKENS * POOL_TOKENS  # of the complete blocks
    rest = torch.bmm(weights[:, end:].unsqueeze(1), rows[:, end:]).squeeze(1)
    if end == 0:
        return rest
    blocks = (-1, POOL_TOKENS)
    row_blocks = rows[:, :end].unflatten(1, blocks)
    weight_blocks = weights[:, :end].unflatten(1, blocks).unsqueeze(2)
    return torch.matmul(weight_blocks, row_blocks).sum((1, 2)) + rest


def saved_like(inputs: Sequence[Tensor], weights: AnyWeights, keep: str) -> Saved:
    """Uninitialised results that a forward saves."""
    x = inputs[0]
    return Saved(x.new_empty(x.shape[0], weights.width, dtype=accumulator(x.dtype)))


def forward(
    inputs: Sequence[Tensor],
    weights: AnyWeights,
    mask: Tensor | None,
    options: Options,
    keep: str = "",
) -> tuple[Tensor, Saved]:
    """Output [B, N, D], and what the backward needs.

    Args:
        inputs: x, or q and k.
        weights: `Weights`, or `OutputWeights` for q and k.
        mask: of the tokens.
        options: of the operator.
        keep: not used; only other backends have a choice.
    """
    batch, n_tokens, _ = inputs[0].shape
    out = inputs[0].new_empty(batch, n_tokens, weights.token_dim)
    saved = saved_like(inputs, weights, keep)
    projection = _Projection(inputs, weights, saved.global_query.dtype)
    for elements in _chunks(inputs[0], weights.width):
        q, k = projection.rows(elements)
        rows = _rows(q, k, weights.w_g, None if mask is None else mask[elements], options)
        G = _pool(rows.q, rows.weights)
        saved.global_query[elements] = G
        dtype = out.dtype
        t = _operand(rows.k.mul_(G.unsqueeze(1)), dtype)
        y = F.linear(t, weights.proj_weight, weights.proj_bias) + _operand(rows.q, dtype)
        out[elements] = F.linear(y, weights.final_weight, weights.final_bias)
    return out, saved


def backward(
    dout: Tensor,
    inputs: Sequence[Tensor],
    weights: AnyWeights,
    mask: Tensor | None,
    saved: Saved,
    options: Options,
    needs: Needs,
) -> list[Tensor | None]:
    """Gradients of inputs and weights; None where not needed or without bias."""
    sums = _Backward(weights, mask, saved.global_query, options, needs.weights)
    projection = _Projection(inputs, weights, sums.acc)
    d_inputs = [torch.empty_like(x) if needs.inputs else None for x in inputs]
    for elements in _chunks(inputs[0], weights.width):
        q, k = projection.rows(elements)
        dq_dk = sums.chunk(dout[elements], q, k, elements)
        projection.backward(dq_dk, elements, d_inputs, needs.weights)
    if not needs.weights:
        return [*d_inputs, *[None] * len(weights)]
    return [*d_inputs, *projection.weight_gradients(), *sums.weight_gradients()]


class _Projection:
    """Queries and keys: given, or computed from tokens by one product with both weights.

    The backward sums the gradients of these weights over the chunks.
    """

    def __init__(self, inputs: Sequence[Tensor], weights: AnyWeights, acc: torch.dtype) -> None:
        self.inputs, self.acc = inputs, acc
        self.weights = weights if isinstance(weights, Weights) else None
        if self.weights is not None:
            self.weight, self.bias = pack_projections(*self.weights[:4])
            self.d_weight = self.weight.new_zeros(self.weight.shape, dtype=acc)
            self.d_bias = self.weight.new_zeros(self.weight.shape[0], dtype=acc)

    def rows(self, elements: slice) -> Sequence[Tensor]:
        """q and k [b, N, E] of some batch elements, in the accumulator type; may be overwritten."""
        if self.weights is None:
            return [t[elements].to(self.acc, copy=True) for t in self.inputs]
        x = self.inputs[0][elements]
        return F.linear(x, self.weight, self.bias).to(self.acc).chunk(2, dim=2)

    def backward(
        self,
        dq_dk: Sequence[Tensor],
        elements: slice,
        d_inputs: Sequence[Tensor | None],
        needs_weights: bool,
    ) -> None:
        """Write the gradients of the inputs, and add to those of the weights."""
        if self.weights is None:
            for d_input, gradient in zip(d_inputs, dq_dk, strict=True):
                if d_input is not None:
                    d_input[elements] = gradient
            return
        gradients = torch.cat(tuple(dq_dk), dim=2)  # [b, N, 2 E]
        x = self.inputs[0][elements]
        operand = _operand(gradients, x.dtype)
        if d_inputs[0] is not None:
            d_inputs[0][elements] = operand @ self.weight
        if needs_weights:
            self.d_weight += operand.flatten(0, 1).t() @ x.reshape(-1, x.shape[2])
            self.d_bias += gradients.sum((0, 1))

    def weight_gradients(self) -> list[Tensor | None]:
        """dWq, dbq, dWk, dbk; nothing if queries and keys were given."""
        if self.weights is None:
            return []
        dtype, w = self.weight.dtype, self.weights
        dwq, dwk = (part.to(dtype, copy=True) for part in self.d_weight.chunk(2))
        dbq, dbk = (part.to(dtype, copy=True) for part in self.d_bias.chunk(2))
        return [
            dwq, None if w.query_bias is None else dbq, dwk, None if w.key_bias is None else dbk,
        ]  # fmt: skip


class _Backward:
    """Sums of a backward over its chunks: dw_g, dbf and the moments U and V."""

    def __init__(
        self,
        weights: AnyWeights,
        mask: Tensor | None,
        global_query: Tensor,
        options: Options,
        needs_weights: bool,
    ) -> None:
        self.weights, self.mask, self.global_query = weights, mask, global_query
        self.options, self.needs_weights = options, needs_weights
        self.acc = global_query.dtype
        new_zeros = weights.final_weight.new_zeros
        shape = weights.final_weight.shape
        self.dw_g = new_zeros(weights.width, dtype=self.acc)
        self.d_final_bias = new_zeros(weights.token_dim, dtype=self.acc)
        self.U, self.V = new_zeros(shape, dtype=self.acc), new_zeros(shape, dtype=self.acc)

    def chunk(self, dout: Tensor, q: Tensor, k: Tensor, elements: slice) -> tuple[Tensor, Tensor]:
        """dq and dk [b, N, E] of some batch elements, in the accumulator type; overwrites q, k."""
        w = self.weights
        mask = None if self.mask is None else self.mask[elements]
        scale, dtype = self.options.scale, w.final_weight.dtype
        rows = _rows(q, k, w.w_g, mask, self.options)
        G = self.global_query[elements]
        w_g = w.w_g.flatten().to(self.acc)

        d_final = dout @ w.final_weight  # [b, N, E]
        d_product = (d_final @ w.proj_weight).to(self.acc)  # gradient of G * kn, [b, N, E]
        dG = (rows.k * d_product).sum(1)  # [b, E]
        d_weights = torch.bmm(rows.q, dG.unsqueeze(2)).squeeze(2)
        d_scores = scale * _score_gradients(rows, d_weights, mask, self.options)
        dq = d_final.to(self.acc) + rows.weights.unsqueeze(2) * dG.unsqueeze(1)
        dq += d_scores.unsqueeze(2) * w_g
        dq = _normalize_backward(dq, rows.q, rows.q_norms, self.options)
        dk = _normalize_backward(d_product * G.unsqueeze(1), rows.k, rows.k_norms, self.options)
        if self.needs_weights:
            self.dw_g += _pool(rows.q, d_scores).sum(0)
            self.d_final_bias += dout.sum((0, 1), dtype=self.acc)
            t = _operand(rows.k * G.unsqueeze(1), dtype).flatten(0, 1)
            z = rows.q if w.proj_bias is None else rows.q + w.proj_bias
            dout_t = dout.flatten(0, 1).t()
            self.U += dout_t @ t
            self.V += dout_t @ _operand(z, dtype).flatten(0, 1)
        return dq, dk

    def weight_gradients(self) -> list[Tensor | None]:
        """dw_g, dWp, dbp, dWf, dbf; None where there is no bias."""
        w, dtype = self.weights, self.weights.final_weight.dtype
        wp, wf = w.proj_weight.to(self.acc), w.final_weight.to(self.acc)
        return [
            self.dw_g.to(dtype).view(w.w_g.shape),
            (wf.t() @ self.U).to(dtype),
            None if w.proj_bias is None else (wf.t() @ self.d_final_bias).to(dtype),
            torch.addmm(self.V, self.U, wp.t()).to(dtype),
            None if w.final_bias is None else self.d_final_bias.to(dtype),
        ]


def _score_gradients(
    rows: _Rows, d_weights: Tensor, mask: Tensor | None, options: Options
) -> Tensor:
    """ds [b, N] from da [b, N]."""
    # The projection on the weights is subtracted twice. What rounding leaves of it the first time
    # would be most of the gradient of w_g where the tokens are almost equal.
    weights = rows.weights
    if options.pooling == "softmax":
        grads = weights * (d_weights - (weights * d_weights).sum(1, keepdim=True))
        return grads - weights * grads.sum(1, keepdim=True)
    if options.pooling == "sum":
        return torch.zeros_like(d_weights)
    grads = d_weights
    if options.pooling == "l2":
        norms = torch.linalg.vector_norm(rows.scores, dim=1, keepdim=True)
        # Below eps the norm is a constant: no projection.
        unit = torch.where(norms >= options.eps, weights, 0)
        for _ in range(2):
            grads = grads - unit * (unit * grads).sum(1, keepdim=True)
        grads = grads / norms.clamp_min(options.eps)
    return grads if mask is None else grads.masked_fill(~mask, 0)


def _normalize_backward(
    grads: Tensor, unit: Tensor, norms: Tensor | None, options: Options
) -> Tensor:
    """Gradient of the rows from that of the normalised rows; overwrites grads."""
    if norms is None:
        return grads
    projection = (unit * grads).sum(2, keepdim=True)
    # Below eps the divisor is a constant: no projection.
    projection = torch.where(norms >= options.eps, projection, 0)
    return grads.sub_(unit * projection).mul_(norms.clamp_min(options.eps).reciprocal_())
