"""What the tests share: tensors of sensible magnitude, all gradients of a call, error budgets."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swiftkernels.ops.additive_attention.reference import POOLINGS
from swiftkernels.ops.additive_attention.weights import Options, OutputWeights, Weights
from swiftkernels.ops.operator import Needs
from swiftkernels.tools.verify import (
    QUERY_KEY_NAMES,
    SELF_NAMES,
    ULPS,
    budget,
    make_mask,
    make_query_key_tensors,
    make_tensors,
    relative_error,
)

__all__ = [
    "EXACT",
    "POOLINGS",
    "QUERY_KEY_NAMES",
    "SELF_NAMES",
    "assert_as_good_as_eager",
    "assert_exact",
    "assert_gradients_survive_cancellation",
    "backward_by",
    "cancelling_tensors",
    "convert",
    "forward_backward",
    "forward_by",
    "make_mask",
    "make_query_key_tensors",
    "make_tensors",
    "relative_error",
    "split",
]

EXACT = 1e-12
"""Relative error left to two float64 computations of the same thing in another order."""


def convert(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Every tensor in another dtype."""
    return [None if t is None else t.to(dtype) for t in tensors]


def forward_backward(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    names: Sequence[str],
    dout: Tensor | None = None,
) -> dict[str, Tensor]:
    """The output of function(*tensors), and under their names the gradients of all tensors.

    `dout` is the gradient of the output; without it a fixed random one.
    """
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    if dout is None:
        generator = torch.Generator().manual_seed(1)
        dout = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    wanted = {name: t for name, t in zip(names, leaves, strict=True) if t is not None}
    grads = torch.autograd.grad(output, list(wanted.values()), dout.to(output.dtype))
    return {"output": output.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_exact(
    ours: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float = EXACT
) -> None:
    """Every named tensor equals the exact one, in float64, to rounding."""
    assert ours.keys() == exact.keys()
    errors = {name: relative_error(ours[name], exact[name]) for name in exact}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def assert_as_good_as_eager(
    ours: Tensor, eager: Tensor, exact: Tensor, ulps: float = ULPS, name: str = "output"
) -> None:
    """error(ours) <= 2 error(eager) + a few ulp of the dtype, both against the float64 `exact`."""
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype} instead of {eager.dtype}"
    error, eager_error = relative_error(ours, exact), relative_error(eager, exact)
    bound = budget(eager_error, ours.dtype, ulps)
    assert error <= bound, f"{name}: error {error:.3g}, eager's {eager_error:.3g}"


def cancelling_tensors(
    layer: str, spread: float, batch: int, n_tokens: int, width: int, seed: int = 0
) -> list[Tensor | None]:
    """float32 tokens around a mean that biases take away: those of "query", "key" or "both"."""
    tensors = make_tensors(batch, n_tokens, width, width, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    mean = torch.randn(width, generator=generator, dtype=torch.float64)
    tensors = convert([mean + spread * tensors[0], *tensors[1:]], torch.float32)
    for weight in {"query": [1], "key": [3], "both": [1, 3]}[layer]:
        tensors[weight + 1] = -tensors[weight] @ mean.float()
    return tensors


def assert_gradients_survive_cancellation(
    ours: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    draws: Sequence[list[Tensor | None]],
    name: str = "",
) -> None:
    """The median error of output and gradients over several draws is as good as eager's.

    The tokens of one draw are almost equal, and so are their rounding errors: they do not average
    out, and either side may be several times as exact as the other by chance.
    """
    run = functools.partial(forward_backward, names=SELF_NAMES)
    errors: dict[str, list[tuple[float, float]]] = {}
    for tensors in draws:
        exact, eager = run(reference, convert(tensors, torch.float64)), run(reference, tensors)
        for key, value in run(ours, tensors).items():
            pair = relative_error(value, exact[key]), relative_error(eager[key], exact[key])
            errors.setdefault(key, []).append(pair)
    for key, pairs in errors.items():
        error, eager_error = map(statistics.median, zip(*pairs, strict=True))
        bound = budget(eager_error, torch.float32)
        assert error <= bound, f"{key}, {name}: error {error:.3g}, eager's {eager_error:.3g}"


def split(tensors: Sequence[Any]) -> tuple[tuple[Tensor, ...], Any]:
    """Inputs and weights of one of the operators, from its tensors in order."""
    if len(tensors) == len(SELF_NAMES):
        return (tensors[0],), Weights(*tensors[1:])
    return tuple(tensors[:2]), OutputWeights(*tensors[2:])


def forward_by(
    backend: Any,
    tensors: Sequence[Any],
    mask: Tensor | None,
    options: Options,
    keep: str = "statistics",
) -> tuple[Tensor, Any]:
    """The forward of a backend: its output, and what it saves."""
    result: tuple[Tensor, Any] = backend.forward(*split(tensors), mask, options, keep)
    return result


def backward_by(
    backend: Any,
    dout: Tensor,
    tensors: Sequence[Any],
    mask: Tensor | None,
    saved: Any,
    options: Options,
) -> list[Tensor | None]:
    """The backward of a backend: all gradients, in the order of the tensors."""
    needs = Needs(True, True)
    return list(backend.backward(dout, *split(tensors), mask, saved, options, needs))
