"""`AdditiveAttention`: the attention layer of SwiftFormer as an `nn.Module`."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, overload

import torch
import torch.fx
from torch import Tensor, nn

from swiftkernels.backends import torch_state
from swiftkernels.backends.layouts import from_tokens, to_tokens
from swiftkernels.ops import linear_parts
from swiftkernels.ops.additive_attention import reference
from swiftkernels.ops.additive_attention.api import (
    BACKENDS,
    POOLINGS,
    AttentionOutput,
    Request,
    attend,
    attend_by_parts,
    with_weights,
)
from swiftkernels.ops.additive_attention.weights import Weights
from swiftkernels.ops.plan import KeepsPlans, call_key
from swiftkernels.ops.types import Backend, Layout, Pooling
from swiftkernels.utils import checks

LAYOUTS = get_args(Layout)


class Names(NamedTuple):
    """Names of the parts of an additive attention in a module: four linear layers, and w_g."""

    query: str = "to_query"
    key: str = "to_key"
    proj: str = "proj"
    final: str = "final"
    w_g: str = "w_g"


class AttentionForward(KeepsPlans, nn.Module):
    """The forward of additive attention, for modules that have its weights under given `names`.

    The kernels read the weights of the four linear layers. A layer that is more than an `nn.Linear`
    is called instead: see `swiftkernels.ops.linear_parts`.
    """

    names = Names()
    if TYPE_CHECKING:  # TorchScript would read these annotations
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

    if TYPE_CHECKING:

        @overload
        def forward(
            self,
            x: Tensor,
            mask: Tensor | None = ...,
            return_weights: Literal[False] = ...,
            residual_scale: Tensor | None = ...,
        ) -> Tensor: ...
        @overload
        def forward(
            self,
            x: Tensor,
            mask: Tensor | None = ...,
            *,
            return_weights: Literal[True],
            residual_scale: Tensor | None = ...,
        ) -> AttentionOutput: ...
        def forward(self, *_: Any, **__: Any) -> Tensor | AttentionOutput: ...

        __call__ = forward
    else:

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
            # TorchScript compiles only the first branch, whose types the annotations give.
            if torch.jit.is_scripting():
                return self._scripted(x, mask, return_weights, residual_scale)
            else:  # noqa: RET505
                return self._attend(x, mask, return_weights, residual_scale)

    def _attend(
        self, x: Tensor, mask: Tensor | None, return_weights: bool, residual_scale: Tensor | None
    ) -> Tensor | AttentionOutput:
        if type(x) is not Tensor and isinstance(x, torch.fx.Proxy):
            return self._traced(x, mask, return_weights, residual_scale)
        if mask is not None:
            mask = self._flat_mask(mask, x)
        weights = self._plain_weights()
        options = (
            self.pooling, self.qk_norm, self.scale_factor, self.eps, self.backend, self.recompute,
        )  # fmt: skip
        key = None
        if weights is not None and not return_weights:
            key = call_key(x, weights, mask, residual_scale, options, self.layout)
            try:
                plan = None if key is None else self._plans().by_key.get(key)
            except TypeError:  # an option cannot be hashed: the checks of a new plan name it
                key = plan = None
            if plan is not None:
                out = plan(x, weights, mask, residual_scale)
                if out is not None:
                    return out
        return self._attend_anew(x, weights, mask, return_weights, residual_scale, options, key)

    def _attend_anew(
        self,
        x: Tensor,
        weights: Weights | None,
        mask: Tensor | None,
        return_weights: bool,
        residual_scale: Tensor | None,
        options: tuple[Any, ...],
        key: Hashable | None,
    ) -> Tensor | AttentionOutput:
        """Compute the output by a new plan, which is kept, or by calling the linear layers."""
        channels_first = self._channels_first(x)
        request = Request(*options)
        if weights is None:
            weights = self._read_weights()
        if weights is None:
            return self._attend_by_parts(
                to_tokens(x, channels_first), x, mask, residual_scale, request, return_weights
            )
        plans = None if key is None else self._plans()
        out, plan = attend(x, weights, mask, residual_scale, request, channels_first, plans)
        if plans is not None:
            plans.keep(key, plan)
        if not return_weights:
            return out
        return with_weights(out, to_tokens(x, channels_first), weights, mask, request)

    def _plain_weights(self) -> Weights | None:
        """The weights, if all parts are plain linear layers with parameters: the usual case."""
        # The attribute lookup of nn.Module would take a third of the time of a small call.
        modules, names = self._modules, self.names
        w_g = self._parameters.get(names.w_g)
        linears = linear_parts.plain_parameters(map(modules.get, names[:4]))
        if not linears or type(w_g) is not nn.Parameter:
            return None
        query, key, proj, final = linears
        return Weights(
            query["weight"], query["bias"], key["weight"], key["bias"], w_g,
            proj["weight"], proj["bias"], final["weight"], final["bias"],
        )  # fmt: skip

    def _read_weights(self) -> Weights | None:
        """The weights; None if some parts have to be called."""
        if self.called_parts():
            return None
        # Each is read once: a parametrization may give another value at every access.
        linears = (getattr(self, name) for name in self.names[:4])
        query, key, proj, final = found = [(linear.weight, linear.bias) for linear in linears]
        if any(linear_parts.why_weights_are_called(*pair) for pair in found):
            return None
        return Weights(*query, *key, getattr(self, self.names.w_g), *proj, *final)

    def _attend_by_parts(
        self,
        tokens: Tensor,
        x: Tensor,
        mask: Tensor | None,
        residual_scale: Tensor | None,
        request: Request,
        return_weights: bool,
    ) -> Tensor | AttentionOutput:
        called = self.called_parts()
        result = attend_by_parts(
            tokens,
            tuple(getattr(self, name) for name in self.names[:4]),
            getattr(self, self.names.w_g),
            mask,
            residual_scale,
            request,
            readable=bool(called) and called.keys().isdisjoint(self.names[2:4]),
            return_weights=return_weights,
        )
        shape, channels_first = x.shape, self._channels_first(x)
        if isinstance(result, AttentionOutput):
            return result._replace(output=from_tokens(result.output, shape, channels_first))
        return from_tokens(result, shape, channels_first)

    def called_parts(self) -> dict[str, str]:
        """The linear layers that are called, because kernels cannot just read them, and why.

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
        """For `torch.fx`: the definition in PyTorch's operators, calling the linear layers."""
        mask = torch_state.default_in_trace(mask, "mask", None)
        return_weights = torch_state.default_in_trace(return_weights, "return_weights", False)
        residual_scale = torch_state.default_in_trace(residual_scale, "residual_scale", None)
        return self._scripted(x, mask, return_weights, residual_scale)

    def _scripted(
        self, x: Tensor, mask: Tensor | None, return_weights: bool, residual_scale: Tensor | None
    ) -> Tensor:
        """The definition in the Python that TorchScript compiles, calling the linear layers."""
        if return_weights:
            raise ValueError(
                "return_weights must be False in TorchScript and torch.fx; call the eager layer."
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

    def _channels_first(self, x: Tensor) -> bool:
        """Whether x is [B, C, *spatial].

        Raises:
            TypeError, ValueError: x is not a tensor, or not of the layer's width.
        """
        checks.check_tensor("x", x)
        checks.check_option("layout", self.layout, LAYOUTS)
        if x.dim() < 3:
            raise ValueError(
                f"x must be [B, N, {self.in_dims}] or [B, {self.in_dims}, *spatial]; got shape "
                f"{tuple(x.shape)}. Add the missing axis with x.unsqueeze(0)."
            )
        channels_first = self.layout == "channels_first" or (self.layout == "auto" and x.dim() > 3)
        width = x.shape[1 if channels_first else -1]
        if width != self.in_dims:
            order = "[B, C, *spatial]" if channels_first else "[B, *spatial, C]"
            raise ValueError(
                f"x must have {self.in_dims} channels (in_dims), read as {order}; got {width} in "
                f"shape {tuple(x.shape)}. If the axes are in another order, set "
                "layout='channels_first' or layout='channels_last'."
            )
        if (
            self.layout == "auto"
            and x.dim() > 3
            and x.shape[-1] == width
            and not torch.compiler.is_compiling()
        ):
            _warn_of_ambiguity(tuple(x.shape))
        return channels_first

    def _flat_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        """[B, *spatial] -> [B, N]"""
        if not isinstance(mask, Tensor) or mask.dim() < 3 or not isinstance(x, Tensor):
            return mask
        spatial = x.shape[2:] if self._channels_first(x) else x.shape[1:-1]
        if mask.shape[1:] != spatial:
            raise ValueError(
                f"mask must have shape [B, N] or [B, *spatial] = {(x.shape[0], *spatial)}; "
                f"got {tuple(mask.shape)}. One value per token: drop the channel axis."
            )
        return mask.flatten(1)


@functools.cache
def _warn_of_ambiguity(shape: tuple[int, ...]) -> None:
    """Warn once per shape."""
    warnings.warn(
        f"layout='auto' reads x of shape {list(shape)} as [B, C, *spatial], but its last axis has "
        "as many elements as the layer has channels. Pass layout='channels_first' or "
        "layout='channels_last' to say which it is.",
        stacklevel=2,
    )


class AdditiveAttention(AttentionForward):
    r"""Efficient additive attention (arXiv 2303.15446); `num_heads` widens queries and keys only.

    With the rows of q = to_query(x) and k = to_key(x) divided by their norms, a token's output is

    .. math::

        y_n = \mathrm{final}(\mathrm{proj}(G \odot k_n) + q_n), \qquad G = \sum_m a_m q_m,
        \qquad s_m = (q_m \cdot w_g) \cdot \mathrm{token\_dim}^{-1/2}

    where the pooling computes the token weights a from the scores s. With another pooling the same
    weights give other outputs. The pooling of a checkpoint depends on its source:

    ===========  ============================  ====================================================
    ``pooling``  a_n                           used by
    ===========  ============================  ====================================================
    ``l2``       s_n / max(norm(s), eps)       the official code since July 2023, timm
    ``softmax``  exp(s_n) / sum_m exp(s_m)     what readers of the paper expect; Fastformer
    ``sum``      1                             the official code before July 2023, transformers
    ``linear``   s_n                           equations 4 to 6 of the paper as printed
    ===========  ============================  ====================================================

    The layer replaces the official ``EfficientAdditiveAttnetion`` and timm's
    ``EfficientAdditiveAttention``: it has their constructor arguments, parameter names, state dicts
    (`Proj` or `proj`) and outputs.

    Args:
        in_dims: width C of the input.
        token_dim: width D of the output, in_dims by default; the scores are scaled by
            token_dim ** -0.5.
        num_heads: widens queries and keys to E = token_dim * num_heads. For any number of heads
            there is one score per token.
        pooling: "l2", "softmax", "sum" or "linear", see above.
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

    The kernels read the weights of `to_query`, `to_key`, `proj` and `final`. With every backend, a
    part that is more than a linear layer with a weight and a bias (an adapter, a quantised layer,
    one with hooks) is called instead. Then the layer is not fused completely; `called_parts` and
    `swiftkernels.doctor` report which parts are called and why.

    In inference on a CPU the weights are packed once. Changes of the weights are noticed, except
    for writes to a few elements that PyTorch does not count: see `swiftkernels.weights_changed` and
    `invalidate`.

    Shapes:
        x [B, N, C] or [B, C, H, W] (any number of spatial axes); the output has D channels.
        mask: bool [B, N] or `[B, *spatial]`, True = the token takes part in the pooling.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, with the remedy.

    Example:
        >>> attention = AdditiveAttention(64)
        >>> attention(torch.randn(2, 64, 14, 14)).shape
        torch.Size([2, 64, 14, 14])
        >>> output, weights, global_query = attention(torch.randn(2, 49, 64), return_weights=True)
    """

    def __init__(
        self,
        in_dims: int,
        token_dim: int | None = None,
        num_heads: int = 1,
        *,
        pooling: Pooling = "l2",
        qk_norm: bool = True,
        bias: bool = True,
        layout: Layout = "auto",
        eps: float = 1e-12,
        backend: Backend = "auto",
        recompute: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        remedy = (
            "Pass the width in channels (in_dims, token_dim) or the number of heads (num_heads)."
        )
        checks.check_positive("in_dims", in_dims, remedy)
        token_dim = in_dims if token_dim is None else token_dim
        checks.check_positive("token_dim", token_dim, remedy)
        checks.check_positive("num_heads", num_heads, remedy)
        checks.check_option("pooling", pooling, POOLINGS)
        checks.check_option("qk_norm", qk_norm, (True, False))
        checks.check_number("eps", eps, positive=True)
        checks.check_option("layout", layout, LAYOUTS)
        checks.check_option("backend", backend, BACKENDS)
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
    """Set the model to eval mode; at the end, restore the mode of every module."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


# For TorchScript and torch.fx. They depend on the number of axes, so torch.fx traces their calls.


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
