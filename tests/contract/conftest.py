"""The tests that every registered operator passes on every backend.

An operator brings its arguments (`example` and `variants` of `swiftkernels.ops.operator.Operator`);
nothing here names one. With TRITON_INTERPRET=1 the same tests run the Triton kernels on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from swiftkernels.backends import torch_state
from tests.contract.cases import Implementation

if torch_state.interpreting():
    from tests.interpreter import instruments

    instruments.round_bfloat16_to_nearest()


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(uninitialised_memory_is_nan: None, one_thread: None) -> None:
    """Whatever a kernel does not write shows as NaN."""


@pytest.fixture(autouse=True)
def _in_use(request: pytest.FixtureRequest) -> Iterator[None]:
    """The CPU library of the implementation under test."""
    implementation = request.node.funcargs.get("implementation")
    if isinstance(implementation, Implementation):
        with implementation.in_use():
            yield
    else:
        yield
