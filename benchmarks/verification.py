"""How wrong a result may be, judged by the same computation in float64."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from swiftkernels.tools.bench import type_bound
from swiftkernels.tools.verify import budget as operator_bound
from swiftkernels.tools.verify import relative_error

__all__ = ["operator_bound", "relative_error", "relative_errors", "type_bound"]


def relative_errors(ours: Iterable[Tensor], exact: Iterable[Tensor]) -> list[float]:
    """`relative_error` of each pair."""
    return [relative_error(*pair) for pair in zip(ours, exact, strict=True)]
