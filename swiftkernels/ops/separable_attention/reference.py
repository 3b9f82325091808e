"""Separable attention in plain PyTorch: the definition every backend is tested against.

Shapes: B batch, N tokens, C channels, D output channels. MobileViTv2 passes [B, C, P, N], the P
pixels of N patches of an image. The pixels at each of the P places are a sequence of N tokens.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import conv2d, linear

from swiftkernels.ops.separable_attention.weights import Options, Weights


def mix(rows: Tensor, dropout: Callable[[Tensor], Tensor] = lambda a: a) -> Tensor:
    """relu(value) * context from score, key and value, [..., N, 1 + 2 C] -> [..., N, C].

    context = sum_n a_n key_n, where a is the softmax of the scores over the tokens. `dropout` is
    applied to a.
    """
    width = rows.shape[-1] // 2
    score, key, value = rows.split([1, width, width], dim=-1)
    context = (dropout(score.softmax(-2)) * key).sum(-2, keepdim=True)
    return value.relu() * context


def separable_attention(
    x: Tensor, weights: Weights, mask: None = None, options: Options | None = None
) -> Tensor:
    """Section 3.2 of arXiv 2206.02680; [B, N, C] -> [B, N, D] or [B, C, P, N] -> [B, D, P, N].

    The layer `qkv` computes score, key and value of every token. `proj` is applied to their `mix`.
    """
    qkv, qkv_bias, proj, proj_bias = weights
    if x.dim() == 3:
        rows = linear(x, qkv.flatten(1), qkv_bias)
        return linear(mix(rows), proj.flatten(1), proj_bias)
    rows = conv2d(x, qkv.view(*qkv.shape[:2], 1, 1), qkv_bias).movedim(1, -1)
    return conv2d(mix(rows).movedim(-1, 1), proj.view(*proj.shape[:2], 1, 1), proj_bias)
