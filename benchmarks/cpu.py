"""Additive attention on a CPU, next to eager PyTorch, compilers, runtimes and other attentions.

`python -m benchmarks.cpu` verifies every engine against float64, times them in turn at the shapes
of SwiftFormers, appends to cpu.csv after every shape, prints the speed-ups and draws them. The
clock is the process time with one thread, else wall time. ONNX Runtime and OpenVINO are optional;
inputs, outputs and weights are the same for all.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory, plots
from benchmarks.tradeoff import positive
from benchmarks.workloads import size_tokens
from swiftkernels.ops.additive_attention.benchmark import BENCHMARK as ADDITIVE_ATTENTION
from swiftkernels.ops.benchmark import Size
from swiftkernels.testing import harness
from swiftkernels.testing.engines import COMPARED_PEERS, ENGINES, OURS
from swiftkernels.testing.harness import Row
from swiftkernels.testing.peers import PEERS
from swiftkernels.testing.ratios import ratio_table, speedups
from swiftkernels.testing.timing import Stopwatch
from swiftkernels.utils import command
from swiftkernels.utils.files import append_csv, make_folder, write_csv
from swiftkernels.utils.progress import track

DTYPES = ("float32", "bfloat16")

LARGE_SIZES = (Size(65536, 64, "long"), Size(4096, 512, "wide"))
"""Inputs larger than in SwiftFormers: many narrow tokens, and wide tokens. Batch 1 only."""

MEMORY_SHAPES = ((32, 3136, 48), (32, 784, 128), (1, 65536, 64))
"""Batch, tokens, width."""

COLUMNS = (
    "started", "shape", "tokens", "width", "batch", "threads", "dtype", "direction", "engine",
    "median_seconds", "min_seconds", "spread_seconds", "rounds", "ratio_to_eager", "error",
    "gradient_error", "note", "device", "clock", "torch", "onnxruntime", "openvino", "isa",
)  # fmt: skip
"""The columns of cpu.csv; `harness.COLUMNS` explains them."""


def run(settings: harness.Settings, out: Path) -> list[str]:
    """Measure, write, print and draw; returns the errors, with engine and problem."""
    make_folder("--out", out)
    path = out / plots.CPU_CSV
    check_columns(path)
    rows: list[Row] = []
    for comparison in harness.measure(settings, Stopwatch("cpu"), "cpu", size_tokens):
        append_csv(path, comparison, COLUMNS)
        rows += comparison
    report(out, rows)
    return [harness.message(row) for row in rows if harness.is_error(row)]


def report(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of these rows and draw the plots of all rows in the file."""
    found = speedups(rows)
    if not found:
        print(f"\nNo speed-ups: they need {OURS} and another engine in one comparison.")
        return
    print("\n" + ratio_table(found))
    images = plots.draw_cpu(out)
    print("\nWritten: " + ", ".join(str(file) for file in (out / plots.CPU_CSV, *images)))


def check_columns(path: Path) -> None:
    """Check that rows can be appended to the file.

    Raises:
        ValueError: the file has other columns.
    """
    if path.exists():
        with path.open(newline="") as file:
            header = next(csv.reader(file), None)
        if header is not None and tuple(header) != COLUMNS:
            raise ValueError(f"{path} has other columns; remove it or choose another --out.")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of the CSV file.

    Raises:
        ValueError: there are no rows, or the file has other columns.
    """
    check_columns(path)
    return plots.read(path, "benchmarks.cpu")


def measure_memory(settings: harness.Settings, quick: bool) -> list[Row]:
    """A row for each engine, shape and direction."""
    cases = [
        memory.Case(engine, harness.dtype_name(dtype), direction, *shape, threads)
        for shape in (MEMORY_SHAPES[-1:] if quick else MEMORY_SHAPES)
        for threads in settings.threads
        for direction in ("forward", "forward+backward")
        for engine in settings.engines
        for dtype in settings.dtypes
    ]
    return [memory.measure(case) for case in track(cases, "cases")]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, with `settings`; wrong arguments end the program with a message."""
    parser = command.Parser(
        prog="python -m benchmarks.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a short run: three shapes, less time for each")
    add(
        "--engines",
        nargs="+",
        choices=ENGINES,
        metavar="ENGINE",
        help=f"of {', '.join(ENGINES)} (default: all but mdta and fastformer for float32 forward; "
        "the operator, eager and, in float32, compile with --backward; the operator and eager for "
        "bfloat16)",
    )
    add("--batch", type=positive, nargs="+", help="batch sizes (default: 1 32)")
    add("--threads", type=positive, nargs="+", default=[1], help="one or several (default: 1)")
    add("--dtype", choices=DTYPES, default="float32", help="of tokens and weights (%(default)s)")
    add("--backward", action="store_true", help="time the forward and the backward together")
    add("--seconds", type=_seconds, help="for one comparison (default 5; quick 1)")
    add("--memory", action="store_true", help="measure peak memory, not time")
    add("--report", action="store_true", help="measure nothing: print and draw the file's rows")
    add("--out", type=Path, default=Path("results"), help="folder to write to (%(default)s)")
    given = parser.parse_args(arguments)
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out must be a folder; {given.out} is a file.")
    if given.memory:
        given.engines = given.engines or [OURS, "eager"]
        if given.backward:
            parser.error("--memory measures both directions; remove --backward.")
    batches = tuple(dict.fromkeys(given.batch or (1, 32)))
    sizes = ADDITIVE_ATTENTION.quick_sizes if given.quick else ADDITIVE_ATTENTION.sizes
    inputs = [(size, batch) for batch in batches for size in sizes]
    if 1 in batches and not given.quick:
        inputs += [(size, 1) for size in LARGE_SIZES]
    given.settings = harness.Settings(
        engines=_engines(parser, given),
        inputs=tuple(inputs),
        dtypes=(getattr(torch, given.dtype),),
        backward=(given.backward,),
        threads=tuple(dict.fromkeys(given.threads)),
        seconds=given.seconds or (1.0 if given.quick else 5.0),
    )
    return given


def default_engines(dtype: str, backward: bool) -> tuple[str, ...]:
    """The engines that are measured by default."""
    if dtype != "float32":
        return OURS, "eager"
    if backward:
        return OURS, "eager", "compile"
    return tuple(name for name in ENGINES if name not in PEERS or name in COMPARED_PEERS)


def _engines(parser: argparse.ArgumentParser, given: argparse.Namespace) -> tuple[str, ...]:
    engines = tuple(dict.fromkeys(given.engines or default_engines(given.dtype, given.backward)))
    dtype = getattr(torch, given.dtype)
    unable = [e for e in engines if not ENGINES[e].supports(dtype, given.backward)]
    if given.memory:
        unable += [e for e in engines if not memory.supports(e)]
    if unable:
        what = "--memory" if given.memory else f"{given.dtype}{' --backward' * given.backward}"
        parser.error(f"--engines: {', '.join(unable)} cannot be measured with {what}.")
    present = []
    for engine in engines:
        missing = ENGINES[engine].missing()
        if missing:
            print(f"Without {engine}. To add it: pip install {' '.join(missing)}", file=sys.stderr)
        else:
            present.append(engine)
    return tuple(present)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0; got {text!r}")
    return seconds


def main() -> int:
    """Measure, or report; returns the exit status, 1 if an engine was wrong."""
    given = parse()
    if given.report:
        report(given.out, read_rows(given.out / plots.CPU_CSV))
        return 0
    if given.memory:
        rows = measure_memory(given.settings, given.quick)
        make_folder("--out", given.out)
        write_csv(given.out / memory.CSV, rows, digits=6)
        print(f"{memory.table(rows)}\n\nWritten: {given.out / memory.CSV}")
        return 0
    wrong = run(given.settings, given.out)
    if wrong:
        print("\nNot timed, because wrong:", *wrong, sep="\n", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(command.run(main))
