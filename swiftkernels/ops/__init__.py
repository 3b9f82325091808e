"""The operators: one folder each, and what they share.

A folder with an operator has `op.py` with `OPERATORS`, its `Operator`s (`ops/operator.py`), and
`benchmark.py` with a `BENCHMARK` (`ops/benchmark.py`).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swiftkernels.ops.benchmark import Benchmark
    from swiftkernels.ops.operator import Operator


def _folders() -> list[str]:
    """The folders of the operators."""
    return [folder.name for folder in pkgutil.iter_modules(__path__) if folder.ispkg]


@functools.cache
def operators() -> dict[str, Operator]:
    """All operators by name, as registered in `torch.ops.swiftkernels`.

    Example:
        >>> sorted(operators())
        ['additive_attention', 'additive_self_attention', 'conv_mlp', 'separable_attention']
    """
    modules = (importlib.import_module(f"swiftkernels.ops.{folder}.op") for folder in _folders())
    return {operator.name: operator for module in modules for operator in module.OPERATORS}


@functools.cache
def benchmarks() -> dict[str, Benchmark]:
    """What the benchmarks measure, by the names of the folders."""
    modules = {
        folder: importlib.import_module(f"swiftkernels.ops.{folder}.benchmark")
        for folder in _folders()
    }
    return {folder: module.BENCHMARK for folder, module in modules.items()}


def find(name: str) -> Operator:
    """The operator of that name.

    Raises:
        ValueError: there is no operator of that name.

    Example:
        >>> find("separable_attention").inputs
        ('x',)
    """
    found = operators().get(name)
    if found is None:
        raise ValueError(
            f"name must be one of {', '.join(map(repr, operators()))}; got {name!r}. An "
            "operator of your own is a folder of swiftkernels.ops, as CONTRIBUTING.md describes."
        )
    return found
