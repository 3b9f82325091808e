"""How operators and their backends are found by name."""

from __future__ import annotations

import pytest
import torch

from swiftkernels import ops
from swiftkernels.backends.layouts import as_tokens
from swiftkernels.ops.operator import Operator

every_operator = pytest.mark.parametrize("operator", ops.operators().values(), ids=lambda o: o.name)


@every_operator
def test_every_operator_is_found(operator: Operator) -> None:
    assert ops.find(operator.name) is operator
    assert hasattr(torch.ops.swiftkernels, operator.name)
    x = operator.example(2, 6, 8, 16).inputs[0]
    tokens = x if x.dim() == 3 else as_tokens(x)
    assert tokens.shape[:2] == (2, 6)
    assert callable(operator.function)


@pytest.mark.parametrize("name", ["", "attention", "Separable_attention", "separable_attention "])
def test_unknown_operators_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"got {name!r}") as raised:
        ops.find(name)
    assert all(known in str(raised.value) for known in ops.operators())


@every_operator
@pytest.mark.parametrize("name", ["", "fast", "CPU", "cuda", None])
def test_unknown_backends_are_named(operator: Operator, name: str) -> None:
    x = torch.randn(2, 6, 8)
    for function in (
        lambda: operator.choose_backend(name, x, 8),
        lambda: operator.why_not(name, x, 8),
    ):
        with pytest.raises(ValueError, match=f"backend must be one of .*; got {name!r}") as raised:
            function()
        assert all(repr(backend) in str(raised.value) for backend in operator.backends)


@every_operator
def test_backends_that_cannot_take_an_input_say_why(operator: Operator) -> None:
    x = torch.empty(1, 4, 8, device="meta")
    for name in operator.backends:
        reason = operator.why_not(name, x, 8)
        if not reason:
            continue
        assert reason.startswith(f"backend={name!r} ")
        with pytest.raises(ValueError, match=r"Use backend='auto'") as raised:
            operator.choose_backend(name, x, 8)
        assert str(raised.value).startswith(reason)


@every_operator
def test_auto_chooses_a_backend_that_takes_the_input(operator: Operator) -> None:
    for dtype in (torch.float64, torch.float32):
        x = torch.empty(1, 4, 8, dtype=dtype)
        chosen = operator.choose_backend("auto", x, 8)
        assert not operator.why_not(chosen, x, 8)
        assert operator.choose_backend("reference", x, 8) == "reference"
