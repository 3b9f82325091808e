"""Peak memory of additive attention on a CPU: the growth of a process's resident set.

Each case runs in its own process, `python -m benchmarks.memory` with the case as arguments. The
process makes the layer and its input, and first runs a few tokens to load libraries and start
threads. The result is the growth of the resident set (`benchmarks.resident`) during one call,
without the bytes of the output and of the gradients.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch

from benchmarks import resident
from swiftkernels.ops.benchmark import Size
from swiftkernels.testing.engines import ENGINES, Problem
from swiftkernels.testing.harness import isa
from swiftkernels.testing.ratios import markdown_table

CSV = "cpu_memory.csv"
WARM_UP_TOKENS = 16


def supports(engine: str) -> bool:
    """Whether the engine's memory can be measured; that of compilers would count too."""
    return ENGINES[engine].build is Problem.call


@dataclass(frozen=True)
class Case:
    """What a process runs."""

    engine: str
    dtype: str
    direction: str
    """forward or forward+backward"""
    batch: int
    tokens: int
    width: int
    threads: int

    def problem(self, batch: int, tokens: int) -> Problem:
        dtype, backward = getattr(torch, self.dtype), self.direction != "forward"
        return Problem(Size(tokens, self.width), batch, dtype, backward, backend="cpu")


def measure(case: Case, repeats: int = 3) -> dict[str, Any]:
    """The case as a row, with bytes beyond output and gradients: median, least and most.

    Raises:
        RuntimeError: the process failed.
    """
    found = [
        int(resident.run_process("benchmarks.memory", *astuple(case)).split()[-1])
        for _ in range(repeats)
    ]
    itemsize: int = getattr(torch, case.dtype).itemsize
    x_bytes = case.batch * case.tokens * case.width * itemsize
    return asdict(case) | {
        "x_bytes": x_bytes,
        "peak_bytes": int(statistics.median(found)),
        "peak_bytes_min": min(found),
        "peak_bytes_max": max(found),
        "peak_in_x": statistics.median(found) / x_bytes,
        "repeats": repeats,
        "torch": torch.__version__,
        "isa": isa(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Peaks in units of the bytes of x."""
    names = ("engine", "direction", "batch", "tokens", "width", "threads")
    lines = [[*(str(row[name]) for name in names), f"{row['peak_in_x']:.2f}"] for row in rows]
    return markdown_table([[*names, "peak / x"], *lines], texts=(0, 1))


def peak_growth(case: Case) -> int:
    """Bytes of this process at their peak during one call, beyond those before and the results."""
    torch.set_num_threads(case.threads)
    problem, warm_up = case.problem(case.batch, case.tokens), case.problem(1, WARM_UP_TOKENS)
    with torch.set_grad_enabled(problem.backward):
        module = problem.module(ENGINES[case.engine].layer)
        warm_up.call(module)()
        peak, results = resident.peak_growth(problem.call(module))
    return peak - sum(t.untyped_storage().nbytes() for t in results)


if __name__ == "__main__":
    engine, dtype, direction = sys.argv[1:4]
    print(peak_growth(Case(engine, dtype, direction, *map(int, sys.argv[4:]))))
