"""The functional interface: check the arguments, cast for autocast, choose the backend, call it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.backends import torch_state
from swiftkernels.backends.torch_state import autocast_off, autocasts
from swiftkernels.ops import operator, plan
from swiftkernels.ops.additive_attention import reference
from swiftkernels.ops.additive_attention.cpu.packing import Weights
from swiftkernels.ops.additive_attention.reference import Options
from swiftkernels.utils import checks


class AttentionOutput(NamedTuple):
    """What ``return_weights=True`` gives.

    Weights and global query carry no gradient; they are float32 where the input is in half
    precision.
    """

    output: Tensor
    """The output, as without ``return_weights``."""
    weights: Tensor
    """Token weights a, [B, N]."""
    global_query: Tensor
    """Global query G, [B, E]."""


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
    pooling: str = "l2",
    qk_norm: bool = True,
    scale: float | None = None,
    eps: float = 1e-12,
    backend: str = "auto",
    return_weights: bool = False,
) -> Tensor | AttentionOutput:
    """Efficient additive attention on given queries and keys (section 3 of arXiv 2303.15446).

    Args:
        q, k: queries and keys, [B, N, E], any strides.
        w_g: scoring vector, [E] or [E, 1].
        proj_weight, proj_bias: the layer `proj`, [E, E] and [E] or None.
        final_weight, final_bias: the layer `final`, [D, E] and [D] or None.
        mask: bool [B, N], True = the token takes part in the pooling. Masked tokens weigh 0 and
            count in no norm; their own output row is computed all the same.
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
    checks.check_w_g(w_g)
    w_g = w_g.flatten()
    q, k, w_g, proj_weight, proj_bias, final_weight, final_bias = _autocast(
        q, k, w_g, proj_weight, proj_bias, final_weight, final_bias
    )
    width = w_g.shape[0]
    checks.check_tokens("q", q, width, "E, the length of w_g")
    checks.check_shape(
        "k", k, tuple(q.shape), "that of q", "Queries and keys come from the same tokens."
    )
    weights = (w_g, proj_weight, proj_bias, final_weight, final_bias)
    _check_weights(checks.check_alike, "q", q, *weights)
    checks.check_alike("q", q, {"k": k})
    checks.check_mask(mask, q)
    options = _options(pooling, qk_norm, scale, eps, q.shape[1], final_weight.shape[0])
    chosen = operator.choose_backend(backend, q, width, from_tokens=False)
    if chosen == "reference":
        out = reference.additive_attention(q, k, *weights, mask, options)
    else:
        out = operator.additive_attention(
            q, k, *weights, mask=mask, options=options, backend=chosen
        )
    return _with_weights(out, q, w_g, mask, options) if return_weights else out


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
    pooling: str = "l2",
    qk_norm: bool = True,
    scale: float | None = None,
    eps: float = 1e-12,
    backend: str = "auto",
    return_weights: bool = False,
    residual_scale: Tensor | None = None,
    recompute: bool | None = None,
) -> Tensor | AttentionOutput:
    """The whole attention layer from tokens and weights; what `AdditiveAttention` calls.

    In inference on a CPU, weight matrices that are `nn.Parameter` are packed once, others are read
    as they are at every call.

    Args:
        x: tokens, [B, N, C], any strides: views of NCHW images are read without a copy.
        query_weight, query_bias: the layer `to_query`, [E, C] and [E] or None.
        key_weight, key_bias: the layer `to_key`, [E, C] and [E] or None.
        w_g, proj_weight, proj_bias, final_weight, final_bias: as in `additive_attention`.
        mask, pooling, qk_norm, scale, eps, backend, return_weights: as in `additive_attention`.
        residual_scale: [C] in any shape; if given, the result is x + residual_scale * output, the
            residual branch of a SwiftFormer block, with the strides of x. The CPU kernels add it in
            inference without another pass over memory. Needs D = C.
        recompute: what the CPU kernels keep for a backward. True: x and a few numbers for each
            token, and queries and keys are computed again or, with many tokens, not needed; False:
            unit queries and keys too, 3 x the bytes of x; None: the faster one. The other backends
            have no choice.

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
        query_weight,
        query_bias,
        key_weight,
        key_bias,
        w_g,
        proj_weight,
        proj_bias,
        final_weight,
        final_bias,
        residual_scale,
    )
    checks.check_w_g(w_g)
    checks.check_weight("query_weight", query_weight, "[E, C]")
    residual, (x,) = x, _autocast(x)
    width, in_dims = w_g.shape[0], query_weight.shape[-1]
    checks.check_tokens("x", x, in_dims, "C, the width of query_weight")
    checks.check_shape(
        "query_weight", query_weight, (width, in_dims), "[E, C], E the length of w_g"
    )
    checks.check_shape("key_weight", key_weight, (width, in_dims), "[E, C]")
    for name, bias in (("query_bias", query_bias), ("key_bias", key_bias)):
        if bias is not None:
            checks.check_shape(name, bias, (width,), "[E]")
    projections = {
        "query_weight": query_weight,
        "query_bias": query_bias,
        "key_weight": key_weight,
        "key_bias": key_bias,
    }
    check_alike = _check_castable if autocasts(x.device.type) else checks.check_alike
    check_alike("x", x, projections)
    _check_weights(check_alike, "x", x, *weights[4:9])
    checks.check_mask(mask, x)
    checks.check_option("recompute", recompute, (None, True, False))
    if residual_scale is not None:
        _check_residual(residual_scale, residual, final_weight.shape[0])
    options = _options(pooling, qk_norm, scale, eps, x.shape[1], final_weight.shape[0])
    chosen = operator.choose_backend(backend, x, width)
    plain = (
        chosen in ("cpu", "triton")
        and torch_state.nothing_listens()
        and torch_state.is_plain(x, *weights)
    )
    added = False
    if plain and chosen == "cpu" and not operator.needs_gradient(residual, *weights):
        # These kernels round the weights to the type of x, and add x themselves.
        added = residual_scale is not None and residual is x and residual_scale.dtype == x.dtype
        out = operator.infer_on_cpu(
            x, weights if added else weights._replace(layer_scale=None), mask, options
        )
    else:
        out = _attend(x, weights, mask, options, chosen, recompute, plain)
    if residual_scale is not None and not added:
        out = residual + residual_scale.flatten() * out
    if plain and x is residual:
        plan.remember(weights, (backend, pooling, qk_norm, scale, eps), chosen, options, x)
    if not return_weights:
        return out
    with torch.no_grad():
        q = F.linear(x, *_autocast(query_weight, query_bias))
    return _with_weights(out, q, w_g.flatten(), mask, options)


def _attend(
    x: Tensor,
    weights: Weights,
    mask: Tensor | None,
    options: Options,
    chosen: str,
    recompute: bool | None,
    plain: bool,
) -> Tensor:
    """The output by the chosen backend, differentiable."""
    w = Weights(*_autocast(*weights[:9]))
    if chosen == "reference":
        return reference.additive_self_attention(x, *w[:4], w.w_g.flatten(), *w[5:9], mask, options)
    # In the shape in which the short way past these checks saves it for the backward: activation
    # checkpointing compares what two calls save.
    w_g = w.w_g if plain else w.w_g.flatten()
    return operator.additive_self_attention(
        x, *w._replace(w_g=w_g)[:9],
        mask=mask, options=options, backend=chosen, recompute=recompute,
    )  # fmt: skip


def attend_by_parts(
    x: Tensor,
    query: Callable[[Tensor], Tensor],
    key: Callable[[Tensor], Tensor],
    w_g: Tensor,
    proj: Callable[[Tensor], Tensor],
    final: Callable[[Tensor], Tensor],
    readable: bool,
    *,
    mask: Tensor | None,
    pooling: str,
    qk_norm: bool,
    scale: float,
    eps: float,
    backend: str,
    return_weights: bool,
    residual_scale: Tensor | None,
) -> Tensor | AttentionOutput:
    """As `additive_self_attention`, with linear layers that have to be called.

    `readable`: proj and final are `nn.Linear` whose weights may be read, so that the operator on
    queries and keys can run fused, where a backend has it.
    """
    checks.check_w_g(w_g)
    checks.check_mask(mask, x)
    q, k = query(x), key(x)
    checks.check_tokens("the output of the query layer", q, w_g.shape[0], "E, the length of w_g")
    options = _options(pooling, qk_norm, scale, eps, x.shape[1], 1)
    fused = backend in ("triton", "aten") or (
        backend == "auto"
        and operator.choose_backend(backend, q, w_g.shape[0], from_tokens=False) != "reference"
    )
    if readable and fused:
        assert isinstance(proj, nn.Linear)
        assert isinstance(final, nn.Linear)
        out = additive_attention(
            q, k, w_g, proj.weight, proj.bias, final.weight, final.bias,
            mask=mask, pooling=pooling, qk_norm=qk_norm, scale=scale, eps=eps, backend=backend,
        )  # fmt: skip
        assert isinstance(out, Tensor)
    else:
        out = reference.attend(q, k, w_g.flatten(), proj, final, mask, options)
    if residual_scale is not None:
        _check_residual(residual_scale, x, out.shape[2])
        out = x + residual_scale.flatten() * out
    return _with_weights(out, q, w_g.flatten(), mask, options) if return_weights else out


def _check_weights(
    check_alike: Callable[..., None],
    like_name: str,
    like: Tensor,
    w_g: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    final_weight: Tensor,
    final_bias: Tensor | None,
) -> None:
    width = w_g.shape[0]
    checks.check_shape("proj_weight", proj_weight, (width, width), "[E, E]")
    checks.check_weight("final_weight", final_weight, "[D, E]")
    token_dim = final_weight.shape[0]
    checks.check_shape("final_weight", final_weight, (token_dim, width), "[D, E]")
    if proj_bias is not None:
        checks.check_shape("proj_bias", proj_bias, (width,), "[E]")
    if final_bias is not None:
        checks.check_shape("final_bias", final_bias, (token_dim,), "[D]")
    weights = {
        "w_g": w_g,
        "proj_weight": proj_weight,
        "proj_bias": proj_bias,
        "final_weight": final_weight,
        "final_bias": final_bias,
    }
    check_alike(like_name, like, weights)


def _check_castable(like_name: str, like: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """As `check_alike`, where autocast is on: it casts every floating-point type but float64."""
    for name, t in others.items():
        if t is not None:
            if torch.float64 in (t.dtype, like.dtype) or not t.is_floating_point():
                checks.check_dtype(name, t, like_name, like)
            checks.check_device(name, t, like_name, like)


def _check_residual(residual_scale: Tensor, x: Tensor, token_dim: int) -> None:
    checks.check_tensor("residual_scale", residual_scale)
    in_dims = x.shape[2]
    if residual_scale.numel() != in_dims or in_dims != token_dim:
        raise ValueError(
            f"residual_scale must have {in_dims} elements, one for each channel of x, and the "
            f"output as many channels; got shape {tuple(residual_scale.shape)} and {token_dim} "
            "channels. "
            "Leave it out and add the branches yourself."
        )
    check_alike = _check_castable if autocasts(x.device.type) else checks.check_alike
    check_alike("x", x, {"residual_scale": residual_scale})


def _options(
    pooling: str, qk_norm: bool, scale: float | None, eps: float, n_tokens: int, token_dim: int
) -> Options:
    checks.check_option("qk_norm", qk_norm, (True, False))
    checks.check_number("eps", eps, positive=True)
    if scale is None:
        scale = token_dim**-0.5
    checks.check_number("scale", scale)
    checks.check_pooling(pooling, n_tokens)
    return Options(pooling, qk_norm, scale, eps)


def _with_weights(
    out: Tensor, q: Tensor, w_g: Tensor, mask: Tensor | None, options: Options
) -> AttentionOutput:
    # In float32 for halves, as in the kernels: in float16 eps is 0, and a long sum overflows.
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.no_grad(), autocast_off(q.device.type):
        q, w_g = q.to(dtype), w_g.to(dtype)
        if options.qk_norm:
            q = F.normalize(q, dim=-1, eps=options.eps)
        return AttentionOutput(out, *reference.global_query(q, w_g, mask, options))


def _autocast(*tensors):  # type: ignore[no-untyped-def]
    """Cast to the active autocast dtype, as autocast casts the inputs of a linear layer."""
    first = next((t for t in tensors if isinstance(t, Tensor)), None)
    if first is None or not autocasts(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )
