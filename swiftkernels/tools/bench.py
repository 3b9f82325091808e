"""`swiftkernels bench`: the operator beside others on the user's own device, and a report to send.

Every engine is verified before it is timed, and what is wrong is not timed. The engines of one
problem are timed in turn, in an order shuffled anew for every round.

* On a GPU a time lies between two events. As called: the device is idle before, so that the time in
  which the host launches kernels counts. In a CUDA graph: the kernels alone. The caches are flushed
  before every sample.
* On a CPU with one thread it is the time of the process, which other programs disturb least; with
  several, wall time.
"""

from __future__ import annotations

import functools
import gc
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import swiftkernels
from swiftkernels.backends import devices
from swiftkernels.ops.additive_attention.layer import AdditiveAttention
from swiftkernels.ops.additive_attention.op import SELF_ATTENTION
from swiftkernels.testing.peers import PEERS
from swiftkernels.tools.verify import budget, relative_error
from swiftkernels.utils.files import save_figure, write_csv, write_text
from swiftkernels.utils.progress import Progress

OURS = "swiftkernels"
WRONG, FAILED = "wrong", "failed"
"""How notes begin that make the command fail."""
NO_GRAPH = "no graph: "
COMPARED = ("mhsa", "separable", "xca", "linear")
"""Some of `swiftkernels.testing.peers`."""

WIDTHS = {
    "XS": (48, 56, 112, 220),
    "S": (48, 64, 168, 224),
    "L1": (48, 96, 192, 384),
    "L3": (64, 128, 320, 512),
}
"""Width of each of a SwiftFormer's four stages, of 3136, 784, 196 and 49 tokens."""

QUICK_SIZES = ((3136, 48), (196, 112), (49, 220))
"""Tokens and width."""

CSV = "bench.csv"
PLOT = "bench.png"
REPORT = "bench.md"

SLOWEST_CALL = 3.0
"""Seconds: what takes longer is left out."""
FLUSH_BYTES = 512 << 20
"""More than any GPU's caches: 256 MiB in an MI300X."""
COPY_BYTES = {"cuda": 256 << 20, "xpu": 256 << 20, "cpu": 64 << 20}
EXACT_SCORES = 1 << 24
"""Scores N x N of the items that are computed in float64 at once, at most."""
STEPS = 16
"""More roundings in a row than any of the layers makes."""

COLUMNS = (
    "tokens",
    "width",
    "batch",
    "dtype",
    "direction",
    "engine",
    "backend",  # of ours
    "median_seconds",  # as called
    "min_seconds",
    "spread_seconds",  # interquartile range
    "graph_median_seconds",  # in a CUDA graph
    "graph_min_seconds",
    "graph_spread_seconds",
    "rounds",
    "graph_rounds",
    "peak_bytes",  # on GPUs: beyond what there was before the call, with outputs and gradients
    "least_bytes",  # inputs, outputs, weights and their gradients, each once
    "gigabytes_per_second",  # least_bytes in the graph's time, or where there is none as called
    "share_of_copy",  # of the rate of a plain copy
    "error",  # of the output, relative, against float64
    "gradient_error",  # the largest of all gradients
    "note",  # why there is no time, or no graph
)

Row = dict[str, Any]
Call = Callable[[], Any]
Measure = Callable[[Call], float]


@dataclass(frozen=True)
class Timing:
    """Times of one callable, in seconds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range."""
        lower, _, upper = statistics.quantiles(self.samples, n=4)
        return upper - lower

    @property
    def minimum(self) -> float:
        return min(self.samples)


@dataclass(frozen=True)
class Settings:
    """What one run measures."""

    sizes: tuple[tuple[int, int], ...]
    """Tokens and width."""
    batches: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    seconds: float
    """Time for the rounds of one comparison."""
    min_rounds: int = 9

    def problems(self) -> list[tuple[int, int, int, torch.dtype, bool]]:
        """Batch, tokens, width, dtype and whether with a backward."""
        return [
            (batch, *size, dtype, backward)
            for dtype in self.dtypes
            for backward in (False, True)
            for batch in self.batches
            for size in self.sizes
        ]


def settings_for(device: torch.device, quick: bool) -> Settings:
    """What is worth measuring on a device."""
    stages = ((56 // 2**i) ** 2 for widths in WIDTHS.values() for i in range(len(widths)))
    widths = (width for model in WIDTHS.values() for width in model)
    sizes = tuple(dict.fromkeys(zip(stages, widths, strict=True)))
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    batches: tuple[int, ...] = (1, 8, 64)
    if device.type == "cpu":
        dtypes, batches = (torch.float32, torch.bfloat16), (1, 8)
    if quick:
        return Settings(QUICK_SIZES, (8,), dtypes[:1], 0.3)
    return Settings(sizes, batches, dtypes, 1.0)


class Problem:
    """One input and direction: what every engine gets, and what is exact."""

    def __init__(
        self,
        batch: int,
        tokens: int,
        width: int,
        dtype: torch.dtype,
        backward: bool,
        device: torch.device,
    ) -> None:
        self.dtype, self.backward, self.device = dtype, backward, device
        generator = torch.Generator().manual_seed(0)
        x, dout = (torch.randn(batch, tokens, width, generator=generator) for _ in range(2))
        # No leaf of autograd, as in a network.
        self.x = x.to(device, dtype).requires_grad_(backward).clone()
        self.dout = dout.to(device, dtype)
        self._exact: dict[str, list[Tensor]] = {}

    def module(self, engine: str) -> nn.Module:
        """A new layer with weights that depend on nothing but its kind."""
        width = self.x.shape[2]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if engine in PEERS:
                module = PEERS[engine](width)
            else:
                backend = "auto" if engine == OURS else "reference"
                module = AdditiveAttention(width, width, num_heads=1, backend=backend)
        return module.to(self.device, self.dtype).eval().requires_grad_(self.backward)

    def build(self, engine: str) -> Callable[[], list[Tensor]]:
        """A call without arguments: the output and, with a backward, all gradients."""
        module: Any = self.module(engine)
        if engine == "compile":
            module = torch.compile(module, dynamic=False, fullgraph=True)
        return functools.partial(self._run, module, self.x, self.dout)

    def _run(self, module: nn.Module, x: Tensor, dout: Tensor) -> list[Tensor]:
        out = module(x)
        if not self.backward:
            return [out]
        return [out, *torch.autograd.grad(out, [x, *module.parameters()], dout)]

    def exact(self, engine: str) -> list[Tensor]:
        """What the engine computes, in float64 from the same rounded numbers."""
        layer = engine if engine in PEERS else "eager"
        if layer not in self._exact:
            self._exact[layer] = self._exactly(layer)
        return self._exact[layer]

    def _exactly(self, layer: str) -> list[Tensor]:
        """A few items at a time: self-attention would not fit in memory otherwise."""
        # Intel's GPUs may lack float64.
        device = torch.device("cpu") if self.device.type == "xpu" else self.device
        module = self.module(layer).to(device, torch.float64)
        items = max(1, EXACT_SCORES // self.x.shape[1] ** 2)
        parts = []
        for x, dout in zip(self.x.split(items), self.dout.split(items), strict=True):
            leaf = x.detach().to(device, torch.float64).requires_grad_(self.backward)
            results = self._run(module, leaf, dout.to(device, torch.float64))
            parts.append([t.detach() for t in results])
        # Outputs and gradients of x belong to items, those of weights are summed over them.
        return [
            torch.cat(tensors) if i < 1 + self.backward else torch.stack(tensors).sum(0)
            for i, tensors in enumerate(zip(*parts, strict=True))
        ]

    @functools.cached_property
    def eager_errors(self) -> list[float]:
        """Relative errors of the plain definition in the same type: output, gradients."""
        return self.errors(self.build("eager")(), self.exact("eager"))

    def errors(self, results: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
        """Relative errors: output, gradients."""
        pairs = zip(results, exact, strict=True)
        return [relative_error(ours.detach().to(e.device), e) for ours, e in pairs]

    def bounds(self, engine: str) -> list[float]:
        """How large the relative errors of `engine` may be."""
        if engine == OURS:
            return [budget(error, self.dtype) for error in self.eager_errors]
        batch, tokens, width = self.x.shape
        rows = tokens * (batch if self.backward else 1)
        return [type_bound(self.dtype, max(width, rows))] * len(self.exact(engine))

    def least_bytes(self, module: nn.Module) -> int:
        """Input, output and weights once; with a backward their gradients too."""
        tensors = [self.x, self.dout, *module.parameters()]
        return sum(t.nbytes for t in tensors) * (1 + self.backward)


def type_bound(dtype: torch.dtype, length: int) -> float:
    """As near to float64 as the type allows, for code that is its own measure.

    It rounds a number of times to its type, and sums up to `length` terms in float32 at least,
    where rounding errors grow as the root of the length.

    Example:
        >>> type_bound(torch.float32, 49) < type_bound(torch.float32, 3136) < 1e-3
        True
    """
    accumulation = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return STEPS * (torch.finfo(dtype).eps + length**0.5 * accumulation)


class Stopwatch:
    """Measures calls on one device, in seconds.

    `queued`: the call waits behind other work on a GPU, so that the time is the device's alone;
    else the device is idle before, and the host's launching counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cpu":
            one = torch.get_num_threads() == 1
            self._now = time.process_time if one else time.perf_counter
        else:
            self._module = torch.get_device_module(device)
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, call: Call, queued: bool = False) -> float:
        if self.device.type == "cpu":
            began = self._now()
            call()
            return self._now() - began
        start, end = (self._module.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        if not queued:
            self._module.synchronize(self.device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def capture(call: Call) -> Call:
    """The kernels of a call as a CUDA graph: a call that starts them all at once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def peak_bytes(call: Call, device: torch.device) -> int:
    """Memory of a GPU that a call takes at most, beyond what was there before it."""
    module = torch.get_device_module(device)
    module.synchronize(device)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    call()
    module.synchronize(device)
    return int(module.max_memory_allocated(device) - before)


def copy_rate(watch: Stopwatch, rounds: int = 21) -> float:
    """Bytes per second, read and written, of a plain copy of a large tensor."""
    device = watch.device
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    copy()
    return 2 * source.nbytes / statistics.median(watch(copy, queued=True) for _ in range(rounds))


def interleave(
    calls: Mapping[str, Call], measure: Measure, seconds: float, min_rounds: int
) -> dict[str, Timing]:
    """Time the calls in turn, so that all meet the same clock rate, caches and neighbours.

    A round is one call of each, in an order shuffled anew; one round is not counted. Rounds go on
    for `seconds` of wall time, and there are at least `min_rounds` of them.
    """
    order = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    generator = random.Random(0)
    for call in calls.values():
        measure(call)
    end = time.perf_counter() + seconds
    rounds = 0
    while calls and (rounds < min_rounds or time.perf_counter() < end):
        generator.shuffle(order)
        for name in order:
            samples[name].append(measure(calls[name]))
        rounds += 1
    return {name: Timing(tuple(times)) for name, times in samples.items()}


def compare(
    problem: Problem, engines: Sequence[str], watch: Stopwatch, rate: float, settings: Settings
) -> list[Row]:
    """Build, verify and time the engines on one problem: a row each."""
    torch.compiler.reset()  # old graphs would use up the limit of recompilations
    gc.collect()
    batch, tokens, width = problem.x.shape
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    graphs: dict[str, Call] = {}
    for engine in engines:
        row: Row = dict.fromkeys(COLUMNS, "")
        rows[engine] = row
        row |= {
            "tokens": tokens,
            "width": width,
            "batch": batch,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "direction": "forward+backward" if problem.backward else "forward",
            "engine": engine,
            "least_bytes": problem.least_bytes(problem.module(engine)),
        }
        if engine == OURS:
            row["backend"] = SELF_ATTENTION.choose_backend("auto", problem.x, width)
        try:
            call = problem.build(engine)
            row["note"] = check(engine, problem, call(), row)
            if not row["note"]:
                took = watch(call)
                if took > SLOWEST_CALL:
                    row["note"] = f"absent: a call takes {took:.1f} s"
        except Exception as error:  # a compiler that fails, memory that is short: findings
            row["note"] = f"{FAILED if engine == OURS else 'absent'}: {first_line(error)}"
        if row["note"]:
            continue
        calls[engine] = call
        if problem.device.type != "cpu":
            row["peak_bytes"] = peak_bytes(call, problem.device)
        if problem.device.type == "cuda":
            try:
                graph = capture(call)
                wrong = check(engine, problem, graph(), row)
            except Exception as error:
                wrong = first_line(error)
            if wrong:
                row["note"] = NO_GRAPH + wrong
            else:
                graphs[engine] = graph
    queued = functools.partial(watch, queued=True)
    for prefix, own, measure in (("", calls, watch), ("graph_", graphs, queued)):
        timings = interleave(own, measure, settings.seconds, settings.min_rounds)
        for engine, timing in timings.items():
            row = rows[engine]
            row[f"{prefix}median_seconds"] = timing.median
            row[f"{prefix}min_seconds"] = timing.minimum
            row[f"{prefix}spread_seconds"] = timing.spread
            row[f"{prefix}rounds"] = len(timing.samples)
            row["gigabytes_per_second"] = row["least_bytes"] / timing.median / 1e9
            row["share_of_copy"] = row["least_bytes"] / timing.median / rate
    return list(rows.values())


def check(engine: str, problem: Problem, results: Any, row: Row) -> str:
    """Write down the errors of an engine's results; tells what is wrong, empty if nothing."""
    errors, bounds = problem.errors(results, problem.exact(engine)), problem.bounds(engine)
    row["error"], row["gradient_error"] = errors[0], max(errors[1:], default="")
    # Written so that a NaN is wrong.
    pairs = [(e, b) for e, b in zip(errors, bounds, strict=True) if not e <= b]
    if not pairs:
        return ""
    error, bound = max(pairs, key=lambda pair: pair[0] / pair[1])
    return f"{WRONG}: relative error {error:.2g} > {bound:.2g}"


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {lines[0]}" if lines else "")


def run(device: str | None, out: Path, quick: bool = False, threads: int = 1) -> int:
    """The command: 0 if all engines were right, 1 if one was wrong or the operator failed.

    Raises:
        ValueError: the device is not there, or `out` is no folder.
    """
    where = devices.find(device)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder; {out} is a file. Choose another.")
    if threads < 1:
        raise ValueError(f"--threads must be at least 1; got {threads}.")
    out.mkdir(parents=True, exist_ok=True)
    before = torch.get_num_threads()
    if where.type == "cpu":
        torch.set_num_threads(threads)
    else:
        torch.get_device_module(where).set_device(where)  # graphs and events are of the current one
    try:
        return _run(where, out, settings_for(where, quick))
    finally:
        torch.set_num_threads(before)


def _run(device: torch.device, out: Path, settings: Settings) -> int:
    engines = (OURS, "eager", "compile", *COMPARED)
    watch = Stopwatch(device)
    rate = copy_rate(watch)
    rows: list[Row] = []
    status = 0
    problems = settings.problems()
    with Progress(len(problems), "problems") as progress:
        try:
            for batch, tokens, width, dtype, backward in problems:
                name = str(dtype).removeprefix("torch.") + " with backward" * backward
                progress.show(f"{name}, B={batch}, N={tokens}, C={width}")
                with torch.set_grad_enabled(backward):
                    problem = Problem(batch, tokens, width, dtype, backward, device)
                    found = compare(problem, engines, watch, rate, settings)
                rows += found
                write_csv(out / CSV, rows, COLUMNS, digits=6)
                for row in found:
                    if row["note"].removeprefix(NO_GRAPH).startswith((WRONG, FAILED)):
                        status = 1
                        progress.write(f"{row['engine']}, {problem_label(row)}: {row['note']}")
                progress.advance()
        except KeyboardInterrupt:
            status = 130
            if not rows:
                print("\ninterrupted; nothing was measured, nothing written", file=sys.stderr)
                return status
            print("\ninterrupted; reporting what was measured", file=sys.stderr)
    write_text(out / REPORT, report(rows, device, rate))
    written = [CSV, REPORT]
    try:
        draw(rows, device, out / PLOT)
        written.append(PLOT)
    except ImportError as error:
        print(f"No plots: {error}. To have them: pip install 'swiftkernels[bench]'")
    print("\n".join(ratio_table(rows)))
    print("\nWritten: " + ", ".join(str(out / name) for name in written))
    return status


def problem_label(row: Row) -> str:
    """The problem of a row."""
    return (
        f"{row['dtype']} {row['direction']}, B={row['batch']}, N={row['tokens']}, C={row['width']}"
    )


def ratios(rows: Sequence[Row], column: str) -> dict[tuple[str, str, str], list[float]]:
    """By dtype, direction and engine: its time / ours, for every shape where both have one."""
    ours = {problem_label(r): r[column] for r in rows if r["engine"] == OURS and r[column]}
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        label = problem_label(row)
        if row["engine"] != OURS and row[column] and label in ours:
            key = (row["dtype"], row["direction"], row["engine"])
            found.setdefault(key, []).append(row[column] / ours[label])
    return found


def ratio_table(rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table: how many times our time another engine takes."""
    lines = [
        f"| time of it / of {OURS} | type | direction | shapes | mean | worst | best |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for column, mode in (("median_seconds", "as called"), ("graph_median_seconds", "in a graph")):
        for (dtype, direction, engine), values in ratios(rows, column).items():
            mean = statistics.geometric_mean(values)
            lines.append(
                f"| {engine}, {mode} | {dtype} | {direction} | {len(values)} "
                f"| {mean:.2f} | {min(values):.2f} | {max(values):.2f} |"
            )
    return lines


def report(rows: Sequence[Row], device: torch.device, rate: float) -> str:
    """The Markdown text that can be sent in."""
    lines = [
        f"# swiftkernels on {devices.name(device)}",
        "",
        f"Measured by `swiftkernels bench`, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC.",
        "",
        *(f"* {name}: {value}" for name, value in _machine(device)),
        f"* a plain copy: {rate / 1e9:.4g} GB/s, read and written",
        "",
        *_method(device),
        "",
    ]
    lines += [
        "## Ratios",
        "",
        "Geometric mean, worst and best over the shapes; above 1 the operator is faster.",
        "",
        *ratio_table(rows),
        "",
        "## Times",
        "",
        "Medians and interquartile ranges in microseconds; GB/s are the bytes of inputs, outputs, "
        "weights and their gradients, each counted once, in that time; the share is of the copy.",
        "",
        "| problem | engine | as called | in a graph | peak MB | GB/s | share | error |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
        *map(_time_line, (r for r in rows if r["median_seconds"])),
    ]
    notes = [r for r in rows if r["note"]]
    if notes:
        lines += ["", "## Notes", ""]
        lines += [f"* {r['engine']}, {problem_label(r)}: {r['note']}" for r in notes]
    return "\n".join(lines) + "\n"


def _time_line(row: Row) -> str:
    def times(prefix: str) -> str:
        if not row[f"{prefix}median_seconds"]:
            return ""
        median, spread = (1e6 * row[f"{prefix}{name}_seconds"] for name in ("median", "spread"))
        return f"{median:.1f} ± {spread:.1f}"

    peak = f"{row['peak_bytes'] / 1e6:.1f}" if row["peak_bytes"] != "" else ""
    engine = row["engine"] + (f" ({row['backend']})" if row["backend"] else "")
    return (
        f"| {problem_label(row)} | {engine} | {times('')} | {times('graph_')} | {peak} "
        f"| {row['gigabytes_per_second']:.3g} | {row['share_of_copy']:.2g} | {row['error']:.1e} |"
    )


def _machine(device: torch.device) -> Iterator[tuple[str, str]]:
    yield "device", f"{devices.name(device)}, {devices.facts(device)}"
    yield "torch", f"{torch.__version__}, built for {devices.built_for()}"
    try:
        yield "triton", metadata.version("triton")
    except metadata.PackageNotFoundError:
        yield "triton", "not installed"
    yield OURS, swiftkernels.__version__
    yield "python", f"{platform.python_version()}, {platform.platform()}"


def _method(device: torch.device) -> list[str]:
    if device.type == "cpu":
        clock = "process time" if torch.get_num_threads() == 1 else "wall time"
        return [
            f"Engines in turn, {clock}, caches as the call before left them; each verified against "
            "float64 before it is timed."
        ]
    return [
        "Engines in turn, between events on the device, caches flushed before every sample. As "
        "called: from an idle device, so that launching counts; in a graph: the kernels alone. "
        "Each engine is verified against float64 before it is timed."
    ]


def draw(rows: Sequence[Row], device: torch.device, path: Path) -> None:
    """Plot the ratios of every shape, a panel for each type and direction.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    column = "graph_median_seconds" if device.type == "cuda" else "median_seconds"
    panels = list(dict.fromkeys((r["dtype"], r["direction"]) for r in rows))
    if not panels:
        return
    figure = Figure(figsize=(11, 3.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        own = [r for r in rows if (r["dtype"], r["direction"]) == panel]
        ours = {_shape(r): r[column] for r in own if r["engine"] == OURS and r[column]}
        for engine in dict.fromkeys(r["engine"] for r in own if r["engine"] != OURS):
            times = {_shape(r): r[column] for r in own if r["engine"] == engine and r[column]}
            shapes = [shape for shape in ours if shape in times]
            ax.plot(
                [list(ours).index(shape) for shape in shapes],
                [times[shape] / ours[shape] for shape in shapes],
                marker="o",
                markersize=4,
                linewidth=0.8,
                label=engine,
            )
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_xticks(range(len(ours)), list(ours), rotation=90, fontsize=6)
        ax.set_ylabel(f"time / time of {OURS}", fontsize=8)
        ax.set_title(", ".join(panel), fontsize=9)
    axes[0].legend(fontsize=7, ncols=6)
    mode = "in CUDA graphs" if device.type == "cuda" else "as called"
    figure.suptitle(f"{devices.name(device)}, medians {mode}", fontsize=10)
    save_figure(figure, path, dpi=120)


def _shape(row: Row) -> str:
    return f"{row['batch']} x {row['tokens']} x {row['width']}"
