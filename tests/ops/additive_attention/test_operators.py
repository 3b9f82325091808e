"""The operators with the ATen backend: exact, frugal, and at home in PyTorch's subsystems."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from swiftkernels import AdditiveAttention, additive_attention, additive_self_attention
from swiftkernels.backends import torch_state
from swiftkernels.backends.cpu import library
from swiftkernels.ops.additive_attention import eager
from swiftkernels.ops.additive_attention.op import QUERY_KEY_ATTENTION, SELF_ATTENTION
from swiftkernels.ops.operator import Operator
from swiftkernels.testing import costs
from swiftkernels.testing.cases import (
    POOLINGS,
    QUERY_KEY_NAMES,
    SELF_NAMES,
    assert_gradients_survive_cancellation,
    cancelling_tensors,
    convert,
    forward_backward,
    make_mask,
    make_query_key_tensors,
    make_tensors,
)
from swiftkernels.testing.tolerance import (
    EXACT,
    assert_as_good_as_eager,
    assert_exact,
    relative_error,
)

Tensors = list[Tensor | None]

pytestmark = [
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # inside torch itself
]


class Form(NamedTuple):
    """One of the two operators: what is called, with which tensors, and their names."""

    function: Callable[..., Tensor]
    make: Callable[..., Tensors]
    names: tuple[str, ...]
    operator: Operator


FORMS = {
    "tokens": Form(additive_self_attention, make_tensors, SELF_NAMES, SELF_ATTENTION),
    "queries and keys": Form(
        additive_attention, make_query_key_tensors, QUERY_KEY_NAMES, QUERY_KEY_ATTENTION
    ),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
poolings = pytest.mark.parametrize("pooling", POOLINGS)


def run(form: Form, tensors: Tensors, backend: str, dout: Tensor | None = None, **options: Any):
    """The output and the gradients of all tensors."""
    function = functools.partial(form.function, backend=backend, **options)
    return forward_backward(function, tensors, form.names, dout)


# Against the definition.


@forms
@pytest.mark.parametrize("elements_per_chunk", [0, 1, 2, 4])
def test_chunks_of_the_batch_add_up(monkeypatch, form, elements_per_chunk):
    tensors = form.make(5, 6, 4, 3, 2)
    mask = make_mask(5, 6)
    exact = run(form, tensors, "reference", mask=mask)
    monkeypatch.setattr(eager, "CHUNK_BYTES", elements_per_chunk * 2 * 6 * 6 * 8)
    assert_exact(run(form, tensors, "aten", mask=mask), exact)


@forms
@pytest.mark.parametrize("eps", [1e-12, 1e-8, 1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_below_eps_have_the_gradient_of_a_constant_norm(form, dtype, eps):
    """Rows of q and k from zero to just below eps; some above as well."""
    tensors = form.make(2, 6, 5, 4)
    shrink = torch.tensor([0, 1e-3, 0.1, 0.2, 0.3, 10], dtype=torch.float64).unsqueeze(1) * eps
    if form.names[0] == "x":
        tensors[0], tensors[2], tensors[4] = tensors[0] * shrink, None, None
    else:
        tensors[:2] = [t * shrink for t in tensors[:2]]
    tensors = convert(tensors, dtype)
    dout = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(3))
    exact = run(form, convert(tensors, torch.float64), "reference", dout, eps=eps)
    eager = run(form, tensors, "reference", dout, eps=eps)
    ours = run(form, tensors, "aten", dout, eps=eps)
    for name, t in ours.items():
        assert_as_good_as_eager(t, eager[name], exact[name], name=name)


@forms
@pytest.mark.parametrize("pooling", ["l2", "softmax"])
def test_scores_of_almost_equal_tokens_have_exact_gradients(form, pooling):
    """Their weights are almost the same too, and most of what reaches the scores cancels."""
    tensors = form.make(2, 60, 12, 10)
    inputs = 1 if form.names[0] == "x" else 2
    tensors[:inputs] = [t[:, :1] + 1e-3 * t for t in tensors[:inputs]]
    exact = run(form, tensors, "reference", pooling=pooling)
    tensors = convert(tensors, torch.float32)
    eager = run(form, tensors, "reference", pooling=pooling)
    for name, t in run(form, tensors, "aten", pooling=pooling).items():
        assert_as_good_as_eager(t, eager[name], exact[name], name=name)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("spread", [1, 1e-2, 1e-4])
@poolings
def test_gradients_where_biases_cancel_the_mean(pooling, spread, qk_norm):
    ours, reference = (
        functools.partial(
            additive_self_attention, backend=backend, pooling=pooling, qk_norm=qk_norm
        )
        for backend in ("aten", "reference")
    )
    for layer in ("query", "key", "both"):
        draws = [cancelling_tensors(layer, spread, 2, 600, 24, seed) for seed in range(7)]
        assert_gradients_survive_cancellation(ours, reference, draws, layer)


@pytest.mark.parametrize("create_graph", [False, True])
def test_one_tensor_in_two_places_gets_both_gradients_once(create_graph):
    """Queries as keys, and one weight for proj and final."""
    q, _, w_g, w, b, _, _ = make_query_key_tensors(2, 4, 5, 3)
    results = []
    for backend in ("aten", "reference"):
        leaves = [t.clone().requires_grad_() for t in (q, w_g, w, b)]
        q_leaf, w_g_leaf, w_leaf, b_leaf = leaves
        out = additive_attention(
            q_leaf, q_leaf, w_g_leaf, w_leaf, b_leaf, w_leaf, b_leaf, backend=backend
        )
        results.append(torch.autograd.grad(out.square().sum(), leaves, create_graph=create_graph))
    for ours, exact in zip(*results, strict=True):
        assert relative_error(ours, exact) <= EXACT


@pytest.mark.parametrize("create_graph", [False, True])
def test_weights_used_twice_in_a_row_get_both_gradients_once(create_graph):
    """A layer on its own output: x itself depends on the weights."""
    tensors = make_tensors(2, 4, 3, 3)
    results = []
    for backend in ("aten", "reference"):
        x, *weights = leaves = [t.clone().requires_grad_() for t in tensors]
        for _ in range(2):
            x = additive_self_attention(x, *weights, backend=backend)
        grads = torch.autograd.grad(x.square().sum(), leaves, create_graph=create_graph)
        if create_graph:
            penalty = sum(g.square().sum() for g in grads)
            grads += torch.autograd.grad(penalty, leaves)
        results.append(grads)
    for ours, exact in zip(*results, strict=True):
        assert relative_error(ours, exact) <= EXACT


# Which gradients are asked for, and which are computed.


@forms
@pytest.mark.parametrize("shape", [lambda w: w, lambda w: w.unsqueeze(1)], ids=["[E]", "[E, 1]"])
def test_gradients_have_the_shapes_and_types_of_their_tensors(form, shape):
    tensors = form.make(2, 4, 6, 5, 2, dtype=torch.float32)
    tensors[form.names.index("w_g")] = shape(tensors[form.names.index("w_g")])
    result = run(form, tensors, "aten")
    for name, t in zip(form.names, tensors, strict=True):
        assert (result[name].shape, result[name].dtype) == (t.shape, t.dtype), name


# Accuracy in the types people use, by the error of eager PyTorch in the same type.


@pytest.mark.parametrize("pooling", ["l2", "softmax", "sum"])
def test_long_inputs_are_pooled_as_accurately_as_by_eager(pooling):
    """A float32 sum over all tokens one by one is not: its error grows with their number."""
    tensors = make_query_key_tensors(1, 50_000, 8, 8, dtype=torch.float32)
    attend = functools.partial(additive_attention, pooling=pooling)
    exact = attend(*convert(tensors, torch.float64), backend="reference")
    eager = attend(*tensors, backend="reference")
    assert_as_good_as_eager(attend(*tensors, backend="aten"), eager, exact)


def test_a_sum_over_70000_tokens_does_not_overflow_float16():
    """G itself passes 65504, so it has to be kept wider than the input."""
    q, k, *weights = make_query_key_tensors(1, 70_000, 4, 4)
    q[..., 0] += 100  # the unit queries add up along the first axis
    k = 1 + 0.1 * k  # and the unit keys halve the sum again
    weights[1] *= 1e-2  # what comes of it in the output fits float16
    tensors = convert([q, k, *weights], torch.float16)
    G = F.normalize(q, dim=-1).sum(1)
    assert G.abs().max() > torch.finfo(torch.float16).max
    form = FORMS["queries and keys"]
    exact = run(form, convert(tensors, torch.float64), "reference", pooling="sum")
    eager = additive_attention(*tensors, pooling="sum", backend="reference")
    assert not eager.isfinite().all()
    ours = run(form, tensors, "aten", pooling="sum")
    # Half an ulp for each rounding: of the operand G * k, its product with proj, y, the output;
    # and for the gradients of tokens and biases no more.
    for name in ("output", "q", "k", "proj_bias", "final_bias"):
        assert relative_error(ours[name], exact[name]) <= 2 * torch.finfo(torch.float16).eps, name


@poolings
def test_rows_of_norm_above_65504_are_normalised_in_float16(pooling):
    """In float16 their norm is infinite, and eager's unit rows are 0."""
    form = FORMS["queries and keys"]
    tensors = form.make(2, 9, 64, 64, dtype=torch.float16)
    tensors[:2] = [(t.sign() * 1e4 * (1 + 0.1 * t)).clamp(-2e4, 2e4) for t in tensors[:2]]
    dout = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(5)).half()
    wide = convert(tensors, torch.float64)
    assert wide[0].norm(dim=-1).min() > torch.finfo(torch.float16).max
    exact = run(form, wide, "reference", dout, pooling=pooling)
    eager = run(form, tensors, "reference", dout, pooling=pooling)
    assert not relative_error(eager["output"], exact["output"]) < 0.1
    # What eager manages on the same rows at a size that suits it is the measure.
    small = [t / 1e4 for t in tensors[:2]] + tensors[2:]
    exact_small = run(form, convert(small, torch.float64), "reference", dout, pooling=pooling)
    eager_small = run(form, small, "reference", dout, pooling=pooling)
    ours = run(form, tensors, "aten", dout, pooling=pooling)
    for name in set(ours) - {"q", "k"}:
        error = relative_error(ours[name], exact[name])
        bound = 2 * relative_error(eager_small[name], exact_small[name])
        assert error <= bound + 4 * torch.finfo(torch.float16).eps, name
    assert all(t.isfinite().all() for t in ours.values())


# What the operator costs.


def bytes_kept(backend: str, mask: Tensor | None) -> float:
    """Bytes kept for the backward beside the parameters, in units of the input's."""
    attention = AdditiveAttention(48, 48, 1, backend=backend)
    x = torch.randn(4, 784, 48, requires_grad=True)
    assert attention(x, mask).requires_grad
    kept = costs.saved_bytes(lambda: attention(x, mask), attention.parameters())
    return kept / x.untyped_storage().nbytes()


@pytest.mark.parametrize("masked", [False, True])
def test_the_backward_keeps_little_more_than_the_input(masked):
    mask = make_mask(4, 784) if masked else None
    assert 1 <= bytes_kept("aten", mask) <= 1.05
    assert bytes_kept("reference", mask) > 6


# torch.library.


@forms
def test_the_fake_for_triton_matches_its_launches(form):
    """On fake CUDA tensors: nothing of Triton is imported or run."""
    operator = getattr(torch.ops.swiftkernels, form.operator.name)
    backward = getattr(torch.ops.swiftkernels, f"{form.operator.name}_backward")
    for dtype, acc in [(torch.float16, torch.float32), (torch.float64, torch.float64)]:
        with FakeTensorMode():
            shapes = [t.shape for t in form.make(2, 5, 6, 4, 2)]
            tensors = [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]
            arguments = (*tensors, None, "l2", True, 0.5, 1e-12, "triton", "")
            out, G, statistics, folded = operator(*arguments)
            grads = backward(out, *arguments, [G, statistics, folded], True, True)
        assert (out.shape, out.stride(), out.dtype) == ((2, 5, 4), (20, 4, 1), dtype)
        assert (G.shape, G.dtype) == ((2, 8), acc)
        assert (statistics.shape, statistics.dtype) == ((2, 2), acc)
        assert (folded.shape, folded.dtype) == ((4, 8), dtype)
        for grad, t in zip(grads, tensors, strict=True):
            assert (grad.shape, grad.dtype, grad.device) == (t.shape, dtype, t.device)


# torch.compile, torch.export, torch.jit.


def make_layer(backend: str, **options: Any) -> AdditiveAttention:
    torch.manual_seed(0)
    return AdditiveAttention(6, 5, 2, backend=backend, dtype=torch.float64, **options)


def with_gradients(
    attention: Callable[..., Tensor], module: AdditiveAttention, x: Tensor, **kwargs: Any
) -> list[Tensor]:
    """The output, and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    out = attention(x, **kwargs)
    return [out, *torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(library.loaded() is None, reason="no CPU kernels")
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_graphs_hold_the_operator(autocast):
    """Not the definition, which would be right as well, and slow."""
    targets: list[str] = []

    def noting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    layer = make_layer("auto").float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        torch.compile(layer, fullgraph=True, backend=noting)(torch.randn(2, 7, 6))
    assert targets.count("swiftkernels.additive_self_attention.default") == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("pooling", ["softmax", "sum"])
@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_compile_with_mask_and_weights(backend, pooling):
    layer, reference = (
        make_layer(backend, pooling=pooling),
        make_layer("reference", pooling=pooling),
    )
    x, mask = torch.randn(2, 7, 6, dtype=torch.float64), make_mask(2, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = compiled(x, mask, return_weights=True), reference(x, mask, return_weights=True)
    for t, expected in zip(*results, strict=True):
        assert relative_error(t, expected) <= EXACT
    exact = with_gradients(reference, reference, x, mask=mask)
    for t, expected in zip(with_gradients(compiled, layer, x, mask=mask), exact, strict=True):
        assert relative_error(t, expected) <= EXACT


def long_input() -> Tensor:
    """Tokens for which "auto" does not take the definition in eager mode."""
    x = torch.randn(1, 6 * eager.CHUNK_BYTES // (4 * 8), 8)
    assert SELF_ATTENTION.choose_backend("auto", x, 8) in ("aten", "cpu")
    return x


def test_auto_takes_the_aten_backend_for_long_inputs_without_kernels(monkeypatch):
    monkeypatch.setattr(library, "_constant_why_not", lambda: "needs the compiled kernels")
    assert SELF_ATTENTION.choose_backend("auto", long_input(), 8) == "aten"
    x, layer = long_input(), AdditiveAttention(8, 8, 1)
    out = layer(x)
    layer.backend = "aten"
    assert torch.equal(layer(x), out)
    layer.backend = "reference"
    assert_as_good_as_eager(out, layer(x), copy.deepcopy(layer).double()(x.double()))


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("channels_last", (1, -1, 2, 8)),
        ("channels_first", (1, 8, -1)),
        ("channels_first", (1, 8, 2, -1)),
    ],
)
def test_auto_counts_the_tokens_of_every_layout(monkeypatch, layout, shape):
    monkeypatch.setattr(library, "_constant_why_not", lambda: "needs the compiled kernels")
    layer = AdditiveAttention(8, 8, 1, layout=layout)
    with mock.patch.object(eager, "forward", wraps=eager.forward) as forward:
        layer(long_input().view(shape))
    forward.assert_called_once()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_hold_plain_operators_only(strict):
    x, layer = long_input(), AdditiveAttention(8, 8, 1)
    dynamic = {"x": {1: torch.export.Dim("tokens", min=2)}}
    program = torch.export.export(layer, (x,), dynamic_shapes=dynamic, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets
    assert all(target.startswith("aten.") for target in targets), targets
    layer.backend = "reference"
    for tokens in (x, x[:, :9]):
        assert torch.equal(program.module()(tokens), layer(tokens))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes become constants
def test_traced_programs_hold_plain_operators_only():
    x, layer = long_input(), AdditiveAttention(8, 8, 1)
    traced = torch.jit.trace(layer, x)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::linear" in kinds
    assert all(kind.startswith(("aten::", "prim::")) for kind in kinds), kinds
    assert "prim::PythonOp" not in kinds
    layer.backend = "reference"
    assert_as_good_as_eager(traced(x), layer(x), copy.deepcopy(layer).double()(x.double()))


# torch.func and forward-mode AD: the definition is differentiated.


# Checkpointing, autocast, subclasses.


def test_plain_calls_go_past_the_dispatcher_and_others_do_not():
    plain = torch.randn(2)
    assert torch_state.is_plain(plain)
    assert torch_state.is_plain(torch.nn.Parameter(plain))
    assert not torch_state.is_plain(plain.to("meta"))
    assert not torch_state.is_plain(TwoTensor(plain, plain))
    with FlopCounterMode(display=False):
        assert not torch_state.is_plain(plain)
    inside = []
    torch.vmap(lambda t: inside.append(torch_state.is_plain(plain)) or t)(plain)
    assert inside == [False]


def test_the_result_is_that_of_the_written_out_layer():
    """One plain statement of the layer in the middle of it all, with torch's own functions."""
    layer = make_layer("aten")
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    q, k = F.normalize(layer.to_query(x), dim=-1), F.normalize(layer.to_key(x), dim=-1)
    a = F.normalize(q @ layer.w_g * 5**-0.5, dim=1)
    G = (a * q).sum(1, keepdim=True)
    assert relative_error(layer(x), layer.final(layer.proj(G * k) + q)) <= EXACT


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_aten_shows_queries_that_are_not_finite(dtype, value):
    """float16 saturates finite values only."""
    q, k, *weights = convert(make_query_key_tensors(2, 9, 16, 16), dtype)
    q[0, 3, 5] = value
    options = {"pooling": "sum", "backend": "aten"}
    out = additive_attention(q, k, *weights, **options)
    assert not out[0].isfinite().any()
    q[0] = 0
    assert torch.equal(out[1], additive_attention(q, k, *weights, **options)[1])
