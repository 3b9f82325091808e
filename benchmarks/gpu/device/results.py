"""The files that `benchmarks/gpu/run` leaves in a folder, and the report that is written from them.

| file | what |
|---|---|
| `steps.csv` | the plan, and what became of each step |
| `checks.csv` | every case of every step: right or wrong, with its errors; every test |
| `networks.csv` | times and memory of whole networks, forward and training step |
| `operators.csv` | times of single operators |
| `log.txt` | what the steps printed |
| `report.md` | tables of all this |
| `networks.png`, `operators.png` | pictures, if matplotlib is installed |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from swiftkernels.testing.engines import OURS
from swiftkernels.testing.harness import COLUMNS as HARNESS_COLUMNS
from swiftkernels.testing.ratios import markdown_table, ratio_table, speedups
from swiftkernels.utils.files import read_csv, write_csv, write_text
from swiftkernels.utils.text import shown

Row = dict[str, Any]

STEPS, CHECKS, NETWORKS, OPERATORS = "steps.csv", "checks.csv", "networks.csv", "operators.csv"
LOG, REPORT = "log.txt", "report.md"
NETWORKS_PNG, OPERATORS_PNG = "networks.png", "operators.png"
TABLES = (STEPS, CHECKS, NETWORKS, OPERATORS)

MACHINE = ("device", "torch", "triton", "timm")
"""Columns of every row of results."""
STEP_COLUMNS = ("step", "state", "seconds", "tries", "limit", "needs", "gpu", "note", "command")
CHECK_COLUMNS = (
    "step",
    "case",
    "dtype",
    "outcome",  # one of `OUTCOMES`
    "output",  # largest error of the outputs, in units of its bound: right up to 1
    "gradients",  # the same of the gradients
    "seconds",  # with compilation
    "note",
    *MACHINE,
)
NETWORK_COLUMNS = (
    "started",  # time of the comparison: rows that were measured in turn have the same
    "network",
    "source",  # of the network that the engines run: timm or this library
    "direction",
    "dtype",
    "batch",
    "side",
    "engine",
    "images_per_second",  # as called, by the median
    "median_seconds",
    "min_seconds",
    "spread_seconds",  # interquartile range
    "rounds",
    "graph_images_per_second",  # in a CUDA graph
    "graph_median_seconds",
    "graph_min_seconds",
    "graph_spread_seconds",
    "graph_rounds",
    "peak_bytes",  # beyond weights, images and optimizer
    "error",  # of the output, or of the loss of the first step, relative
    "note",  # why there is no time, or no graph
    *MACHINE,
)
OPERATOR_COLUMNS = ("operator", *HARNESS_COLUMNS, "triton", "timm")

BEGUN, RIGHT, WRONG, FAILED, SKIPPED = "begun", "right", "wrong", "failed", "skipped"
OUTCOMES = (BEGUN, RIGHT, WRONG, FAILED, SKIPPED)
"""Of a case. Begun: its process ended, or was killed, in it."""
ERRORS = (WRONG, FAILED)
FOUND_ERRORS = 3
"""Exit status of a step that ran all its cases, some of them with `ERRORS`; 1 is a bug of its own,
as of every command."""

FORWARD, TRAINING = "forward", "training step"
GRAPHS = f"{OURS}-graph"
"""`fuse_for_inference` with the CUDA graphs that it captures itself."""
NAMES = {
    "eager": "eager",
    "channels_last": "channels_last",
    "compile": "torch.compile",
    "compile-max": "max-autotune",
    OURS: "fused, graph=False",
    GRAPHS: "fused",
    "accelerated": "accelerated",
    "accelerated-channels_last": "accelerated, channels_last",
}
"""Engines of whole networks in the order of tables, and their names there."""
OWN = (OURS, GRAPHS, "accelerated", "accelerated-channels_last")
"""Those of this library."""
MODES = {"": "as called", "graph_": "in a CUDA graph"}
"""By the prefix of their columns."""

LISTED = 40
"""Errors that the report lists."""
SHOWN = 8
"""Errors that the summary lists."""
NOTE = 160
"""Characters of a note there."""
LONGEST = 7500
"""Characters of the summary: few enough that a terminal and a log show all of it."""


class Rows:
    """The rows of a CSV file by their keys; a change is in the file at once.

    Args:
        path: of the file, which may be missing.
        columns: of the file.
        keys: columns that identify a row; rows with the same replace each other.
    """

    def __init__(self, path: Path, columns: Sequence[str], keys: Sequence[str]) -> None:
        self.path, self.columns, self.keys = path, columns, keys
        self._rows: dict[tuple[str, ...], Row] = {
            self._key(row): dict(row) for row in read_csv(path)
        }

    def _key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self.keys)

    def __iter__(self) -> Iterator[Row]:
        return iter(list(self._rows.values()))

    def get(self, *key: object) -> Row:
        """The row with that key; empty if there is none."""
        return self._rows.get(tuple(map(str, key)), {})

    def outcomes(self, step: str) -> dict[str, str]:
        """The outcomes of the cases of a step by name, of rows of checks.csv."""
        return {r["case"]: r["outcome"] for r in self._rows.values() if r["step"] == step}

    def put(self, rows: Iterable[Row]) -> None:
        """Add rows, in the place of those with the same keys."""
        for row in rows:
            self._rows[self._key(row)] = dict.fromkeys(self.columns, "") | row
        write_csv(self.path, list(self._rows.values()), self.columns, digits=6)

    def remove(self, unwanted: Sequence[str], column: str) -> None:
        """Remove the rows with one of these values in a column."""
        kept = {key: row for key, row in self._rows.items() if row[column] not in unwanted}
        if kept != self._rows:
            self._rows = kept
            self.put(())


def checks(folder: Path) -> Rows:
    return Rows(folder / CHECKS, CHECK_COLUMNS, ("step", "case"))


def networks(folder: Path) -> Rows:
    keys = ("network", "direction", "dtype", "batch", "side", "engine")
    return Rows(folder / NETWORKS, NETWORK_COLUMNS, keys)


def operators(folder: Path) -> Rows:
    keys = ("operator", "tokens", "width", "batch", "dtype", "direction", "engine")
    return Rows(folder / OPERATORS, OPERATOR_COLUMNS, keys)


def write_report(folder: Path) -> None:
    """Write report.md from the CSV files."""
    rows = {name: read_csv(folder / name) for name in TABLES}
    device = next((row["note"] for row in rows[STEPS] if row["step"] == "device"), "")
    sections = {
        "Steps": step_table(rows[STEPS]),
        "Errors": errors(rows[CHECKS], LISTED),
        "Whole networks, inference": _both_modes(rows[NETWORKS]),
        "Whole networks, training step": training_table(rows[NETWORKS]),
        "Operators": operator_tables(rows[OPERATORS]),
        "Checks": check_table(rows[CHECKS]),
    }
    method = _TINY if is_tiny(folder) else _METHOD
    text = [f"# Results on {device or 'an unknown device'}", method]
    text += [f"## {title}\n\n{part}" for title, part in sections.items() if part]
    pictures = [name for name in (NETWORKS_PNG, OPERATORS_PNG) if (folder / name).exists()]
    text += [f"![{name}]({name})" for name in pictures]
    write_text(folder / REPORT, "\n\n".join(text) + "\n")


_METHOD = """\
Engines are measured in turn, in one process, between events on the device, with flushed caches. As
called: from an idle device, so that launching counts. In a CUDA graph: only the kernels. float32 is
without TF32, `tf32` with it in convolutions and matrix products. Before an engine is measured, its
output is compared with float64; of a training step, the first loss with that of eager PyTorch.
Errors are in units of their bounds: twice the error of eager PyTorch in the same type, plus a few
roundings."""

_TINY = "**Tiny sizes on a CPU, to try the command. The times mean nothing.**"


def is_tiny(folder: Path) -> bool:
    """Whether a folder has the steps of a run that tries the command."""
    return any("--tiny" in row["command"].split() for row in read_csv(folder / STEPS))


def summary(folder: Path) -> str:
    """The essential results, in at most `LONGEST` characters."""
    rows = {name: read_csv(folder / name) for name in TABLES}
    waiting = [row["step"] for row in rows[STEPS] if row["state"] not in FINISHED]
    parts = [
        errors(rows[CHECKS], SHOWN),
        f"Not finished: {', '.join(waiting)}" if waiting else "",
        check_table(rows[CHECKS]),
        training_table(rows[NETWORKS]),
        operator_summary(rows[OPERATORS]),
        throughput_table(rows[NETWORKS], list(MODES)),
    ]
    text = "\n\n".join(filter(None, parts))
    if len(text) <= LONGEST:
        return text
    rest = f"\n... the rest is in {REPORT}"
    return text[: LONGEST - len(rest)].rpartition("\n")[0] + rest


DONE, WAITING, RUNNING, STOPPED, BROKEN = "done", "waiting", "running", "stopped", "broken"
FINISHED = (DONE, SKIPPED)
"""States of steps that are not continued. The others: waiting for time, running, stopped at the
step's own limit of time, and ended by an error of the process."""


def step_table(rows: Sequence[Mapping[str, str]]) -> str:
    lines = [["step", "state", "seconds", "note"]]
    for row in rows:
        took = f"{float(row['seconds']):.0f}" if row["seconds"] else ""
        lines.append([row["step"], row["state"], took, shown(row["note"], NOTE)])
    return markdown_table(lines, texts=(0, 1, 3)) if rows else ""


def errors(rows: Iterable[Mapping[str, str]], most: int) -> str:
    """A list of the cases that are wrong, failed, or in which a process ended."""
    found = [row for row in rows if row["outcome"] in (*ERRORS, BEGUN)]
    lines = [
        f"* {row['step']}, {row['case']}: {row['outcome']}; {shown(row['note'], NOTE)}"
        for row in found[:most]
    ]
    if len(found) > most:
        lines.append(f"* and {len(found) - most} more in {CHECKS}")
    return "\n".join(lines)


def check_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Counts of the outcomes, and the largest errors, by step and type."""
    lines = [["step", "dtype", *OUTCOMES, "output", "gradients"]]
    groups = dict.fromkeys((row["step"], row["dtype"]) for row in rows)
    for group in groups:
        own = [row for row in rows if (row["step"], row["dtype"]) == group]
        counts = [sum(row["outcome"] == outcome for row in own) for outcome in OUTCOMES]
        worst = [
            max((float(row[name]) for row in own if row[name]), default=None)
            for name in ("output", "gradients")
        ]
        largest = ["" if error is None else f"{error:.2g}" for error in worst]
        lines.append([*group, *(str(count or "") for count in counts), *largest])
    return markdown_table(lines, texts=(0, 1)) if groups else ""


def _both_modes(rows: Sequence[Mapping[str, str]]) -> str:
    origins = {f"{row['source']} {row.get(row['source'], '')}".strip() for row in rows}
    parts = [f"The networks are those of {', '.join(sorted(origins))}."] if rows else []
    for prefix, mode in MODES.items():
        if table := throughput_table(rows, [prefix], minima=True):
            parts.append(f"Images per second {mode}, by the median and, in brackets, the best "
                         f"round.\n\n{table}")  # fmt: skip
    return "\n\n".join(parts)


def throughput_table(
    rows: Iterable[Mapping[str, str]], prefixes: Sequence[str], minima: bool = False
) -> str:
    """Images per second of a forward in each engine, and the gain over the best other engine.

    Args:
        rows: of networks.csv.
        prefixes: of `MODES`; several stand next to each other in a cell.
        minima: add those of the best rounds.
    """
    rows = [
        row
        for row in rows
        if row["direction"] == FORWARD and any(row[f"{prefix}rounds"] for prefix in prefixes)
    ]
    engines = _engines(rows)

    def cell(row: Mapping[str, str]) -> str:
        parts = []
        for prefix in prefixes:
            if not row.get(f"{prefix}rounds"):
                parts.append("-")
                continue
            rates = [_rate(row, prefix, which) for which in ("median", "min")[: 1 + minima]]
            parts.append(f"{rates[0]:,.0f}" + "".join(f" ({rate:,.0f})" for rate in rates[1:]))
        return " / ".join(parts) if row else ""

    lines = [["network", "dtype", "batch", *(NAMES[e] for e in engines), "gain"]]
    for key, found in _problems(rows).items():
        best = [_gain(found, prefix) for prefix in prefixes]
        gain = " / ".join(f"{g:.2f}" if g else "-" for g in best)
        lines.append([*key, *(cell(found.get(e, {})) for e in engines), gain])
    if len(lines) == 1:
        return ""
    modes = " / ".join(MODES[prefix] for prefix in prefixes)
    heading = "" if minima else f"Images per second, {modes}; gain over the best other engine\n\n"
    return heading + markdown_table(lines, texts=(0, 1))


def _rate(row: Mapping[str, str], prefix: str, which: str) -> float:
    return int(row["batch"]) / float(row[f"{prefix}{which}_seconds"])


def _engines(rows: Iterable[Mapping[str, str]]) -> list[str]:
    present = {row["engine"] for row in rows}
    return [engine for engine in NAMES if engine in present]


def _problems(
    rows: Iterable[Mapping[str, str]],
) -> dict[tuple[str, str, str], dict[str, Mapping[str, str]]]:
    """The rows by network, type and batch, then by engine."""
    found: dict[tuple[str, str, str], dict[str, Mapping[str, str]]] = {}
    for row in rows:
        key = row["network"].removeprefix("swiftformer_").upper(), row["dtype"], row["batch"]
        found.setdefault(key, {})[row["engine"]] = row
    return dict(sorted(found.items(), key=lambda item: (item[0][1], int(item[0][2]))))


def _gain(found: Mapping[str, Mapping[str, str]], prefix: str) -> float:
    """Time of the best other engine / time of the best of ours; 0 if one of them is missing."""
    times = {
        e: float(r[f"{prefix}median_seconds"]) for e, r in found.items() if r[f"{prefix}rounds"]
    }
    ours = [seconds for engine, seconds in times.items() if engine in OWN]
    others = [seconds for engine, seconds in times.items() if engine not in OWN]
    return min(others) / min(ours) if ours and others else 0.0


def training_table(rows: Iterable[Mapping[str, str]]) -> str:
    """Time of a training step and its peak memory in each engine."""
    rows = [row for row in rows if row["direction"] == TRAINING and row["rounds"]]
    engines = _engines(rows)

    def cell(row: Mapping[str, str]) -> str:
        if not row:
            return ""
        median, least = (1e3 * float(row[f"{which}_seconds"]) for which in ("median", "min"))
        memory = f", {int(row['peak_bytes']) / 2**20:,.0f} MiB" if row["peak_bytes"] else ""
        return f"{median:.1f} ({least:.1f}){memory}"

    lines = [["network", "dtype", "batch", *(NAMES[e] for e in engines), "gain"]]
    for key, found in _problems(rows).items():
        gain = _gain(found, "")
        cells = [cell(found.get(e, {})) for e in engines]
        lines.append([*key, *cells, f"{gain:.2f}" if gain else ""])
    heading = "Training step in ms (least), and peak memory besides weights and optimizer\n\n"
    return heading + markdown_table(lines, texts=(0, 1)) if rows else ""


def _by_operator(rows: Sequence[Mapping[str, str]]) -> dict[str, list[Mapping[str, str]]]:
    ordered = sorted(rows, key=lambda row: row["operator"])
    return {name: list(own) for name, own in groupby(ordered, key=lambda row: row["operator"])}


def operator_tables(rows: Sequence[Mapping[str, str]]) -> str:
    """Speed-ups over each engine: mean, worst and best."""
    return "\n\n".join(
        f"### {name}, {mode}\n\n{ratio_table(found)}"
        for name, own in _by_operator(rows).items()
        for prefix, mode in MODES.items()
        if (found := speedups(own, prefix))
    )


def operator_summary(rows: Sequence[Mapping[str, str]]) -> str:
    """One line for each operator, type and direction: the mean gain over each engine."""
    lines = [["operator", "dtype", "direction", "timed", "mean gain (least) over each engine"]]
    for name, own in _by_operator(rows).items():
        for prefix, mode in MODES.items():
            found = sorted(speedups(own, prefix), key=lambda s: s.setting)
            for setting, members in groupby(found, key=lambda s: s.setting):
                gains: dict[str, list[float]] = {}
                for member in members:
                    gains.setdefault(member.engine, []).append(member.by_median)
                text = ", ".join(
                    f"{engine} {geometric_mean(values):.2f} ({min(values):.2f})"
                    for engine, values in gains.items()
                )
                lines.append([name, setting.dtype, setting.direction, mode, text])
    return markdown_table(lines, texts=range(5)) if len(lines) > 1 else ""
