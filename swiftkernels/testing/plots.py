"""Plots of speed-ups, and the style that all plots of the benchmarks share. Needs matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from swiftkernels.testing.engines import OURS
from swiftkernels.testing.peers import PEERS
from swiftkernels.testing.ratios import COMBINED, Speedup


class Style(NamedTuple):
    """How an engine or a token mixer is drawn."""

    name: str
    colour: str
    marker: str


class Margins(NamedTuple):
    """Inches around the panels of a figure."""

    left: float = 0.75
    right: float = 0.2
    top: float = 0.6
    bottom: float = 1.1


VERMILION = "#D55E00"
"""Colour of the operator."""
INK = "#333333"
"""Colour of text."""

# Okabe and Ito's colours, which colour-blind readers can distinguish; the yellow is darker, so that
# it can be read as text.
STYLES = {
    "eager": Style("eager", VERMILION, "o"),
    "published": Style("eager, as published", "#7F7F7F", "s"),
    "compile": Style("torch.compile", "#B8860B", "^"),
    "compile-max": Style("max-autotune, frozen", "#E69F00", "v"),
    "onnxruntime": Style("ONNX Runtime", "#56B4E9", "X"),
    "openvino": Style("OpenVINO", "#5E4FA2", "d"),
    "mhsa": Style("self-attention", "#000000", "D"),
    "xca": Style("XCA", "#0072B2", "P"),
    "mdta": Style("MDTA", "#56B4E9", "X"),
    "separable": Style("separable", "#009E73", "h"),
    "separable_fused": Style("separable, fused", "#004D38", "*"),
    "linear": Style("linear", "#CC79A7", "p"),
    "fastformer": Style("Fastformer", "#B8860B", "d"),
}
"""The styles of engines, in the order of legends."""
OTHER = Style("", "#7F7F7F", ".")
"""The style of engines without an entry in `STYLES`."""


def speedups_figure(found: Sequence[Speedup], title: str, caption: str) -> Figure:
    """The operator's speed-up over every engine by shape.

    Each setting has a row of panels, with a panel for each batch size.
    """
    found = [s for s in found if s.engine not in COMBINED]
    settings = list(dict.fromkeys(s.setting for s in found))
    batches = sorted({s.shape.batch for s in found})
    shapes = {b: sorted({s.shape for s in found if s.shape.batch == b}) for b in batches}
    width = max(7.6, 3.2 + sum(1.2 + 0.36 * len(own) for own in shapes.values()))
    height = 2.45 + 3.15 * len(settings)
    ratios = [1 + len(own) for own in shapes.values()]
    margins = Margins(right=2.0, bottom=1.85)
    figure, panels = new_figure(
        width, height, len(settings), len(batches), margins=margins, ratios=ratios
    )
    engines = {s.engine for s in found}
    order = [*(e for e in STYLES if e in engines), *sorted(engines - STYLES.keys())]
    for setting, row in zip(settings, panels, strict=True):
        for batch, axes in zip(batches, row, strict=True):
            for engine in order:
                own = sorted(
                    s
                    for s in found
                    if (s.setting, s.engine, s.shape.batch) == (setting, engine, batch)
                )
                style, peer = STYLES.get(engine, OTHER), engine in PEERS
                axes.plot(
                    [shapes[batch].index(s.shape) for s in own],
                    [s.by_median for s in own],
                    color=style.colour,
                    marker=style.marker,
                    markersize=5 if peer else 6,
                    markeredgecolor="white",
                    linewidth=1 if peer else 1.6,
                    linestyle="--" if peer else "-",
                    label=style.name or engine,
                    zorder=3 if peer else 4,
                )
            axes.axhline(1, color=INK, linewidth=1, zorder=2)
            logarithmic(axes)
            labels = [f"{s.tokens:,} x {s.width}" for s in shapes[batch]]
            axes.set_xticks(
                range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor"
            )
            axes.set_xlim(-0.6, len(labels) - 0.4)
            axes.tick_params(axis="x", labelsize=8, labelbottom=setting == settings[-1])
        row[0].set_ylabel(f"time / time of {OURS}")
        if len(settings) > 1:
            row[0].set_title(setting.label, fontsize=9, color=INK, loc="left")
    for batch, axes in zip(batches, panels[-1], strict=True):
        axes.set_xlabel(f"N x C at batch {batch}")
    handles = {
        name: handle
        for axes in panels[0]
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="center left",
        bbox_to_anchor=(1 - 1.95 / width, 0.62),
        fontsize=9,
        labelcolor=INK,
        frameon=False,
    )
    add_title(figure, title)
    add_caption(
        figure,
        "Ratio of medians measured in turn; above 1 the operator is faster. Dashed: other "
        f"operators. {caption}",
    )
    return figure


def new_figure(
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    margins: Margins | None = None,
    sharey: Literal["all", "row", "none"] = "row",
    ratios: Sequence[float] | None = None,
) -> tuple[Figure, list[list[Axes]]]:
    """A figure and its panels by row; sizes in inches, `ratios` of columns' widths."""
    left, right, top, bottom = margins or Margins()
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(
        rows, columns, sharey=sharey, squeeze=False, gridspec_kw={"width_ratios": ratios}
    )
    figure.subplots_adjust(
        left=left / width, right=1 - right / width, top=1 - top / height, bottom=bottom / height,
        wspace=0.06, hspace=0.14,
    )  # fmt: skip
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.tick_params(colors=INK, labelsize=9)
        axes.grid(color="#E6E6E6", linewidth=0.7)
        axes.set_axisbelow(True)
    for axes in grid[:, 1:].flat:
        axes.tick_params(labelleft=False)
    return figure, [list(row) for row in grid]


def logarithmic(axes: Axes, steps: Sequence[float] = (1, 2, 5)) -> None:
    """A logarithmic y axis with plain numbers at these steps of every decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def add_title(figure: Figure, text: str) -> None:
    """A title at the top left."""
    x, y = figure.subplotpars.left, 1 - 0.18 / figure.get_figheight()
    figure.text(x, y, text, fontsize=12, fontweight="bold", color=INK, va="top", parse_math=False)


def add_caption(figure: Figure, text: str) -> None:
    """A wrapped caption at the bottom left."""
    wrapped = textwrap.fill(text, int(figure.get_figwidth() * 15.5))
    y = 0.12 / figure.get_figheight()
    figure.text(
        figure.subplotpars.left,
        y,
        wrapped,
        fontsize=8,
        color="#666666",
        va="bottom",
        parse_math=False,
    )
