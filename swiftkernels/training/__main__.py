"""Train a SwiftFormer with the recipe of the paper.

    python -m swiftkernels.training --data IMAGENET --model swiftformer_s --batch-size 256
    torchrun --nproc-per-node 8 -m swiftkernels.training --data IMAGENET --batch-size 256
    python -m swiftkernels.training --data IMAGENET --evaluate training/best.pth --ema-weights

IMAGENET is a folder with train/CLASS/*.jpg and val/CLASS/*.jpg. Defaults are the published options
of the model; docs/training.md has the full recipe, with distillation and 2048 images a step.
`--resume` continues an interrupted run. Needs (in a clone of this library): pip install '.[train]'
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from swiftkernels.training import Recipe, evaluate_file, train
from swiftkernels.training.recipe import PUBLISHED
from swiftkernels.training.trainer import LAST
from swiftkernels.utils import command
from swiftkernels.utils.text import shown


class Arguments(NamedTuple):
    """The arguments of the command."""

    recipe: Recipe
    """The published options of the model, with those of the command line."""
    checkpoint: Path | None
    """A checkpoint to evaluate; None to train."""
    ema: bool
    """Evaluate the averaged weights."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train or evaluate; returns the exit status, see `swiftkernels.utils.command`."""
    return command.run(lambda: _run(*parse(arguments)))


def _run(recipe: Recipe, checkpoint: Path | None, ema: bool) -> int:
    if checkpoint is not None:
        found = evaluate_file(recipe, checkpoint, ema)
        print(f"loss {found.loss:.4f}, top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %")
        return 0
    try:
        last = train(recipe)[-1]
    except KeyboardInterrupt as interruption:
        file = recipe.out / LAST
        found_there = "--resume continues from" if file.is_file() else "there is no"
        interruption.args = (f"{found_there} {shown(file)}",)
        raise
    scores = f"top-1 {last['top1']:.2f} %, top-5 {last['top5']:.2f} %"
    if "ema_top1" in last:
        scores += f"; averaged weights: {last['ema_top1']:.2f} %, {last['ema_top5']:.2f} %"
    print(f"{scores}; files in {shown(recipe.out)}")
    return 0


def parse(arguments: Sequence[str] | None = None) -> Arguments:
    """Parse the command line: an option for each field of `Recipe`, and two for evaluation."""
    parser = command.Parser(
        prog="python -m swiftkernels.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = get_type_hints(Recipe, include_extras=True)
    for option in fields(Recipe):
        default: Any = option.default
        kind, text = get_args(hints[option.name])
        if get_origin(kind) in (Union, UnionType):  # of a type and None
            kind = get_args(kind)[0]
        published = {m: o[option.name] for m, o in PUBLISHED.items() if option.name in o}
        shown = "none" if default is None else default
        text += f" ({shown}" + "".join(f"; {m}: {value}" for m, value in published.items()) + ")"
        settings: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if isinstance(default, bool):
            settings["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            settings["choices"] = get_args(kind)
        else:
            settings["type"] = kind
            settings["metavar"] = "PATH" if kind is Path else kind.__name__.upper()
        parser.add_argument("--" + option.name.replace("_", "-"), **settings)
    parser.add_argument(
        "--evaluate", type=Path, metavar="FILE", help="evaluate this checkpoint, do not train"
    )
    parser.add_argument(
        "--ema-weights", action="store_true", help="with --evaluate: use the averaged weights"
    )
    given = vars(parser.parse_args(arguments))
    checkpoint, ema = given.pop("evaluate"), given.pop("ema_weights")
    return Arguments(Recipe.of(given.pop("model", Recipe.model), **given), checkpoint, ema)


if __name__ == "__main__":
    sys.exit(main())
