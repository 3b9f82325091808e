"""Writes docs/gpu_evidence.md: what is counted of the GPU kernels, how, and the tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from swiftkernels.testing.engines import OURS
from swiftkernels.utils.files import read_csv, write_text

PAGE = "gpu_evidence.md"
TRAFFIC_CSV = "gpu_traffic.csv"
LAUNCHES_CSV = "gpu_launches.csv"
BLOCKS_CSV = "gpu_blocks.csv"
LOWER_BOUNDS_CSV = "gpu_lower_bounds.csv"
GRID_FILL_CSV = "gpu_grid_fill.csv"
LAUNCH_COST_CSV = "gpu_launch_cost.csv"
FORWARD, BOTH = "forward", "forward+backward"
"""Names of the directions."""
ENGINES = (OURS, "eager", "inductor", "mhsa", "separable", "linear")
"""In the order of the tables."""
SHOWN_STAGES = (("3136", "48"), ("784", "56"), ("196", "112"), ("49", "220"))
"""Tokens and width of the stages of SwiftFormer XS."""

NAMES = {"inductor": "torch.compile", "mhsa": "self-attention"}
"""Names of engines in the tables, where they differ."""
DATASHEETS = Path(__file__).with_name("datasheets.json")
SHOWN_GPU = "H100"
"""The page shows the lower bounds of this GPU only."""

Row = dict[str, str]

_INTRODUCTION = """\
# What is known about the GPU kernels without a GPU

Nothing on this page was measured on a GPU. The figures are counts, lower bounds, or times of the
host. [What an H100 measured](gpu_results.md) is on a page of its own; where there is a GPU,
[one command](gpu_runs.md) measures.

Four commands write the page, its tables and its pictures from the CSV files in `docs/results`:

```sh
python -m benchmarks.gpu.traffic        # half an hour on one core
python -m benchmarks.gpu.blocks         # a quarter of an hour
python -m benchmarks.gpu.roofline       # a moment
python -m benchmarks.gpu.launch_cost    # two minutes
```

## Memory safety

`TRITON_INTERPRET=1 pytest tests/interpreter/test_memory_safety.py` runs every kernel in Triton's
interpreter and traces every lane of every load and store
(`swiftkernels/testing/triton_trace.py`, for any Triton kernels). Each tensor is in a buffer of its
own, between poisoned guards. These are errors:

* a lane outside of its tensor, or in the gaps of a slice,
* a program that writes what another one reads or writes,
* two lanes of a program that store to one address,
* an output that is not written to its last element.

With `-m slow`, each mask of the kernels is removed in turn, and the trace has to find each removal.

The interpreter runs programs one after the other. It does not show reads that race with stores of
the same program, shared-memory limits, or rounding to tf32.

## Bytes that cross the boundaries of kernels

* **{ours}**: traced lane by lane. *Distinct* bytes are 32-byte sectors that a launch touches at
  least once, loads and stores, added up over the launches; *requested* bytes are those of all
  lanes. Distinct bytes alone would flatter a kernel whose programs all read the same weights.
  PyTorch's GEMMs around the kernels count too.
* **eager**: every operator of PyTorch, except for views, reads its inputs and writes its output
  (`benchmarks/gpu/eager.py`). Self-attention counts as the fused kernel that GPUs have.
* **torch.compile**: the code that Inductor writes for an H100, and its own count of the buffers
  that each kernel reads and writes (`benchmarks/gpu/inductor.py`). Forward and backward are
  compiled as one graph. This saves what a backward reads of a forward: an underestimate.
* **minimum**: every input is read once and every output is written once, in the forward and in the
  backward. An operator that pools over all tokens before it can write the first output reads x
  twice.

These are not bytes of DRAM traffic: caches may hold some of them from one kernel to the next.

![Bytes that cross the boundaries of kernels, and launches](results/gpu_traffic.png)
"""

_BLOCKS = """\
## Whole networks, convolutional blocks and MLPs

SwiftFormers in inference on images of 224 x 224 pixels, of {ours} by `fuse_for_inference`; and
`conv_mlp` at the stages of XS. `encoder`: the convolutional block in inference, with a 3 x 3
depthwise convolution, BatchNorm, 4 C hidden channels, GELU, layer scale and residual. `mlp`: two
pointwise convolutions with GELU between them, 4 C hidden channels and residual. Kernels launched,
and MB, in float16; what float32 moves is in [gpu_blocks.csv](results/gpu_blocks.csv). A launch of
{ours} counts the bytes of its tensors: it touches all of them once, as the trace shows. Images are
in channels_last memory format.

![Whole networks: bytes between kernels, and launches](results/gpu_networks.png)
"""

_BLOCKS_NOTE = """\
A block reads x once and writes its output once; the hidden channels stay on chip. For the backward
of `mlp`, {ours} keeps x: {kept}.
"""

_BOUNDS = """\
## Lower bounds, not times

A bound is the larger of bytes / memory bandwidth and operations / peak, by the vendors' datasheets
(`benchmarks/gpu/datasheets.json`). No GPU can be faster if every kernel reads from and writes to
memory. The bound does not say how far above it the real time is. So **no ratio of two bounds is a
speed-up**. The operations of {ours} include the padding of its tiles to powers of two. Those of
torch.compile are not known, and its bounds are those of its bytes. An asterisk marks sizes at which
the layer's own tensors fit in the GPU's last-level cache: there, bytes between kernels need not
reach memory, and the real time may be below the bound.

![Lower bounds, not times](results/gpu_lower_bounds.png)
"""

_TRAFFIC_NOTE = """\
Kernels launched, and MB (distinct; in brackets requested), in float16. What float32 moves is in
[gpu_traffic.csv](results/gpu_traffic.csv), and kernel by kernel in
[gpu_launches.csv](results/gpu_launches.csv).
"""

_PROMISES = """\
The forward of a layer up to E = 128 reads its tokens twice and writes its output, and nothing of
that size besides. From about 12 E tokens in the batch on it moves at most 1.15 times as many bytes;
below, the weights outweigh the tokens.

Bytes of forward and backward / those of torch.compile, at the stages of SwiftFormer XS, S, L1 and
L3. Up to E = 64 a program sums the gradients of the weights of up to 256 tokens on chip: of the
largest group that leaves programs for half of an H100, or else of the smallest group. Above, the
gradients of queries and keys and
two more tensors of their size go through memory, from which PyTorch's products compute those of the
weights. Above E = 128 all products are PyTorch's, because an H100 takes longer for weights that
every program reads. There a layer moves little less than torch.compile: what is between two
products goes through memory in both. With one image, partial sums outweigh all else up to E = 64.
More of them would fill more of a GPU, and move more than torch.compile.
"""

_BOUNDS_NOTE = """\
Microseconds on an {gpu}, float16; the others are in
[gpu_lower_bounds.csv](results/gpu_lower_bounds.csv).
"""

_FILL = """\
## Grid fill

Programs of each kernel against the multiprocessors of a GPU. A kernel with fewer programs than
multiprocessors leaves the others idle, which no lower bound shows.

![Grid fill](results/gpu_grid_fill.png)
"""

_FILL_NOTE = """\
float16, batch 1: programs per multiprocessor. In brackets, where the compiled kernel is known
(`gpu_kernels.json`): how many fit on one at a time by shared memory, registers and threads.
"""

_LAUNCH_COST = """\
## What a call costs the host

Microseconds of process time from the Python call to the last launch, with a launcher that launches
nothing: median, interquartile range, minimum, all calls in turn. [1, 49, 16] and [1, 16, 7, 7] on
{device}, torch {torch}, Triton {triton}. CUDA's allocator and launcher are not in it. From the
second call on, a launch skips Triton's lookup of the compiled kernel. The empty
autograd function has the layer's inputs and gradients and computes nothing: no training step made
in Python costs less.
"""


def write(results: Path) -> Path:
    """Write the page next to the folder of results; returns its path.

    Sections without a CSV file are skipped.
    """
    traffic = read_csv(results / TRAFFIC_CSV)
    bounds = read_csv(results / LOWER_BOUNDS_CSV)
    fills = read_csv(results / GRID_FILL_CSV)
    parts = [_INTRODUCTION.format(ours=OURS)]
    half = shown(traffic)
    if half:
        parts.append(_TRAFFIC_NOTE)
        parts.append(traffic_table(half))
        parts.append(_PROMISES)
        parts.append(_promises(traffic))
    blocks = read_csv(results / BLOCKS_CSV)
    if blocks:
        parts += [_BLOCKS.format(ours=OURS), blocks_table(blocks), _blocks_note(blocks)]
    if bounds:
        parts += [_BOUNDS.format(ours=OURS), _BOUNDS_NOTE.format(gpu=SHOWN_GPU)]
        own = [row for row in shown(bounds) if row["gpu"] == SHOWN_GPU]
        parts.append(bounds_table(own))
        parts.append(_sources())
    if fills:
        parts += [_FILL, _FILL_NOTE, _fills(fills)]
    costs = read_csv(results / LAUNCH_COST_CSV)
    if costs:
        parts += [_LAUNCH_COST.format(**costs[0]), _launch_costs(costs)]
    page = results.parent / PAGE
    write_text(page, "\n".join(parts))
    return page


def shown(rows: Iterable[Row]) -> list[Row]:
    """The rows in float16 that tables and pictures show: `SHOWN_STAGES`, or all without these."""
    half = [row for row in rows if row["dtype"] == "float16"]
    return [row for row in half if (row["tokens"], row["width"]) in SHOWN_STAGES] or half


def engines_in(rows: Iterable[Row]) -> list[str]:
    """The engines in the rows, in the order of the tables."""
    found = {row["engine"] for row in rows}
    return [engine for engine in ENGINES if engine in found]


CASE = ("batch", "tokens", "width", "direction")


def traffic_table(rows: Sequence[Row], case: Sequence[str] = CASE) -> str:
    """Launches, MB, and in brackets requested MB of every engine: a Markdown table."""

    def cell(row: Row) -> str:
        star = "\\*" if " " in row.get("counted_batches", "") else ""
        text = f"{row['launches']}: {_mega(row['bytes'])}{star}"
        requested = row.get("requested_bytes")
        return text + (f" ({_mega(requested)})" if requested else "")

    minimum = [("minimum", lambda row: _mega(row["minimum_bytes"]))]
    lines = _table(rows, case, engines_in(rows), cell, minimum)
    starred = any(" " in row.get("counted_batches", "") for row in rows)
    note = "\n\\* counted at batches 1 and 2 and extrapolated.\n"
    return lines + (note if starred else "")


def blocks_table(rows: Sequence[Row]) -> str:
    """As `traffic_table`, of the blocks in float16, with their bytes / torch.compile's."""
    half = [row for row in rows if row["dtype"] == "float16"]
    case = ("layer", *CASE)
    moved = {(row["engine"], *(row[n] for n in case)): int(row["bytes"]) for row in half}
    ratios = ["bytes / torch.compile's", "---"]
    for values in dict.fromkeys(tuple(row[n] for n in case) for row in half):
        ours, compiled = moved.get((OURS, *values)), moved.get(("inductor", *values))
        ratios.append(f"{ours / compiled:.2f}" if ours and compiled else "")
    lines = traffic_table(half, case).splitlines()
    return "".join(f"{line} {ratio} |\n" for line, ratio in zip(lines, ratios, strict=True))


def _blocks_note(rows: Sequence[Row]) -> str:
    kept = {
        (row["engine"], row["tokens"], row["width"]): row["kept_bytes"]
        for row in rows
        if (row["dtype"], row["batch"], row["direction"]) == ("float16", "8", BOTH)
    }
    texts = []
    for (engine, tokens, width), ours in kept.items():
        eager = kept.get(("eager", tokens, width))
        if engine == OURS and eager:
            texts.append(f"{_mega(ours)} MB where eager keeps {_mega(eager)} (batch 8, C {width})")
    return _BLOCKS_NOTE.format(ours=OURS, kept=", ".join(texts))


def _promises(rows: Sequence[Row]) -> str:
    """Bytes of forward and backward / torch.compile's, at every stage of every SwiftFormer."""
    moved = {
        (row["engine"], *(row[n] for n in ("dtype", "tokens", "width", "batch"))): int(row["bytes"])
        for row in rows
        if row["direction"] == BOTH
    }
    stages = dict.fromkeys(key[2:4] for key in moved)
    columns = list(dict.fromkeys((key[1], key[4]) for key in moved))
    lines = [
        "| N, E | " + " | ".join(f"{dtype}, B {batch}" for dtype, batch in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for stage in stages:
        cells = []
        for dtype, batch in columns:
            ours, other = (moved.get((e, dtype, *stage, batch)) for e in (OURS, "inductor"))
            cells.append(f"{ours / other:.2f}" if ours and other else "")
        lines.append(f"| {', '.join(stage)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def bounds_table(rows: Sequence[Row], case: Sequence[str] = CASE) -> str:
    """Lower bounds of every engine in microseconds: a Markdown table."""

    def cell(row: Row) -> str:
        star = "\\*" if row["fits_in_cache"] == "True" else ""
        return _three_digits(1e6 * float(row["lower_bound_seconds"])) + star

    return _table(rows, case, engines_in(rows), cell)


def _fills(rows: Sequence[Row]) -> str:
    own = [row for row in shown(rows) if row["batch"] == "1"]
    gpus = list(dict.fromkeys((row["gpu"], row["multiprocessors"]) for row in own))
    lines = [
        "| N, E | direction | kernel | programs | "
        + " | ".join(f"{gpu}, {count}" for gpu, count in gpus)
        + " |",
        "|---|---|---|---|" + "---|" * len(gpus),
    ]
    names = ("tokens", "width", "direction", "kernel", "programs")
    for values in dict.fromkeys(tuple(row[n] for n in names) for row in own):
        tokens, width, direction, kernel, programs = values
        cells = []
        for row in own:
            if tuple(row[n] for n in names) == values:
                fit = row["resident_per_multiprocessor"]
                share = float(row["programs_per_multiprocessor"])
                cells.append(f"{share:.2f}" + (f" ({fit})" if fit else ""))
        lines.append(
            f"| {tokens}, {width} | {direction} | `{kernel}` | {programs} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


def _launch_costs(rows: Sequence[Row]) -> str:
    kinds = list(dict.fromkeys((row["input"], row["dtype"]) for row in rows))
    calls = list(dict.fromkeys((row["direction"], row["what"]) for row in rows))
    cells = {
        (row["direction"], row["what"], row["input"], row["dtype"]): (
            f"{row['microseconds']} ({row['spread']}, {row['fastest']})"
        )
        for row in rows
    }
    lines = [
        "| direction | what | " + " | ".join(f"{kind}, {dtype}" for kind, dtype in kinds) + " |",
        "|---|---|" + "---|" * len(kinds),
    ]
    for call in sorted(calls, key=lambda call: call[0]):
        found = (cells.get((*call, *kind), "") for kind in kinds)
        lines.append(f"| {' | '.join((*call, *found))} |")
    return "\n".join(lines) + "\n"


def _sources() -> str:
    sheets = json.loads(DATASHEETS.read_text())
    lines = [sheets["note"] + "\n"]
    for gpu in sheets["gpus"]:
        source = gpu["source"]
        lines.append(
            f"* {gpu['name']} ({gpu['variant']}): {gpu['memory_bytes_per_second'] / 1e12:g} TB/s, "
            f"{gpu['float16_flops'] / 1e12:g} TFLOPS in float16, {gpu['multiprocessors']} "
            f"multiprocessors, {gpu['cache_bytes'] >> 20} MiB of cache: "
            f"[{source['title']}]({source['url']}), {source['date']}. Not confirmed: "
            f"{', '.join(gpu['unconfirmed'])}."
        )
    return "\n".join(lines) + "\n"


def _table(
    rows: Sequence[Row],
    case: Sequence[str],
    engines: Sequence[str],
    cell: Callable[[Row], str],
    extra: Sequence[tuple[str, Callable[[Row], str]]] = (),
) -> str:
    """A line for each case, a column for each engine."""
    head = [*case, *(name for name, _ in extra), *(NAMES.get(e, e) for e in engines)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for values in dict.fromkeys(tuple(row[name] for name in case) for row in rows):
        own = {r["engine"]: r for r in rows if tuple(r[name] for name in case) == values}
        first = next(iter(own.values()))
        cells: Iterable[str] = (
            *values,
            *(text(first) for _, text in extra),
            *(cell(own[e]) if e in own else "" for e in engines),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[n] for n in ("dtype", "direction", "batch", "tokens", "width"))


def _mega(count: str) -> str:
    return _three_digits(int(count) / 1e6)


def _three_digits(value: float) -> str:
    """Three significant digits, but all digits before the decimal point.

    Example:
        >>> _three_digits(0.01234), _three_digits(12345.6)
        ('0.0123', '12,346')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
