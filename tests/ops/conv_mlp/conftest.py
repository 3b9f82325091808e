"""What the tests of conv_mlp share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from swiftkernels.backends.cpu import library
from tests.ops.conv_mlp.cases import kernels_in_use

ISAS = [isa for isa, runs in library.available().items() if runs]


@pytest.fixture(params=ISAS)
def isa(request) -> Iterator[None]:
    handle = library.declare(
        library.load(request.param).handle, "conv_mlp", "pack", "forward", "backward"
    )
    with kernels_in_use(handle):
        yield
