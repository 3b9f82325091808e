"""Times of whole networks, from the rows of the CSV files of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from swiftkernels.testing.engines import OURS

EAGER = ("timm", "channels_last")
"""Engines that are timm's network in eager PyTorch."""


class Problem(NamedTuple):
    """What the engines of whole networks are timed on."""

    network: str
    """timm's name."""
    direction: str
    batch: int
    side: int
    """Height and width of the images."""
    threads: int


def problem_of(row: Mapping[str, Any]) -> Problem:
    numbers = (int(row[key]) for key in ("batch", "side", "threads"))
    return Problem(row["network"], row["direction"], *numbers)


def seconds_of(row: Mapping[str, Any]) -> float:
    """The median by the clock that counts: process time with one thread, else wall time."""
    return float(row[f"{row['clock'].split()[0]}_median_seconds"])


def times(rows: Iterable[Mapping[str, Any]]) -> dict[Problem, dict[str, float]]:
    """Median seconds of each engine; of several forms of a network, those of the fastest.

    Example:
        >>> common = {"network": "net", "direction": "forward", "side": 224, "engine": "timm"}
        >>> common |= {"batch": 1, "threads": 1, "clock": "process time"}
        >>> forms = [common | {"process_median_seconds": s} for s in (0.3, 0.2)]
        >>> list(times(forms).values())
        [{'timm': 0.2}]
    """
    found: dict[Problem, dict[str, float]] = {}
    for row in rows:
        engines = found.setdefault(problem_of(row), {})
        seconds = seconds_of(row)
        engines[row["engine"]] = min(seconds, engines.get(row["engine"], seconds))
    return found


class Compared(NamedTuple):
    """Names of engines; "" where there is none."""

    eager: str
    """The fastest form of eager PyTorch."""
    other: str
    """The fastest compiler or runtime."""
    fused: str


def compared(engines: Mapping[str, float]) -> Compared:
    """The fastest engine of each kind, from the seconds of all.

    Example:
        >>> compared({"timm": 0.3, "channels_last": 0.2, "openvino": 0.1})
        Compared(eager='channels_last', other='openvino', fused='')
    """
    eager = [engine for engine in EAGER if engine in engines]
    others = [engine for engine in engines if engine not in (*EAGER, "accelerated", OURS)]
    fastest, other = (min(names, key=engines.__getitem__, default="") for names in (eager, others))
    return Compared(fastest, other, OURS if OURS in engines else "")
