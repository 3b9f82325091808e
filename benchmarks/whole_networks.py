"""Time of complete SwiftFormers on a CPU: timm's model, and the same after `accelerate`.

`python -m benchmarks.whole_networks` needs timm (torchvision may be missing) and writes
whole_networks.csv. Both models of a pair have the same weights; their outputs are compared before
the timing. Calls are timed in turn. Attention is one block of each stage and 6 to 10 % of the
multiply-adds, so a complete network gains far less than the operator.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swiftkernels
from swiftkernels.backends import devices
from swiftkernels.testing.harness import isa
from swiftkernels.testing.timing import Stopwatch, clock_name, interleave
from swiftkernels.utils.files import write_csv
from swiftkernels.utils.progress import Progress

CSV = "whole_networks.csv"
NAMES = ("xs", "s", "l1", "l3")
DIRECTIONS = ("forward", "training step")
CLASSES = 1000
SIDE = 224
TOLERANCE = 1e-4
"""Largest relative difference of the outputs, which another order of roundings explains."""


def pair(name: str) -> dict[str, nn.Module]:
    """timm's SwiftFormer, and the same model accelerated.

    The layer scales are made large. Their initial value, 1e-5, would hide the attention's output.
    """
    from tests.stubs import import_timm

    models = {}
    for engine in ("timm", "accelerated"):
        torch.manual_seed(0)
        model = import_timm().create_model(f"swiftformer_{name}", num_classes=CLASSES)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "layer_scale" in parameter_name:
                    parameter.uniform_(0.5, 1.5)
        models[engine] = model
    swiftkernels.accelerate(models["accelerated"])
    return models


def calls(
    models: dict[str, nn.Module], images: Tensor, direction: str
) -> dict[str, Callable[[], Any]]:
    """One call of each model: a forward in eval mode, or a training step."""
    if direction == "forward":
        return {name: _forward(model.eval(), images) for name, model in models.items()}
    return {name: _step(model.train(), images) for name, model in models.items()}


def _forward(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def call() -> Tensor:
        out: Tensor = model(images)
        return out

    return call


def _step(model: nn.Module, images: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    labels = torch.arange(len(images)) % CLASSES

    def call() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return call


def measure(name: str, batch: int, direction: str, seconds: float) -> list[dict[str, Any]]:
    """A row for each model of the pair.

    Raises:
        RuntimeError: the outputs differ.
    """
    models = pair(name)
    images = torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, out = (model.eval()(images) for model in models.values())
    error = ((out - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE:
        raise RuntimeError(f"swiftformer_{name}: the outputs differ by {error:.1e}")
    timings = interleave(calls(models, images, direction), Stopwatch("cpu"), seconds, min_rounds=5)
    return [
        {
            "network": f"swiftformer_{name}",
            "engine": engine,
            "batch": batch,
            "side": SIDE,
            "dtype": "float32",
            "direction": direction,
            "median_seconds": found.median,
            "min_seconds": found.minimum,
            "spread_seconds": found.spread,
            "rounds": len(found.samples),
            "difference": error,
            "threads": torch.get_num_threads(),
            "clock": clock_name("cpu"),
            "device": devices.name(torch.device("cpu")),
            "isa": isa(),
            "torch": torch.__version__,
        }
        for engine, found in timings.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.whole_networks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--networks", nargs="+", choices=NAMES, default=NAMES)
    add("--batches", nargs="+", type=int, default=(1, 16), help="images (1 and 16)")
    add("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    add("--threads", type=int, default=1, help="(%(default)s)")
    add("--seconds", type=float, default=10.0, help="for the rounds of one pair (%(default)g)")
    add("--out", type=Path, default=Path("results"), help="folder to write to (%(default)s)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    problems = [
        (name, batch, direction)
        for direction in given.directions
        for batch in (given.batches if direction == "forward" else given.batches[-1:])
        for name in given.networks
    ]
    rows: list[dict[str, Any]] = []
    with Progress(len(problems), "pairs") as bar:
        for name, batch, direction in problems:
            bar.show(f"{name}, batch {batch}, {direction}")
            rows += measure(name, batch, direction, given.seconds)
            theirs, ours = (row["median_seconds"] for row in rows[-2:])
            bar.write(
                f"swiftformer_{name}, batch {batch}, {direction}: timm {theirs * 1e3:.1f} ms, "
                f"accelerated {ours * 1e3:.1f} ms, {theirs / ours:.2f} x"
            )
            write_csv(given.out / CSV, rows, digits=6)
            bar.advance()
    print(f"Written: {given.out / CSV}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
