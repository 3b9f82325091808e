"""Losses and accuracies of a training: a CSV file, and a plot of it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swiftkernels.utils.files import save_figure, write_csv

COLUMNS = (
    "step",
    "epoch",
    "lr",
    "train_loss",
    "val_loss",
    "top1",
    "top5",
    "ema_val_loss",
    "ema_top1",
    "ema_top5",
)
"""train_loss is the mean since the previous row, with mixed and smoothed labels. The last six
columns, cross-entropy and percentages on the validation images, are set at the end of an epoch."""

Row = dict[str, Any]


def write(rows: Sequence[Row], path: Path) -> None:
    """Write all rows to a CSV file."""
    write_csv(path, rows, COLUMNS)


def draw(table: Path, picture: Path) -> None:
    """Plot losses and accuracies against epochs, from the CSV file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(9, 4.2))
    panels = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.28, top=0.92)
    curves = (
        (0, "train_loss", "training", "#888888", "-"),
        (0, "val_loss", "validation", "#0072B2", "o-"),
        (0, "ema_val_loss", "validation, averaged weights", "#D55E00", "o-"),
        (1, "top1", "top-1", "#0072B2", "o-"),
        (1, "top5", "top-5", "#0072B2", "o:"),
        (1, "ema_top1", "top-1, averaged weights", "#D55E00", "o-"),
        (1, "ema_top5", "top-5, averaged weights", "#D55E00", "o:"),
    )
    for panel, column, label, colour, style in curves:
        points = [(float(r["epoch"]), float(r[column])) for r in rows if r[column]]
        if points:
            panels[panel].plot(
                *zip(*points, strict=True), style, color=colour, label=label, markersize=3
            )
    for axes, title in zip(panels, ("loss", "validation accuracy, %"), strict=True):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("epoch")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E6E6E6", linewidth=0.7)
        if axes.lines:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
            axes.legend(**below, fontsize=8, frameon=False)
    save_figure(figure, picture, dpi=120)
