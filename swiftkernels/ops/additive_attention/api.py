"""Additive attention as functions: they check the arguments, choose the backend, make a plan."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.backends import cache, torch_state
from swiftkernels.backends.layouts import to_tokens, tokens_of
from swiftkernels.backends.torch_state import autocast_dtype, autocasts
from swiftkernels.ops import plan as planning
from swiftkernels.ops.additive_attention import reference
from swiftkernels.ops.additive_attention.cpu import config as cpu_config
from swiftkernels.ops.additive_attention.op import QUERY_KEY_ATTENTION, SELF_ATTENTION
from swiftkernels.ops.additive_attention.weights import Options, OutputWeights, Weights
from swiftkernels.ops.operator import Call, needs_gradient
from swiftkernels.ops.plan import OperatorPlan, Plan, Plans, ViewingPlan
from swiftkernels.ops.types import Backend, Pooling
from swiftkernels.utils import checks

POOLINGS, BACKENDS = reference.POOLINGS, ("auto", "triton", "cpu", "aten", "reference")
IMAGES = ("triton", "cpu")
"""Backends that take images [B, C, H, W] as they are."""


class AttentionOutput(NamedTuple):
    """The result with ``return_weights=True``.

    Weights and global query have no gradient. They are float32 if the input is in half precision.
    """

    output: Tensor
    """The output, as without ``return_weights``."""
    weights: Tensor
    """Token weights a, [B, N]."""
    global_query: Tensor
    """Global query G, [B, E]."""


class Request(NamedTuple):
    """The options of a call, as in `additive_self_attention`."""

    pooling: str
    qk_norm: bool
    scale: float | None
    eps: float
    backend: str
    recompute: bool | None = None


@overload
def additive_attention(
    q: Tensor,
    k: Tensor,
    w_g: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    final_weight: Tensor,
    final_bias: Tensor | None,
    *,
    mask: Tensor | None = ...,
    pooling: Pooling = ...,
    qk_norm: bool = ...,
    scale: float | None = ...,
    eps: float = ...,
    backend: Backend = ...,
    return_weights: Literal[False] = ...,
) -> Tensor: ...
@overload
def additive_attention(
    q: Tensor,
    k: Tensor,
    w_g: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    final_weight: Tensor,
    final_bias: Tensor | None,
    *,
    mask: Tensor | None = ...,
    pooling: Pooling = ...,
    qk_norm: bool = ...,
    scale: float | None = ...,
    eps: float = ...,
    backend: Backend = ...,
    return_weights: Literal[True],
) -> AttentionOutput: ...
def additive_attention(
    q: Tensor,
    k: Tensor,
    w_g: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    final_weight: Tensor,
    final_bias: Tensor | None,
    *,
    mask: Tensor | None = None,
    pooling: Pooling = "l2",
    qk_norm: bool = True,
    scale: float | None = None,
    eps: float = 1e-12,
    backend: Backend = "auto",
    return_weights: bool = False,
) -> Tensor | AttentionOutput:
    """Efficient additive attention on given queries and keys (section 3 of arXiv 2303.15446).

    Args:
        q, k: queries and keys, [B, N, E], any strides.
        w_g: scoring vector, [E] or [E, 1].
        proj_weight, proj_bias: the layer `proj`, [E, E] and [E] or None.
        final_weight, final_bias: the layer `final`, [D, E] and [D] or None.
        mask: bool [B, N], True = the token takes part in the pooling. Masked tokens have weight 0
            and count in no norm. Their own output rows are computed as usual.
        pooling: "l2", "softmax", "sum" or "linear": see the table of `AdditiveAttention`.
        qk_norm: divide the rows of q and k by their L2 norms.
        scale: factor of the scores; default D ** -0.5.
        eps: lower bound of every norm, as in `torch.nn.functional.normalize`.
        backend: "auto", "triton", "cpu", "aten" or "reference". Only "auto" chooses; the
            others never fall back.
        return_weights: also return the token weights and the global query.

    Returns:
        The output [B, N, D], contiguous; with ``return_weights`` an `AttentionOutput`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, with the
            remedy.

    Example:
        >>> q, k = torch.randn(2, 49, 64), torch.randn(2, 49, 64)
        >>> w = torch.randn(64, 64) / 8
        >>> additive_attention(q, k, torch.randn(64), w, None, w, None).shape
        torch.Size([2, 49, 64])
    """
    _check_w_g(w_g)
    w_g = w_g.flatten()
    if (dtype := autocast_dtype(q)) is not None:
        q, k, w_g, proj_weight, proj_bias, final_weight, final_bias = _cast(
            dtype, q, k, w_g, proj_weight, proj_bias, final_weight, final_bias
        )
    width = w_g.shape[0]
    checks.check_tokens("q", q, width, "E, the length of w_g")
    checks.check_shape(
        "k", k, tuple(q.shape), "that of q", "Queries and keys come from the same tokens."
    )
    weights = OutputWeights(w_g, proj_weight, proj_bias, final_weight, final_bias)
    _check_output_weights(weights)
    checks.check_alike("q", q, weights._asdict())
    checks.check_alike("q", q, {"k": k})
    checks.check_mask(mask, q.shape[:2], q.device)
    request = Request(pooling, qk_norm, scale, eps, backend)
    options = _options(request, q.shape[1], final_weight.shape[0])
    chosen = QUERY_KEY_ATTENTION.choose_backend(backend, q, width)
    if chosen == "reference":
        out = reference.additive_attention(q, k, weights, mask, options)
    else:
        out = QUERY_KEY_ATTENTION(Call((q, k), weights, mask, options, chosen, "statistics"))
    return _with_weights(out, q, w_g, mask, options) if return_weights else out


@overload
def additive_self_attention(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    key_bias: Tensor | None,
    w_g: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    final_weight: Tensor,
    final_bias: Tensor | None,
    *,
    mask: Tensor | None = ...,
    pooling: Pooling = ...,
    qk_norm: bool = ...,
    scale: float | None = ...,
    eps: float = ...,
    backend: Backend = ...,
    return_weights: Literal[False] = ...,
    residual_scale: Tensor | None = ...,
    recompute: bool | None = ...,
) -> Tensor: ...
@overload
def additive_self_attention(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    key_bias: Tensor | None,
    w_g: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    final_weight: Tensor,
    final_bias: Tensor | None,
    *,
    mask: Tensor | None = ...,
    pooling: Pooling = ...,
    qk_norm: bool = ...,
    scale: float | None = ...,
    eps: float = ...,
    backend: Backend = ...,
    return_weights: Literal[True],
    residual_scale: Tensor | None = ...,
    recompute: bool | None = ...,
) -> AttentionOutput: ...
def additive_self_attention(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    key_bias: Tensor | None,
    w_g: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    final_weight: Tensor,
    final_bias: Tensor | None,
    *,
    mask: Tensor | None = None,
    pooling: Pooling = "l2",
    qk_norm: bool = True,
    scale: float | None = None,
    eps: float = 1e-12,
    backend: Backend = "auto",
    return_weights: bool = False,
    residual_scale: Tensor | None = None,
    recompute: bool | None = None,
) -> Tensor | AttentionOutput:
    """The attention layer from tokens and weights; `AdditiveAttention` as a function.

    In inference on a CPU, weights that are `nn.Parameter` are packed once. Other weights are read
    at every call.

    Args:
        x: tokens, [B, N, C], any strides: views of NCHW images are read without a copy.
        query_weight, query_bias: the layer `to_query`, [E, C] and [E] or None.
        key_weight, key_bias: the layer `to_key`, [E, C] and [E] or None.
        w_g, proj_weight, proj_bias, final_weight, final_bias: as in `additive_attention`.
        mask, pooling, qk_norm, scale, eps, backend, return_weights: as in `additive_attention`.
        residual_scale: [C] in any shape. If given, the result is x + residual_scale * output, the
            residual branch of a SwiftFormer block, with the strides of x. Needs D = C. In inference
            the CPU kernels add x without another pass over memory.
        recompute: what the CPU kernels keep for a backward. True: x and three floats per token;
            queries and keys are computed again or, with many tokens, not needed. False: also the
            normalised queries and keys, 3 x the bytes of x. None: the faster one. The other
            backends have no choice.

    Returns:
        The output [B, N, D], contiguous unless `residual_scale` is given; with ``return_weights``
        an `AttentionOutput`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, with the
            remedy.

    Example:
        >>> x, w, b = torch.randn(2, 49, 64), torch.randn(64, 64) / 8, torch.zeros(64)
        >>> additive_self_attention(x, w, b, w, b, torch.randn(64), w, b, w, b).shape
        torch.Size([2, 49, 64])
    """
    weights = Weights(
        query_weight, query_bias, key_weight, key_bias, w_g, proj_weight, proj_bias, final_weight,
        final_bias,
    )  # fmt: skip
    _check_w_g(w_g)
    checks.check_weight("query_weight", query_weight, "[E, C]")
    checks.check_tokens("x", x, query_weight.shape[1], "C, the width of query_weight")
    request = Request(pooling, qk_norm, scale, eps, backend, recompute)
    out, _ = attend(x, weights, mask, residual_scale, request, False)
    return with_weights(out, x, weights, mask, request) if return_weights else out


def attend(
    x: Tensor,
    weights: Weights,
    mask: Tensor | None,
    residual_scale: Tensor | None,
    request: Request,
    channels_first: bool,
    plans: Plans | None = None,
) -> tuple[Tensor, Plan]:
    """The output by a new plan, and the plan.

    Args:
        x: tokens [B, N, C], [B, *spatial, C] or, if `channels_first`, [B, C, *spatial].
        weights, mask, residual_scale: as in `additive_self_attention`.
        request: the options.
        channels_first: the order of the axes of x.
        plans: of a layer; its next calls may use the plan. None: the plan is used only once.
    """
    make = functools.partial(
        _make_plan, x, weights, mask, residual_scale, request, channels_first, plans
    )
    return planning.run(make, x, weights, mask, residual_scale)


def _make_plan(
    x: Tensor,
    weights: Weights,
    mask: Tensor | None,
    residual_scale: Tensor | None,
    request: Request,
    channels_first: bool,
    plans: Plans | None,
) -> Plan:
    """Check the arguments, choose the backend, pack the weights."""
    options = _check(x, weights, mask, residual_scale, request, channels_first)
    width = weights.final_weight.shape[1]
    dtype = autocast_dtype(x)
    tokens = to_tokens(x if dtype is None else x.to(dtype), channels_first)
    backend = SELF_ATTENTION.choose_backend(request.backend, tokens, width)
    needs_grad = needs_gradient(x, residual_scale, *weights)
    as_image = backend in IMAGES and channels_first and x.dim() == 4
    infers = (
        (backend == "cpu" or (backend == "triton" and dtype is None))
        and not needs_grad
        and torch_state.nothing_listens()
        and torch_state.is_plain(x, residual_scale, *weights)
    )
    if infers and backend == "cpu" and as_image:
        # Neither x nor an output with the strides of x may have gaps between rows of pixels.
        outputs = [] if residual_scale is None else [torch.empty_like(x, device="meta")]
        as_image = all(tokens_of(t.shape, t.stride()) is not None for t in (x, *outputs))
    # The CPU kernels add x only if residual_scale is of its type.
    fuses = infers and backend == "cpu" and dtype is None
    adds = residual_scale is not None and not (fuses and residual_scale.dtype == x.dtype)
    as_is = dtype is None and not adds and (as_image or (x.dim() == 3 and not channels_first))
    plan: Plan | None = None
    if infers:
        scale = None if adds else residual_scale
        found = _plans_of(weights) if plans is None else plans
        given = x if as_is else tokens
        plan = _inference_plan(backend, given, weights, mask, options, scale, found)
    if plan is None:
        keep = "statistics"
        if needs_grad and backend == "cpu":
            keep = _keep(tokens, width, request.recompute)
        places = None if plans is None else cache.places(cache.present(weights))
        trains = places is not None and needs_grad
        plan = OperatorPlan(SELF_ATTENTION, options, backend, keep, trains, dtype, places)
    return plan if as_is else ViewingPlan(plan, channels_first, dtype, adds)


def _inference_plan(backend: str, *arguments: Any) -> Plan:
    plan: Plan = SELF_ATTENTION.implementation(backend).inference_plan(*arguments)
    return plan


def _plans_of(weights: Weights) -> Plans:
    w = weights
    return planning.plans_of((w.query_weight, w.key_weight, w.proj_weight, w.final_weight))


def _keep(tokens: Tensor, width: int, recompute: bool | None) -> str:
    """What the CPU kernels keep for a backward."""
    if recompute is None:
        recompute = not cpu_config.keeps_rows(tokens.shape[0], tokens.shape[1], width)
    return "statistics" if recompute else "rows"


def _n_tokens(x: Tensor, channels_first: bool) -> int:
    return math.prod(x.shape[2:] if channels_first else x.shape[1:-1])


def attend_by_parts(
    tokens: Tensor,
    linears: tuple[Callable[[Tensor], Tensor], ...],
    w_g: Tensor,
    mask: Tensor | None,
    residual_scale: Tensor | None,
    request: Request,
    readable: bool,
    return_weights: bool,
) -> Tensor | AttentionOutput:
    """`additive_self_attention` where linear layers have to be called.

    Args:
        tokens: [B, N, C].
        linears: the query and key layers, proj and final.
        w_g, mask, residual_scale, return_weights: as in `additive_self_attention`.
        request: the options.
        readable: whether the weights of proj and final may be read. Then the operator on queries
            and keys can run fused, if a backend has it.
    """
    query, key, proj, final = linears
    _check_w_g(w_g)
    checks.check_mask(mask, tokens.shape[:2], tokens.device)
    q, k = query(tokens), key(tokens)
    width = w_g.shape[0]
    checks.check_tokens("the output of the query layer", q, width, "E, the length of w_g")
    options = _options(request, tokens.shape[1], 1)
    backend = request.backend
    fused = backend in ("triton", "aten") or (
        backend == "auto" and QUERY_KEY_ATTENTION.choose_backend(backend, q, width) != "reference"
    )
    if readable and fused:
        assert isinstance(proj, nn.Linear)
        assert isinstance(final, nn.Linear)
        chosen: Any = request._asdict()
        del chosen["recompute"]
        out: Tensor = additive_attention(
            q, k, w_g, proj.weight, proj.bias, final.weight, final.bias, mask=mask, **chosen
        )
    else:
        out = reference.attend(q, k, w_g.flatten(), proj, final, mask, options)
    if residual_scale is not None:
        _check_residual(residual_scale, tokens, tokens.shape[2], out.shape[2])
        out = tokens + residual_scale.flatten() * out
    return _with_weights(out, q, w_g.flatten(), mask, options) if return_weights else out


def with_weights(
    out: Tensor, tokens: Tensor, weights: Weights, mask: Tensor | None, request: Request
) -> AttentionOutput:
    """Add token weights and global query to an output for tokens [B, N, C]."""
    with torch.no_grad():
        query = (weights.query_weight, weights.query_bias)
        if (dtype := autocast_dtype(tokens)) is not None:
            tokens, *query = _cast(dtype, tokens, *query)
        q = F.linear(tokens, *query)
    options = _options(request, tokens.shape[1], weights.final_weight.shape[0])
    return _with_weights(out, q, weights.w_g.flatten(), mask, options)


def _with_weights(
    out: Tensor, q: Tensor, w_g: Tensor, mask: Tensor | None, options: Options
) -> AttentionOutput:
    # In float32 for half precision, as in the kernels: in float16 eps is 0, and long sums overflow.
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.no_grad(), torch_state.autocast_off(q.device.type):
        q, w_g = q.to(dtype), w_g.to(dtype)
        if options.qk_norm:
            q = F.normalize(q, dim=-1, eps=options.eps)
        return AttentionOutput(out, *reference.global_query(q, w_g, mask, options))


def _check(
    x: Tensor,
    weights: Weights,
    mask: Tensor | None,
    residual_scale: Tensor | None,
    request: Request,
    channels_first: bool,
) -> Options:
    """Raise for bad arguments. x was checked to have as many channels as the weights."""
    w = weights
    in_dims, n_tokens = w.query_weight.shape[-1], _n_tokens(x, channels_first)
    _check_w_g(w.w_g)
    checks.check_weight("query_weight", w.query_weight, "[E, C]")
    checks.check_floating("x", x)
    width = w.w_g.shape[0]
    projection = (width, in_dims)
    checks.check_shape("query_weight", w.query_weight, projection, "[E, C], E the length of w_g")
    checks.check_shape("key_weight", w.key_weight, projection, "[E, C]")
    for name, bias in (("query_bias", w.query_bias), ("key_bias", w.key_bias)):
        if bias is not None:
            checks.check_shape(name, bias, (width,), "[E]")
    _check_output_weights(OutputWeights(*w[4:]))
    _check_alike(x, w._asdict())
    checks.check_mask(mask, (x.shape[0], n_tokens), x.device)
    checks.check_option("recompute", request.recompute, (None, True, False))
    if residual_scale is not None:
        _check_residual(residual_scale, x, in_dims, w.final_weight.shape[0])
    return _options(request, n_tokens, w.final_weight.shape[0])


def _check_w_g(w_g: Tensor) -> None:
    checks.check_tensor("w_g", w_g)
    if w_g.numel() == 0 or (w_g.dim() != 1 and w_g.shape[1:] != (1,)):
        raise ValueError(
            f"w_g must have shape [E] or [E, 1]; got {tuple(w_g.shape)}. "
            "Pass one weight for each channel of the queries, as the layer's state dict has them."
        )


def _check_output_weights(weights: OutputWeights) -> None:
    width = weights.w_g.shape[0]
    checks.check_shape("proj_weight", weights.proj_weight, (width, width), "[E, E]")
    checks.check_weight("final_weight", weights.final_weight, "[D, E]")
    token_dim = weights.final_weight.shape[0]
    checks.check_shape("final_weight", weights.final_weight, (token_dim, width), "[D, E]")
    if weights.proj_bias is not None:
        checks.check_shape("proj_bias", weights.proj_bias, (width,), "[E]")
    if weights.final_bias is not None:
        checks.check_shape("final_bias", weights.final_bias, (token_dim,), "[D]")


def _check_alike(x: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Raise unless all have the type and device of x.

    Under autocast all floating-point types except float64 may be mixed.
    """
    if not autocasts(x.device.type):
        checks.check_alike("x", x, others)
        return
    for name, t in others.items():
        if t is not None:
            if torch.float64 in (t.dtype, x.dtype) or not t.is_floating_point():
                checks.check_dtype(name, t, "x", x)
            checks.check_device(name, t, "x", x)


def _check_residual(residual_scale: Tensor, x: Tensor, in_dims: int, token_dim: int) -> None:
    checks.check_tensor("residual_scale", residual_scale)
    if residual_scale.numel() != in_dims or in_dims != token_dim:
        raise ValueError(
            f"residual_scale must have {in_dims} elements, one for each channel of x, and the "
            f"output as many channels; got shape {tuple(residual_scale.shape)} and {token_dim} "
            "channels. Call without residual_scale and add the branches yourself."
        )
    _check_alike(x, {"residual_scale": residual_scale})


def _options(request: Request, n_tokens: int, token_dim: int) -> Options:
    checks.check_option("qk_norm", request.qk_norm, (True, False))
    checks.check_number("eps", request.eps, positive=True)
    scale = token_dim**-0.5 if request.scale is None else request.scale
    checks.check_number("scale", scale)
    checks.check_option("pooling", request.pooling, POOLINGS)
    # The branch on n_tokens comes last: under torch.compile it would otherwise guard every graph.
    if request.pooling in ("l2", "softmax") and n_tokens == 0:
        raise ValueError(
            f"pooling={request.pooling!r} normalises over the tokens and needs at least one; got 0 "
            "tokens. Skip the layer for empty inputs, or use pooling='sum' or 'linear'."
        )
    return Options(request.pooling, request.qk_norm, scale, request.eps)  # type: ignore[arg-type]


def _cast(dtype: torch.dtype, *tensors):  # type: ignore[no-untyped-def]
    """Cast as autocast does: all floating-point tensors except float64."""
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )
