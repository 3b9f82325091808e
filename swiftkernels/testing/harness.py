"""The benchmark harness: build, verify and time engines on one problem.

Every engine is verified against float64 before it is timed; an engine with a wrong result is not
timed. The engines of one problem are timed in turn.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import product
from typing import Any

import torch
from torch import Tensor

from swiftkernels.backends import devices
from swiftkernels.backends.cpu import library
from swiftkernels.ops.benchmark import Size
from swiftkernels.testing import costs, timing
from swiftkernels.testing.engines import ENGINES, LONGEST_CALL, OURS, Call, Engine, Problem
from swiftkernels.testing.timing import Stopwatch, interleave
from swiftkernels.testing.tolerance import relative_errors
from swiftkernels.utils.progress import Progress
from swiftkernels.utils.text import first_line

COLUMNS = (
    "started",  # time of the comparison: rows that were measured in turn have the same
    "shape",  # stages of networks with this size
    "tokens",
    "width",
    "batch",
    "threads",  # on a CPU
    "dtype",
    "direction",
    "engine",
    "backend",  # of this library's engine
    "median_seconds",  # as called
    "min_seconds",
    "spread_seconds",  # interquartile range
    "rounds",
    "graph_median_seconds",  # in a CUDA graph
    "graph_min_seconds",
    "graph_spread_seconds",
    "graph_rounds",
    "ratio_to_eager",
    "peak_bytes",  # on GPUs: beyond what was allocated before, with outputs and gradients
    "least_bytes",  # of inputs, outputs, weights and their gradients, each counted once
    "gigabytes_per_second",  # least_bytes / time in the graph or, without a graph, as called
    "error",  # of the output, relative, against float64
    "gradient_error",  # the largest of all gradients
    "note",  # why there is no time, or no graph
    "device",
    "clock",
    "torch",
    "onnxruntime",
    "openvino",
    "isa",  # of this library's CPU kernels
)

WRONG, FAILED, ABSENT = "wrong", "failed", "absent"
"""First words of the notes on engines without a time. The first two are errors."""
NO_GRAPH = "no graph: "

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What one run of a command measures."""

    engines: tuple[str, ...]
    """Keys of `ENGINES`."""
    inputs: tuple[tuple[Size, int], ...]
    """Sizes and batches."""
    dtypes: tuple[torch.dtype, ...]
    backward: tuple[bool, ...] = (False,)
    threads: tuple[int, ...] = (1,)
    """On a CPU."""
    seconds: float = 1.0
    """For the timing of one problem."""

    def problems(self) -> list[tuple[torch.dtype, bool, Size, int]]:
        """Dtype, whether with a backward, size and batch."""
        combined = product(self.dtypes, self.backward, self.inputs)
        return [(dtype, backward, *sized) for dtype, backward, sized in combined]


def measure(
    settings: Settings,
    watch: Stopwatch,
    backend: str = "auto",
    tokens: Callable[[Size, int, torch.dtype], Tensor | None] = lambda *_: None,
) -> Iterator[list[Row]]:
    """Compare the engines on one problem after another, and show the progress.

    Args:
        settings: what to measure.
        watch: of the device to measure on.
        backend: of the operator.
        tokens: makes the input from size, batch and dtype; None for a random one.

    Yields:
        The rows of one comparison.
    """
    problems = settings.problems()
    threads = settings.threads if watch.device.type == "cpu" else (torch.get_num_threads(),)
    before = torch.get_num_threads()
    with Progress(len(problems) * len(threads), "comparisons") as bar:
        try:
            for dtype, backward, size, batch in problems:
                problem = Problem(
                    size, batch, dtype, backward, watch.device,
                    tokens=tokens(size, batch, dtype), backend=backend,
                )  # fmt: skip
                for count in threads:
                    torch.set_num_threads(count)
                    bar.show(label(common_columns(problem)))
                    rows = compare(problem, settings.engines, watch, settings.seconds, bar.note)
                    for row in rows:
                        if row["note"]:
                            bar.write(message(row))
                    yield rows
                    bar.advance()
        finally:
            torch.set_num_threads(before)


def direction_name(backward: bool) -> str:
    return "forward+backward" if backward else "forward"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare(
    problem: Problem,
    engines: Sequence[str],
    watch: Stopwatch,
    seconds: float,
    show: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Build, verify and time the engines on one problem.

    Args:
        problem: what they compute.
        engines: keys of `ENGINES`.
        watch: of the problem's device.
        seconds: for the timing; once more for the timing in graphs.
        show: gets the name of the engine that is being built.

    Returns:
        A row with `COLUMNS` for each engine.
    """
    torch.compiler.reset()  # old graphs would count for the limit of recompilations
    gc.collect()
    common = common_columns(problem)
    rows = {name: common | {"engine": name} for name in engines}
    calls: dict[str, Call] = {}
    graphs: dict[str, Call] = {}
    with torch.set_grad_enabled(problem.backward):
        for name, row in rows.items():
            show(name)
            call = _try_build(problem, name, row, watch)
            if call is None:
                continue
            calls[name] = call
            if problem.device.type != "cpu":
                row["peak_bytes"] = costs.peak_bytes(call, problem.device)
            if problem.device.type == "cuda" and (graph := _try_capture(problem, row, call)):
                graphs[name] = graph
        show("timing")
        time_calls(rows, calls, watch, seconds)
        time_calls(rows, graphs, functools.partial(watch, queued=True), seconds, "graph_")
    show("")
    return list(rows.values())


def common_columns(problem: Problem) -> Row:
    """A row with the columns that all engines of a problem share; the others are ""."""
    on_cpu = problem.device.type == "cpu"
    return dict.fromkeys(COLUMNS, "") | {
        "started": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "shape": problem.size.name,
        "tokens": problem.size.tokens,
        "width": problem.size.width,
        "batch": problem.batch,
        "threads": torch.get_num_threads() if on_cpu else "",
        "dtype": dtype_name(problem.dtype),
        "direction": direction_name(problem.backward),
        "device": devices.name(problem.device),
        "clock": timing.clock_name(problem.device) if on_cpu else "device time",
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime"),
        "openvino": version("openvino"),
        "isa": isa() if on_cpu else "",
    }


def _try_build(problem: Problem, name: str, row: Row, watch: Stopwatch) -> Call | None:
    """The engine's call if it is right and fast enough; else None, with the reason in the row."""
    engine = ENGINES[name]
    if engine.too_slow(problem):
        row["note"] = f"{ABSENT}: a call could take more than {LONGEST_CALL:g} s"
        return None
    try:
        module = problem.module(engine.layer)
        row["least_bytes"] = problem.least_bytes(module)
        if name == OURS:
            operator = problem.benchmark.operator
            width = problem.size.width
            row["backend"] = operator.choose_backend(problem.backend, problem.x, width)
        call = engine.build(problem, module)
        row["note"] = check(problem, engine, call(), row)
        if not row["note"] and (took := watch(call)) > LONGEST_CALL:
            row["note"] = f"{ABSENT}: a call takes {took:.1f} s"
    except Exception as error:  # a compiler that fails, or too little memory, is a result
        row["note"] = f"{FAILED if engine.fused else ABSENT}: {first_line(error)}"
    return None if row["note"] else call


def _try_capture(problem: Problem, row: Row, call: Call) -> Call | None:
    """The call as a CUDA graph; None if there is none, with the reason in the row."""
    try:
        graph: Call = timing.capture(call)
        wrong = check(problem, ENGINES[row["engine"]], graph(), row)
    except Exception as error:
        wrong = first_line(error)
    row["note"] = NO_GRAPH + wrong if wrong else ""
    return None if wrong else graph


def time_calls(
    rows: Mapping[str, Row],
    calls: Mapping[str, Call],
    clock: Callable[[Call], float],
    seconds: float,
    prefix: str = "",
) -> None:
    """Time the calls in turn, and write their times into the rows of the same names."""
    timings = interleave(calls, clock, seconds)
    for name, own in timings.items():
        row = rows[name]
        row |= own.columns(prefix)
        row[f"{prefix}rounds"] = len(own.samples)
        row["gigabytes_per_second"] = row["least_bytes"] / own.median / 1e9
        if not prefix and "eager" in timings:
            row["ratio_to_eager"] = own.median / timings["eager"].median


def check(problem: Problem, engine: Engine, results: Sequence[Tensor], row: Row) -> str:
    """Write an engine's errors into the row; returns the largest violation, or ""."""
    names = ["output"]
    if problem.backward:
        parameters = dict(problem.module(engine.layer).named_parameters())
        names += [f"gradient of {name}" for name in ("x", *parameters)]
    errors, bounds = relative_errors(results, engine.exact(problem)), engine.bounds(problem)
    row["error"], row["gradient_error"] = errors[0], max(errors[1:], default="")
    checked = zip(names, errors, bounds, strict=True)
    # `not e <= b` is true for NaN.
    found = [(e / b, name, e, b) for name, e, b in checked if not e <= b]
    if not found:
        return ""
    _, name, error, bound = max(found)
    return f"{WRONG}: relative error of the {name} {error:.2g} > {bound:.2g}"


def is_error(row: Row) -> bool:
    """Whether the engine of a row is wrong, or a kernel of this library raised an error."""
    return str(row["note"]).removeprefix(NO_GRAPH).startswith((WRONG, FAILED))


def message(row: Row) -> str:
    """The note of a row, with its engine and problem."""
    return f"{row['engine']}, {label(row)}: {row['note']}"


def version(package: str) -> str:
    """The version of a package; "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def isa() -> str:
    """The instruction set of the CPU kernels in use; "" if there are none."""
    kernels = library.loaded()
    return kernels.name if kernels else ""


def label(row: Row) -> str:
    """The problem of a row, for messages."""
    size = f"N={row['tokens']}, C={row['width']}"
    name = f"{row['shape']} ({size})" if row["shape"] else size
    threads = f", {row['threads']} thread(s)" if row["threads"] else ""
    return f"{row['dtype']} {row['direction']}, {name}, batch {row['batch']}{threads}"
