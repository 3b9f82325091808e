"""Values and gradients of every backend, against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from swiftkernels.ops.operator import Call
from swiftkernels.testing.tolerance import EXACT, budget, relative_error
from tests.contract.cases import (
    DRAWS,
    INTERPRETED,
    SIZE,
    Change,
    Implementation,
    biases,
    cast,
    check,
    definition,
    draw,
    gradients,
    ids,
    implementations,
    on_inputs,
    parameters,
    public,
    some_variants,
    typed,
    without_biases,
)

every_implementation = pytest.mark.parametrize("implementation", implementations(True), ids=ids)
every_dtype = pytest.mark.parametrize(("implementation", "dtype"), typed(True), ids=ids)

SIZES = (
    (1, 1, 1, 3),
    (2, 7, 3, 1),
    (1, 31, 37, 64),
    (2, 65, 40, 37),
    (9, 9, 16, 24),
    (1, 49, 72, 72),
)
"""Odd sizes, and less and more than a tile in every direction."""

LARGE_SIZES = ((1, 257, 56, 56), (2, 7, 220, 220), (1, 700, 48, 48), (33, 7, 100, 6))
"""These take minutes in the interpreter, which has sizes of its own in tests/interpreter."""


def variants() -> list[Any]:
    """Every implementation, dtype and variant; in the interpreter some in all but one dtype."""
    found = []
    for number, (implementation, dtype) in enumerate(typed(True)):
        names = list(implementation.operator.variants)
        if INTERPRETED and dtype != implementation.widest:
            names = names[number % 4 :: 4]
        found += [
            pytest.param(implementation, dtype, variant)
            for variant in names
            if draw(implementation, dtype, (1, 1, 1, 1), variant) is not None
        ]
    return found


@pytest.mark.parametrize(("implementation", "dtype", "variant"), variants(), ids=ids)
def test_variants(implementation: Implementation, dtype: torch.dtype, variant: str) -> None:
    check(implementation, dtype, variant=variant)


def sizes() -> list[Any]:
    """Every implementation, dtype and size; in the interpreter in one dtype."""
    return [
        pytest.param(implementation, dtype, size)
        for implementation, dtype in typed(True)
        for size in (SIZES if INTERPRETED else SIZES + LARGE_SIZES)
        if not INTERPRETED or dtype == implementation.widest
    ]


@pytest.mark.parametrize(("implementation", "dtype", "size"), sizes(), ids=ids)
def test_sizes(
    implementation: Implementation, dtype: torch.dtype, size: tuple[int, int, int, int]
) -> None:
    check(implementation, dtype, size=size)


@every_implementation
def test_missing_biases(implementation: Implementation) -> None:
    call = draw(implementation)
    assert call is not None
    check(implementation, change=without_biases)
    for name in biases(call):
        check(
            implementation,
            change=lambda call, name=name: call._replace(
                weights=call.weights._replace(**{name: None})
            ),
        )


@every_dtype
def test_inference(implementation: Implementation, dtype: torch.dtype) -> None:
    """Weights that do not change may be packed."""
    operator = implementation.operator
    run, eager = public(operator), definition(operator)
    draws = [draw(implementation, dtype, seed=seed) for seed in range(DRAWS)]
    with torch.no_grad():
        for call in map(parameters, filter(None, draws)):
            first = run(call)
            assert not first.requires_grad
            assert all(torch.equal(run(call), first) for _ in range(2))
            exact = eager(cast(call, torch.float64))
            error = relative_error(eager(call), exact)
            bound = EXACT if dtype == torch.float64 else budget(error, dtype)
            assert relative_error(first, exact) <= bound


def masked_variants() -> list[Any]:
    """Every implementation and variant with a mask."""
    return [
        pytest.param(implementation, variant)
        for implementation in implementations(True)
        for variant in implementation.operator.variants
        if (call := draw(implementation, None, (1, 1, 1, 1), variant)) and call.mask is not None
    ]


@pytest.mark.parametrize(("implementation", "variant"), masked_variants(), ids=ids)
def test_masked_batch_elements(implementation: Implementation, variant: str) -> None:
    """With every token masked, and with every token kept."""

    def change(call: Call) -> Call:
        assert call.mask is not None
        mask = call.mask.clone()
        mask[0], mask[1] = False, True
        return call._replace(mask=mask)

    check(implementation, variant=variant, change=change)


def zero_rows(x: Tensor) -> Tensor:
    """Every third token is zero."""
    x = x.clone()
    x[:, ::3] = 0
    return x


@every_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_zero_rows(implementation: Implementation, dtype: torch.dtype, bias: bool) -> None:
    def change(call: Call) -> Call:
        call = call._replace(inputs=tuple(map(zero_rows, call.inputs)))
        return call if bias else without_biases(call)

    for variant in some_variants(implementation.operator):
        call = draw(implementation, dtype, SIZE, variant)
        if call is not None:
            check_zero_rows(implementation, dtype, variant, change)


def check_zero_rows(
    implementation: Implementation, dtype: torch.dtype, variant: str, change: Change
) -> None:
    operator = implementation.operator
    call = draw(implementation, dtype, SIZE, variant)
    assert call is not None
    call = change(call)
    assert call is not None
    eager = gradients(definition(operator), operator, call)
    if all(t.isfinite().all() for t in eager.values()):
        check(implementation, dtype, variant=variant, change=change)
        return
    # In float16 an eps of 1e-12 is 0, and eager divides 0 by 0.
    exact = gradients(definition(operator), operator, cast(call, torch.float64))
    for name, t in gradients(operator, operator, call).items():
        assert not t.isnan().any(), name
        # Infinite only where the exact value is: the gradient of a zero row is that of its unit row
        # by eps.
        too_large = exact[name].abs() > torch.finfo(dtype).max
        assert (t.isfinite() | too_large).all(), name


@every_implementation
@pytest.mark.parametrize("factor", [1e-15, 1e-6, 1e4, 1e8])
def test_huge_and_tiny_values(implementation: Implementation, factor: float) -> None:
    check(implementation, torch.float32, change=on_inputs(lambda x: x * factor))


@every_implementation
def test_tokens_around_a_large_mean(implementation: Implementation) -> None:
    check(implementation, torch.float32, change=on_inputs(lambda x: x + 100))


# How the tensors lie in memory.


def with_gaps(t: Tensor) -> Tensor:
    """Between all elements NaN, which must not be read."""
    wide = t.new_full([2 * n for n in t.shape], float("nan"))
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t


def first_axis_last(t: Tensor) -> Tensor:
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def expanded_batch(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def expanded_tokens(t: Tensor) -> Tensor:
    return t[:, :1].expand(t.shape)


def constant(t: Tensor) -> Tensor:
    return t[(slice(0, 1),) * t.dim()].expand(t.shape)


LAYOUTS = (with_gaps, transposed, first_axis_last, expanded_batch)


def layouts() -> list[Any]:
    """Every implementation, the variants of different shape, and a layout in memory."""
    found = []
    for implementation in implementations(True):
        shapes: dict[object, str] = {}
        for variant in ("", *implementation.operator.variants):
            call = draw(implementation, None, SIZE, variant)
            if call is not None:
                shapes.setdefault((call.inputs[0].dim(), call.mask is None), variant)
        found += [
            pytest.param(implementation, variant, layout)
            for variant in shapes.values()
            for layout in LAYOUTS
        ]
    return found


@pytest.mark.parametrize(("implementation", "variant", "layout"), layouts(), ids=ids)
def test_strides(implementation: Implementation, variant: str, layout: Any) -> None:
    """Of inputs, mask, weights and gradient: the values are those of contiguous tensors."""
    check(implementation, variant=variant, change=on_inputs(layout), dout=layout)
    check(
        implementation,
        variant=variant,
        change=lambda call: call._replace(
            weights=type(call.weights)(
                *(None if w is None else transposed(w) for w in call.weights)
            ),
            mask=None if call.mask is None else transposed(call.mask),
        ),
    )


@every_implementation
@pytest.mark.parametrize("layout", [expanded_tokens, constant])
def test_gradients_of_stride_0(implementation: Implementation, layout: Any) -> None:
    """As of a sum, whose gradient is one number."""
    check(implementation, dout=layout)
