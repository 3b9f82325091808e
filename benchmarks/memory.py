"""Peak memory of additive attention on a CPU: how far the resident set of a process grows.

Each case runs in a process of its own, `python -m benchmarks.memory` with the case as arguments. It
makes the layer and its input, runs a few tokens so that libraries are loaded and thread pools
exist, gives freed memory back to the system (malloc_trim), and sets the kernel's high-water mark of
its resident set back (5 to /proc/self/clear_refs). The growth of the mark (VmHWM) over one call,
without the bytes of the output and of the gradients, is the result. One malloc arena and a low
threshold for mmap make malloc take tensors from the system and give them back at once, so that the
mark shows what lived at the same time, not malloc's caches. Linux with glibc only.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import subprocess
import sys
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines import Problem, Size

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
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
    command = [sys.executable, "-m", "benchmarks.memory", *map(str, astuple(case))]
    found = []
    for _ in range(repeats):
        done = subprocess.run(
            command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        found.append(int(done.stdout.split()[-1]))
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
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        results = problem.run(module)
        peak = _status("VmHWM")
    return peak - before - sum(t.untyped_storage().nbytes() for t in results)


def _status(key: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"/proc/self/status has no {key}; peak memory is measured on Linux only.")


if __name__ == "__main__":
    engine, dtype, direction = sys.argv[1:4]
    print(peak_growth(Case(engine, dtype, direction, *map(int, sys.argv[4:]))))
