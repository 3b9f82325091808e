"""Peak memory of additive attention on a CPU: how far the resident set of a process grows.

Each case runs in a process of its own, `python -m benchmarks.memory` with the case as arguments. It
makes the layer and its input and runs a few tokens, so that libraries are loaded and thread pools
exist. The growth of the resident set (`benchmarks.resident`) over one call, without the bytes of
the output and of the gradients, is the result.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import astuple, dataclass
from typing import Any

import torch

from benchmarks import resident
from benchmarks.engines import Problem, Size

WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Case:
    """What one process runs."""

    engine: str
    dtype: str
    direction: str
    """forward or forward+backward"""
    batch: int
    tokens: int
    width: int
    threads: int

    @property
    def x_bytes(self) -> int:
        itemsize: int = getattr(torch, self.dtype).itemsize
        return self.batch * self.tokens * self.width * itemsize

    def problem(self) -> Problem:
        return self._problem(self.batch, self.tokens)

    def warm_up(self) -> Problem:
        return self._problem(1, WARM_UP_TOKENS)

    def _problem(self, batch: int, tokens: int) -> Problem:
        backward = self.direction != "forward"
        size = Size("", tokens, self.width)
        return Problem(size, batch, getattr(torch, self.dtype), backward)


def measure(case: Case, repeats: int = 3) -> dict[str, Any]:
    """The case as a row, with bytes beyond output and gradients: median, least and most.

    Raises:
        RuntimeError: the process failed.
    """
    found = [
        int(resident.run_alone("benchmarks.memory", *astuple(case)).split()[-1])
        for _ in range(repeats)
    ]
    return {
        "engine": case.engine,
        "dtype": case.dtype,
        "direction": case.direction,
        "batch": case.batch,
        "tokens": case.tokens,
        "width": case.width,
        "threads": case.threads,
        "x_bytes": case.x_bytes,
        "peak_bytes": int(statistics.median(found)),
        "peak_bytes_min": min(found),
        "peak_bytes_max": max(found),
        "peak_in_x": statistics.median(found) / case.x_bytes,
        "repeats": repeats,
    }


def peak_growth(case: Case) -> int:
    """Bytes of this process at their peak in one call, beyond what it has before and returns."""
    torch.set_num_threads(case.threads)
    problem = case.problem()
    module = problem.module(case.engine)
    with torch.set_grad_enabled(problem.backward):
        case.warm_up().run(module)
        peak, results = resident.peak_growth(lambda: problem.run(module))
    return peak - sum(t.untyped_storage().nbytes() for t in results)


if __name__ == "__main__":
    engine, dtype, direction = sys.argv[1:4]
    print(peak_growth(Case(engine, dtype, direction, *map(int, sys.argv[4:]))))
