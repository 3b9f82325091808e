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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import memory, plots
from benchmarks.tradeoff import positive
from benchmarks.workloads import size_tokens
from swiftkernels.testing import harness
from swiftkernels.testing.engines import COMPARED_PEERS, ENGINES, OURS, Problem
from swiftkernels.testing.harness import Row
from swiftkernels.testing.operators import ADDITIVE_ATTENTION, Size
from swiftkernels.testing.peers import PEERS
from swiftkernels.testing.ratios import ratio_table, speedups
from swiftkernels.testing.timing import Stopwatch
from swiftkernels.utils.files import rounded, write_csv
from swiftkernels.utils.progress import Progress, track

DTYPES = ("float32", "bfloat16")

LARGE_SIZES = (Size(65536, 64, "long"), Size(4096, 512, "wide"))
"""Beyond SwiftFormer's images: many narrow tokens, and wide ones. Batch 1 only."""
SIZES = (*ADDITIVE_ATTENTION.sizes, *LARGE_SIZES)

MEMORY_SHAPES = ((32, 3136, 48), (32, 784, 128), (1, 65536, 64))
"""Batch, tokens, width."""

COLUMNS = (
    "started",
    "shape",
    "tokens",
    "width",
    "batch",
    "threads",
    "dtype",
    "direction",
    "engine",
    "median_seconds",
    "min_seconds",
    "spread_seconds",
    "rounds",
    "ratio_to_eager",
    "error",
    "gradient_error",
    "note",
    "device",
    "clock",
    "torch",
    "onnxruntime",
    "openvino",
    "isa",
)
"""Of cpu.csv; `harness.COLUMNS` explains them."""


@dataclass(frozen=True)
class Settings:
    """What one run of the command does."""

    engines: tuple[str, ...]
    out: Path
    sizes: tuple[Size, ...] = SIZES
    batches: tuple[int, ...] = (1, 32)
    threads: tuple[int, ...] = (1,)
    dtype: str = "float32"
    backward: bool = False
    seconds: float = 5.0
    """For the timing of one problem."""
    memory: bool = False
    """Measure memory instead of time."""
    report: bool = False
    """Measure nothing: table and plots of the rows in the file."""

    def problems(self) -> list[tuple[Size, int]]:
        """Every size and batch; the large sizes at batch 1, if that is among the batches."""
        return [
            (size, batch)
            for batch in self.batches
            for size in self.sizes
            if batch == 1 or size not in LARGE_SIZES
        ]


def run(settings: Settings) -> list[str]:
    """Measure, write, print and draw; returns the engines that were wrong, and where."""
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / plots.CPU_CSV
    if settings.report:
        report(settings.out, read_rows(path))
        return []
    check_columns(path)
    rows: list[Row] = []
    wrong = []
    before = torch.get_num_threads()
    with Progress(len(settings.problems()) * len(settings.threads), "comparisons") as bar:
        try:
            for comparison in compare_all(settings, bar):
                append_rows(path, comparison)
                rows += comparison
                for row in comparison:
                    if row["note"]:
                        message = f"{row['engine']}, {harness.label(row)}: {row['note']}"
                        bar.write(message)
                        if harness.is_error(row):
                            wrong.append(message)
                bar.advance()
        finally:
            torch.set_num_threads(before)
    report(settings.out, rows)
    return wrong


def report(out: Path, rows: Sequence[Row]) -> None:
    """Print the table of these rows and draw the plots of all rows in the file."""
    found = speedups(rows)
    if not found:
        print(f"\nNo speed-ups: they need {OURS} and another engine in one comparison.")
        return
    print("\n" + ratio_table(found))
    images = plots.draw_cpu(out)
    print("\nWritten: " + ", ".join(str(file) for file in (out / plots.CPU_CSV, *images)))


def compare_all(settings: Settings, bar: Progress) -> Iterator[list[Row]]:
    """The rows of one comparison after the other; `bar` shows which one runs."""
    dtype = getattr(torch, settings.dtype)
    watch = Stopwatch("cpu")
    for size, batch in settings.problems():
        tokens = size_tokens(size, batch, dtype)
        problem = Problem(size, batch, dtype, settings.backward, tokens=tokens, backend="cpu")
        for threads in settings.threads:
            bar.show(f"{size.name}, batch {batch}, {threads} thread(s)")
            torch.set_num_threads(threads)
            yield harness.compare(problem, settings.engines, watch, settings.seconds, bar.note)


def check_columns(path: Path) -> None:
    """Rows can only be appended to a file with the same columns.

    Raises:
        ValueError: the file has others.
    """
    if path.exists():
        with path.open(newline="") as file:
            header = next(csv.reader(file), None)
        if header is not None and tuple(header) != COLUMNS:
            raise ValueError(f"{path} has other columns; remove it or choose another --out.")


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append to the CSV file, after the header if the file is new."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(map(rounded, rows))


def read_rows(path: Path) -> list[Row]:
    """The rows of the CSV file.

    Raises:
        ValueError: there is no file, or it has other columns.
    """
    check_columns(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing; nothing was measured yet.")
    with path.open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def measure_memory(settings: Settings) -> list[Row]:
    """A row for each engine, shape and direction."""
    shapes = MEMORY_SHAPES if settings.sizes == SIZES else MEMORY_SHAPES[-1:]
    cases = [
        memory.Case(engine, settings.dtype, direction, *shape, threads)
        for shape in shapes
        for threads in settings.threads
        for direction in ("forward", "forward+backward")
        for engine in settings.engines
    ]
    return [memory.measure(case) for case in track(cases, "cases")]


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """The settings that the command line asks for; wrong ones end the program with a message."""
    parser = argparse.ArgumentParser(
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
    sizes = ADDITIVE_ATTENTION.quick_sizes if given.quick else SIZES
    return Settings(
        engines=_engines(parser, given),
        out=given.out,
        sizes=sizes,
        batches=tuple(dict.fromkeys(given.batch or (1, 32))),
        threads=tuple(dict.fromkeys(given.threads)),
        dtype=given.dtype,
        backward=given.backward,
        seconds=given.seconds or (1.0 if given.quick else 5.0),
        memory=given.memory,
        report=given.report,
    )


def default_engines(dtype: str, backward: bool) -> tuple[str, ...]:
    """What is measured unless engines are named."""
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


def main() -> None:
    settings = parse()
    try:
        if settings.memory:
            rows = measure_memory(settings)
            settings.out.mkdir(parents=True, exist_ok=True)
            write_csv(settings.out / memory.CSV, rows, digits=6)
            print(memory.table(rows))
            print(f"\nWritten: {settings.out / memory.CSV}")
            return
        wrong = run(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        kept = "nothing was written" if settings.memory else "the CSV file has the rows so far"
        sys.exit(f"\ninterrupted; {kept}")
    if wrong:
        sys.exit("\nNot timed, because wrong:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
