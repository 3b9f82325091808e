"""`SeparableAttention`: the attention layer of MobileViTv2 as an `nn.Module`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swiftkernels.ops import linear_parts
from swiftkernels.ops.plan import KeepsPlans, call_key
from swiftkernels.ops.separable_attention import reference
from swiftkernels.ops.separable_attention.op import BACKENDS, attend
from swiftkernels.ops.separable_attention.weights import Weights
from swiftkernels.utils import checks


class SeparableAttention(KeepsPlans, nn.Module):
    """Separable self-attention (arXiv 2206.02680), a drop-in for the layer of MobileViTv2.

    It has the constructor arguments, parameter names and state dicts of timm's
    ``LinearSelfAttention``, also loads the state dicts of transformers'
    ``MobileViTV2LinearSelfAttention``, and computes the same outputs.

    Args:
        embed_dim: channels C of input and output.
        attn_drop: dropout of the token weights in training; above 0, training is not fused.
        proj_drop: dropout of the output in training.
        bias: whether the two 1x1 convolutions have biases.
        backend: "auto", "triton", "cpu" or "reference". Only "auto" chooses; the others never fall
            back.
        device, dtype: of the parameters.

    The kernels read the weights of `qkv_proj` and `out_proj`. If one of them is more than a 1x1
    convolution (an adapter, a quantised layer, one with hooks or parametrizations), both are called
    and the layer is not fused.

    Shapes:
        x [B, N, C] (tokens) or [B, C, P, N] (the P pixels of N patches); the output is the same.
        The softmax runs over the N.

    Example:
        >>> attention = SeparableAttention(64)
        >>> attention(torch.randn(2, 64, 4, 49)).shape
        torch.Size([2, 64, 4, 49])
    """

    def __init__(
        self,
        embed_dim: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        bias: bool = True,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_positive("embed_dim", embed_dim, "Pass the width in channels.")
        checks.check_option("backend", backend, BACKENDS)
        self.embed_dim = embed_dim
        self.backend = backend
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.qkv_proj = nn.Conv2d(embed_dim, 1 + 2 * embed_dim, 1, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        self.out_proj = nn.Conv2d(embed_dim, embed_dim, 1, **factory)
        self.out_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Attend; shapes as in the class, errors as in `separable_attention`."""
        weights = self._plain_weights() if _does_nothing(self.attn_drop) else None
        out = self._call_parts(x) if weights is None else self._attend(x, weights)
        if _does_nothing(self.out_drop):
            return out  # a call of a module takes as long as a small layer
        dropped: Tensor = self.out_drop(out)
        return dropped

    def _attend(self, x: Tensor, weights: Weights) -> Tensor:
        key = call_key(x, weights, None, None, self.backend)
        if key is None:
            return attend(x, weights, self.backend)[0]
        plans = self._plans()
        plan = plans.by_key.get(key)
        out = None if plan is None else plan(x, weights, None, None)
        if out is None:
            out, plan = attend(x, weights, self.backend, plans)
            plans.keep(key, plan)
        return out

    def _plain_weights(self) -> Weights | None:
        """The weights, if both parts are plain convolutions with parameters."""
        modules = self._modules
        parts: Any = (modules["qkv_proj"], modules["out_proj"])
        found = linear_parts.plain_parameters(parts, nn.Conv2d)
        if not found or not all(map(linear_parts.is_pointwise, parts)):
            return None
        qkv, out = found
        return Weights(qkv["weight"], qkv["bias"], out["weight"], out["bias"])

    def _call_parts(self, x: Tensor) -> Tensor:
        image = x.mT.unsqueeze(2) if x.dim() == 3 else x  # [B, C, P, N]
        rows = self.qkv_proj(image).movedim(1, -1)
        out: Tensor = self.out_proj(reference.mix(rows, self.attn_drop).movedim(-1, 1))
        return out.squeeze(2).mT if x.dim() == 3 else out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("qkv_proj", "out_proj"):
            for parameter in ("weight", "bias"):
                theirs = f"{prefix}{name}.convolution.{parameter}"  # the name in transformers
                if theirs in state_dict:
                    state_dict.setdefault(f"{prefix}{name}.{parameter}", state_dict.pop(theirs))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, backend={self.backend!r}"


def _does_nothing(dropout: Any) -> bool:
    """Whether a call of a dropout would return its input and run nothing else."""
    idle = type(dropout) is nn.Dropout and not (dropout.training and dropout.p > 0)
    return idle and linear_parts.is_untouched(dropout)
