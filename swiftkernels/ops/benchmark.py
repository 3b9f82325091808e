"""What a benchmark has to know about an operator: its layer, the published form, and its sizes.

The folder of each operator has `benchmark.py` with a `BENCHMARK`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from swiftkernels.ops.operator import Operator


class Size(NamedTuple):
    """Tokens (or pixels) and width of an input."""

    tokens: int
    """N"""
    width: int
    """C"""
    name: str = ""
    stage: Any = None
    """The stage of a network with this size; None if unknown."""


def _tokens(size: Size, batch: int) -> tuple[int, ...]:
    return batch, size.tokens, size.width


@dataclass(frozen=True)
class Benchmark:
    """An operator with an output of the shape of its input, as the benchmarks measure it."""

    operator: Operator
    layer: Callable[[int, Any], nn.Module]
    """Makes the layer from its width C and a backend, with weights from torch's generator."""
    published: Callable[[Any], nn.Module]
    """Makes the layer as its authors publish it, with the weights of a layer by `layer`. It uses
    only operators of PyTorch that export to ONNX."""
    sizes: tuple[Size, ...]
    """The sizes at which networks use the operator."""
    quick_sizes: tuple[Size, ...]
    """Some of `sizes`, for a short run."""
    shape: Callable[[Size, int], tuple[int, ...]] = _tokens
    """Of the input, from size and batch; [B, N, C] by default."""
