"""What a call of an operator computes, keeps and leaves alone."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from swiftkernels.ops.operator import Call, Needs
from swiftkernels.testing import costs
from swiftkernels.testing.tolerance import EXACT, relative_error
from tests.contract.cases import (
    DRAWS,
    INTERPRETED,
    SIZE,
    THREADS,
    Implementation,
    assert_close,
    beyond,
    cast,
    check,
    definition,
    draw,
    gradients,
    ids,
    implementations,
    names,
    public,
    random_dout,
    some_variants,
    typed,
    with_tensors,
)

every_implementation = pytest.mark.parametrize("implementation", implementations(), ids=ids)


def arguments(implementation: Implementation, *args: Any, **kwargs: Any) -> Call:
    call = draw(implementation, *args, **kwargs)
    assert call is not None
    return call


# Which gradients are asked for.


@every_implementation
def test_only_wanted_gradients(
    implementation: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor alone, all inputs, all weights: the values are those of a call for all."""
    operator, calls = implementation.operator, []
    backward = implementation.kernels.backward

    def recording(*args: Any) -> Any:
        found = backward(*args)
        calls.append((args[-1], [g is not None for g in found]))
        return found

    monkeypatch.setattr(implementation.kernels, "backward", recording)
    call = arguments(implementation)
    everything = gradients(operator, operator, call)
    count = len(operator.inputs)
    inputs, weights = names(operator)[:count], names(operator)[count:]
    for wanted in {*((name,) for name in names(operator)), inputs, weights}:
        calls.clear()
        leaves = [
            t.detach().requires_grad_(name in wanted)
            for name, t in zip(names(operator), call.tensors(), strict=True)
            if t is not None
        ]
        operator(with_tensors(call, list(leaves))).backward(random_dout(operator, call))
        for name, leaf in zip(names(operator), leaves, strict=True):
            assert (leaf.grad is not None) == (name in wanted), name
            if leaf.grad is not None:
                assert_same(implementation, name, leaf.grad, everything[name])
        needs = Needs(any(n in wanted for n in inputs), any(n in wanted for n in weights))
        computed = [needs.inputs] * count + [needs.weights] * len(weights)
        assert calls == [(needs, computed)]


def assert_same(implementation: Implementation, name: str, ours: Tensor, expected: Tensor) -> None:
    """To the bit, but for products of PyTorch's, which sum in another order at another size."""
    if implementation.multiplies_by_torch(name):
        assert_close(ours, expected)
    else:
        assert torch.equal(ours, expected)


@every_implementation
def test_nothing_is_differentiable_where_nothing_requires_it(
    implementation: Implementation,
) -> None:
    run, call = public(implementation.operator), arguments(implementation)
    expected = run(call)
    assert not expected.requires_grad
    leaves = with_tensors(call, [t if t is None else t.requires_grad_() for t in call.tensors()])
    assert run(leaves).requires_grad
    with torch.no_grad():
        assert not run(leaves).requires_grad
    with torch.inference_mode():
        inside = with_tensors(call, [t if t is None else t.clone() for t in call.tensors()])
        for out in (run(leaves), run(inside)):
            assert out.is_inference()
            assert torch.equal(out, expected)


@every_implementation
@pytest.mark.parametrize(
    "size", [SIZE] if INTERPRETED else [SIZE, (1, 6, 96, 96), (1, 6, 260, 260)], ids=ids
)
def test_shapes_of_gradients(
    implementation: Implementation, size: tuple[int, int, int, int]
) -> None:
    """Those of the tensors; the gradient of a dense input has its strides."""
    operator, call = implementation.operator, arguments(implementation, size=size)
    call = call._replace(inputs=tuple(t.mT.contiguous().mT for t in call.inputs))
    found = gradients(operator, operator, call)
    for name, t in zip(names(operator), call.tensors(), strict=True):
        assert t is not None
        assert (found[name].shape, found[name].dtype) == (t.shape, t.dtype), name
    for name, t in zip(operator.inputs, call.inputs, strict=True):
        assert found[name].stride() == t.stride(), name


# Autograd's graph.


@every_implementation
def test_a_second_backward_over_a_kept_graph(implementation: Implementation) -> None:
    operator, call = implementation.operator, arguments(implementation)
    leaves = [t.requires_grad_() for t in call.tensors() if t is not None]
    out = operator(call).sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    second = torch.autograd.grad(out, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_implementation
def test_overwriting_what_the_backward_needs_is_noticed(implementation: Implementation) -> None:
    operator, call = implementation.operator, arguments(implementation)
    leaves = [t.requires_grad_() for t in call.inputs]
    call = call._replace(inputs=tuple(t.clone() for t in leaves))
    out = operator(call)
    with torch.no_grad():
        call.inputs[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@every_implementation
def test_gradients_of_gradients(implementation: Implementation) -> None:
    """Of a penalty on all gradients."""
    for variant in some_variants(implementation.operator):
        if draw(implementation, variant=variant) is not None:
            check_gradients_of_gradients(implementation, variant)


def check_gradients_of_gradients(implementation: Implementation, variant: str) -> None:
    operator = implementation.operator
    pairs: dict[str, list[tuple[float, float]]] = {}
    for seed in range(DRAWS):
        call = arguments(implementation, size=(2, 6, 5, 4), variant=variant, seed=seed)
        exact = penalty_gradients(definition(operator), cast(call, torch.float64))
        eager = penalty_gradients(definition(operator), call)
        for i, t in enumerate(penalty_gradients(operator, call)):
            pair = relative_error(t, exact[i]), relative_error(eager[i], exact[i])
            pairs.setdefault(names(operator)[i], []).append(pair)
        if seed == 0 and not beyond(pairs, call.inputs[0].dtype):
            return
    assert not beyond(pairs, call.inputs[0].dtype)


def penalty_gradients(run: Callable[[Call], Tensor], call: Call) -> tuple[Tensor, ...]:
    tensors = [None if t is None else t.detach().requires_grad_() for t in call.tensors()]
    leaves = [t for t in tensors if t is not None]
    out = run(with_tensors(call, tensors))
    first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    penalty = torch.stack([g.square().sum() for g in first]).sum()
    return torch.autograd.grad(penalty, leaves, materialize_grads=True)


@every_implementation
def test_batched_gradients(implementation: Implementation) -> None:
    """Several gradients of the output at once."""
    operator, call = implementation.operator, arguments(implementation)
    leaves = [t.requires_grad_() for t in call.tensors() if t is not None]
    out = operator(call)
    douts = torch.stack([random_dout(operator, call, seed) for seed in range(2)])
    batched = torch.autograd.grad(out, leaves, douts, is_grads_batched=True, retain_graph=True)
    reference = definition(operator)(call)
    for i, dout in enumerate(douts):
        exact = torch.autograd.grad(reference, leaves, dout, retain_graph=True)
        for ours, expected in zip(batched, exact, strict=True):
            bound = EXACT if out.dtype == torch.float64 else 16 * torch.finfo(out.dtype).eps
            assert relative_error(ours[i], expected) <= bound


# Empty inputs.


@every_implementation
@pytest.mark.parametrize("size", [(0, 7, 12, 16), (0, 1, 3, 5), (2, 0, 12, 16)], ids=ids)
def test_empty_inputs(implementation: Implementation, size: tuple[int, int, int, int]) -> None:
    """An empty output and zero gradients; without tokens, the error of the definition, if any."""
    operator = implementation.operator
    for variant in ("", *operator.variants):
        call = draw(implementation, size=size, variant=variant)
        if call is None:
            continue
        run = operator if call.inputs[0].dim() > 3 else public(operator)
        try:
            public(operator)(call._replace(backend="reference"))
        except ValueError as error:
            if run is not operator:
                with pytest.raises(ValueError, match=re.escape(str(error))):
                    run(call)
            continue
        except RuntimeError:  # a convolution of PyTorch's takes no empty image
            continue
        found = gradients(run, operator, call)
        shape, _ = operator.output_like(call.inputs[0], call.weights.token_dim)
        assert found["output"].shape == tuple(shape)
        for name, t in zip(names(operator), call.tensors(), strict=True):
            if t is not None:
                assert torch.equal(found[name], torch.zeros_like(t)), name
        with torch.no_grad():
            assert run(call).shape == tuple(shape)


# Determinism.


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [(i, dtype) for i, dtype in typed() if not INTERPRETED or dtype == i.widest],
    ids=ids,
)
def test_two_runs_are_equal(implementation: Implementation, dtype: torch.dtype) -> None:
    operator = implementation.operator
    for threads in THREADS:
        torch.set_num_threads(threads)
        call = arguments(implementation, dtype)
        first, second = (gradients(operator, operator, call) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has one thread")
@every_implementation
@pytest.mark.parametrize("size", [SIZE, (1, 300, 24, 16)], ids=ids)
def test_threads(implementation: Implementation, size: tuple[int, int, int, int]) -> None:
    """Output and gradients of the inputs do not depend on their number; all are accurate."""
    operator, call = implementation.operator, arguments(implementation, size=size)
    alone = gradients(operator, operator, call)
    for threads in THREADS[1:]:
        torch.set_num_threads(threads)
        check(implementation, size=size)
        found = gradients(operator, operator, call)
        for name in ("output", *operator.inputs):
            assert_same(implementation, name, found[name], alone[name])


@every_implementation
def test_batch_elements_are_independent(implementation: Implementation) -> None:
    """Alone or among others, even if these are NaN."""
    for variant in some_variants(implementation.operator):
        call = draw(implementation, variant=variant)
        if call is not None:
            check_independence(implementation, call)


def check_independence(implementation: Implementation, call: Call) -> None:
    operator = implementation.operator
    dout = random_dout(operator, call)
    together = gradients(operator, operator, call, dout)
    mask = None if call.mask is None else call.mask[1:2]
    one = call._replace(inputs=tuple(t[1:2] for t in call.inputs), mask=mask)
    alone = gradients(operator, operator, one, dout[1:2])
    nan = [torch.full_like(t, torch.nan) for t in call.inputs]
    for t, own in zip(nan, call.inputs, strict=True):
        t[1] = own[1]
    spoilt = gradients(operator, operator, call._replace(inputs=tuple(nan)), dout)
    for name in ("output", *operator.inputs):
        for found in (together, spoilt):
            assert_same(implementation, name, found[name][1:2], alone[name])
    assert spoilt["output"][0].isnan().all()


# What a call costs.


@every_implementation
def test_flops_are_those_of_the_definition(implementation: Implementation) -> None:
    operator = implementation.operator
    counts = []
    for run in (operator, definition(operator)):
        call = arguments(implementation)
        leaves = [t.requires_grad_() for t in call.tensors() if t is not None]
        out = run(call).sum()
        forward = costs.flops(functools.partial(run, call))
        backward = costs.flops(functools.partial(torch.autograd.grad, out, leaves))
        counts.append((forward, backward))
    assert counts[0] == counts[1]
    assert counts[0][1] == 2 * counts[0][0] > 0


@pytest.mark.parametrize(("implementation", "dtype"), typed(), ids=ids)
def test_saved_bytes(implementation: Implementation, dtype: torch.dtype) -> None:
    """For the backward stay the inputs, and a few numbers per token and batch element."""
    operator = implementation.operator
    batch, n_tokens, width, _ = size = (1, 100, 64, 64)
    call = arguments(implementation, dtype, size)
    leaves = [t.requires_grad_() for t in call.tensors() if t is not None]
    kept = costs.saved_bytes(lambda: operator(call), leaves)
    numbers = 8 * batch * n_tokens + 4 * batch * width + width * width
    accumulator = torch.promote_types(dtype, torch.float32)
    assert kept <= numbers * accumulator.itemsize
    assert kept < costs.saved_bytes(lambda: definition(operator)(call), leaves) / 3
