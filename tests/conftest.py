"""The public implementations that tests compare with."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tests.stubs import import_timm
from tests.vision import import_torchvision

if importlib.util.find_spec("torchvision"):
    # Before transformers, which does not import beside a torchvision that does not.
    import_torchvision()


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    return import_timm()


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers")
