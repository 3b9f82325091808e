"""The definition in plain PyTorch against the formulas written out token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swiftkernels.ops.additive_attention import reference
from swiftkernels.ops.additive_attention.weights import Options, OutputWeights, Weights
from swiftkernels.testing.cases import (
    POOLINGS,
    QUERY_KEY_NAMES,
    forward_backward,
    make_mask,
    make_query_key_tensors,
    make_tensors,
)
from swiftkernels.testing.tolerance import EXACT, assert_exact, relative_error


def options_for(
    token_dim: int, pooling: str = "l2", qk_norm: bool = True, eps: float = 1e-12
) -> Options:
    return Options(pooling, qk_norm, token_dim**-0.5, eps)


def token_by_token(
    tensors: list[Tensor | None], mask: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the token weights and G, from one token at a time."""
    x, wq, bq, wk, bk, w_g, wp, bp, wf, bf = tensors
    batch, n_tokens, _ = x.shape
    out = x.new_empty(batch, n_tokens, wf.shape[0])
    weights = x.new_zeros(batch, n_tokens)
    global_queries = []

    def layer(weight: Tensor, bias: Tensor | None, v: Tensor) -> Tensor:
        product = torch.stack([(row * v).sum() for row in weight])
        return product if bias is None else product + bias

    def row(v: Tensor) -> Tensor:
        if not options.qk_norm:
            return v
        norm = math.sqrt(sum(value**2 for value in v.tolist()))
        return v / max(norm, options.eps)

    for b in range(batch):
        tokens = [n for n in range(n_tokens) if mask is None or mask[b, n]]
        q = [row(layer(wq, bq, x[b, n])) for n in range(n_tokens)]
        k = [row(layer(wk, bk, x[b, n])) for n in range(n_tokens)]
        s = {n: (w_g * q[n]).sum().item() * options.scale for n in tokens}
        if options.pooling == "l2":
            norm = math.sqrt(sum(value**2 for value in s.values()))
            a = {n: s[n] / max(norm, options.eps) for n in tokens}
        elif options.pooling == "softmax":
            a = {n: math.exp(s[n]) / sum(math.exp(value) for value in s.values()) for n in tokens}
        elif options.pooling == "linear":
            a = s
        else:
            a = dict.fromkeys(tokens, 1.0)
        G = sum((a[n] * q[n] for n in tokens), torch.zeros_like(w_g))
        for n in range(n_tokens):
            out[b, n] = layer(wf, bf, layer(wp, bp, G * k[n]) + q[n])
        for n in tokens:
            weights[b, n] = a[n]
        global_queries.append(G)
    return out, weights, torch.stack(global_queries)


def on_tokens(tensors: Sequence[Any], mask: Tensor | None, options: Options) -> Tensor:
    x, *weights = tensors
    return reference.additive_self_attention(x, Weights(*weights), mask, options)


def on_queries(tensors: Sequence[Any], mask: Tensor | None, options: Options) -> Tensor:
    q, k, *weights = tensors
    return reference.additive_attention(q, k, OutputWeights(*weights), mask, options)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("num_heads", "bias"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_definition_equals_the_formulas_token_by_token(pooling, qk_norm, num_heads, bias, masked):
    tensors = make_tensors(2, 6, 7, 5, num_heads, bias=bias)
    mask = make_mask(2, 6) if masked else None
    options = options_for(5, pooling, qk_norm)
    exact, weights, G = token_by_token(tensors, mask, options)
    ours = on_tokens(tensors, mask, options)
    assert relative_error(ours, exact) <= EXACT

    x, wq, bq, *_ = tensors
    q = F.linear(x, wq, bq)
    if qk_norm:
        q = F.normalize(q, dim=-1)
    our_weights, our_G = reference.global_query(q, tensors[5], mask, options)
    assert relative_error(our_weights, weights) <= EXACT
    assert relative_error(our_G, G) <= EXACT


def test_scale_counts_the_width_of_a_head_and_not_of_all_heads():
    """token_dim ** -0.5 is seen where the pooling keeps the size of the scores."""
    x, wq, bq, _, _, w_g, *_ = make_tensors(1, 4, 6, 3, 2)
    q = F.linear(x, wq, bq)
    weights, _ = reference.global_query(q, w_g, None, options_for(3, "linear"))
    assert relative_error(weights * math.sqrt(3), q @ w_g) <= EXACT


@pytest.mark.parametrize("pooling", POOLINGS)
def test_masked_tokens_do_not_reach_the_outputs_of_others(pooling):
    tensors = make_tensors(2, 8, 6, 5)
    mask = make_mask(2, 8)
    options = options_for(5, pooling)
    out = on_tokens(tensors, mask, options)
    changed = tensors[0].clone()
    changed[~mask] = 100 * torch.randn_like(changed[~mask])
    other = on_tokens([changed, *tensors[1:]], mask, options)
    assert torch.equal(out[mask], other[mask])
    assert not torch.equal(out[~mask], other[~mask])

    x = tensors[0].requires_grad_()
    out = on_tokens(tensors, mask, options)
    (grad,) = torch.autograd.grad(out[mask].sum(), x)
    assert not grad[~mask].any()
    assert grad[mask].any()


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_masking_equals_dropping_the_tokens_and_adding_their_rows(pooling, qk_norm):
    x, wq, bq, wk, bk, w_g, wp, bp, wf, bf = tensors = make_tensors(1, 9, 6, 5, 2)
    mask = make_mask(1, 9)
    options = options_for(5, pooling, qk_norm)
    out = on_tokens(tensors, mask, options)
    kept = on_tokens([x[:, mask[0]], *tensors[1:]], None, options)
    assert relative_error(out[:, mask[0]], kept) <= EXACT

    q, k = F.linear(x, wq, bq), F.linear(x, wk, bk)
    if qk_norm:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    _, G = reference.global_query(q[:, mask[0]], w_g, None, options)
    rows = F.linear(F.linear(G * k, wp, bp) + q, wf, bf)
    assert relative_error(out[:, ~mask[0]], rows[:, ~mask[0]]) <= EXACT


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_batch_element_with_all_tokens_masked_gets_a_zero_global_query(pooling):
    tensors = make_query_key_tensors(2, 5, 6, 4)
    q, _, _, _, bp, wf, bf = tensors
    mask = torch.tensor([[False] * 5, [True] * 5])
    result = forward_backward(
        lambda *t: on_queries(t, mask, options_for(4, pooling)),
        tensors,
        QUERY_KEY_NAMES,
    )
    assert all(t.isfinite().all() for t in result.values())
    expected = F.linear(F.normalize(q[0], dim=-1) + bp, wf, bf)
    assert relative_error(result["output"][0], expected) <= EXACT
    assert not result["k"][0].any()
    assert result["k"][1].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_softmax_of_an_all_masked_batch_element_gives_zeros_and_finite_gradients(dtype):
    """Without a NaN on the way, which anomaly detection would stop at."""
    scores = torch.randn(2, 5, dtype=dtype, requires_grad=True)
    mask = torch.tensor([[False] * 5, [True, False, True, True, False]])
    weights = reference.pool_weights(scores, mask, "softmax", 1e-12)
    assert not weights[0].any()
    assert not weights[~mask].any()
    assert weights[1].sum().item() == pytest.approx(1, rel=4 * torch.finfo(dtype).eps)
    with torch.autograd.set_detect_anomaly(True):
        (grad,) = torch.autograd.grad(weights.square().sum(), scores)
    assert grad.isfinite().all()
    assert not grad[~mask].any()


@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_rows_below_eps_are_divided_by_eps_alone(eps):
    """There the clamped norm is a constant, for the gradients too (torch.nn.functional.normalize).

    So the layer equals the one without norms on q / eps; rows of exactly zero are among them.
    """
    q, k, *weights = make_query_key_tensors(2, 4, 6, 5)
    shrink = torch.tensor([0.0, 0.01, 0.1, 0.0], dtype=torch.float64).unsqueeze(1) * eps
    q, k = q * shrink, k * shrink.flip(0)
    assert q.norm(dim=-1).max() < eps
    assert k.norm(dim=-1).max() < eps
    options = options_for(5, eps=eps)

    def clamped(q: Tensor, k: Tensor, *weights: Tensor) -> Tensor:
        without_norms = options._replace(qk_norm=False)
        return on_queries([q / eps, k / eps, *weights], None, without_norms)

    def ours(*tensors: Tensor) -> Tensor:
        return on_queries(tensors, None, options)

    exact = forward_backward(clamped, [q, k, *weights], QUERY_KEY_NAMES)
    assert exact["q"][:, 0].any()
    assert_exact(forward_backward(ours, [q, k, *weights], QUERY_KEY_NAMES), exact)


def test_scores_below_eps_are_divided_by_eps_alone():
    scores = torch.tensor([[3e-3, -4e-3], [0.0, 0.0], [3.0, -4.0]], dtype=torch.float64)
    scores.requires_grad_()
    weights = reference.pool_weights(scores, None, "l2", 1.0)
    expected = torch.tensor([[3e-3, -4e-3], [0.0, 0.0], [0.6, -0.8]], dtype=torch.float64)
    assert relative_error(weights, expected) <= EXACT
    (grad,) = torch.autograd.grad(weights[:, 0].sum(), scores)
    # Below eps the derivative is 1 / eps; above, that of s_1 / |s|.
    expected = torch.tensor([[1.0, 0.0], [1.0, 0.0], [16 / 125, 12 / 125]], dtype=torch.float64)
    assert relative_error(grad, expected) <= EXACT


@pytest.mark.parametrize("masked", [False, True])
def test_sum_pooling_gives_the_scoring_vector_a_gradient_of_zero(masked):
    """Zero and not None, as with the published layers: optimisers and DDP distinguish the two."""
    result = forward_backward(
        lambda *t: on_queries(t, make_mask(2, 5) if masked else None, options_for(4, "sum")),
        make_query_key_tensors(2, 5, 6, 4),
        QUERY_KEY_NAMES,
    )
    assert not result["w_g"].any()
    assert all(t.any() for name, t in result.items() if name != "w_g")
