"""The operators: sizes, strides, dtypes, values, masks and options, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("hypothesis")

import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor

from swiftkernels.ops.operator import Call
from swiftkernels.testing.tolerance import relative_error
from tests.contract.cases import (
    DRAWS,
    Implementation,
    beyond,
    cast,
    definition,
    draw,
    errors,
    implementations,
    parameters,
    public,
    random_dout,
)

FOUND = [i for i in implementations() if i.backend != "reference"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FINITE = ("none", "zeros", "negative zeros", "subnormal", "large", "65504", "equal", "tiny")
INFINITE = ("inf", "-inf", "nan")
MANY_DRAWS = 6 * DRAWS

sizes = st.tuples(
    st.integers(0, 5) | st.just(1),
    st.integers(1, 70) | st.sampled_from([1, 49, 64, 65, 196]),
    st.integers(1, 40) | st.sampled_from([16, 48, 64, 65]),
    st.integers(1, 40) | st.sampled_from([16, 48, 64, 65, 96]),
)


@st.composite
def cases(draw_: Any) -> tuple[Implementation, torch.dtype, Any, str, str, str]:
    implementation = draw_(st.sampled_from(FOUND))
    dtype = draw_(st.sampled_from([t for t in DTYPES if implementation.takes(t)]))
    variant = draw_(st.sampled_from(["", *implementation.operator.variants]))
    values = draw_(st.sampled_from([*FINITE, *FINITE, *INFINITE]))
    strides = draw_(st.sampled_from(["none", "transposed", "sliced", "reversed", "expanded"]))
    event(f"operator: {implementation}")
    event(f"values: {values}")
    return implementation, dtype, draw_(sizes), variant, values, strides


def with_values(x: Tensor, values: str, seed: int) -> Tensor:
    """Some elements have another value."""
    if values == "none" or x.numel() == 0:
        return x
    if values == "equal":
        return torch.ones_like(x)
    chosen = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.2
    info = torch.finfo(x.dtype)
    value = {
        "zeros": 0.0,
        "negative zeros": -0.0,
        "subnormal": info.smallest_normal / 4,
        "large": 100.0,
        "65504": 65504.0,
        "tiny": info.smallest_normal * 8,
    }
    return x.masked_fill(chosen.to(x.device), value.get(values) or 0.0)


def with_strides(x: Tensor, strides: str) -> Tensor:
    """The same values, elsewhere in memory."""
    if strides == "transposed" and x.dim() > 1:
        return x.mT.contiguous().mT
    if strides == "sliced":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if strides == "reversed" and x.dim() > 2:
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    if strides == "expanded" and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    return x


def make(case: Any, seed: int) -> Call | None:
    implementation, dtype, size, variant, values, strides = case
    call = draw(implementation, dtype, size, variant, seed)
    if call is None:
        return None
    inputs = tuple(with_strides(with_values(t, values, seed), strides) for t in call.inputs)
    return call._replace(inputs=inputs)


def with_gradients(case: Any, call: Call, seed: int) -> dict[str, tuple[float, float]]:
    """Errors of output and gradients, ours and eager's, from weights that require gradients."""
    operator = case[0].operator
    return errors(operator, call, operator, random_dout(operator, call, seed), False)


def in_inference(case: Any, call: Call, seed: int) -> dict[str, tuple[float, float]]:
    """Those of the output from parameters, which are packed at the second call."""
    run, eager = public(case[0].operator), definition(case[0].operator)
    packed = parameters(call)
    with torch.no_grad():
        out = run(packed)
        assert torch.equal(run(packed), out) or not out.isfinite().all()
        exact = eager(cast(call, torch.float64))
        return {"output": (relative_error(out, exact), relative_error(eager(call), exact))}


def check(case: Any, found_by: Callable[..., dict[str, tuple[float, float]]]) -> None:
    """As the contract tests: where one draw is beyond its bound, the median of several counts.

    Of many, where several are beyond: one token that outweighs all others makes the gradients of
    the scores differences of almost equal numbers, of which few draws say little.
    """
    implementation, dtype, size, *_ = case
    pairs: dict[str, list[tuple[float, float]]] = {}
    for seed in range(MANY_DRAWS):
        call = make(case, seed)
        if call is None:
            event("not supported")
            return
        found = found_by(case, call, seed)
        if not all(math.isfinite(eager) for _, eager in found.values()):
            event("eager PyTorch overflows")
            return
        for name, (error, eager) in found.items():
            # Gradients of weights are sums over the tokens, in an order that depends on the sizes.
            order = size[1] ** 0.5 * torch.finfo(torch.float32).eps
            sums = implementation.multiplies_by_torch(name) or name != "output"
            allowed = order if sums else 0.0
            pairs.setdefault(name, []).append((error - allowed, eager))
        if seed + 1 in (1, DRAWS) and not beyond(pairs, dtype):
            return
    assert not beyond(pairs, dtype)


@given(cases())
def test_errors_are_at_most_twice_those_of_eager(case):
    if case[4] in INFINITE:
        return
    check(case, with_gradients)
    if not case[3]:  # some variants are reached by layers only
        check(case, in_inference)


@given(cases())
def test_values_that_are_not_finite_stay_in_their_batch_element(case):
    implementation, dtype, size, variant, values, strides = case
    if values not in INFINITE or size[0] < 2 or strides == "expanded":
        return
    operator = implementation.operator
    if operator.name == "conv_mlp":  # its activations map -inf to 0, those of PyTorch to NaN
        return
    call = draw(implementation, dtype, size, variant, 0)
    if call is None:
        return
    clean = operator(call._replace(inputs=tuple(with_strides(t, strides) for t in call.inputs)))
    inputs = []
    for t in call.inputs:
        changed = t.clone()
        changed[(0,) * changed.dim()] = float(values)
        inputs.append(with_strides(changed, strides))
    call = call._replace(inputs=tuple(inputs))
    out = operator(call)
    eager = definition(operator)(cast(call, torch.float64))
    event(f"in float64 {'finite' if eager[0].isfinite().all() else 'not finite'}")
    assert torch.equal(out[1:], clean[1:])
    wrong = out[0].isfinite() & ~eager[0].isfinite()
    assert not wrong.any()
