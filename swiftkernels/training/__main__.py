"""Train a SwiftFormer by the paper's recipe.

    python -m swiftkernels.training --data IMAGENET --model swiftformer_s --batch-size 256
    torchrun --nproc-per-node 8 -m swiftkernels.training --data IMAGENET --batch-size 256
    python -m swiftkernels.training --data IMAGENET --evaluate training/best.pth --ema-weights

IMAGENET has train/CLASS/*.jpg and val/CLASS/*.jpg. What was published for a model is the default;
the full recipe (also distillation, and 2048 images a step) is in docs/training.md. `--resume` goes
on where a run was stopped. Needs `pip install swiftkernels[train]`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from swiftkernels.training import Recipe, evaluate_file, train
from swiftkernels.training.recipe import LIGHTER


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns the exit status: 2 for arguments that are wrong, 130 when interrupted."""
    try:
        recipe, checkpoint, ema = parse(arguments)
        if checkpoint is not None:
            found = evaluate_file(recipe, checkpoint, ema)
            print(f"loss {found.loss:.4f}, top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %")
            return 0
        last = train(recipe)[-1]
    except (ValueError, ImportError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    scores = f"top-1 {last['top1']:.2f} %, top-5 {last['top5']:.2f} %"
    if "ema_top1" in last:
        scores += f"; of the averaged weights {last['ema_top1']:.2f} %, {last['ema_top5']:.2f} %"
    print(f"{scores}; written: {recipe.out}")
    return 0


def parse(arguments: Sequence[str] | None = None) -> tuple[Recipe, Path | None, bool]:
    """What was published for the model, with the arguments' changes; what to evaluate, if so."""
    parser = argparse.ArgumentParser(
        prog="python -m swiftkernels.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = get_type_hints(Recipe, include_extras=True)
    for option in fields(Recipe):
        name = "--" + option.name.replace("_", "-")
        default: Any = option.default
        kind, text = get_args(hints[option.name])
        kind = next(iter(get_args(kind)), kind)  # of an option that may be left out
        lighter = {m: o[option.name] for m, o in LIGHTER.items() if option.name in o}
        shown = "none" if default is None else default
        text += f" ({shown}" + "".join(f"; {m}: {value}" for m, value in lighter.items()) + ")"
        how: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if isinstance(default, bool):
            how["action"] = argparse.BooleanOptionalAction
        else:
            how["type"] = kind
            how["metavar"] = "PATH" if kind is Path else kind.__name__.upper()
        parser.add_argument(name, **how)
    parser.add_argument(
        "--evaluate", type=Path, metavar="FILE", help="do not train: measure this checkpoint"
    )
    parser.add_argument(
        "--ema-weights", action="store_true", help="with --evaluate: the averaged ones"
    )
    given = vars(parser.parse_args(arguments))
    checkpoint, ema = given.pop("evaluate"), given.pop("ema_weights")
    return Recipe.of(given.pop("model", Recipe.model), **given), checkpoint, ema


if __name__ == "__main__":
    sys.exit(main())
