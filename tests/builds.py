"""Copies of the project for builds, with little to compile, and processes that run in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARIES = Path("swiftkernels", "backends", "cpu")
CSRC = LIBRARIES / "csrc"

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))),
    reason="needs a C++ compiler",
)

# It needs the OpenMP runtime, as the kernels do.
PARALLEL = """
#ifdef _OPENMP
#include <omp.h>
extern "C" __attribute__((visibility("default"))) int parallel_threads(void) {
  int threads = 0;
#pragma omp parallel reduction(+ : threads)
  threads += 1;
  return threads;
}
#endif
"""


def copy_project(target: Path, with_kernels: bool = False) -> Path:
    """Copy the files for a build; by default with one small source instead of the kernels.

    The loader needs the tables of the interface, so abi.cpp and features.cpp stay.
    """
    target.mkdir(exist_ok=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    made = shutil.ignore_patterns("__pycache__", "*.so", "*.tmp", "_build.json")
    shutil.copytree(ROOT / "swiftkernels", target / "swiftkernels", ignore=made)
    if not with_kernels:
        for path in target.glob("swiftkernels/**/csrc/*.cpp"):
            if path.name not in ("features.cpp", "abi.cpp"):
                path.unlink()
        (target / CSRC / "parallel.cpp").write_text(PARALLEL)
    return target


def run(
    cwd: Path, *arguments: str, status: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder; it imports the package in this folder, not an installed one."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SWIFTKERNELS_")}
    env |= {"PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "2"} | environment
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def build_in_place(project: Path, **environment: str) -> str:
    """Compile the libraries in the source tree, as an editable install does; returns the log."""
    done = run(project, "setup.py", "build_ext", "--inplace", **environment)
    return done.stdout + done.stderr


def libraries(folder: Path) -> dict[str, Path]:
    """The libraries in a folder with the package: instruction set -> path."""
    paths = (folder / LIBRARIES).glob("_kernels_*.so")
    return {path.stem.removeprefix("_kernels_"): path for path in paths}
