"""Bytes that cross the boundaries of kernels, counted without a GPU.

    python -m benchmarks.gpu.traffic

It counts a forward, and a forward with its backward, of: the Triton kernels, traced lane by lane in
Triton's interpreter (`swiftkernels.testing.triton_trace`), with PyTorch's GEMMs around them; eager
PyTorch (`eager`); the code that Inductor writes for a GPU (`inductor`); and eager layers of other
attentions. They are compared with the minimum: in the forward and in the backward every input is
read once and every output is written once. The command writes gpu_traffic.csv and, kernel by
kernel, gpu_launches.csv, draws gpu_traffic.png, and writes the page docs/gpu_evidence.md. New rows
replace older rows of the same case.

Bytes and launches are affine in the batch if every program of the backward takes as many tokens as
at that batch. So large batches are counted at batches 1 and 2 and extrapolated; `counted_batches`
says so.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
from torch import nn

from benchmarks.gpu import eager, inductor, plots, report
from benchmarks.gpu.eager import EagerTraffic, Operator
from benchmarks.gpu.report import BOTH, ENGINES, FORWARD, LAUNCHES_CSV, TRAFFIC_CSV
from swiftkernels import AdditiveAttention
from swiftkernels.testing.cases import make_tensors
from swiftkernels.testing.engines import OURS
from swiftkernels.testing.peers import PEERS
from swiftkernels.testing.ratios import Shape
from swiftkernels.utils import command
from swiftkernels.utils.files import make_folder, read_csv, write_csv
from swiftkernels.utils.progress import Progress

if TYPE_CHECKING:
    from swiftkernels.testing.triton_trace import Launch

DTYPES = ("float16", "float32")

STAGES = (
    *((3136, width) for width in (48, 64)),
    *((784, width) for width in (56, 64, 96, 128)),
    *((196, width) for width in (112, 168, 192, 320)),
    *((49, width) for width in (220, 224, 384, 512)),
)
"""Tokens and width of the stages of SwiftFormer XS, S, L1 and L3."""

SHAPES = tuple(Shape(batch, *stage) for stage in STAGES for batch in (1, 8, 256))


@dataclass(frozen=True)
class Count:
    """One row of gpu_traffic.csv."""

    engine: str
    dtype: str
    direction: str
    batch: int
    tokens: int
    width: int
    launches: int
    """Kernels of all kinds."""
    matmuls: int
    """How many of them are matrix products of a library."""
    bytes: int
    """Distinct bytes, launch by launch."""
    requested_bytes: int | str
    """Of all lanes; known only for traced kernels."""
    flops: int | str
    """Of matrix products, with the padding of tiles; unknown for Inductor."""
    minimum_bytes: int
    two_pass_bytes: int
    """The minimum if forward and backward each read their tokens twice."""
    counted_batches: str
    how: str
    torch: str
    triton: str

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies a row."""
        return tuple(map(str, astuple(self)[:6]))


class Part(NamedTuple):
    """The launches of the forward, or of the backward, of one call."""

    launches: list[Launch]
    """Triton kernels."""
    operators: list[Operator]
    """PyTorch's operators around them."""


@functools.cache
def count_ours(
    shape: Shape, dtype: torch.dtype, as_of_batch: int | None = None
) -> tuple[Part, Part]:
    """Trace forward and backward of one call; needs TRITON_INTERPRET=1.

    Args:
        shape: of the input.
        dtype: of all tensors.
        as_of_batch: whose number of tokens for each program of the backward is used, if it is not
            that of `shape`.

    Raises:
        MemoryFaultError: a kernel accessed memory in a forbidden way.
    """
    from benchmarks.gpu import calls
    from swiftkernels.ops.additive_attention.triton import config, launch
    from swiftkernels.testing.triton_trace import trace

    tensors = make_tensors(*shape, shape.width, dtype=dtype)
    group = config.group

    def as_of(cfg: config.Config, batch: int, n_tokens: int) -> int:
        return group(cfg, as_of_batch or batch, n_tokens)

    launch.forget_launches()  # their keys do not show the patch
    try:
        with torch.no_grad(), mock.patch.object(config, "group", as_of):
            with trace() as forward, EagerTraffic() as around_forward:
                run_backward = calls.forward(tensors)
            with trace() as backward, EagerTraffic() as around_backward:
                run_backward()
    finally:
        launch.forget_launches()
    return Part(forward, around_forward.operators), Part(backward, around_backward.operators)


def extrapolate(one: Part, two: Part, batch: int) -> Part:
    """The part at a batch, from those at batches 1 and 2; all counts must be affine in the batch.

    Raises:
        ValueError: the two differ in what they launch.
    """
    from swiftkernels.testing.triton_trace import Bytes, Launch

    names = [[a.kernel for a in p.launches] + [o.name for o in p.operators] for p in (one, two)]
    if names[0] != names[1]:
        raise ValueError(
            f"extrapolation needs the same kernels at batches 1 and 2; got {names[0]} and "
            f"{names[1]}."
        )

    def line(first: int, second: int) -> int:
        return first + (batch - 1) * (second - first)

    def line_of_bytes(first: Bytes, second: Bytes) -> Bytes:
        return Bytes(line(first.requested, second.requested), line(first.distinct, second.distinct))

    launches = [
        Launch(
            a.kernel,
            (line(a.programs, b.programs), 1, 1),
            line_of_bytes(a.loads, b.loads),
            line_of_bytes(a.stores, b.stores),
            line(a.dot_flops, b.dot_flops),
            (),
        )
        for a, b in zip(one.launches, two.launches, strict=True)
    ]
    operators = [
        Operator(
            a.name,
            line(a.read, b.read),
            line(a.written, b.written),
            line(a.flops, b.flops),
            b.shapes,
        )
        for a, b in zip(one.operators, two.operators, strict=True)
    ]
    return Part(launches, operators)


def minimum_bytes(shape: Shape, dtype: torch.dtype, backward: bool, passes: int = 1) -> int:
    """Bytes of a layer that reads its tokens `passes` times, and everything else once.

    The forward reads x and the weights and writes the output; the backward reads x, dout and the
    weights and writes dx and the gradients of the weights.
    """
    tokens = shape.batch * shape.tokens * shape.width
    weights = sum(p.numel() for p in _layer(shape.width, dtype).parameters())
    elements = passes * tokens + tokens + weights
    if backward:
        elements += 2 * passes * tokens + tokens + 2 * weights
    return elements * dtype.itemsize


def _layer(width: int, dtype: torch.dtype) -> AdditiveAttention:
    return AdditiveAttention(width, width, 1, backend="reference", device="meta", dtype=dtype)


def _count(
    engine: str,
    case: tuple[Shape, str, bool],
    launches: int,
    matmuls: int,
    moved: int,
    flops: int | str,
    how: str,
    requested: int | str = "",
    counted_batches: str = "",
) -> Count:
    shape, dtype_name, backward = case
    dtype = getattr(torch, dtype_name)
    return Count(
        engine, dtype_name, BOTH if backward else FORWARD, *shape, launches, matmuls, moved,
        requested, flops, minimum_bytes(shape, dtype, backward),
        minimum_bytes(shape, dtype, backward, passes=2), counted_batches or str(shape.batch), how,
        torch.__version__, importlib.metadata.version("triton"),
    )  # fmt: skip


def _count_ours(shape: Shape, dtype: str) -> tuple[list[Count], list[dict[str, Any]]]:
    """Rows of both directions, and a row of every launch."""
    scaled = shape.batch > 2
    batches = (1, 2) if scaled else (shape.batch,)
    counted = " ".join(map(str, batches))
    how = "traced in the interpreter" + (", extrapolated in the batch" if scaled else "")
    found = [
        count_ours(shape._replace(batch=b), getattr(torch, dtype), shape.batch) for b in batches
    ]
    parts: Sequence[Part] = found[0]
    if scaled:
        parts = [extrapolate(one, two, shape.batch) for one, two in zip(*found, strict=True)]
    rows = []
    for backward in (False, True):
        launches = [a for part in parts[: 1 + backward] for a in part.launches]
        operators = [o for part in parts[: 1 + backward] for o in part.operators]
        around = sum(o.bytes for o in operators)
        rows.append(
            _count(
                OURS,
                (shape, dtype, backward),
                len(launches) + len(operators),
                sum(o.is_matmul for o in operators),
                sum(a.distinct for a in launches) + around,
                sum(a.dot_flops for a in launches) + sum(o.flops for o in operators),
                how,
                sum(a.requested for a in launches) + around,
                counted,
            )
        )
    kernels = [
        {
            "dtype": dtype,
            "batch": shape.batch,
            "tokens": shape.tokens,
            "width": shape.width,
            "direction": direction,
            "kernel": a.kernel,
            "programs": a.programs,
            "loads_requested": a.loads.requested,
            "stores_requested": a.stores.requested,
            "loads_distinct": a.loads.distinct,
            "stores_distinct": a.stores.distinct,
            "dot_flops": a.dot_flops,
            "counted_batches": counted,
        }
        for direction, part in zip(("forward", "backward"), parts, strict=True)
        for a in part.launches
    ]
    return rows, kernels


def _count_eager(engine: str, case: tuple[Shape, str, bool]) -> Count:
    shape, dtype_name, backward = case
    dtype = getattr(torch, dtype_name)
    module: nn.Module = (
        _layer(shape.width, dtype)
        if engine == "eager"
        else PEERS[engine](shape.width).to("meta", dtype)
    )
    found = eager.count(module, torch.empty(shape, dtype=dtype, device="meta"), backward)
    how = "operators on meta tensors"
    return _count(engine, case, found.launches, found.matmuls, found.bytes, found.flops, how)


def run(
    shapes: Iterable[Shape], dtypes: Iterable[str], engines: Iterable[str], out: Path
) -> list[dict[str, Any]]:
    """Count, and write the CSV files after each row; returns all rows of gpu_traffic.csv."""
    make_folder("--out", out)
    shapes, dtypes, engines = list(shapes), list(dtypes), list(engines)
    cases = [(s, d, b) for s in shapes for d in dtypes for b in (False, True)]
    path = out / TRAFFIC_CSV
    rows = {_key(row): row for row in read_csv(path)}

    def keep(count: Count) -> None:
        row = vars(count)
        rows[count.key] = row
        write_csv(path, list(rows.values()), digits=6)

    with Progress(len(cases) * len(engines), "counts") as progress:
        for engine in engines:
            progress.show(engine)
            if engine == "inductor":
                wanted = [
                    inductor.Case(*shape, dtype, backward) for shape, dtype, backward in cases
                ]
                for case, (_, counted) in zip(cases, inductor.count(wanted), strict=True):
                    how = "code for an H100 by Inductor"
                    keep(_count(engine, case, *counted, "", how))
                    progress.advance()
            elif engine == OURS:
                for shape, dtype in itertools.product(shapes, dtypes):
                    own, kernels = _count_ours(shape, dtype)
                    for count in own:
                        keep(count)
                        progress.advance()
                    _keep_launches(out / LAUNCHES_CSV, kernels)
            else:
                for case in cases:
                    keep(_count_eager(engine, case))
                    progress.advance()
    return list(rows.values())


def _keep_launches(path: Path, kernels: list[dict[str, Any]]) -> None:
    """Write rows of gpu_launches.csv; they replace those of the same shape and dtype."""
    names = ("dtype", "batch", "tokens", "width")
    new = {tuple(str(row[n]) for n in names) for row in kernels}
    others = [row for row in read_csv(path) if tuple(row[n] for n in names) not in new]
    write_csv(path, [*others, *kernels], digits=6)


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(value) for value in list(row.values())[:6])


def _shape(text: str) -> Shape:
    parts = text.split(",")
    if len(parts) != 3 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"expected batch,tokens,width as 8,3136,48; got {text!r}")
    return Shape(*map(int, parts))


def _main() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads the variable when it is imported, as PyTorch's FLOP counter did above.
        again = [sys.executable, "-m", "benchmarks.gpu.traffic", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, "TRITON_INTERPRET": "1"})
    assert __doc__
    parser = command.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="for CSV and PNG")
    parser.add_argument(
        "--shapes", type=_shape, nargs="+", default=SHAPES, help="batch,tokens,width"
    )
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=DTYPES)
    parser.add_argument("--engines", choices=ENGINES, nargs="+", default=ENGINES)
    parser.add_argument(
        "--report", action="store_true", help="count nothing: write table, plot and page"
    )
    options = parser.parse_args()
    if not options.report:
        run(options.shapes, options.dtypes, options.engines, options.out)
    rows = read_csv(options.out / TRAFFIC_CSV)
    if not rows:
        parser.error(f"{options.out / TRAFFIC_CSV} has no rows; run without --report.")
    print(report.traffic_table(rows, ("dtype", *report.CASE)))
    print(plots.draw_traffic(options.out))
    print(report.write(options.out))


if __name__ == "__main__":
    sys.exit(command.run(_main))
