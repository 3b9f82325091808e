"""Efficient additive attention in plain PyTorch: the definition every backend is tested against.

Shapes: B batch, N tokens, C input width, D token_dim, E = D * num_heads. All of it is
differentiable, for any dtype and device, and nothing here is fused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftkernels.ops.additive_attention.weights import Options, OutputWeights, Weights
from swiftkernels.ops.types import Pooling

POOLINGS = get_args(Pooling)


def pool_weights(scores: Tensor, mask: Tensor | None, pooling: str, eps: float) -> Tensor:
    """Weights a over the tokens from scores s, [B, N] -> [B, N]; masked tokens weigh 0.

    ===========  ============================  ====================================================
    ``pooling``  a_n                           used by
    ===========  ============================  ====================================================
    ``l2``       s_n / max(norm(s), eps)       the official code since July 2023, timm
    ``softmax``  exp(s_n) / sum_m exp(s_m)     what readers of the paper expect; Fastformer
    ``sum``      1                             the official code before July 2023, transformers
    ``linear``   s_n                           equations 4 to 6 of the paper as printed
    ===========  ============================  ====================================================
    """
    if pooling == "softmax":
        if mask is None:
            return scores.softmax(dim=1)
        # A finite score, not -inf: an item whose tokens are all masked gets 0, not NaN.
        lowest = -65504.0 if scores.dtype == torch.float16 else -3.38e38
        return scores.masked_fill(~mask, lowest).softmax(dim=1).masked_fill(~mask, 0)
    if pooling == "sum":
        # Ones that leave w_g in the graph: its gradient is 0, as in the published code, not None.
        scores = scores.pow(0)
    if mask is not None:
        scores = scores.masked_fill(~mask, 0)
    return normalised(scores, 1, eps) if pooling == "l2" else scores


def normalised(x: Tensor, dim: int, eps: float) -> Tensor:
    """x / max(|x|, eps), L2 norms along `dim`.

    `torch.nn.functional.normalize` without its `expand`: exported, that would be a copy.
    """
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(eps)


def global_query(
    q: Tensor, w_g: Tensor, mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Token weights a [B, N] and G = sum_n a_n q_n [B, E] of the normalised q [B, N, E]."""
    # In a trace w_g is a matrix of one column: Core ML's converter takes no vector there.
    products = (q @ w_g.unsqueeze(1)).squeeze(2) if torch.jit.is_tracing() else q @ w_g
    scores = products * options.scale  # [B, N]
    weights = pool_weights(scores, mask, options.pooling, options.eps)
    return weights, (weights.unsqueeze(-1) * q).sum(dim=1)


def attend(
    q: Tensor,
    k: Tensor,
    w_g: Tensor,
    proj: Callable[[Tensor], Tensor],
    final: Callable[[Tensor], Tensor],
    mask: Tensor | None,
    options: Options,
) -> Tensor:
    """The operator on queries and keys, [B, N, E] -> [B, N, D] (section 3 of arXiv 2303.15446).

    w_g [E]; proj and final are linear, [..., E] -> [..., E] and [..., E] -> [..., D]; mask [B, N],
    True = the token takes part.
    """
    if options.qk_norm:
        q, k = normalised(q, -1, options.eps), normalised(k, -1, options.eps)
    _, G = global_query(q, w_g, mask, options)
    return final(proj(G.unsqueeze(1) * k) + q)


def additive_attention(
    q: Tensor, k: Tensor, weights: OutputWeights, mask: Tensor | None, options: Options
) -> Tensor:
    """The same with the weights of proj and final."""
    w = weights
    proj = partial(F.linear, weight=w.proj_weight, bias=w.proj_bias)
    final = partial(F.linear, weight=w.final_weight, bias=w.final_bias)
    return attend(q, k, w.w_g.flatten(), proj, final, mask, options)


def additive_self_attention(
    x: Tensor, weights: Weights, mask: Tensor | None, options: Options
) -> Tensor:
    """The whole layer, [B, N, C] -> [B, N, D]: queries and keys are linear in x."""
    q = F.linear(x, weights.query_weight, weights.query_bias)
    k = F.linear(x, weights.key_weight, weights.key_bias)
    return additive_attention(q, k, OutputWeights(*weights[4:]), mask, options)
