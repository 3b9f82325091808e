"""The Triton backend behind PyTorch's subsystems."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from swiftkernels import AdditiveAttention
from swiftkernels.ops.additive_attention.op import QUERY_KEY_ATTENTION
from swiftkernels.ops.operator import Operator
from swiftkernels.testing.cases import make_tensors


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


@pytest.mark.parametrize(
    "test", ["schema", "autograd_registration", "faketensor", "aot_dispatch_dynamic"]
)
def test_opcheck(test):
    tensors = make_tensors(2, 9, 16, 16, 1, dtype=torch.float32, seed=0)
    arguments = [*tensors, None, "l2", True, 0.25, 1e-12, "triton", ""]
    name = f"test_{test}"
    operator = torch.ops.swiftkernels.additive_self_attention.default
    torch.library.opcheck(operator, arguments, test_utils=name)
    for t in tensors:
        t.requires_grad_()
    torch.library.opcheck(operator, arguments, test_utils=name)
    saved = operator(*arguments)[1:]
    backward = torch.ops.swiftkernels.additive_self_attention_backward.default
    saved = [t.detach() for t in saved]
    arguments = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    dout = torch.randn(2, 9, 16)
    torch.library.opcheck(backward, (dout, *arguments, saved, True, True), test_utils=name)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_in_one_graph(layers, backend):
    ours, reference = layers
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    x = torch.randn(2, 24, 5, 5, requires_grad=True)
    results = []
    for attention in (compiled, reference):
        out = attention(x)
        grads = torch.autograd.grad(out.sin().sum(), [x, *attention.parameters()])
        results.append((out, *grads))
    assert results[0][0].stride() == results[1][0].stride()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_one_dynamic_graph_serves_many_token_counts(layers):
    ours, reference = layers
    torch._dynamo.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counting)
    with torch.no_grad():
        for n_tokens in (5, 49, 196):
            x = torch.randn(3, n_tokens, 24)
            torch.testing.assert_close(compiled(x), reference(x))
    assert len(graphs) == 1


def test_autocast_runs_in_the_active_type(layers):
    ours, _ = layers
    x = torch.randn(2, 9, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad.dtype == ours.proj.weight.grad.dtype == torch.float32


def test_export_gives_way_to_plain_operators(layers):
    ours, reference = layers
    ours.backend = "auto"
    x = torch.randn(2, 9, 24)
    program = torch.export.export(ours, (x,))
    assert "swiftkernels" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), reference(x))


def test_checkpointing_gives_the_same_gradients(layers):
    ours, _ = layers
    x = torch.randn(2, 9, 24, requires_grad=True)
    plain = torch.autograd.grad(ours(x).sin().sum(), x)
    out = torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), x), plain, rtol=0, atol=0)


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


def test_function_transforms_use_the_definition(layers):
    ours, reference = layers
    x = torch.randn(3, 2, 9, 24)
    torch.testing.assert_close(torch.vmap(ours)(x), torch.vmap(reference)(x))
    tangents = torch.func.jvp(ours, (x[0],), (x[1],)), torch.func.jvp(reference, (x[0],), (x[1],))
    torch.testing.assert_close(*tangents)


def test_an_unsupported_width_is_refused():
    attention = AdditiveAttention(8, 1032, 1, backend="triton")
    with pytest.raises(
        ValueError, match=r"backend='triton' takes .* up to 512 in torch.float32; got 1032"
    ):
        attention(torch.randn(1, 2, 8))


def test_float64_is_not_rounded(layers):
    ours, reference = (layer.double() for layer in layers)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x), reference(x), rtol=1e-13, atol=1e-14)
