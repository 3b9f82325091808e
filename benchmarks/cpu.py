"""Additive attention on a CPU: the operator beside eager PyTorch, compilers, runtimes and peers.

`python -m benchmarks.cpu` verifies every engine against float64, times them in turn at the shapes
of SwiftFormers, appends to cpu.csv as it goes, prints the speed-ups and draws them. With one thread
the clock is the process's time, with more it is wall time, and every turn begins with a rest.
ONNX Runtime and OpenVINO are optional; inputs, outputs and weights are the same for all.
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory, plots, timing
from benchmarks.engines import (
    ENGINES,
    LARGE_SIZES,
    LONGEST_CALL,
    STAGE_SIZES,
    Call,
    Problem,
    Size,
    isa,
    too_slow,
    version,
)
from benchmarks.speedups import OURS, speedups, table
from benchmarks.tradeoff import positive
from swiftkernels.testing.peers import PEERS
from swiftkernels.utils.files import rounded, write_csv
from swiftkernels.utils.progress import Progress, track

MEMORY_CSV = "cpu_memory.csv"
DTYPES = ("float32", "bfloat16")
REST = 0.02
"""Seconds before a turn with several threads: OpenMP's wait in a loop for about half of that."""

QUICK = ("XS-1/S-1/L1-1", "XS-3", "XS-4")
MEMORY_SHAPES = ((32, 3136, 48), (32, 784, 128), (1, 65536, 64))
"""Batch, tokens, width."""

COLUMNS = (
    "started",  # of the comparison: rows measured side by side have it in common
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
    "error",  # of the output, relative, against float64
    "gradient_error",  # the largest of all gradients
    "note",  # why there is no time
    "device",
    "clock",
    "torch",
    "onnxruntime",
    "openvino",
    "isa",
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What one run of the command does."""

    engines: tuple[str, ...]
    out: Path
    sizes: tuple[Size, ...] = (*STAGE_SIZES, *LARGE_SIZES)
    batches: tuple[int, ...] = (1, 32)
    threads: tuple[int, ...] = (1,)
    dtype: str = "float32"
    backward: bool = False
    seconds: float = 5.0
    """Time for the rounds of one comparison."""
    memory: bool = False
    """Measure memory instead of time."""
    report: bool = False
    """Measure nothing: table and plots of what was measured."""

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def direction(self) -> str:
        return "forward+backward" if self.backward else "forward"

    def problems(self) -> list[tuple[Size, int]]:
        """Every size and batch; the large ones at batch 1, if that is among the batches."""
        return [
            (size, batch)
            for batch in self.batches
            for size in self.sizes
            if batch == 1 or size.stage is not None
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
    problems = settings.problems()
    before = torch.get_num_threads()
    with Progress(len(problems) * len(settings.threads), "comparisons") as bar:
        try:
            for comparison in compare_all(settings, bar):
                append_rows(path, comparison)
                rows += comparison
                for row in comparison:
                    if row["note"]:
                        message = f"{row['engine']}, {_where(row)}: {row['note']}"
                        bar.write(message)
                        if row["note"].startswith("wrong"):
                            wrong.append(message)
                bar.advance()
        finally:
            torch.set_num_threads(before)
    report(settings.out, rows)
    return wrong


def report(out: Path, rows: Sequence[Row]) -> None:
    """Print the table of these rows and draw the plots of all in the file."""
    found = speedups(rows)
    if not found:
        print(f"\nNo speed-ups: they need {OURS} and another engine, side by side.")
        return
    print("\n" + table(found))
    images = plots.draw_cpu(out)
    print("\nWritten: " + ", ".join(str(file) for file in (out / plots.CPU_CSV, *images)))


def compare_all(settings: Settings, bar: Progress) -> Iterator[list[Row]]:
    """The rows of one comparison after the other; `bar` shows what is going on."""
    for size, batch in settings.problems():
        with torch.set_grad_enabled(settings.backward):
            problem = Problem(size, batch, settings.torch_dtype, settings.backward)
            for threads in settings.threads:
                bar.show(f"{size.name}, batch {batch}, {threads} thread(s)")
                torch.set_num_threads(threads)
                yield compare(problem, threads, settings, bar)


def compare(problem: Problem, threads: int, settings: Settings, bar: Progress) -> list[Row]:
    """Build, verify and time the engines on one problem: a row each."""
    torch.compiler.reset()  # old graphs would use up the limit of recompilations
    gc.collect()
    common = {
        "started": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "shape": problem.size.name,
        "tokens": problem.size.tokens,
        "width": problem.size.width,
        "batch": problem.batch,
        "threads": threads,
        "dtype": settings.dtype,
        "direction": settings.direction,
    }
    machine = {
        "device": timing.device_name("cpu"),
        "clock": timing.clock_name("cpu"),
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime"),
        "openvino": version("openvino"),
        "isa": isa(),
    }
    calls: dict[str, Call] = {}
    rows = []
    for engine in settings.engines:
        bar.note(engine)
        row: Row = dict.fromkeys(COLUMNS, "") | common | {"engine": engine} | machine
        rows.append(row)
        if too_slow(engine, problem):
            row["note"] = f"absent: a call could take more than {LONGEST_CALL:g} s"
            continue
        try:
            call = ENGINES[engine].build(problem, threads)
            results = call()
        except Exception as error:
            if engine in (OURS, "eager", *PEERS):
                raise
            # A compiler or runtime that fails on a model is a finding.
            row["note"] = f"absent: {first_line(error)}"
            continue
        errors, bounds = problem.errors(engine, results), problem.bounds(engine)
        row["error"] = errors[0]
        row["gradient_error"] = max(errors[1:], default="")
        # Written so that a NaN is wrong.
        if all(error <= bound for error, bound in zip(errors, bounds, strict=True)):
            calls[engine] = call
        else:
            row["note"] = wrong_note(errors, bounds)
    bar.note("timing")
    timings = timing.interleave(calls, "cpu", settings.seconds, rest=REST if threads > 1 else 0.0)
    for row in rows:
        if row["engine"] in timings:
            own = timings[row["engine"]]
            row["median_seconds"] = own.median
            row["min_seconds"] = own.minimum
            row["spread_seconds"] = own.spread
            row["rounds"] = len(own.samples)
            if "eager" in timings:
                row["ratio_to_eager"] = own.median / timings["eager"].median
    bar.note("")
    return rows


def wrong_note(errors: Sequence[float], bounds: Sequence[float]) -> str:
    """The largest error in units of its bound."""
    pairs = [pair for pair in zip(errors, bounds, strict=True) if not pair[0] <= pair[1]]
    error, bound = max(pairs, key=lambda pair: pair[0] / pair[1])
    return f"wrong: relative error {error:.2g} > {bound:.2g}"


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {lines[0]}" if lines else "")


def _where(row: Row) -> str:
    return (
        f"{row['shape']} (N={row['tokens']}, C={row['width']}), batch {row['batch']}, "
        f"{row['threads']} thread(s)"
    )


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
    """Append to the CSV file, which gets its header with its first rows."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(map(rounded, rows))


def read_rows(path: Path) -> list[Row]:
    """What `append_rows` wrote.

    Raises:
        ValueError: there is nothing.
    """
    check_columns(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing; nothing was measured yet.")
    with path.open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def measure_memory(settings: Settings) -> list[Row]:
    """A row for each engine, shape and direction."""
    shapes = MEMORY_SHAPES[-1:] if settings.sizes != Settings.sizes else MEMORY_SHAPES
    cases = [
        memory.Case(engine, settings.dtype, direction, *shape, threads)
        for shape in shapes
        for threads in settings.threads
        for direction in ("forward", "forward+backward")
        for engine in settings.engines
    ]
    machine = {"torch": torch.__version__, "isa": isa()}
    return [memory.measure(case) | machine for case in track(cases, "cases")]


def memory_table(rows: Sequence[Row]) -> str:
    """Peaks in units of the bytes of x."""
    lines = [
        f"{'engine':<14}{'direction':<18}{'batch':>6}{'N':>8}{'C':>6}{'threads':>9}{'peak / x':>10}"
    ]
    lines += [
        f"{r['engine']:<14}{r['direction']:<18}{r['batch']:>6}{r['tokens']:>8}{r['width']:>6}"
        f"{r['threads']:>9}{r['peak_in_x']:>10.2f}"
        for r in rows
    ]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """The settings that the command line asks for; wrong ones end the program with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a look at it: three shapes, less time for each")
    add(
        "--engines",
        nargs="+",
        choices=ENGINES,
        metavar="ENGINE",
        help=f"of {', '.join(ENGINES)} (default: all for float32 forward; the operator, eager and, "
        "in float32, compile with --backward; the operator and eager for bfloat16)",
    )
    add("--batch", type=positive, nargs="+", help="batch sizes (default: 1 32)")
    add("--threads", type=positive, nargs="+", default=[1], help="one or several (default: 1)")
    add("--dtype", choices=DTYPES, default="float32", help="of tokens and weights (%(default)s)")
    add("--backward", action="store_true", help="time the forward and the backward together")
    add("--seconds", type=_seconds, help="for one comparison (default 5; quick 1)")
    add("--memory", action="store_true", help="measure peak memory, not time")
    add("--report", action="store_true", help="measure nothing: print and draw what is in the file")
    add("--out", type=Path, default=Path("results"), help="folder to write to (%(default)s)")
    given = parser.parse_args(arguments)
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out must be a folder; {given.out} is a file.")
    if given.memory:
        given.engines = given.engines or [OURS, "eager"]
        if given.backward:
            parser.error("--memory measures both directions; leave --backward out.")
    sizes = Settings.sizes
    if given.quick:
        sizes = tuple(size for size in sizes if size.name in QUICK)
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
    return (OURS, "eager", "compile") if backward else tuple(ENGINES)


def _engines(parser: argparse.ArgumentParser, given: argparse.Namespace) -> tuple[str, ...]:
    engines = tuple(dict.fromkeys(given.engines or default_engines(given.dtype, given.backward)))
    dtype = getattr(torch, given.dtype)
    unable = [e for e in engines if not ENGINES[e].supports(dtype, given.backward)]
    if given.memory:
        unable += [e for e in engines if e not in (OURS, "eager", "published", *PEERS)]
    if unable:
        what = "--memory" if given.memory else f"{given.dtype}{' --backward' * given.backward}"
        parser.error(f"--engines: {what} does not go with {', '.join(unable)}.")
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
            write_csv(settings.out / MEMORY_CSV, rows, digits=6)
            print(memory_table(rows))
            print(f"\nWritten: {settings.out / MEMORY_CSV}")
            return
        wrong = run(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        kept = "nothing was written" if settings.memory else "the CSV file has what was measured"
        sys.exit(f"\ninterrupted; {kept}")
    if wrong:
        sys.exit("\nNot timed, because wrong:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
