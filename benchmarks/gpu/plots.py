"""The plots of the counts and bounds of GPU kernels, from their CSV files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.gpu.report import (
    BLOCKS_CSV,
    GRID_FILL_CSV,
    LOWER_BOUNDS_CSV,
    TRAFFIC_CSV,
    shown,
)
from benchmarks.plots import read
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
from swiftkernels.utils.files import save_figure

TRAFFIC_PNG = "gpu_traffic.png"
LOWER_BOUNDS_PNG = "gpu_lower_bounds.png"
GRID_FILL_PNG = "gpu_grid_fill.png"
NETWORKS_PNG = "gpu_networks.png"

Rows = Sequence[dict[str, str]]

STYLES = {
    OURS: Style(OURS, VERMILION, "o"),
    "eager": Style("additive, eager", "#7F7F7F", "s"),
    "inductor": Style("additive, torch.compile", "#B8860B", "^"),
    **{
        peer: ENGINE_STYLES[peer]._replace(name=f"{ENGINE_STYLES[peer].name}, eager")
        for peer in ("mhsa", "separable", "linear")
    },
}
"""Engines in the order of the legend."""

NETWORK = "swiftformer_"
"""How the names of whole networks begin."""
NETWORK_STYLES = {
    "eager": Style("eager", "#7F7F7F", ""),
    "inductor": Style("torch.compile", "#B8860B", ""),
    OURS: Style(f"{OURS}, fused", VERMILION, ""),
}
"""Engines of whole networks, in the order of the bars."""

CASE = ("batch", "tokens", "width")

MARGINS = Margins(left=0.95, top=0.75, bottom=2.1)

FORWARD_COLOUR = "#000000"
"""Colour of bars; those of the backward are vermilion."""


def draw_traffic(folder: Path) -> Path:
    """Draw gpu_traffic.png from gpu_traffic.csv in `folder`; returns its path.

    Raises:
        ValueError: the CSV file is missing or has no rows.
    """
    rows = read(folder / TRAFFIC_CSV, "benchmarks.gpu.traffic")
    return _save(traffic(shown(rows)), folder / TRAFFIC_PNG)


def draw_lower_bounds(folder: Path) -> list[Path]:
    """Draw the lower bounds and the grid fill from their CSV files; returns the paths.

    Raises:
        ValueError: a CSV file is missing or has no rows.
    """
    command = "benchmarks.gpu.roofline"
    bounds = read(folder / LOWER_BOUNDS_CSV, command)
    fills = read(folder / GRID_FILL_CSV, command)
    return [
        _save(lower_bounds(shown(bounds)), folder / LOWER_BOUNDS_PNG),
        # Larger batches fill every GPU.
        _save(grid_fill([r for r in shown(fills) if int(r["batch"]) <= 8]), folder / GRID_FILL_PNG),
    ]


def draw_networks(folder: Path) -> Path:
    """Draw gpu_networks.png from gpu_blocks.csv in `folder`; returns its path.

    Raises:
        ValueError: the CSV file is missing or has no whole networks.
    """
    rows = read(folder / BLOCKS_CSV, "benchmarks.gpu.blocks")
    own = [row for row in rows if row["layer"].startswith(NETWORK) and row["dtype"] == "float16"]
    if not own:
        raise ValueError(f"{folder / BLOCKS_CSV} has no whole networks in float16.")
    return _save(networks(own), folder / NETWORKS_PNG)


def networks(rows: Rows) -> Figure:
    """Bytes of an image, and launches, of whole networks; a column for each batch."""
    batches = sorted({row["batch"] for row in rows}, key=int)
    names = list(dict.fromkeys(row["layer"] for row in rows))
    figure, panels = new_figure(11.5, 6.4, 2, len(batches), margins=MARGINS._replace(bottom=1.35))
    for column, batch in enumerate(batches):
        panels[0][column].set_title(f"batch {batch}", fontsize=10, color=INK, loc="left")
        own = [row for row in rows if row["batch"] == batch]
        for row in own:
            engine = row["engine"]
            x = names.index(row["layer"]) + 0.29 * (list(NETWORK_STYLES).index(engine) - 1)
            values = int(row["bytes"]) / 1e6 / int(batch), int(row["launches"])
            for axes, value in zip((panels[0][column], panels[1][column]), values, strict=True):
                axes.bar(x, value, 0.26, color=NETWORK_STYLES[engine].colour, zorder=3)
                axes.annotate(
                    f"{value:.0f}", (x, value), xytext=(0, 2), textcoords="offset points",
                    ha="center", fontsize=7, color=INK,
                )  # fmt: skip
        for row in own:
            x, least = names.index(row["layer"]), int(row["minimum_bytes"]) / 1e6 / int(batch)
            panels[0][column].plot([x - 0.43, x + 0.43], [least] * 2, color=INK, zorder=4)
        for axes in (panels[0][column], panels[1][column]):
            labels = [name.removeprefix(NETWORK).upper() for name in names]
            axes.set_xticks(range(len(names)), labels)
            axes.grid(visible=False, axis="x")
    panels[0][0].set_ylabel("MB for an image", color=INK)
    panels[1][0].set_ylabel("kernels launched", color=INK)
    handles = [
        *(Patch(color=style.colour, label=style.name) for style in NETWORK_STYLES.values()),
        Line2D([], [], color=INK, label="images, weights and output once"),
    ]
    figure.legend(
        handles=handles, ncols=4, loc="lower left",
        bbox_to_anchor=(figure.subplotpars.left, 0.66 / figure.get_figheight()),
        fontsize=8.5, labelcolor=INK, frameon=False, borderaxespad=0,
    )  # fmt: skip
    add_title(figure, "Whole SwiftFormers in inference: bytes between kernels, and launches")
    versions = f"torch {rows[-1]['torch']}, triton {rows[-1]['triton']}"
    add_caption(
        figure,
        "Counted, not measured. float16, 224 x 224 pixels. torch.compile: "
        "code that Inductor writes for an H100. Caches may hold such bytes between kernels. "
        f"{versions}.",
    )
    return figure


def traffic(rows: Rows) -> Figure:
    """Bytes, in multiples of the minimum, and launches by shape; a column for each direction."""
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    figure, panels = new_figure(11.5, 7.8, 2, len(directions), margins=MARGINS)
    cases = _cases(rows)
    for column, direction in enumerate(directions):
        upper, lower = panels[0][column], panels[1][column]
        upper.set_title(direction, fontsize=10, color=INK, loc="left")
        for row in rows:
            if row["direction"] == direction:
                place = _place(row, cases)
                minimum = int(row["minimum_bytes"])
                _point(upper, place, int(row["bytes"]) / minimum, row["engine"])
                _point(lower, place, int(row["launches"]), row["engine"])
                if row["requested_bytes"]:
                    requested = int(row["requested_bytes"]) / minimum
                    _point(upper, place, requested, row["engine"], hollow=True)
        upper.axhline(1, color=INK, linewidth=1, zorder=2)
        for axes in (upper, lower):
            logarithmic(axes)
            _name_cases(axes, cases)
        upper.tick_params(labelbottom=False)
    panels[0][0].set_ylabel("bytes / minimum", color=INK)
    panels[1][0].set_ylabel("kernels launched", color=INK)
    _legend(figure, hollow="the same, requested by all lanes")
    add_title(figure, "Bytes that cross the boundaries of kernels, and launches")
    versions = f"torch {rows[-1]['torch']}, triton {rows[-1]['triton']}"
    add_caption(
        figure,
        "Counted, not measured. float16, [batch x tokens x width]. 1 is the "
        f"minimum: every input read once, every output written once. {OURS}: distinct 32-byte "
        "sectors, launch by launch; requested counts every lane. torch.compile: code written for "
        "an H100, forward and backward in one graph. Caches may hold such bytes between kernels. "
        f"{versions}.",
    )
    return figure


def lower_bounds(rows: Rows) -> Figure:
    """Lower bounds by shape, a panel for each GPU and direction."""
    names = list(dict.fromkeys(row["gpu"] for row in rows))
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    figure, panels = new_figure(14, 8.2, len(directions), len(names), sharey="all", margins=MARGINS)
    cases = _cases(rows)
    for r, direction in enumerate(directions):
        for c, name in enumerate(names):
            axes = panels[r][c]
            own = [row for row in rows if row["gpu"] == name and row["direction"] == direction]
            for row in own:
                microseconds = 1e6 * float(row["lower_bound_seconds"])
                hollow = row["fits_in_cache"] == "True"
                _point(axes, _place(row, cases), microseconds, row["engine"], hollow)
            if r == 0:
                axes.set_title(name, fontsize=10, color=INK, loc="left")
            logarithmic(axes, steps=(1,))
            _name_cases(axes, cases)
            axes.tick_params(labelbottom=r == len(directions) - 1)
        panels[r][0].set_ylabel(f"{direction}\nlower bound, microseconds", color=INK, fontsize=8.5)
    _legend(figure, hollow="hollow: the layer fits in the cache")
    add_title(
        figure, "Lower bounds, not times: what bytes and operations take at the datasheet's peaks"
    )
    add_caption(
        figure,
        "Lower bound, not a time. The bounds do not say how much longer an "
        "engine takes, so their ratios are no speed-ups. float16; the larger of bytes / memory "
        "bandwidth and operations / peak (torch.compile: only bytes, operations are unknown). "
        "Hollow: the layer's tensors fit in the GPU's last-level cache; bytes between kernels may "
        "stay there, and the real time may be below the bound.",
    )
    return figure


def grid_fill(rows: Rows) -> Figure:
    """Programs of every kernel at each shape, against the multiprocessors of the GPUs."""
    cases = _cases(rows)
    first = rows[0]["gpu"]
    launches = [row for row in rows if row["gpu"] == first]
    figure, (panels,) = new_figure(14, 5.6, 1, len(cases), margins=MARGINS)
    limits = {row["gpu"]: int(row["multiprocessors"]) for row in rows}
    for axes, case in zip(panels, cases, strict=True):
        own = [row for row in launches if _case(row) == case]
        for x, row in enumerate(own):
            colour = FORWARD_COLOUR if row["direction"] == "forward" else VERMILION
            axes.bar(x, int(row["programs"]), color=colour, width=0.7, zorder=3)
        axes.set_title(_label(case).replace("\n", " "), fontsize=9, color=INK, loc="left")
        axes.set_xticks(
            range(len(own)), [_short(row["kernel"]) for row in own],
            rotation=60, ha="right", rotation_mode="anchor", fontsize=7.5,
        )  # fmt: skip
        for limit in limits.values():
            axes.axhline(limit, color=INK, linewidth=0.8, linestyle=":", zorder=4)
        logarithmic(axes, steps=(1,))
        axes.grid(visible=False, axis="x")
    panels[0].set_ylabel("programs", color=INK)
    panels[0].set_ylim(bottom=0.7)
    last = panels[-1]
    shift = {"A100": -3, "H100": 4}  # their lines nearly coincide
    for name, limit in limits.items():
        last.annotate(
            f"{name}: {limit}", (1, limit), xycoords=("axes fraction", "data"),
            xytext=(4, shift.get(name, 0)), textcoords="offset points", fontsize=8, va="center",
            color=INK,
            annotation_clip=False,
        )  # fmt: skip
    figure.subplots_adjust(right=1 - 1.0 / figure.get_figwidth(), bottom=0.32, wspace=0.1)
    add_title(figure, "Grid fill: programs of each kernel against the multiprocessors of a GPU")
    add_caption(
        figure,
        "Below a dotted line, some multiprocessors of that GPU are idle. Black: forward; "
        "vermilion: backward. float16, [batch, tokens, width] above each panel.",
    )
    return figure


def _place(row: dict[str, str], cases: Sequence[tuple[str, ...]]) -> float:
    """The position on the x axis: the engines of one shape next to each other."""
    engines = list(STYLES)
    middle = (len(engines) - 1) / 2
    return cases.index(_case(row)) + 0.13 * (engines.index(row["engine"]) - middle)


def _point(axes: Axes, x: float, y: float, engine: str, hollow: bool = False) -> None:
    style = STYLES[engine]
    ours = engine == OURS
    axes.plot(
        x, y, linestyle="", color=style.colour, marker=style.marker, markersize=7 if ours else 5,
        markerfacecolor="none" if hollow else style.colour, zorder=5 if ours else 3,
    )  # fmt: skip


def _cases(rows: Rows) -> list[tuple[str, ...]]:
    """The shapes, by width, then batch and tokens."""

    def order(case: tuple[str, ...]) -> tuple[int, ...]:
        batch, tokens, width = map(int, case)
        return width, batch, tokens

    return sorted({_case(row) for row in rows}, key=order)


def _case(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in CASE)


def _label(case: tuple[str, ...]) -> str:
    batch, tokens, width = case
    return f"{batch} x {int(tokens):,}\nx {width}"


def _name_cases(axes: Axes, cases: Sequence[tuple[str, ...]]) -> None:
    axes.set_xticks(
        range(len(cases)), [_label(c).replace("\n", " ") for c in cases],
        rotation=50, ha="right", rotation_mode="anchor",
    )  # fmt: skip
    axes.set_xlim(-0.5, len(cases) - 0.5)
    axes.grid(visible=False, axis="x")
    for x in range(1, len(cases)):
        axes.axvline(x - 0.5, color="#E6E6E6", linewidth=0.7, zorder=1)


def _short(kernel: str) -> str:
    return kernel.strip("_").removesuffix("_kernel").replace("_", " ")


def _legend(figure: Figure, hollow: str) -> None:
    """A legend of all engines and of hollow markers."""
    handles = [
        Line2D([], [], linestyle="", color=s.colour, marker=s.marker, label=s.name)
        for s in STYLES.values()
    ]
    ours = STYLES[OURS]
    empty = Line2D(
        [], [], linestyle="", color=ours.colour, marker=ours.marker, markerfacecolor="none",
        label=hollow,
    )  # fmt: skip
    figure.legend(
        handles=[handles[0], empty, *handles[1:]], ncols=4, loc="lower left",
        bbox_to_anchor=(figure.subplotpars.left, 0.66 / figure.get_figheight()),
        fontsize=8.5, labelcolor=INK, frameon=False, borderaxespad=0, columnspacing=1.8,
    )  # fmt: skip


def _save(figure: Figure, path: Path) -> Path:
    save_figure(figure, path, dpi=160, facecolor="white")
    return path
