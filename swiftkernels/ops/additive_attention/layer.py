"""`AdditiveAttention`: the attention layer of SwiftFormer as an `nn.Module`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from swiftkernels.backends import torch_state
from swiftkernels.backends.layouts import as_image, as_tokens
from swiftkernels.ops import linear_parts, plan
from swiftkernels.ops.additive_attention import reference
from swiftkernels.ops.additive_attention.api import (
    AttentionOutput,
    additive_self_attention,
    attend_by_parts,
)
from swiftkernels.ops.additive_attention.cpu.packing import Weights
from swiftkernels.ops.additive_attention.reference import POOLINGS
from swiftkernels.utils import checks

LAYOUTS = ("auto", "channels_first", "channels_last")


class Names(NamedTuple):
    """What the parts of an additive attention are called in a module: four linear layers, w_g."""

    query: str = "to_query"
    key: str = "to_key"
    proj: str = "proj"
    final: str = "final"
    w_g: str = "w_g"


class AttentionForward(nn.Module):
    """The forward of additive attention, for modules that hold its weights under some names.

    The four linear layers are read by the kernels if they are just that, else called: see
    `swiftkernels.ops.linear_parts`.
    """

    names = Names()
    if TYPE_CHECKING:  # TorchScript reads annotations that a class has when it runs
        in_dims: int
        pooling: str
        qk_norm: bool
        layout: str
        eps: float
        backend: str
        recompute: bool | None
        scale_factor: float
        to_query: nn.Linear
        to_key: nn.Linear
        proj: nn.Linear
        final: nn.Linear
        w_g: nn.Parameter

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        return_weights: bool = False,
        residual_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend; shapes as in the class, errors as in `additive_self_attention`.

        With `residual_scale`, [C] in any shape: x + residual_scale * attention(x). With
        `return_weights` an `AttentionOutput`.
        """
        # TorchScript compiles the first branch alone, and goes by the annotations.
        if torch.jit.is_scripting():
            return self._scripted(x, mask, return_weights, residual_scale)
        else:  # noqa: RET505
            return self._attend(x, mask, return_weights, residual_scale)  # type: ignore[return-value]

    def _attend(
        self, x: Tensor, mask: Tensor | None, return_weights: bool, residual_scale: Tensor | None
    ) -> Tensor | AttentionOutput:
        if type(x) is not Tensor and isinstance(x, torch.fx.Proxy):
            return self._traced(x, mask, return_weights, residual_scale)
        checks.check_tensor("x", x)
        channels_first = self.layout == "channels_first" or (self.layout == "auto" and x.dim() > 3)
        if mask is None and not return_weights and self.backend in ("auto", "cpu", "triton"):
            out = self._attend_quickly(x, residual_scale, channels_first)
            if out is not None:
                return out
        spatial = self._spatial_shape(x, channels_first)
        tokens = as_tokens(x) if channels_first else x.flatten(1, -2)
        if isinstance(mask, Tensor) and mask.dim() > 2:
            if mask.shape[1:] != spatial:
                raise ValueError(
                    f"mask must have shape [B, N] or [B, *spatial] = {(x.shape[0], *spatial)}; "
                    f"got {tuple(mask.shape)}. One value per token: drop the channel axis."
                )
            mask = mask.flatten(1)
        result = self._attend_to_tokens(tokens, mask, return_weights, residual_scale)
        if isinstance(result, AttentionOutput):
            return result._replace(output=_restore(result.output, spatial, channels_first))
        return _restore(result, spatial, channels_first)

    def _attend_to_tokens(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        return_weights: bool,
        residual_scale: Tensor | None,
    ) -> Tensor | AttentionOutput:
        """By way of all checks, [B, N, C] -> [B, N, D]."""
        linears = [getattr(self, name) for name in self.names[:4]]
        w_g = getattr(self, self.names.w_g)
        called = self.called_parts()
        options: dict[str, Any] = {
            "mask": mask,
            "pooling": self.pooling,
            "qk_norm": self.qk_norm,
            "scale": self.scale_factor,
            "eps": self.eps,
            "backend": self.backend,
            "return_weights": return_weights,
            "residual_scale": residual_scale,
        }
        if not called:
            # Once: a parametrization may change with every access.
            weights = [t for linear in linears for t in (linear.weight, linear.bias)]
            if not any(map(linear_parts.why_weights_are_called, weights[::2], weights[1::2])):
                tensors = [tokens, *weights[:4], w_g, *weights[4:]]
                return additive_self_attention(*tensors, recompute=self.recompute, **options)
        query, key, proj, final = linears
        readable = bool(called) and called.keys().isdisjoint(self.names[2:4])
        return attend_by_parts(tokens, query, key, w_g, proj, final, readable, **options)

    def _attend_quickly(
        self, x: Tensor, residual_scale: Tensor | None, channels_first: bool
    ) -> Tensor | None:
        # Past the attribute lookup of nn.Module, which takes a third of the time of a small call.
        modules, names = self._modules, self.names
        own_w_g = self._parameters.get(names.w_g)
        linears = linear_parts.plain_parameters(map(modules.get, names[:4]))
        if (
            not linears
            or own_w_g is None
            or (residual_scale is not None and not isinstance(residual_scale, Tensor))
        ):
            return None
        query, key, proj, final = linears
        layer = Weights(
            query["weight"], query["bias"], key["weight"], key["bias"],
            own_w_g,
            proj["weight"], proj["bias"], final["weight"], final["bias"],
            residual_scale,
        )  # fmt: skip
        options = (self.backend, self.pooling, self.qk_norm, self.scale_factor, self.eps)
        if torch.is_grad_enabled():
            return plan.train(x, layer, options, channels_first, self.recompute)
        return plan.infer(x, layer, options, channels_first)

    def called_parts(self) -> dict[str, str]:
        """The linear layers that are called, not read by the kernels, and why.

        Example:
            >>> attention = AdditiveAttention(64, 64, 1)
            >>> handle = attention.final.register_forward_hook(lambda *_: None)
            >>> attention.called_parts()
            {'final': 'it has hooks'}
        """
        return linear_parts.called(self, self.names[:4])

    def _traced(
        self, x: Any, mask: Any, return_weights: Any, residual_scale: Any
    ) -> Tensor | AttentionOutput:
        """For `torch.fx`: the definition in PyTorch's operators, the linear layers called."""
        mask = torch_state.left_out(mask, "mask", None)
        return_weights = torch_state.left_out(return_weights, "return_weights", False)
        residual_scale = torch_state.left_out(residual_scale, "residual_scale", None)
        return self._scripted(x, mask, return_weights, residual_scale)

    def _scripted(
        self, x: Tensor, mask: Tensor | None, return_weights: bool, residual_scale: Tensor | None
    ) -> Tensor:
        """The definition in TorchScript's part of Python, the linear layers called."""
        if return_weights:
            raise ValueError(
                "return_weights must be False in TorchScript and torch.fx; call the layer itself."
            )
        tokens = _to_tokens(x, self.layout)
        if mask is not None:
            mask = mask.flatten(1)
        out = self._definition(tokens, mask)
        if residual_scale is not None:
            out = tokens + residual_scale.flatten() * out
        return _from_tokens(out, x, self.layout)

    def _definition(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """[B, N, C] -> [B, N, D]"""
        q, k = self.to_query(tokens), self.to_key(tokens)
        if self.qk_norm:
            q, k = reference.normalised(q, -1, self.eps), reference.normalised(k, -1, self.eps)
        scores = (q @ self.w_g).squeeze(-1) * self.scale_factor
        weights = reference.pool_weights(scores, mask, self.pooling, self.eps)
        G = (weights.unsqueeze(-1) * q).sum(dim=1, keepdim=True)
        out: Tensor = self.final(self.proj(G * k) + q)
        return out

    def _spatial_shape(self, x: Tensor, channels_first: bool) -> torch.Size:
        if x.dim() < 3:
            raise ValueError(
                f"x must be [B, N, {self.in_dims}] or [B, {self.in_dims}, *spatial]; got shape "
                f"{tuple(x.shape)}. Add the missing axis with x.unsqueeze(0)."
            )
        width = x.shape[1 if channels_first else -1]
        if width != self.in_dims:
            order = "[B, C, *spatial]" if channels_first else "[B, *spatial, C]"
            raise ValueError(
                f"x must have {self.in_dims} channels (in_dims), read as {order}; got {width} in "
                f"shape {tuple(x.shape)}. If the axes are in another order, set "
                "layout='channels_first' or layout='channels_last'."
            )
        return x.shape[2:] if channels_first else x.shape[1:-1]


class AdditiveAttention(AttentionForward):
    """Efficient additive attention (arXiv 2303.15446), a drop-in for the layer of SwiftFormer.

    Takes the constructor arguments, parameter names and state dicts (`Proj` or `proj`) of the
    official ``EfficientAdditiveAttnetion`` and of timm's ``EfficientAdditiveAttention``, and gives
    their outputs.

    Args:
        in_dims: width C of the input.
        token_dim: width D of the output; the scores are scaled by token_dim ** -0.5.
        num_heads: widens queries and keys to E = token_dim * num_heads; there is one score per
            token.
        pooling: "l2" (official code since July 2023, timm), "sum" (before, and transformers),
            "softmax" or "linear". The same weights under another pooling give other outputs.
        qk_norm: divide the rows of queries and keys by their L2 norms.
        bias: whether the four linear layers have biases.
        layout: order of the input's axes. "channels_last" [B, ..., C], "channels_first" [B, C,
            ...]; "auto" takes three axes as [B, N, C] and four or more as [B, C, ...]. The output
            has the input's order. Any memory format is read through its strides, without a copy.
        eps: lower bound of every norm.
        backend: "auto", "triton", "cpu", "aten" or "reference". Only "auto" chooses; the others
            never fall back.
        recompute: what the CPU kernels keep for the backward: see `additive_self_attention`.
        device, dtype: of the parameters.

    The kernels read the weights of `to_query`, `to_key`, `proj` and `final`. A part that is more
    than a linear layer with a weight and a bias (an adapter, a quantised layer, one with hooks) is
    called instead, under every backend, and the layer does not run fused as a whole; `called_parts`
    and `swiftkernels.doctor` say which and why. In inference on a CPU the weights are packed once;
    changes are noticed, but for a few elements written past PyTorch's version counters: see
    `swiftkernels.weights_changed`.

    Shapes:
        x [B, N, C] or [B, C, H, W] (any number of spatial axes); the output is the same with D for
        C.
        mask: bool [B, N] or `[B, *spatial]`, True = the token takes part in the pooling.

    Example:
        >>> attention = AdditiveAttention(64, 64, num_heads=1)
        >>> attention(torch.randn(2, 64, 14, 14)).shape
        torch.Size([2, 64, 14, 14])
        >>> output, weights, global_query = attention(torch.randn(2, 49, 64), return_weights=True)
    """

    def __init__(
        self,
        in_dims: int = 512,
        token_dim: int = 256,
        num_heads: int = 2,
        *,
        pooling: str = "l2",
        qk_norm: bool = True,
        bias: bool = True,
        layout: str = "auto",
        eps: float = 1e-12,
        backend: str = "auto",
        recompute: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        remedy = (
            "Pass the width in channels (in_dims, token_dim) or the number of heads (num_heads)."
        )
        checks.check_positive("in_dims", in_dims, remedy)
        checks.check_positive("token_dim", token_dim, remedy)
        checks.check_positive("num_heads", num_heads, remedy)
        checks.check_option("pooling", pooling, POOLINGS)
        checks.check_option("qk_norm", qk_norm, (True, False))
        checks.check_number("eps", eps, positive=True)
        checks.check_option("layout", layout, LAYOUTS)
        checks.check_option("backend", backend, checks.BACKENDS)
        checks.check_option("recompute", recompute, (None, True, False))
        self.in_dims = in_dims
        self.token_dim = token_dim
        self.num_heads = num_heads
        self.pooling = pooling
        self.qk_norm = qk_norm
        self.layout = layout
        self.eps = eps
        self.backend = backend
        self.recompute = recompute
        self.scale_factor = token_dim**-0.5

        width = token_dim * num_heads
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.to_query = nn.Linear(in_dims, width, bias=bias, **factory)
        self.to_key = nn.Linear(in_dims, width, bias=bias, **factory)
        self.w_g = nn.Parameter(torch.randn(width, 1, **factory))
        self.proj = nn.Linear(width, width, bias=bias, **factory)
        self.final = nn.Linear(width, token_dim, bias=bias, **factory)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            official = f"{prefix}Proj.{name}"
            if official in state_dict:
                state_dict.setdefault(f"{prefix}proj.{name}", state_dict.pop(official))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"{self.in_dims}, {self.token_dim}, num_heads={self.num_heads}, "
            f"pooling={self.pooling!r}, qk_norm={self.qk_norm}, layout={self.layout!r}, "
            f"backend={self.backend!r}"
        )


@contextlib.contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _restore(tokens: Tensor, spatial: torch.Size, channels_first: bool) -> Tensor:
    """[B, N, D] back to the axes of the input, as a view."""
    if channels_first:
        return as_image(tokens, spatial)
    batch, _, dim = tokens.shape
    return tokens if len(spatial) == 1 else tokens.view(batch, *spatial, dim)


# For TorchScript and torch.fx. The latter keeps calls of the two that depend on the number of axes.


@torch.fx.wrap
def _to_tokens(x: Tensor, layout: str) -> Tensor:
    """[B, N, C], [B, *spatial, C] or [B, C, *spatial] -> [B, N, C]"""
    if layout == "channels_first" or (layout == "auto" and x.dim() > 3):
        return x.flatten(2).transpose(1, 2)
    return x.flatten(1, -2)


@torch.fx.wrap
def _from_tokens(tokens: Tensor, x: Tensor, layout: str) -> Tensor:
    """[B, N, D] -> the axes of x"""
    if layout == "channels_first" or (layout == "auto" and x.dim() > 3):
        return tokens.transpose(1, 2).reshape([x.size(0), tokens.size(2)] + list(x.shape[2:]))  # noqa: RUF005
    return tokens.reshape(list(x.shape[:-1]) + [tokens.size(2)])  # noqa: RUF005
