"""Writes measured figures into README.md and the pages of docs, from the CSV files in docs/results.

A table stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`, and NAME is one of
`TABLES`. `python docs/figures.py` writes them all; with `--check` it writes nothing and fails if a
table is not what the CSV files say. Hardware and versions come from the same files.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from swiftkernels.testing.ratios import Setting, Speedup, setting_of, speedups

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = DOCS / "results"


_MARKED = re.compile(r"(<!-- figures: ([a-z-]+) -->\n).*?(<!-- end of figures -->)", re.S)

ENGINES = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "compile-max": "torch.compile, max-autotune",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "separable": "separable attention, eager",
    "linear": "linear attention, eager",
    "xca": "XCA, eager",
    "mhsa": "self-attention, eager",
}
"""Of cpu.csv, with their names in the tables, in the tables' order."""
HEADLINE = ("eager", "compile", "onnxruntime", "openvino")

Row = dict[str, str]


def rows_of(name: str) -> list[Row]:
    """The rows of a CSV file in docs/results."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def headline() -> str:
    """What a layer and a whole network gain, float32 on one thread, with the machines."""
    found = [
        s
        for s in speedups(rows_of("cpu.csv"))
        if (s.setting.threads, s.setting.dtype) == (1, "float32") and s.engine in HEADLINE
    ]
    lines = []
    for direction in dict.fromkeys(s.setting.direction for s in found):
        own = [s for s in found if s.setting.direction == direction]
        ratios = ([s.by_median for s in own if s.engine == engine] for engine in HEADLINE)
        lines.append([f"additive attention, {direction}", *map(_spread, ratios)])
    networks = rows_of("whole_networks.csv")
    for direction in dict.fromkeys(row["direction"] for row in networks):
        gains = [gain for row, gain in _network_gains(networks) if row["direction"] == direction]
        lines.append([f"whole SwiftFormer, {direction}", _spread(gains), *[""] * 3])
    table = _table(["faster than", *(ENGINES[engine] for engine in HEADLINE)], lines)
    return (
        f"{table}\n\nMean (least to most) of ratios of median times on CPUs; float32, 1 thread, "
        f"torch {_only(networks, 'torch')}. Attention: {len({s.shape for s in found})} shapes, "
        f"{_only(rows_of('cpu.csv'), 'device')} ({_only(rows_of('cpu.csv'), 'isa')}), "
        "[cpu.csv](DOCS/results/cpu.csv). Networks: timm's XS, S, L1, L3, accelerated, at "
        f"{_only(networks, 'side')} pixels, batch {_only(networks, 'batch')}, "
        f"{_only(networks, 'device')} ({_only(networks, 'isa')}), "
        "[whole_networks.csv](DOCS/results/whole_networks.csv)."
    )


def _spread(ratios: Sequence[float]) -> str:
    """Geometric mean (least to most); empty if nothing was measured."""
    if not ratios:
        return ""
    return f"{statistics.geometric_mean(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"


def operator() -> str:
    """Every setting and engine that was measured."""
    found = [s for s in speedups(rows_of("cpu.csv")) if s.engine in ENGINES]
    return _speedups(found) + "\n\n" + _operator_machine(found)


def _speedups(found: Sequence[Speedup]) -> str:
    lines = []
    groups = sorted({(s.setting, s.engine) for s in found}, key=lambda group: _order(*group))
    for setting, engine in groups:
        own = [s for s in found if (s.setting, s.engine) == (setting, engine)]
        worst, best = (pick(own, key=lambda s: s.by_median) for pick in (min, max))
        threads = f"{setting.threads} thread{'s' if setting.threads > 1 else ''}"
        lines.append(
            [
                f"{setting.direction}, {setting.dtype}, {threads}",
                ENGINES[engine],
                f"{statistics.geometric_mean([s.by_median for s in own]):.2f} x",
                _with_shape(worst),
                _with_shape(best),
                str(len(own)),
            ]
        )
    return _table(
        ["", "faster than", "mean", "least, at [B, N, C]", "most, at [B, N, C]", "shapes"], lines
    )


def _order(setting: Setting, engine: str) -> tuple[bool, int, bool, int]:
    """float32 first, then by threads, direction and engine."""
    place = list(ENGINES).index(engine)
    return setting.dtype != "float32", setting.threads, setting.direction != "forward", place


def _with_shape(s: Speedup) -> str:
    batch, tokens, width = s.shape
    return f"{s.by_median:.2f} x, [{batch},&nbsp;{tokens},&nbsp;{width}]"


def _operator_machine(found: Iterable[Speedup]) -> str:
    settings = {s.setting for s in found}
    rows = [row for row in rows_of("cpu.csv") if setting_of(row) in settings]
    versions = [f"torch {_only(rows, 'torch')}"]
    for column, name in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")):
        versions += [f"{name} {_only(rows, column)}"] if _only(rows, column) else []
    return (
        f"Ratios of medians, geometric mean over shapes; {_only(rows, 'device')}, kernels for "
        f"{_only(rows, 'isa')}, {', '.join(versions)} "
        "([cpu.csv](DOCS/results/cpu.csv), by `python -m benchmarks.cpu`)."
    )


def operator_memory() -> str:
    """Peak memory of the layer beyond input and output, in units of the input."""
    rows = rows_of("cpu_memory.csv")
    lines = []
    for ours in (row for row in rows if row["engine"] == "swiftkernels"):
        same = ("dtype", "direction", "batch", "tokens", "width", "threads")
        (eager,) = (
            row
            for row in rows
            if row["engine"] == "eager" and all(row[key] == ours[key] for key in same)
        )
        lines.append(
            [
                f"[{ours['batch']}, {ours['tokens']}, {ours['width']}]",
                f"{ours['direction']}, {ours['dtype']}",
                f"{float(ours['peak_in_x']):.2f}",
                f"{float(eager['peak_in_x']):.2f}",
            ]
        )
    table = _table(["[B, N, C]", "", "this library", "eager PyTorch"], lines)
    return table + (
        "\n\nHow far the process grows during a call, without the bytes of the output and of the "
        f"gradients, in units of the input's bytes; kernels for {_only(rows, 'isa')}, torch "
        f"{_only(rows, 'torch')} "
        "([cpu_memory.csv](DOCS/results/cpu_memory.csv), by `python -m benchmarks.cpu --memory`)."
    )


def networks() -> str:
    """Whole SwiftFormers of timm, and the same accelerated."""
    rows = rows_of("whole_networks.csv")
    lines = []
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        before, after = float(theirs["median_seconds"]), float(ours["median_seconds"])
        lines.append(
            [
                theirs["network"],
                f"{theirs['direction']}, batch {theirs['batch']}",
                f"{before * 1e3:.1f} ms",
                f"{after * 1e3:.1f} ms",
                f"{before / after:.2f} x",
            ]
        )
    table = _table(["network", "", "timm", "accelerated", "gain"], lines)
    return table + "\n\n" + _networks_machine(rows)


def _network_gains(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Each row of timm's with the gain of the accelerated network, measured in turn with it."""
    return [
        (theirs, float(theirs["median_seconds"]) / float(ours["median_seconds"]))
        for theirs, ours in zip(rows[::2], rows[1::2], strict=True)
    ]


def _networks_machine(rows: Sequence[Row]) -> str:
    return (
        f"Ratios of medians; {_only(rows, 'side')} x {_only(rows, 'side')} pixels, "
        f"{_only(rows, 'dtype')}, {_only(rows, 'threads')} thread, {_only(rows, 'device')}, "
        f"kernels for {_only(rows, 'isa')}, torch {_only(rows, 'torch')} "
        "([whole_networks.csv](DOCS/results/whole_networks.csv), by "
        "`python -m benchmarks.whole_networks`)."
    )


def training_memory() -> str:
    """Peak memory of a training step of whole networks."""
    rows = rows_of("training_memory.csv")
    first = float(rows[0]["peak_bytes"])
    names = {
        "timm, accelerated": "timm with `swiftkernels.accelerate`",
        "swiftkernels": "`swiftformer_xs`",
        "timm, checkpointing": "timm, blocks recomputed",
        "swiftkernels, checkpointing": "`swiftformer_xs`, with `--grad-checkpointing`",
    }
    lines = [
        [
            names.get(row["model"], row["model"]),
            f"{float(row['peak_bytes']) / 2**20:.0f} MiB",
            f"{float(row['peak_bytes']) / first:.2f}",
        ]
        for row in rows
    ]
    table = _table(["model", "peak", "share"], lines)
    side = _only(rows, "side")
    return table + (
        f"\n\nXS, {_only(rows, 'batch')} images of {side} x {side}, {_only(rows, 'dtype')}, "
        f"{_only(rows, 'threads')} thread, {_only(rows, 'processor')}, kernels for "
        f"{_only(rows, 'isa')}, torch {_only(rows, 'torch')}."
    )


def tradeoff() -> str:
    """Accuracy and latency of small networks that differ in their token mixer."""
    rows = rows_of("tradeoff.csv")
    lines = [
        [
            row["mixer"],
            f"{100 * float(row['accuracy_mean']):.1f} +- {100 * float(row['accuracy_sd']):.1f} %",
            f"{float(row['batch1_ms']):.2f} ms",
            f"{float(row['batch32_ms']):.2f} ms",
        ]
        for row in rows
    ]
    table = _table(["mixer", "accuracy", "batch 1", "batch 32"], lines)
    return table + (
        f"\n\nMean and standard deviation of {_only(rows, 'seeds')} seeds, {_only(rows, 'epochs')} "
        f"epochs on {_only(rows, 'data')}; {_only(rows, 'device')}, {_only(rows, 'threads')} "
        f"thread, torch {_only(rows, 'torch')} ([tradeoff.csv](DOCS/results/tradeoff.csv))."
    )


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "operator": operator,
    "operator-memory": operator_memory,
    "networks": networks,
    "training-memory": training_memory,
    "tradeoff": tradeoff,
}


def _only(rows: Sequence[Row], column: str) -> str:
    """The values of a column, almost always one."""
    return " and ".join(dict.fromkeys(row[column] for row in rows if row[column]))


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def written(text: str, folder: str) -> str:
    """The page with its tables as the CSV files say; `folder` is where docs lies from the page.

    Raises:
        ValueError: an unknown table.
    """

    def fill(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"no table {match[2]!r}; there are {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[match[2]]().replace('DOCS/', folder)}\n\n{match[3]}"

    return _MARKED.sub(fill, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; returns the exit status, 1 if a page differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    given = parser.parse_args(arguments)
    status = 0
    for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]:
        before = page.read_text()
        after = written(before, "" if page.parent == DOCS else "docs/")
        if before == after:
            continue
        if given.check:
            status = 1
            print(
                f"{page.relative_to(ROOT)}: its tables are not those of docs/results. "
                "Write them: python docs/figures.py",
                file=sys.stderr,
            )
        else:
            page.write_text(after)
            print(f"Written: {page.relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
