"""Speed-ups from the rows of a benchmark: time of an engine divided by time of the operator."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from swiftkernels.testing.engines import OURS

COMBINED = {
    "best compile": ("compile", "compile-max"),
    "best runtime": ("onnxruntime", "openvino"),
}
"""Names for the fastest of several engines, shape by shape."""


class Setting(NamedTuple):
    """What all shapes of a table share."""

    device: str
    threads: int
    """0 on a GPU."""
    dtype: str
    direction: str

    @property
    def label(self) -> str:
        threads = f"{self.threads} thread" + ("s" if self.threads > 1 else "")
        parts = [self.device, threads if self.threads else "", self.dtype, self.direction]
        return ", ".join(filter(None, parts))


class Shape(NamedTuple):
    """Size of the input, [B, N, C]; sorts by batch, then tokens."""

    batch: int
    tokens: int
    width: int

    @property
    def label(self) -> str:
        return f"B={self.batch}, N={self.tokens}, C={self.width}"


class Speedup(NamedTuple):
    """Time of an engine divided by time of the operator, both from one comparison."""

    setting: Setting
    shape: Shape
    engine: str
    by_median: float
    by_minimum: float


def setting_of(row: Mapping[str, Any]) -> Setting:
    threads = int(row["threads"] or 0)
    return Setting(row["device"], threads, row["dtype"], row["direction"])


def speedups(rows: Iterable[Mapping[str, Any]], prefix: str = "") -> list[Speedup]:
    """The operator's speed-up over every engine, and over the best of each in `COMBINED`.

    Args:
        rows: by `compare`, or the same as strings from a CSV file. Only times from one comparison
            (equal `started`) are divided by each other. If a shape was measured several times, the
            last counts. Rows without times and comparisons without the operator are skipped.
        prefix: "graph_" for the times in CUDA graphs.

    Example:
        >>> row = {"started": "", "device": "", "threads": 1, "dtype": "", "direction": "",
        ...        "batch": 1, "tokens": 49, "width": 8, "min_seconds": 1}
        >>> rows = [row | {"engine": "eager", "median_seconds": 3},
        ...         row | {"engine": "swiftkernels", "median_seconds": 2}]
        >>> [(s.engine, s.by_median, s.by_minimum) for s in speedups(rows)]
        [('eager', 1.5, 1.0)]
    """
    comparisons: dict[tuple[Setting, Shape, str], dict[str, tuple[float, float]]] = {}
    for row in rows:
        median, minimum = row[f"{prefix}median_seconds"], row[f"{prefix}min_seconds"]
        if median == "":
            continue
        shape = Shape(int(row["batch"]), int(row["tokens"]), int(row["width"]))
        times = comparisons.setdefault((setting_of(row), shape, row["started"]), {})
        times[row["engine"]] = float(median), float(minimum)

    found: dict[tuple[Setting, Shape, str], Speedup] = {}
    for (setting, shape, _), times in comparisons.items():
        if OURS not in times:
            continue
        for name, members in COMBINED.items():
            if all(member in times for member in members):
                medians, minima = zip(*(times[member] for member in members), strict=True)
                times[name] = min(medians), min(minima)
        median, minimum = times.pop(OURS)
        for engine, (their_median, their_minimum) in times.items():
            found[setting, shape, engine] = Speedup(
                setting, shape, engine, their_median / median, their_minimum / minimum
            )
    return list(found.values())


def ratio_table(found: Iterable[Speedup], mode: str = "") -> str:
    """Mean, least and largest speed-up over each engine: a Markdown table for each setting.

    Args:
        found: by `speedups`.
        mode: how it was timed, for the headings.
    """
    blocks = []
    header = ["engine", "shapes", "mean", "worst", "best", "minima: mean", "worst", "best"]
    by_setting = sorted(found, key=lambda s: s.setting)
    for setting, members in groupby(by_setting, key=lambda s: s.setting):
        own = list(members)
        engines = dict.fromkeys(s.engine for s in own)
        lines = [[*header, "worst at"]]
        for engine in sorted(engines, key=lambda name: name in COMBINED):
            ratios = [s for s in own if s.engine == engine]
            values = [[s.by_median for s in ratios], [s.by_minimum for s in ratios]]
            numbers = [f"{f(v):.2f}" for v in values for f in (statistics.geometric_mean, min, max)]
            worst = min(ratios, key=lambda s: s.by_median)
            lines.append([engine, str(len(ratios)), *numbers, worst.shape.label])
        heading = f"{setting.label}{mode and ', ' + mode}: time of the engine / time of {OURS}"
        blocks.append(heading + "\n\n" + markdown_table(lines, texts=(0, len(header))))
    return "\n\n".join(blocks)


def markdown_table(lines: Sequence[Sequence[str]], texts: Sequence[int]) -> str:
    """The lines, of which the first is the header, with aligned columns.

    `texts` are the numbers of the columns that hold text; the others hold numbers.

    Example:
        >>> print(markdown_table([["name", "N"], ["x", "100"]], texts=[0]))
        | name |   N |
        | :--- | --: |
        | x    | 100 |
    """
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    def row(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i in texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    marks = [
        ":" + "-" * (width - 1) if i in texts else "-" * (width - 1) + ":"
        for i, width in enumerate(widths)
    ]
    return "\n".join([row(lines[0]), row(marks), *map(row, lines[1:])])
