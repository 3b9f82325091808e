"""The GPU kernels' tests with the oldest and the newest Triton supported: `pip install nox`, `nox`.

`nox -s "kernels-3.9.0"` runs one of the two. Each makes an environment of its own in .nox. No GPU
is needed: the kernels are compiled for GPUs that are not there, and run by Triton's interpreter.
"""

from __future__ import annotations

import nox

SUBSET = "every_variant or odd_sizes or queries or images"
"""Of the interpreter's tests: every kernel and branch, in a few minutes."""


@nox.session
@nox.parametrize("triton", ["3.6.0", "3.9.0"], ids=["3.6.0", "3.9.0"])
def kernels(session: nox.Session, triton: str) -> None:
    # The CPU kernels are not what is tried here.
    without_cpu = {"SWIFTKERNELS_BUILD": "0"}
    session.install("-c", "constraints.txt", ".[bench,test]", env=without_cpu)
    # A torch build may ask for a Triton of its own; Triton up to 3.6 needs an older numpy.
    session.install("--no-deps", f"triton=={triton}", "numpy<2.4")
    session.run("pytest", "tests/test_cross_compile.py")
    session.run(
        "pytest", "tests/interpreter/test_kernels.py", "-k", SUBSET, env={"TRITON_INTERPRET": "1"}
    )
