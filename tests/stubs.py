"""timm without a torchvision that fits the installed torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

_TORCHVISION = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


def import_timm() -> ModuleType:
    """timm, or skip the test where it is not installed.

    timm imports torchvision for its data pipelines and some old layers. Where torchvision is
    missing or broken, stand-ins take its place while timm is imported, and not a moment longer.
    """
    if "timm" in sys.modules:
        return sys.modules["timm"]
    if importlib.util.find_spec("timm") is None:
        import pytest  # here, because the benchmarks import timm without it

        pytest.skip("needs timm")
    try:
        importlib.import_module("torchvision")
    except Exception:  # one built for another torch fails with more than ImportError
        standins = {name: _Standin(name) for name in _TORCHVISION}
        sys.modules.update(standins)
        try:
            return importlib.import_module("timm")
        finally:
            for name in standins:
                del sys.modules[name]
    return importlib.import_module("timm")


class _AnyMember(type):
    """So that InterpolationMode.BILINEAR and the like exist."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Standin(ModuleType):
    """A package in which every name is an empty class, to import, subclass or leave alone."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or _AnyMember(name, (), {})
