"""The operators: one folder each, and what they share.

A folder with an operator has `op.py` with `OPERATORS`, its `Operator`s (`ops/operator.py`).
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swiftkernels.ops.operator import Operator

FOLDERS = ("additive_attention", "separable_attention")
"""Of the operators; a new one is its folder and its name here."""


@functools.cache
def operators() -> dict[str, Operator]:
    """All operators by name, as registered in `torch.ops.swiftkernels`.

    Example:
        >>> sorted(operators())
        ['additive_attention', 'additive_self_attention', 'separable_attention']
    """
    modules = (importlib.import_module(f"swiftkernels.ops.{folder}.op") for folder in FOLDERS)
    return {operator.name: operator for module in modules for operator in module.OPERATORS}


def find(name: str) -> Operator:
    """The operator of that name.

    Raises:
        ValueError: there is none.

    Example:
        >>> find("separable_attention").inputs
        ('x',)
    """
    found = operators().get(name)
    if found is None:
        raise ValueError(
            f"name must be one of {', '.join(map(repr, operators()))}; got {name!r}. Register an "
            "operator of your own in swiftkernels.ops.FOLDERS."
        )
    return found
