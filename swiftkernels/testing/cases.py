"""Inputs for the additive attention operators, and gradients by name.

They are for tests, benchmarks and code outside this library. All tensors come from seeded
generators: one seed gives the same numbers in every dtype, up to rounding.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftkernels.ops.additive_attention.reference import POOLINGS
from swiftkernels.ops.additive_attention.weights import Options, OutputWeights, Weights
from swiftkernels.ops.operator import Needs
from swiftkernels.testing.tolerance import budget, relative_error

__all__ = [
    "PARAMETERS",
    "POOLINGS",
    "QUERY_KEY_NAMES",
    "SELF_NAMES",
    "Tensors",
    "assert_gradients_survive_cancellation",
    "backward_by",
    "cancelling_tensors",
    "convert",
    "forward_backward",
    "forward_by",
    "make_mask",
    "make_query_key_tensors",
    "make_tensors",
    "split",
]

PARAMETERS = (
    "to_query.weight",
    "to_query.bias",
    "to_key.weight",
    "to_key.bias",
    "w_g",
    "proj.weight",
    "proj.bias",
    "final.weight",
    "final.bias",
)
"""The parameters of `AdditiveAttention`."""

SELF_NAMES = ("x", *(name.removeprefix("to_").replace(".", "_") for name in PARAMETERS))
"""The tensors of `additive_self_attention`, in its order: x, query_weight, query_bias, ..."""

QUERY_KEY_NAMES = ("q", "k", *SELF_NAMES[5:])
"""The tensors of `additive_attention`, in its order."""

Tensors = list[Tensor | None]


def make_tensors(
    batch: int,
    n_tokens: int,
    in_dims: int,
    token_dim: int,
    num_heads: int = 1,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Tensors:
    """x and the nine weights, in the order of `SELF_NAMES`; the biases are None without `bias`.

    x is [B, N, C]. Values are drawn in float64 and rounded to `dtype`.

    Example:
        >>> x, query_weight, *_ = make_tensors(2, 49, 48, 24, num_heads=2)
        >>> x.shape, query_weight.shape
        (torch.Size([2, 49, 48]), torch.Size([48, 48]))
    """
    generator = torch.Generator().manual_seed(seed)
    width = token_dim * num_heads

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (values * std).to(dtype)

    def bias_of(n: int) -> Tensor | None:
        values = normal(n, std=0.2)  # always drawn, so that other tensors do not depend on `bias`
        return values if bias else None

    return [
        normal(batch, n_tokens, in_dims),
        normal(width, in_dims, std=in_dims**-0.5),
        bias_of(width),
        normal(width, in_dims, std=in_dims**-0.5),
        bias_of(width),
        normal(width),
        normal(width, width, std=width**-0.5),
        bias_of(width),
        normal(token_dim, width, std=width**-0.5),
        bias_of(token_dim),
    ]


def make_query_key_tensors(*args: int, **kwargs: Any) -> Tensors:
    """q, k and the five weights, in the order of `QUERY_KEY_NAMES`; arguments of `make_tensors`."""
    x, wq, bq, wk, bk, *weights = make_tensors(*args, **kwargs)
    assert x is not None
    assert wq is not None
    assert wk is not None
    return [F.linear(x, wq, bq), F.linear(x, wk, bk), *weights]


def make_mask(batch: int, n_tokens: int, seed: int = 0) -> Tensor:
    """A bool mask [B, N] that masks about a third; every batch element keeps at least one token."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, n_tokens, generator=generator) > 1 / 3
    mask[:, 0] = True
    return mask


def convert(tensors: Sequence[Tensor | None], to: torch.dtype | torch.device) -> Any:
    """A list of the tensors in another dtype (masks excepted) or on another device."""
    return [
        t if t is None or (isinstance(to, torch.dtype) and t.dtype == torch.bool) else t.to(to)
        for t in tensors
    ]


def forward_backward(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    names: Sequence[str],
    dout: Tensor | None = None,
) -> dict[str, Tensor]:
    """The output of function(*tensors), and the gradients of all tensors by their names.

    `dout` is the gradient of the output; by default a fixed random tensor.
    """
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    if dout is None:
        generator = torch.Generator().manual_seed(1)
        dout = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    wanted = {name: t for name, t in zip(names, leaves, strict=True) if t is not None}
    grads = torch.autograd.grad(output, list(wanted.values()), dout.to(output.dtype))
    return {"output": output.detach(), **dict(zip(wanted, grads, strict=True))}


def cancelling_tensors(
    layer: str, spread: float, batch: int, n_tokens: int, width: int, seed: int = 0
) -> Tensors:
    """float32 tensors in which the bias of "query", "key" or "both" cancels the mean of x."""
    tensors = make_tensors(batch, n_tokens, width, width, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    mean = torch.randn(width, generator=generator, dtype=torch.float64)
    x = tensors[0]
    assert x is not None
    tensors = convert([mean + spread * x, *tensors[1:]], torch.float32)
    for i in {"query": [1], "key": [3], "both": [1, 3]}[layer]:
        weight = tensors[i]
        assert weight is not None
        tensors[i + 1] = -weight @ mean.float()
    return tensors


def assert_gradients_survive_cancellation(
    ours: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    draws: Sequence[Tensors],
    name: str = "",
) -> None:
    """The median error of output and gradients over several draws is as good as eager's.

    The tokens of a draw are almost equal, and so are their rounding errors. These do not average
    out, so either implementation may by chance be several times as exact as the other.
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
    needs = Needs(inputs=True, weights=True)
    return list(backend.backward(dout, *split(tensors), mask, saved, options, needs))
