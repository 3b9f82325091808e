"""The cases of a step: each is run once, and what it finds is written when it ends.

A step that is killed goes on with the next case when it is started again. Cases in which a process
ended before come last. After an error that no later call on the GPU survives, the step ends with
the status `devices.LOST`, and has to be started again in a new process.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.device import results
from benchmarks.gpu.device.results import FAILED, RIGHT, WRONG, Row
from swiftkernels.backends import devices
from swiftkernels.testing import harness
from swiftkernels.utils.text import first_line

SIDE, TINY_SIDE = 224, 32
"""Pixels of a side of the images of whole networks; in a tiny run."""
SECONDS = 0.4
"""Of the rounds of one comparison; once more in graphs."""

Case = Callable[[], Row]
"""Returns columns of its row in checks.csv; what it measures it writes itself."""


class Settings(NamedTuple):
    """What a step measures."""

    out: Path
    device: torch.device
    networks: tuple[str, ...]
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    first: bool
    compiled: bool
    tiny: bool

    @property
    def side(self) -> int:
        return TINY_SIDE if self.tiny else SIDE

    @property
    def seconds(self) -> float:
        return 0.0 if self.tiny else SECONDS


@functools.cache
def machine(device: torch.device) -> Row:
    """Values of `results.MACHINE`."""
    return {
        "device": devices.name(device),
        "torch": torch.__version__,
        "triton": harness.version("triton"),
        "timm": harness.version("timm"),
    }


def run_cases(step: str, cases: Mapping[tuple[str, str], Case], settings: Settings) -> int:
    """Run the cases that are not finished; returns the exit status of the step.

    Args:
        step: the name of the step in checks.csv.
        cases: by name and dtype.
        settings: of the step.
    """
    checks = results.checks(settings.out)
    unfinished = {}
    for (name, dtype), case in cases.items():
        outcome = checks.get(step, name).get("outcome", "")
        if outcome in ("", results.BEGUN):
            unfinished[name, dtype] = outcome, case
    common = {"step": step, **machine(settings.device)}
    for name, dtype in sorted(unfinished, key=lambda key: unfinished[key][0]):
        row = common | {"case": name, "dtype": dtype}
        checks.put([row | {"outcome": results.BEGUN, "note": "its process ended in it"}])
        print(f"{datetime.now():%H:%M:%S} {name}", flush=True)
        began = time.perf_counter()
        try:
            with precision(dtype):
                found = unfinished[name, dtype][1]()
        except Exception as error:  # of a compiler or a kernel: a result
            found = {"outcome": FAILED, "note": first_line(error)}
        checks.put([row | found | {"seconds": time.perf_counter() - began}])
        torch.compiler.reset()
        gc.collect()
        if lost := devices.why_lost(settings.device):
            print(f"after {name}: {lost}", flush=True)
            return devices.LOST
    outcomes = [checks.get(step, name)["outcome"] for name, _ in cases]
    wrong = sum(outcome in results.ERRORS for outcome in outcomes)
    print(f"cases: {len(outcomes)}, " + (f"wrong: {wrong}" if wrong else "all right"))
    return results.FOUND_ERRORS if wrong else 0


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Inside, convolutions and matrix products in float32 use TF32 only for "tf32"."""
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        for setting, allowed in zip(settings, before, strict=True):
            setting.allow_tf32 = allowed


def outcome(error: float, bound: float, what: str = "output") -> Row:
    """Columns for an error and its bound."""
    right = error <= bound  # False for NaN
    note = "" if right else f"{what}: relative error {error:.2g}, bound {bound:.2g}"
    return {"outcome": RIGHT if right else WRONG, what: error / bound, "note": note}


def worst(rows: Sequence[Row]) -> Row:
    """The columns of several checks of one case: of a wrong one, if there is one."""
    largest = {
        name: max(row[name] for row in rows if name in row)
        for name in ("output", "gradients")
        if any(name in row for row in rows)
    }
    return next((row for row in rows if row["outcome"] == WRONG), rows[0]) | largest
