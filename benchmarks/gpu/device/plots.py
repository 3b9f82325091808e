"""The pictures of the results of `benchmarks/gpu/run`, from their CSV files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.gpu.device import results
from swiftkernels.testing.engines import OURS
from swiftkernels.testing.plots import (
    INK,
    VERMILION,
    Margins,
    Style,
    add_caption,
    add_title,
    logarithmic,
    new_figure,
)
from swiftkernels.testing.plots import STYLES as ENGINE_STYLES
from swiftkernels.testing.ratios import speedups
from swiftkernels.utils.files import read_csv, save_figure

Rows = Sequence[dict[str, str]]


def draw(folder: Path) -> list[Path]:
    """Draw the pictures of the results of `benchmarks/gpu/run` in a folder; returns their paths."""
    drawn = []
    networks = [row for row in read_csv(folder / results.NETWORKS) if row["rounds"]]
    if any(row["engine"] == "eager" for row in networks):
        drawn.append(_saved(networks_figure(networks), folder / results.NETWORKS_PNG))
    operators = [row for row in read_csv(folder / results.OPERATORS) if row["dtype"] == "float16"]
    operators = operators or read_csv(folder / results.OPERATORS)
    if any(row["rounds"] for row in operators):
        drawn.append(_saved(operators_figure(operators), folder / results.OPERATORS_PNG))
    return drawn


MEASURED = {
    "eager": Style("eager", "#9A9A9A", "s"),
    "channels_last": Style("eager, channels_last", "#5E5E5E", "o"),
    "compile": ENGINE_STYLES["compile"],
    "compile-max": Style("torch.compile, max-autotune", "#E69F00", "v"),
    OURS: Style("fuse_for_inference, kernels only", VERMILION, "o"),
    results.GRAPHS: Style("fuse_for_inference", "#8F3F00", "*"),
    "accelerated": Style("accelerate", "#0072B2", "P"),
    "accelerated-channels_last": Style("accelerate, channels_last", "#56B4E9", "X"),
}
"""Engines of whole networks in the order of the legend."""


def networks_figure(rows: Rows) -> Figure:
    """Speed of whole networks relative to eager PyTorch, with images per second on the bars.

    A panel for each direction and type, with a group of bars for each network and batch.
    """
    panels_of: dict[tuple[str, str], dict[tuple[int, str], dict[str, float]]] = {}
    for row in rows:
        groups = panels_of.setdefault((row["direction"], row["dtype"]), {})
        group = int(row["batch"]), row["network"].removeprefix("swiftformer_").upper()
        groups.setdefault(group, {})[row["engine"]] = _best_seconds(row)
    engines = {
        kind: [e for e in MEASURED if any(e in times for times in groups.values())]
        for kind, groups in panels_of.items()
    }
    bars = max(len(groups) * (len(engines[kind]) + 1) for kind, groups in panels_of.items())
    figure, panels = new_figure(
        max(8.0, 1.2 + 0.17 * bars), 2.3 + 2.7 * len(panels_of), len(panels_of),
        margins=Margins(left=0.8, bottom=1.45, top=0.8), sharey="none",
    )  # fmt: skip
    figure.subplots_adjust(hspace=0.55)
    for (kind, groups), (axes,) in zip(panels_of.items(), panels, strict=True):
        ordered = sorted(groups, key=lambda group: group[0])
        stride = len(engines[kind]) + 1
        for i, group in enumerate(ordered):
            times = groups[group]
            for engine, seconds in times.items():
                place = i * stride + engines[kind].index(engine)
                gain = times.get("eager", seconds) / seconds
                axes.bar(place, gain, 0.9, color=MEASURED[engine].colour)
                axes.annotate(
                    f"{group[0] / seconds:,.0f}", (place, gain), (0.5, 3), rotation=90,
                    textcoords="offset points", fontsize=6.5, ha="center", va="bottom", color=INK,
                )  # fmt: skip
        axes.axhline(1, color=INK, linewidth=0.8, zorder=3)
        axes.margins(y=0.3)
        axes.set_xlim(-1, bars - 1)
        axes.set_xticks(
            [i * stride + (stride - 2) / 2 for i in range(len(ordered))],
            [f"{name}\nbatch {batch}" for batch, name in ordered],
            fontsize=8,
        )
        axes.set_title(", ".join(kind), fontsize=10, color=INK, loc="left")
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("speed / eager", fontsize=9)
    shown = [e for e in MEASURED if any(e in own for own in engines.values())]
    handles = [Patch(color=MEASURED[e].colour, label=MEASURED[e].name) for e in shown]
    _add_legend(figure, handles, min(5, len(handles)), 0.45)
    last = rows[-1]
    add_title(figure, f"SwiftFormers on {last['device']}")
    add_caption(
        figure,
        "Higher is better; the numbers are images per second. Medians of times measured in turn; "
        "inference of each engine in its faster mode, as called or in a CUDA graph. Kernels only: "
        "in a graph of the benchmark, without the copies of images and outputs of the network's. "
        f"{last['side']} x {last['side']} pixels, torch {last['torch']}, triton {last['triton']}.",
    )
    return figure


def _add_legend(figure: Figure, handles: Sequence[Artist], columns: int, height: float) -> None:
    """A legend below the panels, `height` inches above the lower edge."""
    figure.legend(
        handles=handles, loc="lower center", ncols=columns, fontsize=8, frameon=False,
        bbox_to_anchor=(0.5, height / figure.get_figheight()), labelcolor=INK,
    )  # fmt: skip


def _best_seconds(row: dict[str, str]) -> float:
    """The median of the faster mode."""
    return min(
        float(row[f"{prefix}median_seconds"]) for prefix in results.MODES if row[f"{prefix}rounds"]
    )


def operators_figure(rows: Rows) -> Figure:
    """Speed-up of each operator over other engines by size, with a column for each direction."""
    found = {
        name: speedups([row for row in rows if row["operator"] == name], _mode(rows))
        for name in dict.fromkeys(row["operator"] for row in rows)
    }
    found = {name: own for name, own in found.items() if own}
    directions = list(dict.fromkeys(s.setting.direction for own in found.values() for s in own))
    shapes = {name: sorted({s.shape for s in own}) for name, own in found.items()}
    width = max(8.0, 2.0 + 0.24 * len(directions) * max(map(len, shapes.values())))
    margins = Margins(left=0.8, right=0.3, top=0.9, bottom=1.75)
    figure, panels = new_figure(
        width, 2.0 + 3.0 * len(found), len(found), len(directions), margins=margins
    )
    figure.subplots_adjust(hspace=0.75)
    compared = {s.engine for own in found.values() for s in own}
    engines = [name for name in ENGINE_STYLES if name in compared]
    for (name, own), row in zip(found.items(), panels, strict=True):
        for direction, axes in zip(directions, row, strict=True):
            for engine in engines:
                points = [
                    (shapes[name].index(s.shape), s.by_median)
                    for s in own
                    if (s.engine, s.setting.direction) == (engine, direction)
                ]
                if points:
                    style = ENGINE_STYLES[engine]
                    axes.plot(
                        *zip(*sorted(points), strict=True), color=style.colour, linewidth=0,
                        marker=style.marker, markersize=6, markeredgecolor="white",
                    )  # fmt: skip
            axes.axhline(1, color=INK, linewidth=1, zorder=2)
            logarithmic(axes)
            ratios = [s.by_median for s in own]
            axes.set_ylim(min(0.5, *ratios) / 1.2, 1.2 * max(2.0, *ratios))
            axes.set_xticks(
                range(len(shapes[name])),
                [f"{s.batch} x {s.tokens:,} x {s.width}" for s in shapes[name]],
                rotation=60, ha="right", rotation_mode="anchor", fontsize=7,
            )  # fmt: skip
            axes.set_title(f"{name}, {direction}", fontsize=9, color=INK, loc="left")
        row[0].set_ylabel(f"time / time of {OURS}", fontsize=9)
    handles = [
        Line2D([], [], color=s.colour, marker=s.marker, linewidth=0, label=s.name)
        for s in map(ENGINE_STYLES.__getitem__, engines)
    ]
    _add_legend(figure, handles, len(handles), 0.4)
    last = rows[-1]
    add_title(figure, f"Operators on {last['device']}")
    add_caption(
        figure,
        f"Ratio of medians, {results.MODES[_mode(rows)]}, {last['dtype']}, by batch x N x C; above "
        f"1 {OURS} is faster. torch {last['torch']}, triton {last['triton']}.",
    )
    return figure


def _mode(rows: Rows) -> str:
    """The prefix of the times in graphs, if there are any."""
    return "graph_" if any(row["graph_rounds"] for row in rows) else ""


def _saved(figure: Figure, path: Path) -> Path:
    save_figure(figure, path, dpi=120, facecolor="white")
    return path
