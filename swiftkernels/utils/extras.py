"""Import of optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType


def need(package: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package or module.

    Args:
        package: its import name.
        extra: the extra of this library that installs it.
        purpose: what needs it, as the start of a sentence.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ImportError(
            f"{purpose} needs the package {name} ({error}). In a clone of this library, run: "
            f"pip install '.[{extra}]'"
        ) from error
