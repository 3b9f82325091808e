"""The networks of SwiftFormer's Table 2, and newer ones, timed again on this CPU.

`python -m benchmarks.published_networks` needs timm (torchvision may be missing). It times the
inference of each network of data/published_networks.csv. SwiftFormers run in every engine, the
others in eager PyTorch, ONNX Runtime and OpenVINO, and after `fuse_for_inference` where that fuses
something. Runtimes are optional. Each engine is verified against float64, then they are timed in
turn, in one process.

Engines get a network as timm makes it, and `folded`: with merged branches and folded BatchNorms.
The faster form counts. It is found at the first size that is measured; after that, only this form
is measured. What is left out to save time:

* A size is skipped if the network's fastest engine could take longer than `LONGEST_CALL` a call,
  by its time at the sizes before.
* Engines in `SLOW_TO_BUILD` get the networks as they are, at the first size.

The command writes published_networks.csv after each size, and a picture for each side and number
of threads: latency against the accuracy that was published, which is not measured here.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import swiftkernels
from benchmarks import timm_networks
from benchmarks.timm_networks import Network, Row, call_of, installed, machine
from swiftkernels.testing import networks
from swiftkernels.testing.engines import OURS, Call
from swiftkernels.testing.networks import Problem
from swiftkernels.testing.ratios import markdown_table
from swiftkernels.utils import command
from swiftkernels.utils.files import make_folder, read_csv, write_csv
from swiftkernels.utils.progress import Progress

CSV = "published_networks.csv"
PUBLISHED = {row["network"]: row for row in read_csv(Path(__file__).with_name("data") / CSV)}
"""By timm's names: accuracies and their sources."""
FAMILY = "SwiftFormer"
"""The family that runs in all engines."""
ENGINES = ("timm", *timm_networks.BUILT, OURS)
SLOW_TO_BUILD = ("compile", "compile-max", "litert", "ncnn")
"""Engines that take up to minutes to compile or convert a network; they fold BatchNorms
themselves."""
FORMS = ("as is", "folded")
LONGEST_CALL = 1.0
"""Seconds."""
QUICK = (
    *("swiftformer_xs", "swiftformer_l1", "mobilenetv2_100", "mobilenetv4_conv_medium"),
    *("efficientformer_l1", "mobilevitv2_100", "fastvit_t8", "poolformer_s12"),
)
SHORT = ("swiftformer_xs", "swiftformer_l1")
SHORT_ENGINES = ("timm", "channels_last", OURS)


class Forms:
    """One network for images of one size, in its forms. They have the same weights."""

    def __init__(self, name: str, side: int) -> None:
        self.name, self.side = name, side
        # DeiT's position embedding has the size of the images.
        options = {"img_size": side} if name.startswith("deit") else {}
        self._model = timm_networks.make_model(name, **options)
        self._networks: dict[tuple[str, int], Network] = {}
        self._fused: dict[str, nn.Module | ValueError] = {}

    @functools.cached_property
    def _folded(self) -> nn.Module | None:
        return timm_networks.folded(self._model, torch.zeros(1, 3, self.side, self.side))

    def network(self, form: str, batch: int) -> Network | None:
        """The network and its images; None if it does not have the form."""
        model = self._model if form == FORMS[0] else self._folded
        if model is None:
            return None
        key = form, batch
        if key not in self._networks:
            first = self._networks.get((FORMS[0], batch))
            exact = first.exact if first else None
            self._networks[key] = Network(self.name, batch, self.side, model, exact)
        return self._networks[key]

    def fused(self, network: Network, form: str) -> nn.Module:
        """`fuse_for_inference` of a form.

        Raises:
            ValueError: nothing can be fused.
        """
        if form not in self._fused:
            try:
                self._fused[form] = swiftkernels.fuse_for_inference(network.model)
            except ValueError as error:
                self._fused[form] = error
        fused = self._fused[form]
        if isinstance(fused, ValueError):
            raise fused
        return fused


def measure(
    problem: Problem,
    forms: Forms,
    wanted: Iterable[tuple[str, str]],
    seconds: float,
    show: Callable[[str], None] = lambda _: None,
) -> tuple[list[Row], list[str]]:
    """Build, verify and time engines of forms; returns a row for each that works, and failures.

    That nothing of a network can be fused is no failure, unless it is a SwiftFormer.
    """
    chosen: dict[str, tuple[str, str, Network]] = {}
    for engine, form in wanted:
        if network := forms.network(form, problem.batch):
            if engine == OURS and not _fuses(forms, network, form):
                continue
            chosen[engine if form == FORMS[0] else f"{engine}, {form}"] = engine, form, network

    def make(label: str) -> tuple[Call, float]:
        engine, form, network = chosen[label]
        if engine == OURS:
            call = call_of(forms.fused(network, form), network.images)
        else:
            call = timm_networks.build(network, engine)
        return call, network.error(call)

    calls, errors, failures = timm_networks.build_all(chosen, make, show)
    show("timing")
    rows = []
    for label, row in timm_networks.time_all(calls, seconds).items():
        engine, form, network = chosen[label]
        common = timm_networks.problem_columns(network)
        row = {"network": network.name, "engine": engine, "form": form, **common, **row}
        rows.append({**row, "error": errors[label], **machine()})
    show("")
    return rows, failures


def _fuses(forms: Forms, network: Network, form: str) -> bool:
    if form == FORMS[0] and PUBLISHED[forms.name]["family"] == FAMILY:
        return True  # if not, it is a failure
    try:
        forms.fused(network, form)
    except ValueError:
        return False
    return True


def wanted(
    problem: Problem, engines: Sequence[str], rows: Iterable[Mapping[str, Any]], first: bool
) -> list[tuple[str, str]]:
    """The engines for a problem, each with the forms that it gets.

    Args:
        problem: what is timed.
        engines: those that can run.
        rows: what was measured before.
        first: whether the problem has the first batch and side.
    """
    found = []
    ours = PUBLISHED[problem.network]["family"] == FAMILY
    for engine in engines:
        if engine in SLOW_TO_BUILD:
            found += [(engine, FORMS[0])] if ours and first else []
            continue
        before = [
            row for row in rows if (row["network"], row["engine"]) == (problem.network, engine)
        ]
        if before:
            sizes = [networks.problem_of(row) for row in before]
            most = max(sizes, key=sizes.count)  # the one with all forms
            rivals = [row for row in before if networks.problem_of(row) == most]
            found.append((engine, min(rivals, key=networks.seconds_of)["form"]))
        else:
            found += [(engine, form) for form in FORMS]
    return found


def expected_seconds(problem: Problem, rows: Iterable[Mapping[str, Any]]) -> float:
    """Time of a call in the fastest engine, in proportion to the pixels; 0 if nothing is known."""
    rates = [
        min(engines.values()) / (other.batch * other.side**2)
        for other, engines in networks.times(rows).items()
        if (other.network, other.threads) == (problem.network, problem.threads)
    ]
    return min(rates, default=0.0) * problem.batch * problem.side**2


def why_skipped(problem: Problem, rows: Iterable[Mapping[str, Any]]) -> str:
    """Why a problem is left out; "" if it is not."""
    only = PUBLISHED[problem.network]["only_side"]
    if only and int(only) != problem.side:
        return f"it takes only images of {only} x {only} pixels"
    if (seconds := expected_seconds(problem, rows)) > LONGEST_CALL:
        return f"a call of the fastest engine could take {seconds:.1f} s"
    return ""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Times in ms: eager, the best of the compilers and runtimes, and fused."""
    lines = [["network", "top-1", "images", "threads", "eager", "best other", "", "fused", "gain"]]
    for problem, engines in networks.times(rows).items():
        eager, other, fused = networks.compared(engines)
        row = PUBLISHED[problem.network]
        size = f"{problem.batch} x {problem.side}²"
        ms = [f"{1e3 * engines[e]:.1f}" if e else "" for e in (eager, other, fused)]
        best = min((engines[e] for e in (eager, other) if e), default=0.0)
        gain = f"{best / engines[fused]:.2f} x" if fused and best else ""
        line = [row["name"], row["top1"], size, str(problem.threads), ms[0], ms[1], other, ms[2]]
        lines.append([*line, gain])
    return markdown_table(lines, texts=(0, 2, 6)) + (
        "\n\nMedians in ms. top-1: published in %, not measured. gain: fused against the best."
    )


def report(out: Path) -> None:
    """Print the table of the file, and draw the pictures."""
    print("\n" + table(read_csv(out / CSV)))
    try:
        from benchmarks import plots
    except ImportError as error:
        print(f"\nNo picture: {error}")
        return
    pictures = plots.draw_published(out, PUBLISHED)
    print(f"\nWritten: {', '.join(map(str, (out / CSV, *pictures)))}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, with the defaults of a short or quick run."""
    parser = command.Parser(
        prog="python -m benchmarks.published_networks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="eight networks, one image: under five minutes")
    short_help = "two SwiftFormers, one image, eager and fused: under a minute"
    add("--short", action="store_true", help=short_help)
    add("--networks", nargs="+", choices=PUBLISHED, metavar="NETWORK", help="(default: all)")
    add("--engines", nargs="+", choices=ENGINES, help="(default: all that are installed)")
    add("--batches", nargs="+", type=int, help="images (default: 1 16)")
    add("--sides", nargs="+", type=int, help="pixels of a side (default: 224 512)")
    add("--threads", nargs="+", type=int, default=[1], help="(default: 1)")
    add("--seconds", type=float, help="for the rounds of one size (default 3; quick, short 2)")
    add("--out", type=Path, default=Path("results"), help="folder to write to (%(default)s)")
    add("--resume", action="store_true", help="keep the rows of the file, measure what is missing")
    add("--report", action="store_true", help="measure nothing: print and draw the file")
    given = parser.parse_args(arguments)
    few = given.quick or given.short
    fast = [engine for engine in ENGINES if engine not in SLOW_TO_BUILD]
    given.networks = given.networks or (
        SHORT if given.short else QUICK if given.quick else tuple(PUBLISHED)
    )
    given.engines = given.engines or (SHORT_ENGINES if given.short else fast if few else ENGINES)
    given.batches = given.batches or ((1,) if few else (1, 16))
    given.sides = given.sides or ((224,) if few else (224, 512))
    given.seconds = (2.0 if few else 3.0) if given.seconds is None else given.seconds
    return given


def run(given: argparse.Namespace) -> list[str]:
    """Measure, and write the file after each problem; returns what failed."""
    path = given.out / CSV
    rows: list[Row] = [dict(row) for row in read_csv(path)] if given.resume else []
    done = set(networks.times(rows))
    problems = [
        Problem(name, "forward", batch, side, threads)
        for name in given.networks
        for side in given.sides
        for batch in given.batches
        for threads in given.threads
    ]
    engines = installed(given.engines)
    forms: Forms | None = None
    failures = []
    with Progress(len(problems), "sizes") as bar:
        for problem in problems:
            name, side = problem.network, problem.side
            bar.show(
                f"{name}, {problem.batch} x {side} x {side} pixels, threads: {problem.threads}"
            )
            if problem in done:
                bar.advance()
                continue
            if why := why_skipped(problem, rows):
                bar.write(f"{bar.text}: left out, {why}")
                bar.advance()
                continue
            if forms is None or (forms.name, forms.side) != (name, side):
                forms = Forms(name, side)
            torch.set_num_threads(problem.threads)
            first = (problem.batch, side) == (given.batches[0], given.sides[0])
            chosen = wanted(problem, engines, rows, first)
            found, failed = measure(problem, forms, chosen, given.seconds, bar.note)
            rows += found
            failures += failed
            for failure in failed:
                bar.write(f"{bar.text}: {failure}")
            best = networks.times(found).get(problem, {})
            ms = ", ".join(f"{engine} {1e3 * seconds:.1f}" for engine, seconds in best.items())
            bar.write(f"{bar.text}, ms: {ms}")
            write_csv(path, sorted(rows, key=_place), digits=6)
            bar.advance()
    return failures


def _place(row: Mapping[str, Any]) -> tuple[int, ...]:
    """The place of a row in the file, whatever was measured first."""
    problem = networks.problem_of(row)
    return list(PUBLISHED).index(problem.network), problem.side, problem.batch, problem.threads


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit status, 1 if an engine failed."""
    given = parse(arguments)
    failures = []
    if not given.report:
        make_folder("--out", given.out)
        try:
            failures = run(given)
        except KeyboardInterrupt as interruption:
            interruption.args = ("to measure what is missing, add --resume",)
            raise
    report(given.out)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(command.run(main))
