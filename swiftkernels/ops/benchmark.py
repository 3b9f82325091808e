"""What a benchmark has to know of an operator: its layer, the published form, and its sizes.

The folder of each operator has `benchmark.py` with a `BENCHMARK`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from swiftkernels.ops.operator import Operator


class Size(NamedTuple):
    """Tokens and width of an input [B, N, C]."""

    tokens: int
    """N"""
    width: int
    """C"""
    name: str = ""
    stage: Any = None
    """Where a network has this size; None if that is not known."""


@dataclass(frozen=True)
class Benchmark:
    """An operator [B, N, C] -> [B, N, C] as the benchmarks measure it."""

    operator: Operator
    layer: Callable[[int, Any], nn.Module]
    """The layer from its width C and a backend, with weights drawn from torch's generator."""
    published: Callable[[Any], nn.Module]
    """The layer as its authors publish it, with the weights of one by `layer`. It needs only
    operators of PyTorch that export to ONNX."""
    sizes: tuple[Size, ...]
    """The sizes at which networks use the operator."""
    quick_sizes: tuple[Size, ...]
    """Some of `sizes`, for a short run."""
