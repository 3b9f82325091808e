"""The plots of the benchmarks, drawn only from their CSV files.

`python -m benchmarks.plots results/` draws them again.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from swiftkernels.testing import networks
from swiftkernels.testing.engines import OURS
from swiftkernels.testing.networks import Problem
from swiftkernels.testing.plots import (
    INK,
    STYLES,
    VERMILION,
    Margins,
    Style,
    add_caption,
    add_title,
    logarithmic,
    new_figure,
    speedups_figure,
)
from swiftkernels.testing.ratios import Setting, setting_of, speedups
from swiftkernels.utils import command
from swiftkernels.utils.files import read_csv, save_figure

TRADEOFF_CSV = "tradeoff.csv"
TOKENS_CSV = "tokens.csv"
CPU_CSV = "cpu.csv"
ACCURACY_LATENCY = "accuracy_latency.png"
LATENCY_TOKENS = "latency_tokens.png"
CPU_SPEEDUPS = "cpu_speedups.png"
NETWORKS_CSV = "whole_networks.csv"
NETWORKS = "whole_networks.png"
PUBLISHED_CSV = "published_networks.csv"
PUBLISHED = "published_networks.png"

RUNTIMES = {
    "onnxruntime": ("onnxruntime", "ONNX Runtime"),
    "openvino": ("openvino", "OpenVINO"),
    "litert": ("ai-edge-litert", "LiteRT"),
    "ncnn": ("ncnn", "ncnn"),
}
"""Engines with a column for their version: the column, and the name of the engine."""

MIXERS = STYLES | {
    "additive_l2": Style("additive (l2)", VERMILION, "o"),
    "additive_softmax": Style("additive (softmax)", VERMILION, "s"),
    "additive_sum": Style("additive (sum)", VERMILION, "^"),
    "additive_linear": Style("additive (linear)", VERMILION, "v"),
    "none": Style("no mixer", "#7F7F7F", "o"),
}
"""The styles of token mixers."""

NETWORK_ENGINES = {
    "timm": Style("PyTorch", "#7F7F7F", ""),
    "channels_last": Style("PyTorch, channels_last", "#B0B0B0", ""),
    "compile": STYLES["compile"]._replace(name="torch.compile, frozen"),
    "onnxruntime": STYLES["onnxruntime"],
    "openvino": STYLES["openvino"],
    OURS: Style(OURS, VERMILION, ""),
}
"""The styles of the engines of whole networks."""


OTHERS = Style("other networks, the fastest of eager PyTorch and runtimes", "#444444", "D")
PUBLISHED_STYLES = {
    "fused": Style(f"SwiftFormer, fused by {OURS}", VERMILION, "o"),
    "other": Style("SwiftFormer, the fastest compiler or runtime", "#0072B2", "s"),
    "eager": Style("SwiftFormer, eager PyTorch", "#9A9A9A", "^"),
}
"""Lines of the picture of published networks, by the fields of `networks.Compared`."""
RINGS = "other networks, fused, where that is faster"


class Point(NamedTuple):
    """A marker with a name; "" for a place that names do not cover."""

    x: float
    y: float
    name: str
    colour: str
    bold: bool


def draw(folder: Path) -> list[Path]:
    """Draw both plots from the CSV files in `folder` into it; returns their paths.

    Raises:
        ValueError: a CSV file is missing or has no rows.
    """
    accuracy = read(folder / TRADEOFF_CSV)
    tokens = read(folder / TOKENS_CSV)
    paths = [folder / ACCURACY_LATENCY, folder / LATENCY_TOKENS]
    for path, figure in zip(
        paths, (accuracy_latency(accuracy), latency_tokens(tokens)), strict=True
    ):
        save_figure(figure, path, dpi=200, facecolor="white")
    return paths


def draw_cpu(folder: Path) -> list[Path]:
    """Draw a plot for every setting in cpu.csv in `folder` into it; returns their paths.

    Only the rows of the machine that was measured last are drawn, because the plots of another
    machine would have the same names.

    Raises:
        ValueError: the CSV file is missing or has no rows, or no comparison with the operator.
    """
    rows = read(folder / CPU_CSV, "benchmarks.cpu")
    rows = [row for row in rows if row["device"] == rows[-1]["device"]]
    found = speedups(rows)
    if not found:
        raise ValueError(f"{folder / CPU_CSV} has no comparison with {OURS}.")
    paths = []
    for setting in dict.fromkeys(s.setting for s in found):
        own = [s for s in found if s.setting == setting]
        last = next(row for row in reversed(rows) if setting_of(row) == setting)
        parts = [_machine(last), *_versions(rows, {s.engine for s in own})]
        title = f"Speed-up of {OURS} on a CPU, {setting.direction}"
        figure = speedups_figure(own, title, ", ".join(filter(None, parts)) + ".")
        paths.append(folder / _speedups_name(setting))
        save_figure(figure, paths[-1], dpi=200, facecolor="white")
    return paths


def draw_networks(folder: Path) -> Path:
    """Draw the times of whole networks in whole_networks.csv in `folder` into it; returns the path.

    Raises:
        ValueError: the CSV file is missing or has no rows.
    """
    rows = read(folder / NETWORKS_CSV, "benchmarks.whole_networks")
    path = folder / NETWORKS
    save_figure(networks_figure(rows), path, dpi=200, facecolor="white")
    return path


def networks_figure(rows: Sequence[dict[str, str]]) -> Figure:
    """Time of a forward by image: a panel for each network, a group of bars for each batch."""
    rows = [r for r in rows if r["direction"] == "forward" and r["engine"] in NETWORK_ENGINES]
    clock = rows[0]["clock"].split()[0]
    names = list(dict.fromkeys(row["network"] for row in rows))
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    engines = [name for name in NETWORK_ENGINES if any(row["engine"] == name for row in rows)]
    margins = Margins(left=0.6, bottom=1.15, top=0.8)
    figure, (panels,) = new_figure(9.6, 4.1, columns=len(names), margins=margins, sharey="none")
    figure.subplots_adjust(wspace=0.22)
    for name, axes in zip(names, panels, strict=True):
        for row in (row for row in rows if row["network"] == name):
            took = 1e3 * float(row[f"{clock}_median_seconds"]) / int(row["batch"])
            style, ours = NETWORK_ENGINES[row["engine"]], row["engine"] == OURS
            place = batches.index(row["batch"]) * (len(engines) + 1) + engines.index(row["engine"])
            axes.bar(place, took, 0.9, color=style.colour, label=style.name)
            axes.annotate(
                f"{took:.1f}", (place, took), (0.5, 3), textcoords="offset points", rotation=90,
                fontsize=7.5, ha="center", va="bottom", color=VERMILION if ours else INK,
                fontweight="bold" if ours else "normal",
            )  # fmt: skip
        axes.margins(x=0.02, y=0.14)
        middle = (len(engines) - 1) / 2
        axes.set_xticks(
            [i * (len(engines) + 1) + middle for i in range(len(batches))],
            [f"batch {batch}" for batch in batches],
        )
        axes.set_title(name.removeprefix("swiftformer_").upper(), fontsize=10, color=INK)
        axes.grid(axis="x", visible=False)
        axes.tick_params(labelleft=True)
    panels[0].set_ylabel("ms for an image")
    handles, labels = panels[0].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    figure.legend(
        [shown[NETWORK_ENGINES[e].name] for e in engines],
        [NETWORK_ENGINES[e].name for e in engines],
        loc="lower center", bbox_to_anchor=(0.5, 0.13), ncols=len(engines), fontsize=8,
        labelcolor=INK, frameon=False,
    )  # fmt: skip
    add_title(figure, f"Inference of SwiftFormers on a CPU: {OURS}.fuse_for_inference")
    parts = _network_parts(rows, engines)
    add_caption(
        figure,
        "Lower is better. Medians, divided by the batch; all engines in turn in one process. "
        f"{', '.join(filter(None, parts))}.",
    )
    return figure


def draw_published(folder: Path, published: Mapping[str, Mapping[str, str]]) -> list[Path]:
    """Draw the times in published_networks.csv in `folder` into it; returns the paths.

    There is a picture for each side of the images and number of threads.

    Args:
        folder: of the CSV file.
        published: accuracies by the names of networks.

    Raises:
        ValueError: the CSV file is missing or has no rows.
    """
    rows = read(folder / PUBLISHED_CSV, "benchmarks.published_networks")
    paths = []
    for side, threads in dict.fromkeys((row["side"], row["threads"]) for row in rows):
        own = [row for row in rows if (row["side"], row["threads"]) == (side, threads)]
        other_side = f"{side}pixels" if side != "224" else ""
        paths.append(folder / _name(PUBLISHED, other_side, _threads_name(threads)))
        save_figure(published_figure(own, published), paths[-1], dpi=200, facecolor="white")
    return paths


def published_figure(
    rows: Sequence[dict[str, str]], published: Mapping[str, Mapping[str, str]]
) -> Figure:
    """Published accuracy against latency by image, one panel for each batch size."""
    times = networks.times(rows)
    batches = sorted({problem.batch for problem in times})
    bottom = 1.85 if len(batches) == 1 else 1.6  # the legend has three rows or two
    figure, (panels,) = new_figure(
        1 + 7 * len(batches), 8.2, columns=len(batches), margins=Margins(bottom=bottom)
    )
    for batch, axes in zip(batches, panels, strict=True):
        _published_panel(figure, axes, _of_batch(times, batch), published)
        axes.set_xlabel(f"ms for an image, batch {batch}")
    panels[0].set_ylabel("ImageNet top-1 as published, %")
    shown: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    figure.legend(
        shown.values(), shown.keys(), loc="lower left",
        bbox_to_anchor=(figure.subplotpars.left - 0.01, 0.72 / figure.get_figheight()),
        ncols=2 if len(batches) == 1 else 3, fontsize=8, labelcolor=INK, frameon=False,
    )  # fmt: skip
    add_title(figure, "Networks on a CPU: published accuracy against measured latency")
    parts = _network_parts(rows, {row["engine"] for row in rows})
    add_caption(
        figure,
        "Accuracies are those that the authors published, not measured here; with a *, for 256 x "
        "256 pixels. Latencies are medians, divided by the batch; all engines in turn in one "
        "process, each with BatchNorms folded where that is faster. "
        f"{', '.join(filter(None, parts))}.",
    )
    return figure


def _of_batch(times: Mapping[Problem, dict[str, float]], batch: int) -> dict[str, dict[str, float]]:
    """Milliseconds for an image, by networks and engines."""
    return {
        problem.network: {e: 1e3 * seconds / batch for e, seconds in engines.items()}
        for problem, engines in times.items()
        if problem.batch == batch
    }


def _published_panel(
    figure: Figure,
    axes: Axes,
    times: Mapping[str, dict[str, float]],
    published: Mapping[str, Mapping[str, str]],
) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    points: list[Point] = []
    for family, names in groupby(times, key=lambda name: published[name]["family"]):
        members = [(times[n], published[n], networks.compared(times[n])) for n in names]
        if family == "SwiftFormer":
            for kind, style in PUBLISHED_STYLES.items():
                line = [
                    (engines[engine], row)
                    for engines, row, compared in members
                    if (engine := getattr(compared, kind))
                ]
                named = kind == "fused" or not any(compared.fused for *_, compared in members)
                points += _published_line(axes, line, style, named, thick=kind == "fused")
            continue
        line = []
        for engines, row, compared in members:
            best = min(engines[e] for e in (compared.eager, compared.other) if e)
            line.append((best, row))
            if compared.fused and engines[OURS] < best:
                ring, y = engines[OURS], float(row["top1"])
                axes.plot([ring, best], [y, y], color=VERMILION, linewidth=1, zorder=2)
                axes.plot(
                    ring, y, "o", color=VERMILION, markerfacecolor="white", markersize=6,
                    label=RINGS,
                )  # fmt: skip
                points.append(Point(ring, y, "", VERMILION, False))
        points += _published_line(axes, line, OTHERS, named=True)
    axes.margins(x=0.1, y=0.07)
    _label_points(figure, axes, points, [(p.x, p.y, p.x, p.y) for p in points])


def _published_line(
    axes: Axes,
    line: Sequence[tuple[float, Mapping[str, str]]],
    style: Style,
    named: bool,
    thick: bool = False,
) -> list[Point]:
    """Draw the networks of a family, at a latency each; returns what names must not cover."""
    top1 = [float(row["top1"]) for _, row in line]
    axes.plot(
        [latency for latency, _ in line], top1, color=style.colour, marker=style.marker,
        markersize=8 if thick else 5, markeredgecolor="white", linewidth=2.4 if thick else 0.6,
        zorder=4 if thick else 3, label=style.name,
    )  # fmt: skip
    points = []
    for (latency, row), y in zip(line, top1, strict=True):
        name = row["name"] + ("*" if row["trained_side"] != "224" else "")
        points.append(Point(latency, y, name if named else "", style.colour, thick))
    if thick:  # places on the line
        for a, b in pairwise(list(points)):
            for share in (i / 10 for i in range(1, 10)):
                x = a.x ** (1 - share) * b.x**share
                points.append(Point(x, a.y + share * (b.y - a.y), "", style.colour, thick))
    return points


def _speedups_name(setting: Setting) -> str:
    """The name of a plot; only settings other than one thread, float32, forward are in it."""
    return _name(
        CPU_SPEEDUPS,
        _threads_name(str(setting.threads)),
        setting.dtype if setting.dtype != "float32" else "",
        "backward" if setting.direction != "forward" else "",
    )


def _name(name: str, *parts: str) -> str:
    """The name of a file, with those parts that are not empty."""
    path = Path(name)
    return "_".join([path.stem, *filter(None, parts)]) + path.suffix


def _threads_name(threads: str) -> str:
    return f"{threads}threads" if threads not in ("0", "1") else ""


def accuracy_latency(rows: Sequence[dict[str, str]]) -> Figure:
    """Test accuracy against latency, one panel for each batch size in the columns."""
    batches = [c.removeprefix("batch").removesuffix("_ms") for c in rows[0] if c.endswith("_ms")]
    figure, (panels,) = new_figure(5.4 * len(batches), 5.4, columns=len(batches))
    seeds = int(rows[0]["seeds"])
    for batch, axes in zip(batches, panels, strict=True):
        points = []
        boxes = []
        for row in rows:
            x = _interval(row, f"batch{batch}_ms")
            mean, sd = 100 * float(row["accuracy_mean"]), 100 * float(row["accuracy_sd"] or 0)
            _point(axes, row["mixer"], x, mean, sd)
            style, ours = MIXERS[row["mixer"]], row["mixer"].startswith("additive")
            points.append(Point(x[1], mean, style.name, style.colour, ours))
            boxes.append((x[0], mean - sd, x[2], mean + sd))
        axes.set_xlabel(f"latency of the network at batch {batch}, ms")
        axes.margins(x=0.16, y=0.12)
        _label_points(figure, axes, points, boxes)
    panels[0].set_ylabel("test accuracy, %")
    bars = "Across: median and interquartile range; up: "
    bars += f"mean ± sd of {seeds} seeds" if seeds > 1 else "one seed, without a spread"
    # The effect of other test images, the same for all networks: one binomial standard deviation.
    share = sum(float(row["accuracy_mean"]) for row in rows) / len(rows)
    sampling = 100 * math.sqrt(share * (1 - share) / int(rows[0]["test_images"]))
    add_title(figure, "Accuracy against latency: networks that differ only in the token mixer")
    add_caption(
        figure,
        f"{bars}. {rows[0]['data']}: {int(rows[0]['train_images']):,} for training, "
        f"{int(rows[0]['test_images']):,} for the test "
        f"(sampling error: ±\u00a0{sampling:.1f}\u00a0points); {rows[0]['epochs']} epochs. "
        f"{_machine(rows[0])}.",
    )
    return figure


def latency_tokens(rows: Sequence[dict[str, str]]) -> Figure:
    """Latency of the bare mixers against the number of tokens, both logarithmic."""
    figure, ((axes,),) = new_figure(8.2, 5.6)
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
            color=MIXERS[mixer].colour,
            marker=MIXERS[mixer].marker,
            markersize=7 if ours else 5,
            markerfacecolor="none" if _hollow(mixer) else MIXERS[mixer].colour,
            markeredgecolor=MIXERS[mixer].colour if _hollow(mixer) else "white",
            markeredgewidth=1,
            linewidth=2.6 if ours else 1.4,
            elinewidth=1,
            linestyle="--" if mixer != "additive_l2" and ours else "-",
            zorder=4 if ours else 3,
        )
        lines[mixer] = (tokens[-1], intervals[-1][1])
    axes.set_xscale("log")
    logarithmic(axes)
    sizes = sorted({int(row["tokens"]) for row in rows})
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens N")
    axes.set_ylabel("latency, ms")
    _label_ends(figure, axes, lines)
    add_title(figure, "Latency of the bare mixers")
    add_caption(
        figure,
        f"Forward, batch {rows[0]['batch']}, width {rows[0]['width']}. Medians and interquartile "
        f"ranges. {_machine(rows[0])}.",
    )
    return figure


def read(path: Path, command: str = "benchmarks.tradeoff") -> list[dict[str, str]]:
    rows = read_csv(path)
    if not rows:
        what = "has no rows" if path.is_file() else "is missing"
        raise ValueError(f"{path} {what}; `python -m {command}` writes it.")
    return rows


def _interval(row: dict[str, str], column: str) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    return float(row[f"{column}_q25"]), float(row[column]), float(row[f"{column}_q75"])


def _lengths(intervals: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    return [[m - low for low, m, _ in intervals], [high - m for _, m, high in intervals]]


def _network_parts(rows: Sequence[dict[str, str]], engines: Collection[str]) -> list[str]:
    """What a caption says of networks, machine and versions; some parts may be empty."""
    last = rows[-1]
    networks = f"timm {last['timm']}'s networks at {last['side']} x {last['side']} pixels"
    return [networks, _machine(last), *_versions(rows, engines)]


def _machine(row: dict[str, str]) -> str:
    threads = f"{row['threads']} thread" + ("s" if row["threads"] != "1" else "")
    return f"{row['device']}, {threads}, {row['clock']}, {row['dtype']}, torch {row['torch']}"


def _versions(rows: Sequence[dict[str, str]], engines: Collection[str]) -> list[str]:
    """Versions of the runtimes among the engines, and the instruction set of the kernels."""
    found = []
    for engine, (column, name) in RUNTIMES.items():
        if engine in engines:
            last = next(row for row in reversed(rows) if row["engine"] == engine)
            found.append(f"{name} {last[column]}")
    return [*found, f"{rows[-1]['isa']} kernels" if rows[-1]["isa"] else ""]


def _hollow(mixer: str) -> bool:
    """Whether a marker is hollow, because the points of two poolings nearly coincide."""
    return mixer == "none" or (mixer.startswith("additive") and mixer != "additive_l2")


def _point(axes: Axes, mixer: str, x: tuple[float, float, float], mean: float, sd: float) -> None:
    ours = mixer.startswith("additive")
    colour = MIXERS[mixer].colour
    hollow = _hollow(mixer)
    axes.errorbar(
        x[1],
        mean,
        xerr=_lengths([x]),
        yerr=sd or None,
        color=colour,
        marker=MIXERS[mixer].marker,
        markersize=9 if ours else 7,
        markerfacecolor={"none": "white"}.get(mixer, "none") if hollow else colour,
        markeredgecolor=colour if hollow else "white",
        elinewidth=1.6 if ours else 1.1,
        zorder=4 if ours else 3,
    )


def _label_points(
    figure: Figure,
    axes: Axes,
    points: Sequence[Point],
    intervals: Sequence[tuple[float, float, float, float]],
) -> None:
    """Place each name where it covers the least of the other names, markers and bars."""
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    taken: list[Bbox] = []
    for point, (x0, y0, x1, y1) in zip(points, intervals, strict=True):
        (px, py), (left, low), (right, high) = axes.transData.transform(
            [(point.x, point.y), (x0, y0), (x1, y1)]
        )
        taken += [
            Bbox.from_extents(px - 9, py - 9, px + 9, py + 9),
            Bbox.from_extents(left, py - 2, right, py + 2),
            Bbox.from_extents(px - 2, low, px + 2, high),
        ]
    pixels = figure.dpi / 72
    for point in (point for point in points if point.name):
        style: dict[str, Any] = {
            "fontsize": 9,
            "fontweight": "bold" if point.bold else "normal",
            "color": point.colour,
        }
        probe = figure.text(0, 0, point.name, **style)
        size = probe.get_window_extent()
        probe.remove()
        px, py = axes.transData.transform((point.x, point.y))
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
            point.name,
            (point.x, point.y),
            xytext=((box.x0 - px) / pixels, (box.y0 - py) / pixels),
            textcoords="offset points",
            zorder=5,
            arrowprops=_leader(point.colour) if distance > 16 else None,
            **style,
        )


def _leader(colour: str) -> dict[str, Any]:
    return {
        "arrowstyle": "-",
        "color": colour,
        "linewidth": 0.6,
        "shrinkA": 1,
        "shrinkB": 5,
    }


def _overlap(a: Bbox, b: Bbox) -> float:
    """Common area in square pixels."""
    common = Bbox.intersection(a, b)
    return 0.0 if common is None else common.width * common.height


def _label_ends(figure: Figure, axes: Axes, ends: dict[str, tuple[int, float]]) -> None:
    """Names to the right of the lines' ends, moved apart, with thin leaders."""
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
    for _ in range(100):  # move neighbours that are too close apart, until none are
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
            MIXERS[mixer].name,
            (x, y),
            xytext=(1.04, fraction),
            textcoords="axes fraction",
            fontsize=9,
            fontweight="bold" if ours else "normal",
            color=MIXERS[mixer].colour,
            va="center",
            arrowprops={**_leader(MIXERS[mixer].colour), "relpos": (0, 0.5)},
            annotation_clip=False,
        )
    axes.set_xlim(right=right)
    axes.set_ylim(bottom, top)


def _main() -> None:
    parser = command.Parser(description="Draw the plots from the CSV files in a folder.")
    files = f"{TRADEOFF_CSV} and {TOKENS_CSV}, or {CPU_CSV}, or all"
    parser.add_argument("folder", type=Path, help=f"with {files}")
    folder = parser.parse_args().folder
    paths = draw_cpu(folder) if (folder / CPU_CSV).is_file() else []
    if not paths or (folder / TRADEOFF_CSV).is_file():
        paths += draw(folder)
    print("\n".join(str(path) for path in paths))


if __name__ == "__main__":
    sys.exit(command.run(_main))
