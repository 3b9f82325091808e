"""Fails where most tests would be skipped: without the compiled CPU kernels, or without Triton.

SWIFTKERNELS_TESTS_ALLOW_MISSING="compiler triton" names what may be missing.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping

from swiftkernels.backends import torch_state
from swiftkernels.backends.cpu import library

VARIABLE = "SWIFTKERNELS_TESTS_ALLOW_MISSING"


def missing() -> dict[str, str]:
    """What is missing here, and how to get it."""
    found = {}
    if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
        found["compiler"] = "there is no C++ compiler: apt install g++"
    elif reason := library.why_not():
        found["compiler"] = f"backend='cpu' {reason}"
    if not torch_state.has_triton():
        found["triton"] = "the package triton is not installed: pip install '.[triton]' (on Linux)"
    elif old := torch_state.too_old_triton():
        found["triton"] = f"triton 3.6 or newer is needed; got {old}: pip install '.[triton]'"
    return found


def problems(found: Mapping[str, str], allowed: str) -> list[str]:
    """A line for each thing that is missing and may not be, or that is allowed but unknown."""
    names = allowed.split()
    known = ("compiler", "triton")
    lines = [
        f"{VARIABLE} must contain {' or '.join(known)}; got {name!r}."
        for name in names
        if name not in known
    ]
    return lines + [
        f"{name}: {reason}. To skip the tests that need it: {VARIABLE}={name}"
        for name, reason in found.items()
        if name not in names
    ]


if __name__ == "__main__":
    lines = problems(missing(), os.environ.get(VARIABLE, ""))
    sys.exit("\n".join(lines) or 0)
