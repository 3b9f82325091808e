"""The structs of weights that the compiled kernels read: packed for a form, or not packed.

The forms, with the normalised rows qn = rq q and kn = rk k (README.md derives them):

    plain       out = ((G * kn) Wp^T + bp + qn) Wf^T + bf
    triangular  out = rk (G * k) M^T + rq (C x + c0) + c
    folded      out = rk (A x + a) + rq (C x + c0) + c

M = Wf Wp, C = Wf Wq, c0 = Wf bq and c = Wf bp + bf depend on the weights only. A = M diag(G) Wk and
a = M diag(G) bk also depend on the batch element. The last two forms compute norms from the
triangular factor R of [Wq | bq]: |Wq x + bq| = |R [x; 1]|.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from swiftkernels.backends.cpu.packing import Packer, addresses, float32
from swiftkernels.ops.additive_attention.reference import POOLINGS
from swiftkernels.ops.additive_attention.weights import Options, Weights

PLAIN, TRIANGULAR, FOLDED = range(3)
"""The forms, as `FormCode` in csrc/abi.h."""

# In csrc/abi.h: `struct PackedWeights` without its `Fingerprint`, and `struct RawWeights`.
PACKED_WEIGHTS = struct.Struct("5q2d12Pd5P")
RAW_WEIGHTS = struct.Struct("5q2d9P")


def raw_weights(weights: Weights, options: Options) -> tuple[bytes, list[Tensor | None]]:
    """`struct RawWeights`, and the tensors that must stay alive while it is used."""
    ready = float32(weights)
    return RAW_WEIGHTS.pack(*_sizes(weights, options), *addresses(ready)), ready


def _sizes(weights: Weights, options: Options) -> list[float]:
    """The first fields of both structs."""
    return [
        weights.in_dims, weights.width, weights.token_dim, POOLINGS.index(options.pooling),
        options.qk_norm, options.scale, options.eps,
    ]  # fmt: skip


def rounded(weights: Weights, dtype: torch.dtype) -> Weights:
    """The weights in that type; unchanged if they have it."""
    if weights.query_weight.dtype == dtype:
        return weights
    return Weights(*[None if w is None else w.detach().to(dtype) for w in weights])  # type: ignore[arg-type]


def pack(
    packer: Packer, weights: Weights, scale: Tensor | None, options: Options, form: int
) -> bytes:
    """`struct PackedWeights` without its fingerprint; fields that the form does not read are null.

    Products of weights are computed in float64.

    Args:
        packer: packs matrices.
        weights: rounded to the type of the tokens.
        scale: of the residual branch.
        options: of the operator.
        form: `PLAIN`, `TRIANGULAR` or `FOLDED`.
    """
    w = weights
    if scale is not None:
        factor = scale.double().flatten()
        bias = w.final_bias
        w = w._replace(
            final_weight=w.final_weight.double() * factor.unsqueeze(1),
            final_bias=None if bias is None else bias.double() * factor,
        )
    width = w.width
    fields = [
        *_sizes(w, options),
        packer.matrix(w.query_weight.t()), packer.vector(w.query_bias, width),
        packer.matrix(w.key_weight.t()) if form != FOLDED else 0, packer.vector(w.key_bias, width),
    ]  # fmt: skip
    if form == PLAIN:
        plain = [
            packer.vector(w.w_g, width),
            packer.matrix(w.proj_weight.t()), packer.vector(w.proj_bias, width),
            packer.matrix(w.final_weight.t()), packer.vector(w.final_bias, w.token_dim),
        ]  # fmt: skip
        return PACKED_WEIGHTS.pack(*fields, *plain, *[0] * 3, 0.0, *[0] * 5)
    return PACKED_WEIGHTS.pack(*fields, *[0] * 5, *_folded_fields(packer, w, options, form))


def _folded_fields(packer: Packer, weights: Weights, options: Options, form: int) -> list[float]:
    """The fields from `triangles` on."""
    w = Weights(*(None if t is None else t.double() for t in weights))  # type: ignore[arg-type]
    width, in_dims, token_dim = w.width, w.in_dims, w.token_dim
    zeros = w.query_weight.new_zeros
    biases = (w.query_bias, w.key_bias, w.proj_bias)
    bq, bk, bp = (zeros(width) if b is None else b for b in biases)
    bf = zeros(token_dim) if w.final_bias is None else w.final_bias
    wq, wk, wp, wf = w.query_weight, w.key_weight, w.proj_weight, w.final_weight
    w_g = w.w_g.flatten()
    M, C, c0, c = wf @ wp, wf @ wq, wf @ bq, wf @ bp + bf
    layers = [(wq, bq)] if form == TRIANGULAR else [(wq, bq), (wk, bk)]
    triangles = packer.triangles(layers) if options.qk_norm else (0, 0)
    scores = packer.vector(wq.t() @ w_g, in_dims)
    fields = [*triangles, scores, float(bq @ w_g)]
    constant = [c0.unsqueeze(0)]
    if not options.qk_norm:  # rq = 1
        c, constant = c + c0, []
    if form == TRIANGULAR:
        output = packer.matrix(torch.cat([M.t(), C.t(), *constant]))
        return [*fields, output, packer.vector(c, token_dim), *[0] * 3]
    of_keys = [C.new_zeros(in_dims + 1, token_dim)] if options.qk_norm else []
    return [
        *fields, 0, packer.vector(c, token_dim),
        packer.rows(torch.cat([wk.t(), bk.unsqueeze(0)])),
        packer.matrix(M.t()), packer.matrix(torch.cat([*of_keys, C.t(), *constant])),
    ]  # fmt: skip
