"""The public implementations that tests compare with."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.stubs import import_timm


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    return import_timm()


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers")
