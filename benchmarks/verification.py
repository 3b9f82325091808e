"""How wrong a result may be, judged by the same computation in float64."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

STEPS = 16
"""More roundings in a row than any of the layers measured here makes."""


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the largest exact value."""
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


def relative_errors(ours: Iterable[Tensor], exact: Iterable[Tensor]) -> list[float]:
    """`relative_error` of each pair."""
    return [relative_error(*pair) for pair in zip(ours, exact, strict=True)]


def operator_bound(eager_error: float, dtype: torch.dtype) -> float:
    """The operator may err twice as much as the eager layer in the same type, and a few ulp."""
    return 2 * eager_error + 4 * torch.finfo(dtype).eps


def type_bound(dtype: torch.dtype, length: int) -> float:
    """As near to float64 as the type allows, for code that is its own measure.

    It rounds a number of times to its type, and sums up to `length` terms in float32 at least,
    where rounding errors grow as the root of the length. (That goes for torch.compile too: eager
    sums the gradients of biases pairwise, the loops it generates add up all tokens in turn and err
    ten times as much.)

    Example:
        >>> type_bound(torch.float32, 49) < type_bound(torch.float32, 3136) < 1e-3
        True
    """
    accumulation = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return STEPS * (torch.finfo(dtype).eps + length**0.5 * accumulation)
