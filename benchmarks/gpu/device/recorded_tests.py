"""tests/gpu, with the outcome of each test in checks.csv as soon as it is known."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import results
from benchmarks.gpu.device.cases import Settings, machine
from benchmarks.gpu.device.results import FAILED, RIGHT, SKIPPED
from swiftkernels.backends import devices
from swiftkernels.testing.engines import missing

ROOT = Path(__file__).parents[3]
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""In the names of Python's objects."""


class Recorder:
    """A plugin of pytest that writes the outcome of each test into checks.csv."""

    def __init__(self, settings: Settings) -> None:
        self.checks = results.checks(settings.out)
        self.common = {"step": "tests", **machine(settings.device)}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        known = {"passed": RIGHT, "failed": FAILED, "skipped": SKIPPED}
        row = {"case": report.nodeid, "seconds": report.duration, "note": ""}
        row["outcome"] = known[report.outcome]
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            message = (crash.message if crash else str(report.longrepr)).strip()
            row["note"] = ADDRESS.sub("", message)
        elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            row["note"] = report.longrepr[2]
        self.checks.put([self.common | row])


def tests_step(settings: Settings) -> int:
    """tests/gpu, in several processes where pytest-xdist is installed."""
    import pytest

    recorder = Recorder(settings)
    done = recorder.checks.outcomes("tests")
    os.chdir(ROOT)
    options = ["tests/gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    if not missing(["xdist"]):
        # With threads of their own, several processes would wait for each other's most of the time.
        os.environ["OMP_NUM_THREADS"] = "1"
        options += ["-n", str(max(1, min(12, (os.cpu_count() or 2) - 2)))]
    for name in done:
        options += ["--deselect", name]
    status = int(pytest.main(options, plugins=[recorder]))
    found = list(recorder.checks.outcomes("tests").values())
    counts = {outcome: found.count(outcome) for outcome in results.OUTCOMES}
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count))
    if status == devices.LOST:
        return status
    if status not in (0, 1, 5):  # passed, failed, none left
        raise RuntimeError(
            f"pytest ended with exit status {status}; its output is in {results.LOG}"
        )
    return results.FOUND_ERRORS if counts[FAILED] else 0
