"""The plots of `benchmarks.tradeoff` and `benchmarks.cpu`, drawn from their CSV files alone.

`python -m benchmarks.plots results/` draws them again.
"""

from __future__ import annotations

import argparse
import csv
import math
import textwrap
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from benchmarks.speedups import COMBINED, OURS, Setting, Speedup, setting_of, speedups
from swiftkernels.utils.files import save_figure

TRADEOFF_CSV = "tradeoff.csv"
TOKENS_CSV = "tokens.csv"
CPU_CSV = "cpu.csv"
ACCURACY_LATENCY = "accuracy_latency.png"
LATENCY_TOKENS = "latency_tokens.png"
CPU_SPEEDUPS = "cpu_speedups.png"

NAMES = {
    "additive_l2": "additive (l2)",
    "additive_softmax": "additive (softmax)",
    "additive_sum": "additive (sum)",
    "additive_linear": "additive (linear)",
    "mhsa": "self-attention",
    "xca": "XCA",
    "mdta": "MDTA",
    "separable": "separable",
    "linear": "linear",
    "fastformer": "Fastformer",
    "none": "no mixer",
    "eager": "eager",
    "published": "eager, as published",
    "compile": "torch.compile",
    "compile-max": "max-autotune, frozen",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
# Okabe and Ito's colours, which colour-blind readers can tell apart, the yellow darker so that it
# reads as text; vermilion for the operator.
COLOURS = {
    "additive_l2": "#D55E00",
    "additive_softmax": "#D55E00",
    "additive_sum": "#D55E00",
    "additive_linear": "#D55E00",
    "mhsa": "#000000",
    "xca": "#0072B2",
    "mdta": "#56B4E9",
    "separable": "#009E73",
    "linear": "#CC79A7",
    "fastformer": "#B8860B",
    "none": "#7F7F7F",
    "eager": "#D55E00",
    "published": "#7F7F7F",
    "compile": "#B8860B",
    "compile-max": "#E69F00",
    "onnxruntime": "#56B4E9",
    "openvino": "#5E4FA2",
}
MARKERS = {
    "additive_l2": "o",
    "additive_softmax": "s",
    "additive_sum": "^",
    "additive_linear": "v",
    "mhsa": "D",
    "xca": "P",
    "mdta": "X",
    "separable": "h",
    "linear": "p",
    "fastformer": "d",
    "none": "o",
    "eager": "o",
    "published": "s",
    "compile": "^",
    "compile-max": "v",
    "onnxruntime": "X",
    "openvino": "d",
}
PEERS = ("mhsa", "separable", "xca", "linear")
"""Other operators in plots of additive attention."""
INK = "#333333"


def draw(folder: Path) -> list[Path]:
    """Draw both plots from the CSV files in `folder` into it; returns their paths.

    Raises:
        ValueError: a CSV file is missing or has no rows.
    """
    accuracy = _read(folder / TRADEOFF_CSV)
    tokens = _read(folder / TOKENS_CSV)
    paths = [folder / ACCURACY_LATENCY, folder / LATENCY_TOKENS]
    for path, figure in zip(
        paths, (accuracy_latency(accuracy), latency_tokens(tokens)), strict=True
    ):
        save_figure(figure, path, dpi=200, facecolor="white")
    return paths


def draw_cpu(folder: Path) -> list[Path]:
    """Draw a plot for every setting in cpu.csv in `folder` into it; returns their paths.

    Only of the machine that was measured last: files of one name would replace one another.

    Raises:
        ValueError: the CSV file is missing or has no rows, or no comparison with the operator.
    """
    rows = _read(folder / CPU_CSV, "benchmarks.cpu")
    rows = [row for row in rows if row["device"] == rows[-1]["device"]]
    found = [s for s in speedups(rows) if s.engine not in COMBINED]
    if not found:
        raise ValueError(f"{folder / CPU_CSV} compares nothing with {OURS}.")
    paths = []
    for setting in dict.fromkeys(s.setting for s in found):
        last = next(row for row in reversed(rows) if setting_of(row) == setting)
        figure = cpu_speedups([s for s in found if s.setting == setting], last)
        paths.append(folder / _speedups_name(setting))
        save_figure(figure, paths[-1], dpi=200, facecolor="white")
    return paths


def _speedups_name(setting: Setting) -> str:
    """The plain name for one thread, float32, forward; others say what they are."""
    path = Path(CPU_SPEEDUPS)
    parts = [path.stem]
    if setting.threads > 1:
        parts.append(f"{setting.threads}threads")
    if setting.dtype != "float32":
        parts.append(setting.dtype)
    if setting.direction != "forward":
        parts.append("backward")
    return "_".join(parts) + path.suffix


def accuracy_latency(rows: Sequence[dict[str, str]]) -> Figure:
    """Test accuracy against latency, one panel for each batch size in the columns."""
    batches = [c.removeprefix("batch").removesuffix("_ms") for c in rows[0] if c.endswith("_ms")]
    figure, panels = _figure(5.4 * len(batches), 5.4, len(batches))
    seeds = int(rows[0]["seeds"])
    for batch, axes in zip(batches, panels, strict=True):
        points = []
        boxes = []
        for row in rows:
            x = _interval(row, f"batch{batch}_ms")
            mean, sd = 100 * float(row["accuracy_mean"]), 100 * float(row["accuracy_sd"] or 0)
            _point(axes, row["mixer"], x, mean, sd)
            points.append((row["mixer"], x[1], mean))
            boxes.append((x[0], mean - sd, x[2], mean + sd))
        axes.set_xlabel(f"latency of the network at batch {batch}, ms")
        axes.margins(x=0.16, y=0.12)
        _label_points(figure, axes, points, boxes)
    panels[0].set_ylabel("test accuracy, %")
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    bars = "Across: median and interquartile range; up: "
    bars += f"mean ± sd of {seeds} seeds" if seeds > 1 else "one seed, without a spread"
    # What other test images would change, alike for all networks: one binomial standard deviation.
    share = sum(float(row["accuracy_mean"]) for row in rows) / len(rows)
    sampling = 100 * math.sqrt(share * (1 - share) / int(rows[0]["test_images"]))
    _title(figure, "Accuracy against latency: networks that differ in the token mixer alone")
    _caption(
        figure,
        f"{bars}. {rows[0]['data']}: {int(rows[0]['train_images']):,} for training, "
        f"{int(rows[0]['test_images']):,} for the test "
        f"(their choice alone: ±\u00a0{sampling:.1f}\u00a0points); {rows[0]['epochs']} epochs. "
        f"{_machine(rows[0])}.",
    )
    return figure


def latency_tokens(rows: Sequence[dict[str, str]]) -> Figure:
    """Latency of the bare mixers against the number of tokens, both logarithmic."""
    figure, (axes,) = _figure(8.2, 5.6, 1)
    lines = {}
    for mixer in dict.fromkeys(row["mixer"] for row in rows):
        own = [row for row in rows if row["mixer"] == mixer]
        intervals = [_interval(row, "latency_ms") for row in own]
        tokens = [int(row["tokens"]) for row in own]
        ours = mixer.startswith("additive")
        axes.errorbar(
            tokens,
            [middle for _, middle, _ in intervals],
            yerr=_lengths(intervals),
            color=COLOURS[mixer],
            marker=MARKERS[mixer],
            markersize=7 if ours else 5,
            markerfacecolor="none" if _hollow(mixer) else COLOURS[mixer],
            markeredgecolor=COLOURS[mixer] if _hollow(mixer) else "white",
            markeredgewidth=1,
            linewidth=2.6 if ours else 1.4,
            elinewidth=1,
            linestyle="--" if mixer != "additive_l2" and ours else "-",
            zorder=4 if ours else 3,
        )
        lines[mixer] = (tokens[-1], intervals[-1][1])
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = sorted({int(row["tokens"]) for row in rows})
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("tokens N")
    axes.set_ylabel("latency, ms")
    _label_ends(figure, axes, lines)
    _title(figure, "Latency of the bare mixers")
    _caption(
        figure,
        f"Forward, batch {rows[0]['batch']}, width {rows[0]['width']}. Medians and interquartile "
        f"ranges. {_machine(rows[0])}.",
    )
    return figure


def cpu_speedups(found: Sequence[Speedup], row: dict[str, str]) -> Figure:
    """The operator's speed-up over every engine by shape, one panel for each batch size.

    `found` is of one setting; `row` is a row of it, for the caption.
    """
    batches = sorted({s.shape.batch for s in found})
    shapes = {b: sorted({s.shape for s in found if s.shape.batch == b}) for b in batches}
    width = 3.2 + sum(1.2 + 0.36 * len(own) for own in shapes.values())
    figure, panels = _figure(max(width, 7.6), 5.6, len(batches))
    figure.subplots_adjust(bottom=1.85 / 5.6, right=1 - 2.0 / figure.get_figwidth())
    grid = panels[0].get_gridspec()
    assert grid is not None
    grid.set_width_ratios([1 + len(own) for own in shapes.values()])
    order = [e for e in NAMES if any(s.engine == e for s in found)]
    order.sort(key=lambda engine: engine in PEERS)
    for batch, axes in zip(batches, panels, strict=True):
        for engine in order:
            own = sorted(s for s in found if s.engine == engine and s.shape.batch == batch)
            peer = engine in PEERS
            axes.plot(
                [shapes[batch].index(s.shape) for s in own],
                [s.by_median for s in own],
                color=COLOURS[engine],
                marker=MARKERS[engine],
                markersize=5 if peer else 6,
                markeredgecolor="white",
                linewidth=1 if peer else 1.6,
                linestyle="--" if peer else "-",
                label=NAMES[engine],
                zorder=3 if peer else 4,
            )
        axes.axhline(1, color=INK, linewidth=1, zorder=2)
        axes.set_yscale("log")
        labels = [f"{s.tokens:,} x {s.width}" for s in shapes[batch]]
        axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.tick_params(axis="x", labelsize=8)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(f"N x C at batch {batch}")
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    panels[0].set_ylabel(f"time / time of {OURS}")
    legend = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="center left",
        bbox_to_anchor=(1 - 1.95 / figure.get_figwidth(), 0.62),
        fontsize=9,
        labelcolor=INK,
        frameon=False,
    )
    _title(figure, f"Speed-up of {OURS} on a CPU, {row['direction']}")
    runtimes = [
        f"{NAMES[e]} {row[e]}" for e in ("onnxruntime", "openvino") if e in order and row[e]
    ]
    kernels = [f"{row['isa']} kernels"] if row["isa"] else []
    _caption(
        figure,
        "Ratio of medians measured in turn; above 1 the operator is faster. Dashed: other "
        f"operators, eager. {', '.join([_machine(row), *runtimes, *kernels])}.",
    )
    return figure


def _read(path: Path, command: str = "benchmarks.tradeoff") -> list[dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; `python -m {command}` writes it.")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows; run `python -m {command}` again.")
    return rows


def _interval(row: dict[str, str], column: str) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    return float(row[f"{column}_q25"]), float(row[column]), float(row[f"{column}_q75"])


def _lengths(intervals: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    return [[m - low for low, m, _ in intervals], [high - m for _, m, high in intervals]]


def _machine(row: dict[str, str]) -> str:
    threads = f"{row['threads']} thread" + ("s" if row["threads"] != "1" else "")
    return f"{row['device']}, {threads}, {row['clock']}, {row['dtype']}, torch {row['torch']}"


def _figure(width: float, height: float, panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height))
    axes = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.2 / width, top=1 - 0.6 / height, bottom=1.1 / height,
        wspace=0.06,
    )  # fmt: skip
    for a in axes:
        a.spines[["top", "right"]].set_visible(False)
        a.spines[["left", "bottom"]].set_color("#999999")
        a.tick_params(colors=INK, labelsize=9)
        a.grid(color="#E6E6E6", linewidth=0.7)
        a.set_axisbelow(True)
    return figure, axes


def _hollow(mixer: str) -> bool:
    """No mixer, and poolings beside the first: points of two poolings nearly coincide."""
    return mixer == "none" or (mixer.startswith("additive") and mixer != "additive_l2")


def _title(figure: Figure, text: str) -> None:
    x = figure.subplotpars.left
    y = 1 - 0.18 / figure.get_figheight()
    figure.text(x, y, text, fontsize=12, fontweight="bold", color=INK, va="top")


def _caption(figure: Figure, text: str) -> None:
    wrapped = textwrap.fill(text, int(figure.get_figwidth() * 15.5))
    y = 0.12 / figure.get_figheight()
    figure.text(figure.subplotpars.left, y, wrapped, fontsize=8, color="#666666", va="bottom")


def _point(axes: Axes, mixer: str, x: tuple[float, float, float], mean: float, sd: float) -> None:
    ours = mixer.startswith("additive")
    colour = COLOURS[mixer]
    hollow = _hollow(mixer)
    axes.errorbar(
        x[1],
        mean,
        xerr=_lengths([x]),
        yerr=sd or None,
        color=colour,
        marker=MARKERS[mixer],
        markersize=9 if ours else 7,
        markerfacecolor={"none": "white"}.get(mixer, "none") if hollow else colour,
        markeredgecolor=colour if hollow else "white",
        elinewidth=1.6 if ours else 1.1,
        zorder=4 if ours else 3,
    )


def _label_points(
    figure: Figure,
    axes: Axes,
    points: Sequence[tuple[str, float, float]],
    intervals: Sequence[tuple[float, float, float, float]],
) -> None:
    """Put each name where it covers the least of the names, markers and bars already there."""
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    taken: list[Bbox] = []
    for (_, x, y), (x0, y0, x1, y1) in zip(points, intervals, strict=True):
        (px, py), (left, low), (right, high) = axes.transData.transform(
            [(x, y), (x0, y0), (x1, y1)]
        )
        taken += [
            Bbox.from_extents(px - 9, py - 9, px + 9, py + 9),
            Bbox.from_extents(left, py - 2, right, py + 2),
            Bbox.from_extents(px - 2, low, px + 2, high),
        ]
    pixels = figure.dpi / 72
    for mixer, x, y in points:
        style: dict[str, Any] = {
            "fontsize": 9,
            "fontweight": "bold" if mixer.startswith("additive") else "normal",
            "color": COLOURS[mixer],
        }
        probe = figure.text(0, 0, NAMES[mixer], **style)
        size = probe.get_window_extent()
        probe.remove()
        px, py = axes.transData.transform((x, y))
        spots = []
        for distance, dx, dy in product((8, 16, 26, 38), (1, 0, -1), (0.6, -0.6, 0, 1, -1)):
            left = px + dx * distance * pixels + (dx - 1) / 2 * size.width
            low = py + dy * distance * pixels + ((dy > 0) - (dy < 0) - 1) / 2 * size.height
            box = Bbox.from_bounds(left, low, size.width, size.height)
            outside = size.width * size.height - _overlap(box, frame)
            cost = distance + sum(_overlap(box, other) for other in taken) + 1e3 * outside
            spots.append((cost, distance, box))
        _, distance, box = min(spots, key=lambda spot: spot[0])
        taken.append(box)
        axes.annotate(
            NAMES[mixer],
            (x, y),
            xytext=((box.x0 - px) / pixels, (box.y0 - py) / pixels),
            textcoords="offset points",
            zorder=5,
            arrowprops=_leader(mixer) if distance > 16 else None,
            **style,
        )


def _leader(mixer: str) -> dict[str, Any]:
    return {
        "arrowstyle": "-",
        "color": COLOURS[mixer],
        "linewidth": 0.6,
        "shrinkA": 1,
        "shrinkB": 5,
    }


def _overlap(a: Bbox, b: Bbox) -> float:
    """Common area in square pixels."""
    common = Bbox.intersection(a, b)
    return 0.0 if common is None else common.width * common.height


def _label_ends(figure: Figure, axes: Axes, ends: dict[str, tuple[int, float]]) -> None:
    """Names right of the lines' ends, pushed apart, with thin leaders to those that moved."""
    figure.subplots_adjust(right=1 - 1.95 / figure.get_figwidth())
    figure.draw_without_rendering()
    bottom, top = axes.get_ylim()
    height = axes.get_window_extent().height * 72 / figure.dpi  # points
    step = 13.0
    to_points = axes.transData.transform
    base = to_points((1, bottom))[1]
    wanted = sorted(
        ((to_points((x, y))[1] - base) * 72 / figure.dpi, mixer) for mixer, (x, y) in ends.items()
    )
    places = [want for want, _ in wanted]
    for _ in range(100):  # neighbours that are too close share the push, until none are
        for i in range(len(places) - 1):
            push = max(0.0, step - (places[i + 1] - places[i])) / 2
            places[i] -= push
            places[i + 1] += push
    right = axes.get_xlim()[1]
    for (_, mixer), place in zip(wanted, places, strict=True):
        x, y = ends[mixer]
        ours = mixer.startswith("additive")
        fraction = place / height
        axes.annotate(
            NAMES[mixer],
            (x, y),
            xytext=(1.04, fraction),
            textcoords="axes fraction",
            fontsize=9,
            fontweight="bold" if ours else "normal",
            color=COLOURS[mixer],
            va="center",
            arrowprops={**_leader(mixer), "relpos": (0, 0.5)},
            annotation_clip=False,
        )
    axes.set_xlim(right=right)
    axes.set_ylim(bottom, top)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Draw the plots from the CSV files in a folder.")
    files = f"{TRADEOFF_CSV} and {TOKENS_CSV}, or {CPU_CSV}, or all"
    parser.add_argument("folder", type=Path, help=f"with {files}")
    folder = parser.parse_args().folder
    try:
        paths = draw_cpu(folder) if (folder / CPU_CSV).is_file() else []
        if not paths or (folder / TRADEOFF_CSV).is_file():
            paths += draw(folder)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(str(path) for path in paths))


if __name__ == "__main__":
    _main()
