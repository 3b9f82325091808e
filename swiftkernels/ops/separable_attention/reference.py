"""Separable attention in plain PyTorch: the definition every backend is tested against.

Shapes: B batch, N tokens, C channels, D output channels. MobileViTv2 feeds [B, C, P, N], the P
pixels of N patches of an image: each pixel is pooled on its own, as if it were another sequence of
the batch.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from swiftkernels.ops.separable_attention.weights import Weights


def separable_attention(x: Tensor, weights: Weights) -> Tensor:
    """Equations of section 3.2 of arXiv 2206.02680; [B, N, C] -> [B, N, D] or as images.

    With one score for each token, its softmax a over the tokens, and the rows of the linear layer
    `qkv` for query, key and value:

        context = sum_n a_n key_n                       [B, C]
        out     = (relu(value) * context) Wp^T + bp     [B, N, D]

    x is [B, N, C] or [B, C, P, N]; then so is the output.
    """
    channels_first = x.dim() == 4
    tokens = x.movedim(1, -1) if channels_first else x  # [..., N, C]
    width = x.shape[1 if channels_first else -1]
    rows = linear(tokens, weights.qkv.flatten(1), weights.qkv_bias)
    query, key, value = rows.split([1, width, width], dim=-1)
    context = (query.softmax(-2) * key).sum(-2, keepdim=True)
    out = linear(value.relu() * context, weights.proj.flatten(1), weights.proj_bias)
    return out.movedim(-1, 1) if channels_first else out
