"""The Triton backend behind PyTorch's subsystems."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from swiftkernels import AdditiveAttention
from swiftkernels.ops.additive_attention.op import QUERY_KEY_ATTENTION
from swiftkernels.ops.additive_attention.triton import launch
from swiftkernels.ops.additive_attention.weights import Options
from swiftkernels.ops.operator import Operator
from swiftkernels.ops.plan import Plans


@pytest.fixture
def layers() -> tuple[AdditiveAttention, AdditiveAttention]:
    """The same layer twice: with kernels, and by the definition."""
    ours = AdditiveAttention(24, 24, 1, backend="triton")
    reference = copy.deepcopy(ours)
    reference.backend = "reference"
    return ours, reference


def test_auto_takes_the_kernels_where_they_run(layers):
    ours, _ = layers
    x = torch.randn(2, 9, 24)
    expected = ours(x)
    ours.backend = "auto"
    assert torch.equal(ours(x), expected)


@pytest.mark.parametrize("hooked", [["to_query"], ["to_key"], ["to_query", "to_key"], ["final"]])
@pytest.mark.parametrize("shape", [(2, 9, 24), (2, 24, 3, 3)])
def test_queries_and_keys_that_are_called_go_to_the_kernels(layers, shape, hooked, monkeypatch):
    x, ran = torch.randn(shape), []
    for layer in layers:
        for part in hooked:
            layer.get_submodule(part).register_forward_hook(lambda m, i, o: o * 2)
    with monkeypatch.context() as patched:
        dispatch = Operator._dispatch

        def watching(operator: Operator, *args: Any) -> Any:
            if operator is QUERY_KEY_ATTENTION:
                ran.append(args)
            return dispatch(operator, *args)

        patched.setattr(Operator, "_dispatch", watching)
        grads = [
            torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
            for layer in layers
        ]
    assert len(ran) == (0 if hooked == ["final"] else 1)
    for got, right in zip(*grads, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 9, 24), (2, 24, 3, 3)])
def test_later_calls_have_plans_and_the_same_results(layers, shape, monkeypatch):
    ours, _ = layers
    x = torch.randn(shape, requires_grad=True)

    def results() -> list[Tensor]:
        with torch.no_grad():
            inferred = ours(x)
        out = ours(x)
        grads = torch.autograd.grad(out.square().sum(), [x, *ours.parameters()])
        return [inferred, out.detach(), *grads]

    first = results()
    monkeypatch.setattr("swiftkernels.ops.additive_attention.layer.attend", None)
    for name, (expected, again) in enumerate(zip(first, results(), strict=True)):
        assert torch.equal(expected, again), name
        assert expected.stride() == again.stride(), name


@pytest.mark.parametrize("calls_before", [0, 2])
@pytest.mark.parametrize("shape", [(2, 9, 24), (2, 24, 3, 3)])
def test_checkpointing_a_new_layer_and_a_known_one(layers, shape, calls_before):
    """The first call goes through all checks, later ones past them."""
    ours, reference = layers
    x = torch.randn(shape, requires_grad=True)
    for _ in range(calls_before):
        ours(x)
    out = torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(out.sin().sum(), x)
    (expected,) = torch.autograd.grad(reference(x).sin().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_a_plan_for_inference_adds_x_where_the_output_has_its_layout(layers):
    ours, reference = layers
    weights, scale = ours._plain_weights(), torch.randn(24)
    options = Options("l2", True, ours.scale_factor, ours.eps)
    contiguous = torch.randn(2, 9, 24)
    image = torch.randn(2, 24, 3, 4).contiguous(memory_format=torch.channels_last)
    for x in (contiguous, image):
        plan = launch.inference_plan(x, weights, None, options, scale, Plans())
        assert plan is not None
        with torch.no_grad():
            out = plan(x, weights, None, scale)
            torch.testing.assert_close(out, reference(x, residual_scale=scale))
    for x in (contiguous.mT.contiguous().mT, image.contiguous()):
        assert launch.inference_plan(x, weights, None, options, scale, Plans()) is None
        assert launch.inference_plan(x, weights, None, options, None, Plans()) is not None


def test_an_unsupported_width_is_refused():
    attention = AdditiveAttention(8, 1032, 1, backend="triton")
    with pytest.raises(
        ValueError, match=r"backend='triton' takes .* up to 512 in torch.float32; got 1032"
    ):
        attention(torch.randn(1, 2, 8))
