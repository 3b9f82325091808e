"""How far the resident set of this process grows in a call. Linux with glibc only.

Freed memory is given back to the system (malloc_trim), the kernel's high-water mark of the resident
set is set back (5 to /proc/self/clear_refs), and its growth (VmHWM) over the call is the result.
In `ENVIRONMENT`, with one malloc arena and a low threshold for mmap, malloc takes tensors from the
system and gives them back at once, so that the mark shows what lived at the same time, not malloc's
caches.
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
"""To be set when the process starts."""

Result = TypeVar("Result")


def run_alone(module: str, *arguments: object) -> str:
    """What `python -m module` prints, in a process with that environment.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def peak_growth(call: Callable[[], Result]) -> tuple[int, Result]:
    """Bytes at the peak beyond those before the call, and what it returns."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = call()
    return _status("VmHWM") - before, result


def _status(key: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"/proc/self/status has no {key}; peak memory is measured on Linux only.")
