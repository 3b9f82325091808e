"""Separable attention in plain PyTorch: the definition every backend is tested against.

Shapes: B batch, N tokens, C channels, D output channels. MobileViTv2 feeds [B, C, P, N], the P
pixels of N patches of an image: each of the P is pooled separately, like another sequence of the
batch.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import linear

from swiftkernels.ops.separable_attention.weights import Options, Weights


def separable_attention(
    x: Tensor,
    weights: Weights,
    mask: None = None,
    options: Options = Options(),  # noqa: B008 - an empty tuple
    dropout: Callable[[Tensor], Tensor] = lambda a: a,
) -> Tensor:
    """Section 3.2 of arXiv 2206.02680; [B, N, C] -> [B, N, D] or [B, C, P, N] -> [B, D, P, N].

    `qkv` makes a score, a key and a value of every token. With the softmax a of the scores over the
    N tokens::

        context = sum_n a_n key_n                   [B, C]
        out     = (relu(value) * context) Wp^T + bp [B, N, D]

    `dropout` is applied to a.
    """
    channels_first = x.dim() == 4
    tokens = x.movedim(1, -1) if channels_first else x  # [..., N, C]
    width = tokens.shape[-1]
    rows = linear(tokens, weights.qkv_weight.flatten(1), weights.qkv_bias)
    score, key, value = rows.split([1, width, width], dim=-1)
    context = (dropout(score.softmax(-2)) * key).sum(-2, keepdim=True)
    out = linear(value.relu() * context, weights.proj_weight.flatten(1), weights.proj_bias)
    return out.movedim(-1, 1) if channels_first else out
