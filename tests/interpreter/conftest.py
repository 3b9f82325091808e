"""Kernels on the CPU: run with TRITON_INTERPRET=1, in a process of its own, or not at all."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.interpreter import instruments

    instruments.round_bfloat16_to_nearest()


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(uninitialised_memory_is_nan: None) -> None:
    """For every test."""
