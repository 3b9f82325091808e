"""`tests/run` does not pass by skipping."""

from __future__ import annotations

import pytest

from swiftkernels.backends import torch_state
from swiftkernels.backends.cpu import library
from tests.requirements import VARIABLE, missing, problems


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "why_not", lambda: "needs the compiled kernels")
    monkeypatch.setattr(torch_state, "has_triton", lambda: False)
    found = missing()
    assert list(found) == ["compiler", "triton"]
    assert len(problems(found, "")) == 2
    (line,) = problems(found, "triton")
    assert line.startswith("compiler: ")
    assert line.endswith(f"{VARIABLE}=compiler")
    assert not problems(found, "compiler triton")


def test_a_compiler_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "apt install" in missing()["compiler"]


def test_unknown_names_are_refused() -> None:
    (line,) = problems({}, "compiler gpu")
    assert line == f"{VARIABLE} must contain compiler or triton; got 'gpu'."
