"""From rows of cpu.csv to speed-ups: how many times the operator's time another engine takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

OURS = "swiftkernels"
COMBINED = {
    "best compile": ("compile", "compile-max"),
    "best runtime": ("onnxruntime", "openvino"),
}
"""What takes, shape by shape, the least time of several engines."""

Row = Mapping[str, Any]
"""A row of cpu.csv: as measured, or as strings read from the file."""


class Setting(NamedTuple):
    """What the shapes of one table have in common."""

    device: str
    threads: int
    dtype: str
    direction: str


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


def setting_of(row: Row) -> Setting:
    return Setting(row["device"], int(row["threads"]), row["dtype"], row["direction"])


def speedups(rows: Iterable[Row]) -> list[Speedup]:
    """The operator's speed-up over every engine, and over the best of each in `COMBINED`.

    Only times measured side by side (equal `started`) are divided by each other. Of what was
    measured again, the last counts. Rows without times and comparisons without the operator are
    left out.

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
        if row["median_seconds"] == "":
            continue
        shape = Shape(int(row["batch"]), int(row["tokens"]), int(row["width"]))
        times = comparisons.setdefault((setting_of(row), shape, row["started"]), {})
        times[row["engine"]] = float(row["median_seconds"]), float(row["min_seconds"])

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


def geometric_mean(values: Sequence[float]) -> float:
    """Mean of factors.

    Example:
        >>> round(geometric_mean([1, 4]), 9)
        2.0
    """
    return math.exp(sum(map(math.log, values)) / len(values))


def table(found: Iterable[Speedup]) -> str:
    """For every setting and engine the mean, the worst and the best, by medians and by minima."""
    blocks = []
    columns = f"{'mean':>8}{'worst':>8}{'best':>8}"
    by_setting = sorted(found, key=lambda s: s.setting)
    for setting, members in groupby(by_setting, key=lambda s: s.setting):
        own = list(members)
        engines = dict.fromkeys(s.engine for s in own)
        order = [*(e for e in engines if e not in COMBINED), *(e for e in COMBINED if e in engines)]
        threads = f"{setting.threads} thread" + ("s" if setting.threads > 1 else "")
        lines = [
            f"{setting.device}, {threads}, {setting.dtype}, {setting.direction}: "
            f"time of the engine / time of {OURS}",
            f"{'':<18}{'':>7}{'by medians':>24}{'by minima':>24}",
            f"{'engine':<18}{'shapes':>7}{2 * columns}  worst at",
        ]
        for engine in order:
            ratios = [s for s in own if s.engine == engine]
            values = [[s.by_median for s in ratios], [s.by_minimum for s in ratios]]
            worst = min(ratios, key=lambda s: s.by_median)
            lines.append(
                f"{engine:<18}{len(ratios):>7}"
                + "".join(f"{f(own):>8.2f}" for own in values for f in (geometric_mean, min, max))
                + f"  {worst.shape.label}"
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
