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

from swiftkernels.testing.engines import OURS
from swiftkernels.testing.networks import Problem, compared, problem_of, times
from swiftkernels.testing.ratios import Setting, Speedup, setting_of, speedups
from swiftkernels.utils import command
from swiftkernels.utils.files import write_text

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = DOCS / "results"
ACCURACIES = ROOT / "benchmarks/data/published_networks.csv"


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
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
"""Columns with versions, and their names."""
PHONES = {"ai-edge-litert": "LiteRT", "ncnn": "ncnn"}
"""The same for runtimes that are made for phones."""
PUBLISHED = "published_networks.csv"
NETWORKS, BLOCKS = "whole_networks.csv", "whole_networks_blocks.csv"
FAMILIES = "families.csv"
NETWORK_ENGINES = {
    "timm": "timm, eager",
    "channels_last": "channels_last",
    "accelerated": "accelerated",
    "compile": "torch.compile, frozen",
    **RUNTIMES,
    OURS: "**fused**",
}
"""Of whole_networks.csv, with their names in the table, in its order."""
TRAINING_ENGINES = {
    "timm": "timm, eager",
    "channels_last": "channels_last",
    "compile": "torch.compile",
    "accelerated": "accelerated",
    "accelerated-channels_last": "accelerated, channels_last",
}
"""The same for a training step."""
PUBLISHED_ENGINES = {
    "timm": "eager",
    "channels_last": "channels_last",
    "compile": "torch.compile, frozen",
    "compile-max": "max-autotune",
    **RUNTIMES,
    "litert": "LiteRT",
    "ncnn": "ncnn",
    OURS: "**fused**",
}
"""Of published_networks.csv, with their names in the table of SwiftFormers, in its order."""

Row = dict[str, str]


def rows_of(name: str | Path) -> list[Row]:
    """The rows of a CSV file in docs/results, or of one elsewhere."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def headline() -> str:
    """What a whole network and a layer gain, float32 on one thread, with the machines."""
    found = [
        s
        for s in speedups(rows_of("cpu.csv"))
        if (s.setting.threads, s.setting.dtype) == (1, "float32") and s.engine in HEADLINE
    ]
    lines = []
    measured = times(rows_of(NETWORKS))
    inference = [seconds for problem, seconds in measured.items() if problem.direction == "forward"]
    engines = ("timm", *HEADLINE[1:])
    ratios = [[seconds[e] / seconds[OURS] for seconds in inference] for e in engines]
    lines.append(["whole SwiftFormer, inference", *map(_spread, ratios)])
    gains = [
        [seconds[engine] / seconds["accelerated"] for engine in ("timm", "compile")]
        for problem, seconds in measured.items()
        if problem.direction != "forward"
    ]
    columns = map(_spread, zip(*gains, strict=True))
    lines.append(["whole SwiftFormer, training step", *columns, *[""] * 2])
    for direction in dict.fromkeys(s.setting.direction for s in found):
        own = [s for s in found if s.setting.direction == direction]
        ratios = [[s.by_median for s in own if s.engine == engine] for engine in HEADLINE]
        lines.append([f"additive attention, {direction}", *map(_spread, ratios)])
    table = _table(["faster than", *(ENGINES[engine] for engine in HEADLINE)], lines)
    rows = rows_of(NETWORKS)
    inferred, trained = (
        [row for row in rows if (row["direction"] == "forward") is forward]
        for forward in (True, False)
    )
    names, trained_names = (
        ", ".join(dict.fromkeys(_short(row["network"]) for row in of)) for of in (inferred, trained)
    )
    return (
        f"{table}\n\nMean (least to most) of ratios of median times on CPUs; float32, 1 thread, "
        f"torch {_only(rows, 'torch')}. Networks: timm's {names} at "
        f"{_only(rows, 'side')} pixels; inference by `fuse_for_inference`, batch "
        f"{_only(inferred, 'batch')}; training of {trained_names} by `accelerate`, batch "
        f"{_only(trained, 'batch')}; "
        f"{_only(rows, 'device')} ({_only(rows, 'isa')}), "
        f"[{NETWORKS}](DOCS/results/{NETWORKS}). Attention: {len({s.shape for s in found})} "
        f"shapes, {_only(rows_of('cpu.csv'), 'device')} ({_only(rows_of('cpu.csv'), 'isa')}), "
        "[cpu.csv](DOCS/results/cpu.csv)."
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
    for column, name in RUNTIMES.items():
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


def _label(problem: Problem) -> str:
    return f"{_short(problem.network)}, batch&nbsp;{problem.batch}"


def networks() -> str:
    """A forward of whole SwiftFormers in all engines."""
    rows = [row for row in rows_of(NETWORKS) if row["direction"] == "forward"]
    engines = [engine for engine in NETWORK_ENGINES if any(row["engine"] == engine for row in rows)]
    lines = []
    for problem, seconds in times(rows).items():
        best = min(took for engine, took in seconds.items() if engine != OURS)
        cells = [_ms(seconds.get(engine)) for engine in engines]
        lines.append([_label(problem), *cells, f"{best / seconds[OURS]:.2f} x"])
    names = [NETWORK_ENGINES[engine] for engine in engines]
    table = _table(["ms", *names, "best other / fused"], lines)
    return f"{table}\n\nMedians of {_only(rows, 'clock')}; {_networks_machine(rows)}"


def networks_training() -> str:
    """A training step of whole SwiftFormers, before and after `accelerate`."""
    rows = [row for row in rows_of(NETWORKS) if row["direction"] != "forward"]
    lines = []
    for problem, seconds in times(rows).items():
        cells = [f"{1e3 * seconds[engine]:.0f}" for engine in TRAINING_ENGINES]
        gains = [seconds["timm"] / seconds[e] for e in ("accelerated", "accelerated-channels_last")]
        lines.append([_label(problem), *cells, *(f"{gain:.2f} x" for gain in gains)])
    names = [*TRAINING_ENGINES.values(), "gain", "in channels_last"]
    return (
        f"{_table(['ms', *names], lines)}\n\nMedians of {_only(rows, 'clock')}; the gains are "
        f"over timm in eager mode. {_networks_machine(rows)}"
    )


def networks_memory() -> str:
    """Peak memory of a forward of whole SwiftFormers."""
    rows = [row for row in rows_of(NETWORKS) if row["peak_bytes"]]
    lines = []
    for name in dict.fromkeys(row["network"] for row in rows):
        own = {row["engine"]: row for row in rows if row["network"] == name}
        eager, ours = (int(own[engine]["peak_bytes"]) for engine in ("timm", OURS))
        label = _label(problem_of(own[OURS]))
        mib = [f"{n / 2**20:.1f} MiB" for n in (eager, ours)]
        lines.append([label, *mib, f"{eager / ours:.0f} x"])
    table = _table(["", "timm, eager", "fused", "ratio"], lines)
    return (
        f"{table}\n\nHow far a new process grows in a forward; images and weights are in memory "
        f"before. {_networks_machine(rows)}"
    )


def network_blocks() -> str:
    """Where the time of fused networks goes."""
    rows = rows_of(BLOCKS)
    tables = []
    for name in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == name]
        lines = []
        for row in own:
            took, flops, peak = (float(row[k]) for k in ("min_seconds", "flops", "peak_flops"))
            lines.append(
                [
                    row["block"],
                    row["count"],
                    f"{1e3 * took:.2f}",
                    f"{1e3 * float(row['arithmetic_seconds']):.2f}",
                    f"{flops / took / 1e9:.0f}",
                    f"{100 * flops / took / peak:.0f} %",
                ]
            )
        head = [_short(name), "number", "ms", "ms at peak", "GFLOP/s", "share"]
        peak = float(own[0]["peak_flops"]) / 1e9
        tables.append(f"{_table(head, lines)}\n\nPeak: {peak:.0f} GFLOP/s.")
    return (
        "\n\n".join(tables) + f" Least times at batch {_only(rows, 'batch')}, "
        f"{_only(rows, 'side')} x {_only(rows, 'side')} pixels, float32, {_only(rows, 'threads')} "
        f"thread; {_only(rows, 'device')}, kernels for {_only(rows, 'isa')}, torch "
        f"{_only(rows, 'torch')} ([{BLOCKS}](DOCS/results/{BLOCKS}), by "
        "`python -m benchmarks.whole_networks`)."
    )


def published_swiftformers() -> str:
    """One image in SwiftFormers, in every engine."""
    rows = [row for row in rows_of(PUBLISHED) if row["network"].startswith("swiftformer")]
    measured = {p: seconds for p, seconds in times(rows).items() if p.batch == 1}
    engines = [e for e in PUBLISHED_ENGINES if any(e in found for found in measured.values())]
    lines = []
    for problem, seconds in measured.items():
        name, side, threads = _short(problem.network), problem.side, _threads(problem.threads)
        found = (_ms(seconds.get(engine)) for engine in engines)
        lines.append([f"{name}, {side} x {side}, {threads}", *found])
    table = _table(["ms", *(PUBLISHED_ENGINES[engine] for engine in engines)], lines)
    return f"{table}\n\n{_published_machine(rows)}"


def published_networks() -> str:
    """All networks: published accuracies, and times of the fastest engines of each kind."""
    rows, accuracies = rows_of(PUBLISHED), _accuracies()
    measured = times(rows)
    parts = []
    for size in sorted({problem[2:] for problem in measured}, key=lambda s: (s[2], s[1], s[0])):
        lines = []
        for problem, seconds in measured.items():
            if problem[2:] == size:
                eager, other, fused = compared(seconds)
                by = f" {PUBLISHED_ENGINES[other]}" if other else ""
                network = accuracies[problem.network]
                lines.append(
                    [
                        *(network["name"], network["top1"], _ms(seconds.get(eager))),
                        *(_ms(seconds.get(other)) + by, _ms(seconds.get(fused))),
                    ]
                )
        batch, side, threads = size
        images = "one image" if batch == 1 else f"{batch} images"
        parts += [
            f"**{images.capitalize()} of {side} x {side} pixels, {_threads(threads)}**",
            _table(["network", "top-1, %", "eager", "best other", "fused"], lines),
        ]
    return "\n\n".join([*parts, _published_machine(rows)])


def published_sources() -> str:
    """Where the published accuracies stand."""
    lines = [
        [
            row["name"],
            f"`{row['network']}`",
            row["top1"],
            row["trained_side"],
            f"{row['paper']}, [{row['arxiv']}](https://arxiv.org/abs/{row['arxiv']}), "
            f"{row['where']}",
            row["note"],
        ]
        for row in _accuracies().values()
    ]
    return _table(["network", "in timm", "top-1, %", "pixels", "source", "note"], lines)


def _accuracies() -> dict[str, Row]:
    return {row["network"]: row for row in rows_of(ACCURACIES)}


def _published_machine(rows: Sequence[Row]) -> str:
    columns = {"timm": "timm", **RUNTIMES, **PHONES}
    versions = [f"{name} {_only(rows, c)}" for c, name in columns.items() if _only(rows, c)]
    return (
        f"ms: medians of {_only(rows, 'clock')}; {_only(rows, 'dtype')}, {_only(rows, 'device')}, "
        f"kernels for {_only(rows, 'isa')}, torch {_only(rows, 'torch')}, {', '.join(versions)} "
        f"([{PUBLISHED}](DOCS/results/{PUBLISHED}), by `python -m benchmarks.published_networks`)."
    )


def _threads(count: int) -> str:
    return f"{count} thread" + ("s" if count > 1 else "")


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.1f}"


def families() -> str:
    """What the networks of other families gain."""
    rows = rows_of(FAMILIES)
    lines = []
    for row in rows:
        names = [row["family"], f"`{row['model']}`"]
        counts = [row["blocks_found"], row["blocks_fused"]]
        if not row["fused_median_seconds"]:
            lines.append([*names, *counts, "", "", _with_least(row, "eager"), "", "", "", ""])
            continue
        errors = [f"{float(row[k]):.0e}" for k in ("fused_error", "eager_error")]
        times = [_with_least(row, which) for which in ("eager", "merged", "fused")]
        ours = float(row["fused_median_seconds"])
        others = (row["eager_median_seconds"], row["merged_median_seconds"])
        gains = [f"{float(other) / ours:.2f}" if other else "" for other in others]
        lines.append([*names, *counts, *errors, *times, *gains])
    head = ["family", "model", "blocks", "fused", "error", "error, eager", "eager, ms"]
    head += ["merged, ms", "fused, ms", "gain", "gain, merged"]
    return (
        f"{_table(head, lines)}\n\nMedians of process time, least in brackets; batch "
        f"{_only(rows, 'batch')}, {_only(rows, 'side')} x {_only(rows, 'side')} pixels, "
        f"{_only(rows, 'dtype')}, {_only(rows, 'threads')} thread; {_only(rows, 'device')}, "
        f"kernels for {_only(rows, 'isa')}, torch {_only(rows, 'torch')}, timm "
        f"{_only(rows, 'timm')} ([{FAMILIES}](DOCS/results/{FAMILIES}), by "
        "`python -m benchmarks.families`)."
    )


def _with_least(row: Row, which: str) -> str:
    median, least = row[f"{which}_median_seconds"], row[f"{which}_min_seconds"]
    return f"{1e3 * float(median):.1f} ({1e3 * float(least):.1f})" if median else ""


def _short(network: str) -> str:
    return network.removeprefix("swiftformer_").upper()


def _networks_machine(rows: Sequence[Row]) -> str:
    side, threads = _only(rows, "side"), _only(rows, "threads")
    versions = [
        f"{name} {_only(rows, column)}"
        for column, name in (("timm", "timm"), *RUNTIMES.items())
        if column == "timm" or any(row["engine"] == column for row in rows)
    ]
    return (
        f"{side} x {side} pixels, {_only(rows, 'dtype')}, {threads} "
        f"thread{'s' if threads != '1' else ''}, {_only(rows, 'device')}, kernels for "
        f"{_only(rows, 'isa')}, torch {_only(rows, 'torch')}, {', '.join(versions)} "
        f"([{NETWORKS}](DOCS/results/{NETWORKS}), by `python -m benchmarks.whole_networks`)."
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
    "networks-training": networks_training,
    "networks-memory": networks_memory,
    "network-blocks": network_blocks,
    "published-swiftformers": published_swiftformers,
    "published-networks": published_networks,
    "published-sources": published_sources,
    "families": families,
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
    parser = command.Parser(
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
            write_text(page, after)
            print(f"Written: {page.relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(command.run(main))
