"""Code of a typed caller, for mypy: nothing runs it.

What mypy must refuse is ignored, and an ignored line that is right is an error.
"""

import torch
from torch import Tensor

from swiftkernels import AdditiveAttention, AttentionOutput, additive_attention
from swiftkernels.models import SwiftFormer, from_pretrained, swiftformer_xs

layer = AdditiveAttention(64, pooling="softmax")
x = torch.randn(2, 49, 64)
out: Tensor = layer(x)
explained: AttentionOutput = layer(x, return_weights=True)
w, v = torch.randn(64, 64), torch.randn(64)
also: Tensor = additive_attention(x, x, v, w, None, w, None)
more: AttentionOutput = additive_attention(x, x, v, w, None, w, None, return_weights=True)
model: SwiftFormer = swiftformer_xs(num_classes=10, features_only=True)
missing = from_pretrained("weights.pth").pretrained.report

AdditiveAttention(64, pooling="max")  # type: ignore[arg-type]
AdditiveAttention(64, backend="cuda")  # type: ignore[arg-type]
AdditiveAttention(64, layout="nhwc")  # type: ignore[arg-type]
swiftformer_xs(num_clases=10)  # type: ignore[call-arg]
