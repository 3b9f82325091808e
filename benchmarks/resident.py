"""The growth of the resident set of this process in a call. Linux with glibc only.

First, freed memory is returned to the system (malloc_trim), and the kernel's high-water mark of the
resident set is reset (5 to /proc/self/clear_refs). The result is the growth of the mark (VmHWM) in
the call. `ENVIRONMENT` sets one malloc arena and a low threshold for mmap, so that malloc gets
memory for tensors from the system and returns it at once. Then the mark shows the memory that was
in use at the same time, not malloc's caches.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
"""Has to be set when the process starts."""

Result = TypeVar("Result")


def run_process(module: str, *arguments: object) -> str:
    """The output of `python -m module` in a new process with `ENVIRONMENT`.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def peak_growth(call: Callable[[], Result]) -> tuple[int, Result]:
    """Bytes by which the peak exceeds the size before the call, and the result of the call."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = call()
    return status("VmHWM") - before, result


def status(key: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"/proc/self/status has no {key}; peak memory is measured on Linux only.")
