"""The operators with the ATen backend: exact, frugal, and at home in PyTorch's subsystems."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
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
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@poolings
def test_every_variant_equals_the_definition(form, pooling, qk_norm, masked, bias):
    tensors = form.make(3, 7, 6, 5, 2, bias=bias)
    options = {
        "pooling": pooling,
        "qk_norm": qk_norm,
        "mask": make_mask(3, 7) if masked else None,
    }
    exact = run(form, tensors, "reference", **options)
    assert_exact(run(form, tensors, "aten", **options), exact)


@pytest.mark.parametrize(
    ("form", "dropped"),
    [(form, name) for form, f in FORMS.items() for name in f.names if name.endswith("bias")],
)
def test_each_bias_may_be_missing_alone(form, dropped):
    form = FORMS[form]
    tensors = form.make(2, 4, 6, 5)
    tensors[form.names.index(dropped)] = None
    assert_exact(run(form, tensors, "aten"), run(form, tensors, "reference"))


@forms
@pytest.mark.parametrize("options", [{"scale": 3.0}, {"scale": -0.5}, {"eps": 2.0}, {"scale": 2}])
@pytest.mark.parametrize("pooling", ["softmax", "linear", "l2"])
def test_scale_and_eps_are_honoured(form, pooling, options):
    tensors = form.make(2, 4, 6, 5)
    exact = run(form, tensors, "reference", pooling=pooling, **options)
    assert_exact(run(form, tensors, "aten", pooling=pooling, **options), exact)
    default = run(form, tensors, "reference", pooling=pooling)
    if pooling != "l2" or "eps" in options:
        assert relative_error(exact["output"], default["output"]) > 1e-3


@forms
@pytest.mark.parametrize("items_per_chunk", [0, 1, 2, 4])
def test_chunks_of_the_batch_add_up(monkeypatch, form, items_per_chunk):
    tensors = form.make(5, 6, 4, 3, 2)
    mask = make_mask(5, 6)
    exact = run(form, tensors, "reference", mask=mask)
    monkeypatch.setattr(eager, "CHUNK_BYTES", items_per_chunk * 2 * 6 * 6 * 8)
    assert_exact(run(form, tensors, "aten", mask=mask), exact)


@forms
@pytest.mark.parametrize("eps", [1e-12, 1e-8, 1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_below_eps_have_the_gradient_of_a_constant_norm(form, dtype, eps):
    """Rows of q and k from zero to just below eps, in items of their own; some above as well."""
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


@forms
@poolings
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_rows_give_no_nan(form, pooling, dtype):
    """In float16 eps is 0 and eager divides 0 by 0."""
    tensors = form.make(2, 4, 6, 5, bias=False, dtype=dtype)
    tensors[0][0, 1] = 0
    tensors[0][1] = 0
    result = run(form, tensors, "aten", pooling=pooling)
    assert not any(t.isnan().any() for t in result.values())
    assert result["output"].isfinite().all()
    if dtype != torch.float16:  # there the gradient at a zero row, 1 / eps, is infinite
        assert all(t.isfinite().all() for t in result.values())


@forms
@poolings
def test_all_masked_items_equal_the_definition(form, pooling):
    tensors = form.make(3, 4, 6, 5)
    mask = make_mask(3, 4)
    mask[1] = False
    exact = run(form, tensors, "reference", pooling=pooling, mask=mask)
    ours = run(form, tensors, "aten", pooling=pooling, mask=mask)
    assert all(t.isfinite().all() for t in ours.values())
    assert_exact(ours, exact)


@forms
@pytest.mark.parametrize("qk_norm", [True, False])
@poolings
def test_gradcheck(form, pooling, qk_norm):
    leaves = [t.requires_grad_() for t in form.make(2, 3, 3, 2, 2)]
    function = functools.partial(form.function, pooling=pooling, qk_norm=qk_norm, backend="aten")
    torch.autograd.gradcheck(function, leaves)


@forms
@pytest.mark.parametrize("masked", [False, True])
@poolings
def test_gradgradcheck(form, pooling, masked):
    leaves = [t.requires_grad_() for t in form.make(2, 3, 2, 2)]
    mask = make_mask(2, 3) if masked else None
    function = functools.partial(form.function, pooling=pooling, mask=mask, backend="aten")
    torch.autograd.gradgradcheck(function, leaves)


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


def wanted_gradients() -> Iterator[Any]:
    """Each tensor alone, all tokens, all weights, everything."""
    for key, form in FORMS.items():
        n_inputs = len(form.operator.inputs)
        names = form.names
        for wanted in {*((n,) for n in names), names[:n_inputs], names[n_inputs:], names}:
            yield pytest.param(form, wanted, id=f"{key}: {' '.join(wanted)}")


@pytest.mark.parametrize(("form", "wanted"), sorted(wanted_gradients(), key=lambda p: p.id))
def test_only_the_gradients_asked_for_are_computed(monkeypatch, form, wanted):
    backward = eager.backward
    calls = []

    def recording(*args: Any) -> list[Tensor | None]:
        grads = backward(*args)
        calls.append((args[-1], [g is not None for g in grads]))
        return grads

    monkeypatch.setattr(eager, "backward", recording)
    tensors = form.make(2, 4, 6, 5)
    everything = run(form, tensors, "reference")
    leaves = [t.requires_grad_(name in wanted) for name, t in zip(form.names, tensors, strict=True)]
    out = form.function(*leaves, backend="aten")
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(dout)
    for leaf_name, leaf in zip(form.names, leaves, strict=True):
        if leaf_name in wanted:
            assert relative_error(leaf.grad, everything[leaf_name]) <= EXACT, leaf_name
        else:
            assert leaf.grad is None, leaf_name
    n_inputs = len(form.operator.inputs)
    needs_inputs = any(n in wanted for n in form.names[:n_inputs])
    needs_weights = any(n in wanted for n in form.names[n_inputs:])
    computed = [needs_inputs] * n_inputs + [needs_weights] * (len(leaves) - n_inputs)
    assert calls == [((needs_inputs, needs_weights), computed)]


@forms
def test_nothing_is_differentiable_where_nothing_requires_it(form):
    tensors = form.make(2, 4, 6, 5)
    assert not form.function(*tensors, backend="aten").requires_grad
    for t in tensors:
        t.requires_grad_()
    with torch.no_grad():
        assert not form.function(*tensors, backend="aten").requires_grad


@forms
def test_inference_mode_gives_the_same(form):
    tensors = form.make(2, 4, 6, 5)
    exact = form.function(*tensors, backend="reference")
    leaves = [t.requires_grad_() for t in tensors]
    with torch.inference_mode():
        out = form.function(*leaves, backend="aten")
        assert out.is_inference()
        # And on tensors that were themselves made in inference mode.
        inside = form.function(*(t.clone() for t in leaves), backend="aten")
    for result in (out, inside):
        assert relative_error(result, exact) <= EXACT


@forms
@pytest.mark.parametrize("shape", [lambda w: w, lambda w: w.unsqueeze(1)], ids=["[E]", "[E, 1]"])
def test_gradients_have_the_shapes_and_types_of_their_tensors(form, shape):
    tensors = form.make(2, 4, 6, 5, 2, dtype=torch.float32)
    tensors[form.names.index("w_g")] = shape(tensors[form.names.index("w_g")])
    result = run(form, tensors, "aten")
    for name, t in zip(form.names, tensors, strict=True):
        assert (result[name].shape, result[name].dtype) == (t.shape, t.dtype), name


@forms
def test_a_second_backward_over_a_kept_graph_gives_the_same(form):
    leaves = [t.requires_grad_() for t in form.make(2, 4, 6, 5)]
    out = form.function(*leaves, backend="aten").sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    second = torch.autograd.grad(out, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@forms
def test_overwriting_what_the_backward_needs_is_noticed(form):
    leaves = [t.requires_grad_() for t in form.make(2, 4, 6, 5)]
    tokens = leaves[0].clone()
    out = form.function(tokens, *leaves[1:], backend="aten")
    with torch.no_grad():
        tokens.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# Accuracy in the types people use, by the error of eager PyTorch in the same type.


@pytest.mark.parametrize(("token_dim", "num_heads"), [(37, 1), (48, 1), (28, 2), (220, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@poolings
def test_error_is_within_twice_that_of_eager(pooling, dtype, token_dim, num_heads):
    form = FORMS["tokens"]
    tensors = form.make(2, 65, 40, token_dim, num_heads, dtype=dtype)
    dout = torch.randn(2, 65, token_dim, generator=torch.Generator().manual_seed(4)).to(dtype)
    exact = run(form, convert(tensors, torch.float64), "reference", dout, pooling=pooling)
    eager = run(form, tensors, "reference", dout, pooling=pooling)
    ours = run(form, tensors, "aten", dout, pooling=pooling)
    for name, t in ours.items():
        assert_as_good_as_eager(t, eager[name], exact[name], name=name)


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


def test_two_runs_give_the_same_bits():
    tensors = make_tensors(3, 65, 24, 24, dtype=torch.float32)
    first, second = (run(FORMS["tokens"], tensors, "aten") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@poolings
def test_an_item_does_not_depend_on_its_batch(pooling):
    """To rounding: GEMMs of another size may sum in another order. Not even on NaN beside it."""
    x, *weights = make_tensors(4, 9, 6, 5)
    dout = torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    def attend(items: slice, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x[items].clone().requires_grad_()
        out = additive_self_attention(x, *weights, pooling=pooling, backend="aten")
        return out, torch.autograd.grad(out, x, dout[items])[0]

    alone = attend(slice(1, 2), x)
    for t, exact in zip(attend(slice(None), x), alone, strict=True):
        assert relative_error(t[1:2], exact) <= EXACT
    spoilt = x.clone()
    spoilt[[0, 2, 3]] = torch.nan
    for t, exact in zip(attend(slice(None), spoilt), alone, strict=True):
        assert relative_error(t[1:2], exact) <= EXACT


# What the operator costs.


@pytest.mark.parametrize("needs_tokens", [True, False])
def test_flops_are_those_of_the_definition(needs_tokens):
    totals = []
    for backend in ("aten", "reference"):
        x, *weights = (t.requires_grad_() for t in make_tensors(2, 9, 6, 5, 2))
        x.requires_grad_(needs_tokens)
        with FlopCounterMode(display=False) as forward:
            out = additive_self_attention(x, *weights, backend=backend)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        totals.append((forward.get_total_flops(), backward.get_total_flops()))
    ours, exact = totals
    assert ours[0] == exact[0] > 0
    if needs_tokens:
        assert ours[1] == exact[1] == 2 * ours[0]


def test_flops_from_queries_and_keys_are_those_of_the_definition():
    totals = []
    for backend in ("aten", "reference"):
        leaves = [t.requires_grad_() for t in make_query_key_tensors(2, 9, 6, 5, 2)]
        with FlopCounterMode(display=False) as counter:
            additive_attention(*leaves, backend=backend).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == 3 * 2 * 2 * 9 * 10 * (10 + 5)


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


def operator_arguments(form: Form, dense: bool, masked: bool) -> list[Any]:
    tensors = form.make(2, 5, 6, 4, 2, dtype=torch.float32)
    if not dense:
        tensors = [t.mT.contiguous().mT if t.dim() > 1 else t for t in tensors]
    return [*tensors, make_mask(2, 5) if masked else None, "l2", True, 0.5, 1e-12, "aten", ""]


@forms
@pytest.mark.parametrize(("dense", "masked"), [(True, False), (False, True)])
@pytest.mark.parametrize(
    "test",
    ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"],
)
def test_opcheck(form, dense, masked, test):
    operator = getattr(torch.ops.swiftkernels, form.operator.name).default
    backward = getattr(torch.ops.swiftkernels, f"{form.operator.name}_backward").default
    arguments = operator_arguments(form, dense, masked)
    torch.library.opcheck(operator, arguments, test_utils=test)
    out, *saved = operator(*arguments)
    for needs in [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(
            backward, (torch.randn_like(out), *arguments, saved, *needs), test_utils=test
        )
    for t in arguments:
        if isinstance(t, Tensor) and t.is_floating_point():
            t.requires_grad_()
    torch.library.opcheck(operator, arguments, test_utils=test)


@forms
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_the_fake_of_empty_input_is_right(form, shape):
    operator = getattr(torch.ops.swiftkernels, form.operator.name).default
    backward = getattr(torch.ops.swiftkernels, f"{form.operator.name}_backward").default
    tensors = form.make(*shape, 6, 4, dtype=torch.float32)
    arguments = [*tensors, None, "linear", True, 0.5, 1e-12, "aten", ""]
    torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
    out, *saved = operator(*arguments)
    torch.library.opcheck(
        backward, (out, *arguments, saved, True, True), test_utils="test_faketensor"
    )


@forms
@pytest.mark.parametrize(("fake", "device"), [(True, "cuda"), (True, "meta"), (False, "meta")])
def test_fake_and_meta_tensors_get_the_real_shapes_and_strides(form, fake, device):
    tensors = form.make(2, 7, 6, 4, 2, dtype=torch.bfloat16)
    tensors[0] = tensors[0].mT.contiguous().mT
    real = form.function(*tensors, backend="aten")
    with FakeTensorMode() if fake else contextlib.nullcontext():
        empty = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for t in tensors
        ]
        out = form.function(*empty, backend="aten")
    assert (out.shape, out.stride(), out.dtype) == (real.shape, real.stride(), real.dtype)
    assert out.device.type == device


def test_a_layer_on_the_meta_device_runs_forward_and_backward():
    layer = make_layer("aten")
    real = layer(torch.randn(2, 6, 3, 4, dtype=torch.float64))
    layer.to("meta")
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, device="meta", requires_grad=True)
    out = layer(x)
    assert (out.shape, out.stride()) == (real.shape, real.stride())
    out.sum().backward()
    assert (x.grad.shape, x.grad.device) == (x.shape, x.device)
    for p in layer.parameters():
        assert (p.grad.shape, p.grad.device) == (p.shape, x.device)


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


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Neither an earlier test nor a cache on disk has compiled anything."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


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
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_compile_in_one_graph(backend, compiler):
    layer = make_layer(backend)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    reference = make_layer("reference")
    exact = with_gradients(reference, reference, x)
    for t, expected in zip(with_gradients(compiled, layer, x), exact, strict=True):
        assert relative_error(t, expected) <= EXACT
    assert compiled(x).stride() == exact[0].stride()


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


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_one_dynamic_graph_serves_all_sizes(backend, training):
    layer, reference = make_layer(backend), make_layer("reference")
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counting)
    for batch, height, width in [(2, 3, 4), (3, 7, 7), (5, 14, 9)]:
        x = torch.randn(batch, 6, height, width, dtype=torch.float64)
        if training:
            exact = with_gradients(reference, reference, x)
            for t, expected in zip(with_gradients(compiled, layer, x), exact, strict=True):
                assert relative_error(t, expected) <= EXACT
        else:
            with torch.no_grad():
                assert relative_error(compiled(x), reference(x)) <= EXACT
    assert len(graphs) == 1


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


@forms
@pytest.mark.parametrize("backend", ["aten", "auto"])
@poolings
def test_func_grad(form, pooling, backend):
    tensors = form.make(2, 4, 6, 5)
    dout = torch.randn(2, 4, 5, dtype=torch.float64)

    def loss(*tensors: Tensor) -> Tensor:
        return (form.function(*tensors, pooling=pooling, backend=backend) * dout).sum()

    grads = torch.func.grad(loss, argnums=tuple(range(len(tensors))))(*tensors)
    exact = run(form, tensors, "reference", dout, pooling=pooling)
    for name, grad in zip(form.names, grads, strict=True):
        assert relative_error(grad, exact[name]) <= EXACT, name


@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_vmap_over_items_and_over_weights(backend):
    x, *weights = make_tensors(3, 4, 6, 5)
    attend = functools.partial(additive_self_attention, backend=backend)
    exact = attend(x, *weights, backend="reference")
    by_item = torch.vmap(lambda item: attend(item.unsqueeze(0), *weights).squeeze(0))(x)
    assert relative_error(by_item, exact) <= EXACT
    factors = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    by_weight = torch.vmap(lambda f: attend(x, weights[0] * f, *weights[1:]))(factors)
    for f, out in zip(factors, by_weight, strict=True):
        exact = attend(x, weights[0] * f, *weights[1:], backend="reference")
        assert relative_error(out, exact) <= EXACT


@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_gradients_of_every_item_by_vmap(backend):
    x, *weights = make_tensors(3, 4, 6, 5)

    def loss(weight: Tensor, item: Tensor) -> Tensor:
        tokens = item.unsqueeze(0)
        out = additive_self_attention(tokens, weight, *weights[1:], backend=backend)
        return out.square().sum()

    grads = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights[0], x)
    for item, grad in zip(x, grads, strict=True):
        weight = weights[0].clone().requires_grad_()
        out = additive_self_attention(item.unsqueeze(0), weight, *weights[1:], backend="reference")
        (exact,) = torch.autograd.grad(out.square().sum(), weight)
        assert relative_error(grad, exact) <= EXACT


@forms
@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_jvp_and_forward_mode(form, backend):
    primals = tuple(form.make(2, 4, 6, 5))
    tangents = tuple(form.make(2, 4, 6, 5, seed=1))
    attend = functools.partial(form.function, backend=backend)
    # The derivative along the tangents, from reverse mode.
    exact = torch.autograd.functional.jvp(
        functools.partial(form.function, backend="reference"), primals, tangents
    )[1]
    assert relative_error(torch.func.jvp(attend, primals, tangents)[1], exact) <= EXACT
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, primals, tangents)
        tangent = forward_ad.unpack_dual(attend(*duals)).tangent
    assert relative_error(tangent, exact) <= EXACT


@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_hessian(backend):
    q, *others = make_query_key_tensors(1, 3, 2, 2)

    def loss(q: Tensor, backend: str) -> Tensor:
        return additive_attention(q, *others, backend=backend).square().sum()

    ours = torch.func.hessian(functools.partial(loss, backend=backend))(q)
    exact = torch.autograd.functional.hessian(functools.partial(loss, backend="reference"), q)
    assert relative_error(ours, exact) <= EXACT


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_compiled_transforms_differentiate_the_definition(backend, transform):
    """The operator has no such rules: jvp through it would be zero, without an error."""
    x, *weights = make_tensors(3, 4, 6, 5)

    def attend(x: Tensor, backend: str = backend) -> Tensor:
        return additive_self_attention(x, *weights, backend=backend)

    apply = {
        "grad": lambda f: torch.func.grad(lambda t: f(t).square().sum())(x),
        "vmap": lambda f: torch.vmap(lambda t: f(t.unsqueeze(0)))(x),
        "jvp": lambda f: torch.func.jvp(f, (x,), (x.cos(),))[1],
    }[transform]
    compiled = torch.compile(lambda: apply(attend), fullgraph=True, backend="aot_eager")
    exact = apply(functools.partial(attend, backend="reference"))
    assert relative_error(compiled(), exact) <= EXACT


# Checkpointing, autocast, subclasses.


@pytest.fixture
def forward_calls(monkeypatch) -> list[None]:
    """Grows by one at each run of the ATen forward."""
    calls: list[None] = []
    forward = eager.forward

    def counting(*args: Any) -> tuple[Tensor, ...]:
        calls.append(None)
        return forward(*args)

    monkeypatch.setattr(eager, "forward", counting)
    return calls


def test_checkpointing_recomputes_and_gives_the_same_gradients(forward_calls):
    layer, x = make_layer("aten"), torch.randn(2, 7, 6, dtype=torch.float64)
    plain = with_gradients(layer, layer, x)
    assert len(forward_calls) == 1
    recomputed = with_gradients(lambda x: checkpoint(layer, x, use_reentrant=False), layer, x)
    assert len(forward_calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_selective_checkpointing_can_keep_the_operator(forward_calls):
    layer, x = make_layer("aten"), torch.randn(2, 7, 6, dtype=torch.float64)
    keep = [torch.ops.swiftkernels.additive_self_attention.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, keep)

    def attend(x: Tensor) -> Tensor:
        return layer(x.exp()).cos()

    plain = with_gradients(attend, layer, x)
    forward_calls.clear()
    kept = with_gradients(
        lambda x: checkpoint(attend, x, use_reentrant=False, context_fn=contexts), layer, x
    )
    assert len(forward_calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_autocast_runs_in_the_active_type(backend):
    layer = make_layer(backend).float()
    x = torch.randn(2, 7, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = with_gradients(layer, layer, x)
        _, weights, G = layer(x, return_weights=True)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        by_compiler = with_gradients(compiled, layer, x)
    assert ours[0].dtype == torch.bfloat16
    assert (weights.dtype, G.dtype) == (torch.float32, torch.float32)
    assert all(grad.dtype == torch.float32 for grad in ours[1:])
    for a, b in zip(ours, by_compiler, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    if backend == "aten":
        half = copy.deepcopy(layer).to(torch.bfloat16)
        out, *grads = with_gradients(half, half, x.bfloat16())
        assert torch.equal(out, ours[0])
        assert all(torch.equal(a.float(), b) for a, b in zip(grads, ours[1:], strict=True))


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_autocast_leaves_float64_alone(backend):
    layer, x = make_layer(backend), torch.randn(2, 7, 6, dtype=torch.float64)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.float64
    assert relative_error(out, exact) <= EXACT


def test_autocast_casts_half_precision_input_too():
    layer = make_layer("aten").float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 7, 6, dtype=torch.float16)).dtype == torch.bfloat16


def test_autocast_switched_off_inside_is_honoured():
    layer, x = make_layer("aten").float(), torch.randn(2, 7, 6)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(layer(x), exact)


@forms
def test_tensor_subclasses_pass_through(form):
    pairs = list(zip(form.make(2, 4, 6, 5), form.make(2, 4, 6, 5, seed=1), strict=True))
    leaves = [TwoTensor(a.clone(), b.clone()).requires_grad_() for a, b in pairs]
    out = form.function(*leaves, backend="aten")
    grads = torch.autograd.grad(out.sum(), leaves)
    assert type(out) is TwoTensor
    for side, attribute in enumerate("ab"):
        tensors = [pair[side] for pair in pairs]
        exact = run(form, tensors, "reference", torch.ones(2, 4, 5))
        assert relative_error(getattr(out, attribute).detach(), exact["output"]) <= EXACT
        for name, grad in zip(form.names, grads, strict=True):
            assert type(grad) is TwoTensor
            assert relative_error(getattr(grad, attribute), exact[name]) <= EXACT, name


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
