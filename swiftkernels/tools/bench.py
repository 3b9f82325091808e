"""`swiftkernels bench`: the operator next to other engines on the user's own device, and a report.

What is measured, and how, is in `swiftkernels.testing`: `harness`, `engines`, `timing`.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

import swiftkernels
from swiftkernels.backends import devices
from swiftkernels.ops.additive_attention.benchmark import BENCHMARK as ADDITIVE_ATTENTION
from swiftkernels.testing import harness
from swiftkernels.testing.engines import COMPARED_PEERS, OURS
from swiftkernels.testing.harness import Row
from swiftkernels.testing.ratios import markdown_table, ratio_table, speedups
from swiftkernels.testing.timing import Stopwatch, clock_name, copy_rate
from swiftkernels.utils.files import make_folder, save_figure, write_csv, write_text

CSV = "bench.csv"
PLOT = "bench.png"
REPORT = "bench.md"

NAMES = (OURS, "eager", "compile", *COMPARED_PEERS)
"""The engines."""

COLUMNS = (*harness.COLUMNS, "share_of_copy")
"""The last: gigabytes per second as a share of those of a plain copy."""

MODES = {"": "as called", "graph_": "in a graph"}
"""By the prefix of their columns."""


def settings_for(device: torch.device, quick: bool, threads: int = 1) -> harness.Settings:
    """What is worth measuring on a device."""
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    batches: tuple[int, ...] = (1, 8, 64)
    sizes, seconds = ADDITIVE_ATTENTION.sizes, 1.0
    if device.type == "cpu":
        dtypes, batches = (torch.float32, torch.bfloat16), (1, 8)
    if quick:
        sizes, batches, dtypes, seconds = ADDITIVE_ATTENTION.quick_sizes, (8,), dtypes[:1], 0.3
    inputs = tuple((size, batch) for batch in batches for size in sizes)
    return harness.Settings(NAMES, inputs, dtypes, (False, True), (threads,), seconds)


def run(device: str | None, out: Path, quick: bool = False, threads: int = 1) -> int:
    """The command: 0 if all engines were right, 1 if one was wrong or the operator failed.

    Raises:
        ValueError: the device does not exist, or `out` is not a folder.
    """
    where = devices.find(device)
    if threads < 1:
        raise ValueError(f"--threads must be at least 1; got {threads}.")
    make_folder("--out", out)
    before = torch.get_num_threads()
    if where.type == "cpu":
        torch.set_num_threads(threads)
    else:
        torch.get_device_module(where).set_device(where)  # that of graphs and events
    try:
        return _run(where, out, settings_for(where, quick, threads))
    finally:
        torch.set_num_threads(before)


def _run(device: torch.device, out: Path, settings: harness.Settings) -> int:
    watch = Stopwatch(device)
    rate = copy_rate(watch)
    rows: list[Row] = []
    interrupted = False
    try:
        for found in harness.measure(settings, watch):
            for row in found:
                speed = row["gigabytes_per_second"]
                row["share_of_copy"] = 1e9 * speed / rate if speed else ""
            rows += found
            write_csv(out / CSV, rows, COLUMNS, digits=6)
    except KeyboardInterrupt:
        interrupted = True
        if not rows:
            print("\ninterrupted; nothing was measured, nothing written", file=sys.stderr)
            return 130
        print("\ninterrupted; reporting what was measured", file=sys.stderr)
    ratios = _ratios(rows)
    write_text(out / REPORT, report(rows, ratios, device, rate))
    written = [CSV, REPORT]
    try:
        if draw(rows, device, out / PLOT):
            written.append(PLOT)
    except ImportError as error:
        print(f"No plots: {error}. To have them: pip install '.[bench]'")
    print(f"\n{ratios}\n\nWritten: " + ", ".join(str(out / name) for name in written))
    return 130 if interrupted else int(any(map(harness.is_error, rows)))


def _ratios(rows: Sequence[Row]) -> str:
    """The tables of speed-ups, as called and in graphs."""
    tables = (ratio_table(speedups(rows, prefix), mode) for prefix, mode in MODES.items())
    return "\n\n".join(filter(None, tables)) or "No speed-ups: no engine has a time."


def report(rows: Sequence[Row], ratios: str, device: torch.device, rate: float) -> str:
    """The Markdown text that can be sent in."""
    lines = [
        f"# swiftkernels on {devices.name(device)}",
        "",
        f"Measured by `swiftkernels bench`, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC.",
        "",
        *(f"* {name}: {value}" for name, value in _machine(device)),
        f"* a plain copy: {rate / 1e9:.4g} GB/s, read and written",
        "",
        _method(device),
        "",
        "## Speed-ups",
        "",
        "Geometric mean, worst and best over the shapes; above 1 the operator is faster.",
        "",
        ratios,
        "",
        "## Times",
        "",
        "Medians and interquartile ranges in microseconds. GB/s: the bytes of inputs, outputs, "
        "weights and their gradients, each counted once, in that time; the share is of the copy.",
        "",
        _times([row for row in rows if row["median_seconds"]]),
    ]
    notes = [row for row in rows if row["note"]]
    if notes:
        lines += ["", "## Notes", ""]
        lines += [f"* {row['engine']}, {harness.label(row)}: {row['note']}" for row in notes]
    return "\n".join(lines) + "\n"


def _times(rows: Sequence[Row]) -> str:
    def time(row: Row, prefix: str) -> str:
        if not row[f"{prefix}median_seconds"]:
            return ""
        median, spread = (1e6 * row[f"{prefix}{name}_seconds"] for name in ("median", "spread"))
        return f"{median:.1f} ± {spread:.1f}"

    header = ["problem", "engine", *MODES.values(), "peak MB", "GB/s", "share", "error"]
    lines = [
        [
            harness.label(row),
            row["engine"] + (f" ({row['backend']})" if row["backend"] else ""),
            *(time(row, prefix) for prefix in MODES),
            f"{row['peak_bytes'] / 1e6:.1f}" if row["peak_bytes"] != "" else "",
            f"{row['gigabytes_per_second']:.3g}",
            f"{row['share_of_copy']:.2g}",
            f"{row['error']:.1e}",
        ]
        for row in rows
    ]
    return markdown_table([header, *lines], texts=(0, 1))


def _machine(device: torch.device) -> Iterator[tuple[str, str]]:
    yield "device", f"{devices.name(device)}, {devices.facts(device)}"
    yield "torch", f"{torch.__version__}, built for {devices.built_for()}"
    yield "triton", harness.version("triton") or "not installed"
    yield OURS, swiftkernels.__version__
    yield "python", f"{platform.python_version()}, {platform.platform()}"


def _method(device: torch.device) -> str:
    how = (
        f"{clock_name(device)}, caches as the previous call left them"
        if device.type == "cpu"
        else "between events on the device, caches flushed before every sample. As called: from "
        "an idle device, so that launching counts; in a graph: only the kernels"
    )
    return f"Engines in turn, {how}. Each engine is verified against float64 before it is timed."


def draw(rows: Sequence[Row], device: torch.device, path: Path) -> bool:
    """Plot the speed-ups, on a GPU those in graphs; returns whether there is anything to plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from swiftkernels.testing import plots

    prefix = "graph_" if device.type == "cuda" else ""
    found = speedups(rows, prefix)
    if found:
        title = f"Speed-up of {OURS} on {devices.name(device)}"
        caption = f"Times {MODES[prefix]}, torch {torch.__version__}."
        save_figure(plots.speedups_figure(found, title, caption), path, dpi=120)
    return bool(found)
