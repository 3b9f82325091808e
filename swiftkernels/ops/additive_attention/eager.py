"""The fused algorithm in PyTorch's own operators: for devices without kernels of ours.

Queries and keys come from one GEMM, norms and scores are applied in place, and the backward keeps
nothing from the forward but its inputs and G: it recomputes q and k and takes the gradients of the
two output layers as second moments (derivation in `triton/backward.py`). The batch is walked
through in chunks that stay in a processor's cache. The signatures are those of `triton/launch.py`;
nothing here is differentiable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftkernels.backends.layouts import accumulator, pack_projections
from swiftkernels.ops.additive_attention.reference import Options, pool_weights

CHUNK_BYTES = 1 << 20
"""Size of the [q | k] rows that are worked on at a time."""

POOL_TOKENS = 512
"""Tokens that are summed in one go: a longer sum, one by one, is less accurate than eager's."""

Saved = tuple[Tensor, Tensor, Tensor]
"""G [B, E]; and two empty tensors, which other backends need."""


class _Rows(NamedTuple):
    """What forward and backward both need of some items, in the accumulator type."""

    q: Tensor
    """Unit rows, or the rows themselves without qk_norm, [b, N, E]."""
    k: Tensor
    q_norms: Tensor | None
    """Norms that the rows had, [b, N, 1]; None without qk_norm."""
    k_norms: Tensor | None
    scores: Tensor
    """[b, N]; 0 for masked tokens."""
    weights: Tensor
    """Token weights a, [b, N]."""


def _operand(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in the storage type; float16 saturates, so that inf * 0 cannot make a NaN."""
    if dtype == torch.float16:
        limit = torch.finfo(dtype).max
        t = t.clamp(-limit, limit)
    return t.to(dtype)


def _chunks(q: Tensor, width: int) -> Iterator[slice]:
    item_bytes = 2 * q.shape[1] * width * q.element_size()
    step = max(1, CHUNK_BYTES // max(1, item_bytes))
    return (slice(start, start + step) for start in range(0, q.shape[0], step))


def _normalize_(rows: Tensor, options: Options) -> Tensor | None:
    """Divide the rows by their norms, at least eps, in place; returns the norms."""
    if not options.qk_norm:
        return None
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    rows.mul_(norms.clamp_min(options.eps).reciprocal_())
    return norms


def _rows(q: Tensor, k: Tensor, w_g: Tensor, mask: Tensor | None, options: Options) -> _Rows:
    """Normalise q and k (in place) and score the queries."""
    q_norms, k_norms = _normalize_(q, options), _normalize_(k, options)
    scores = (q @ w_g.to(q.dtype)).mul_(options.scale)
    weights = pool_weights(scores, mask, options.pooling, options.eps)
    if mask is not None:
        scores = scores.masked_fill(~mask, 0)
    return _Rows(q, k, q_norms, k_norms, scores, weights)


def _pool(rows: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights_n rows_n, [b, N, E] -> [b, E]."""
    whole = rows.shape[1] // POOL_TOKENS * POOL_TOKENS
    rest = torch.bmm(weights[:, whole:].unsqueeze(1), rows[:, whole:]).squeeze(1)
    if whole == 0:
        return rest
    blocks = (-1, POOL_TOKENS)
    row_blocks = rows[:, :whole].unflatten(1, blocks)
    weight_blocks = weights[:, :whole].unflatten(1, blocks).unsqueeze(2)
    return torch.matmul(weight_blocks, row_blocks).sum((1, 2)) + rest


def additive_self_attention_forward(
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    w_g: Tensor,
    wp: Tensor,
    bp: Tensor | None,
    wf: Tensor,
    bf: Tensor | None,
    mask: Tensor | None,
    options: Options,
    keep: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B, N, D], and for the backward G [B, E]; `keep` is for the CPU kernels."""
    weight, bias = pack_projections(wq, bq, wk, bk)
    out, global_query = _outputs(x, wf)
    for items in _chunks(x, wq.shape[0]):
        q, k = F.linear(x[items], weight, bias).to(global_query.dtype).chunk(2, dim=2)
        _forward_chunk(q, k, items, w_g, wp, bp, wf, bf, mask, options, out, global_query)
    return out, global_query, x.new_empty(0), x.new_empty(0)


def additive_attention_forward(
    q: Tensor,
    k: Tensor,
    w_g: Tensor,
    wp: Tensor,
    bp: Tensor | None,
    wf: Tensor,
    bf: Tensor | None,
    mask: Tensor | None,
    options: Options,
    keep: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `additive_self_attention_forward`, from queries and keys [B, N, E]."""
    out, global_query = _outputs(q, wf)
    for items in _chunks(q, w_g.shape[0]):
        q_chunk = q[items].to(global_query.dtype, copy=True)
        k_chunk = k[items].to(global_query.dtype, copy=True)
        _forward_chunk(
            q_chunk, k_chunk, items, w_g, wp, bp, wf, bf, mask, options, out, global_query
        )
    return out, global_query, q.new_empty(0), q.new_empty(0)


def _outputs(like: Tensor, wf: Tensor) -> tuple[Tensor, Tensor]:
    batch, n_tokens, _ = like.shape
    out = like.new_empty(batch, n_tokens, wf.shape[0])
    return out, like.new_empty(batch, wf.shape[1], dtype=accumulator(like.dtype))


def _forward_chunk(
    q: Tensor,
    k: Tensor,
    items: slice,
    w_g: Tensor,
    wp: Tensor,
    bp: Tensor | None,
    wf: Tensor,
    bf: Tensor | None,
    mask: Tensor | None,
    options: Options,
    out: Tensor,
    global_query: Tensor,
) -> None:
    """Fill out[items] and global_query[items]; overwrites q and k."""
    rows = _rows(q, k, w_g, None if mask is None else mask[items], options)
    G = _pool(rows.q, rows.weights)
    global_query[items] = G
    t = _operand(rows.k.mul_(G.unsqueeze(1)), wp.dtype)
    y = F.linear(t, wp, bp) + _operand(rows.q, wp.dtype)
    out[items] = F.linear(y, wf, bf)


def additive_self_attention_backward(
    dout: Tensor,
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    w_g: Tensor,
    wp: Tensor,
    bp: Tensor | None,
    wf: Tensor,
    bf: Tensor | None,
    mask: Tensor | None,
    saved: Saved,
    options: Options,
    needs_tokens: bool,
    needs_weights: bool,
) -> list[Tensor | None]:
    """Gradients of x and the nine weights; None where not asked for or without bias."""
    weight, bias = pack_projections(wq, bq, wk, bk)
    width, in_dims = wq.shape
    call = _Backward(w_g, wp, bp, wf, bf, mask, saved[0], options, needs_weights)
    dx = torch.empty_like(x) if needs_tokens else None
    d_weight = weight.new_zeros(weight.shape, dtype=call.acc)
    d_bias = weight.new_zeros(2 * width, dtype=call.acc)
    for items in _chunks(x, width):
        q, k = F.linear(x[items], weight, bias).to(call.acc).chunk(2, dim=2)
        grads = torch.cat(call.chunk(dout[items], q, k, items), dim=2)  # [b, N, 2 E]
        operand = _operand(grads, x.dtype)
        if dx is not None:
            dx[items] = operand @ weight
        if needs_weights:
            d_weight += operand.flatten(0, 1).t() @ x[items].reshape(-1, in_dims)
            d_bias += grads.sum((0, 1))
    if not needs_weights:
        return [dx, *[None] * 9]
    dwq, dwk = (part.to(x.dtype, copy=True) for part in d_weight.chunk(2))
    dbq, dbk = (part.to(x.dtype, copy=True) for part in d_bias.chunk(2))
    return [
        dx,
        dwq,
        None if bq is None else dbq,
        dwk,
        None if bk is None else dbk,
        *call.weight_gradients(),
    ]


def additive_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    w_g: Tensor,
    wp: Tensor,
    bp: Tensor | None,
    wf: Tensor,
    bf: Tensor | None,
    mask: Tensor | None,
    saved: Saved,
    options: Options,
    needs_tokens: bool,
    needs_weights: bool,
) -> list[Tensor | None]:
    """Gradients of q, k and the five weights; None where not asked for or without bias."""
    call = _Backward(w_g, wp, bp, wf, bf, mask, saved[0], options, needs_weights)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    for items in _chunks(q, w_g.shape[0]):
        q_chunk, k_chunk = (t[items].to(call.acc, copy=True) for t in (q, k))
        dq[items], dk[items] = call.chunk(dout[items], q_chunk, k_chunk, items)
    tokens: list[Tensor | None] = [dq, dk] if needs_tokens else [None, None]
    return [*tokens, *(call.weight_gradients() if needs_weights else [None] * 5)]


class _Backward:
    """What one backward call sums over its chunks: dw_g, dbf and the moments U and V."""

    def __init__(
        self,
        w_g: Tensor,
        wp: Tensor,
        bp: Tensor | None,
        wf: Tensor,
        bf: Tensor | None,
        mask: Tensor | None,
        global_query: Tensor,
        options: Options,
        needs_weights: bool,
    ) -> None:
        self.w_g, self.wp, self.bp, self.wf, self.bf = w_g, wp, bp, wf, bf
        self.mask, self.global_query, self.options = mask, global_query, options
        self.needs_weights = needs_weights
        self.acc = global_query.dtype
        token_dim, width = wf.shape
        self.dw_g = wf.new_zeros(width, dtype=self.acc)
        self.d_final_bias = wf.new_zeros(token_dim, dtype=self.acc)
        self.U = wf.new_zeros(token_dim, width, dtype=self.acc)
        self.V = wf.new_zeros(token_dim, width, dtype=self.acc)

    def chunk(self, dout: Tensor, q: Tensor, k: Tensor, items: slice) -> tuple[Tensor, Tensor]:
        """dq and dk [b, N, E] of some items, in the accumulator type; overwrites q and k."""
        mask = None if self.mask is None else self.mask[items]
        scale, dtype = self.options.scale, self.wf.dtype
        rows = _rows(q, k, self.w_g, mask, self.options)
        G = self.global_query[items]
        w_g = self.w_g.to(self.acc)

        d_final = dout @ self.wf  # [b, N, E]
        d_product = (d_final @ self.wp).to(self.acc)  # gradient of G * kn, [b, N, E]
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
            z = rows.q if self.bp is None else rows.q + self.bp
            dout_t = dout.flatten(0, 1).t()
            self.U += dout_t @ t
            self.V += dout_t @ _operand(z, dtype).flatten(0, 1)
        return dq, dk

    def weight_gradients(self) -> list[Tensor | None]:
        """dw_g, dWp, dbp, dWf, dbf; None where there is no bias."""
        wp, wf, dtype = self.wp.to(self.acc), self.wf.to(self.acc), self.wf.dtype
        return [
            self.dw_g.to(dtype),
            (wf.t() @ self.U).to(dtype),
            None if self.bp is None else (wf.t() @ self.d_final_bias).to(dtype),
            torch.addmm(self.V, self.U, wp.t()).to(dtype),
            None if self.bf is None else self.d_final_bias.to(dtype),
        ]


def _score_gradients(
    rows: _Rows, d_weights: Tensor, mask: Tensor | None, options: Options
) -> Tensor:
    """ds [b, N] from da [b, N]."""
    # What lies along the weights is taken out twice: what rounding left of it the first time would
    # be most of the gradient of w_g where the tokens are almost equal.
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
    """Gradient of the rows from that of the unit rows; overwrites grads."""
    if norms is None:
        return grads
    along = (unit * grads).sum(2, keepdim=True)
    # Below eps the divisor is a constant: no projection.
    along = torch.where(norms >= options.eps, along, 0)
    return grads.sub_(unit * along).mul_(norms.clamp_min(options.eps).reciprocal_())
