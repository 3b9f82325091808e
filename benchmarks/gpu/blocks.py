"""Launches and bytes of convolutional blocks, MLPs and whole networks, counted without a GPU.

    python -m benchmarks.gpu.blocks

It counts, of each engine, kernels and the bytes that cross their boundaries:

* `encoder`: the convolutional block of SwiftFormer in inference, with a 3 x 3 depthwise
  convolution, BatchNorm, 4 C hidden channels, GELU, layer scale and residual;
* `mlp`: two pointwise convolutions with GELU between them, 4 C hidden channels and residual, in
  inference and in training. For training it also measures what is kept for the backward;
* whole SwiftFormers in inference, of this library by `fuse_for_inference`.

A launch of the library's kernels counts the bytes of its tensors: it touches all of each, and each
once but for caches. (A trace in the interpreter counts the same, see
tests/interpreter/test_traffic.py.)
PyTorch's operators around them count as those of eager PyTorch (`eager`).

The command writes gpu_blocks.csv, draws gpu_networks.png, and writes the page docs/gpu_evidence.md.
New rows replace older rows of the same case.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu import calls, eager, inductor, plots, report
from benchmarks.gpu.cross_compile import Launch, recorded_launches
from benchmarks.gpu.inductor import Case, layer_and_input
from benchmarks.gpu.report import BLOCKS_CSV, BOTH, FORWARD
from swiftkernels import fuse_for_inference, models
from swiftkernels.backends import torch_state
from swiftkernels.fusion.chain import FusedChain, Slot
from swiftkernels.fusion.triton import program
from swiftkernels.testing.costs import saved_bytes
from swiftkernels.testing.engines import OURS
from swiftkernels.utils import command
from swiftkernels.utils.files import read_csv, write_csv
from swiftkernels.utils.progress import Progress

ENGINES = (OURS, "eager", "inductor")
DTYPES = ("float16", "float32")
NETWORKS = ("swiftformer_xs", "swiftformer_s", "swiftformer_l1", "swiftformer_l3")
STAGES = ((3136, 48), (784, 56), (196, 112), (49, 220))
"""Pixels and channels of the stages of SwiftFormer XS, for images of 224 x 224 pixels."""
BATCHES = (1, 8, 64)
IMAGE = 224 * 224
"""Pixels of the images of whole networks."""
KERNELS = {"encoder": 3, "mlp": None}
"""Size of the depthwise convolution of a layer."""


@dataclass(frozen=True)
class Count:
    """One row of gpu_blocks.csv."""

    engine: str
    layer: str
    dtype: str
    direction: str
    batch: str
    tokens: str
    """Pixels of an image."""
    width: str
    launches: int
    """Kernels of all kinds."""
    bytes: int
    """Distinct bytes, launch by launch."""
    minimum_bytes: int
    """Every input is read once and every output is written once, in both directions."""
    kept_bytes: int | str
    """For the backward, besides the parameters; of eager and of our kernels only."""
    torch: str
    triton: str


def cases() -> list[Case]:
    """All that are counted."""
    networks = [
        Case(batch, IMAGE, 3, "float16", False, name)
        for name, batch in itertools.product(NETWORKS, BATCHES)
    ]
    return networks + [
        Case(batch, pixels, width, dtype, backward, layer)
        for layer, backward in (("encoder", False), ("mlp", False), ("mlp", True))
        for batch, (pixels, width), dtype in itertools.product(BATCHES, STAGES, DTYPES)
    ]


def count_ours(case: Case) -> tuple[int, int]:
    """Launches and bytes; no kernel runs."""
    if case.layer in NETWORKS:
        return _count_network(case)
    kernel = KERNELS[case.layer]
    with recorded_launches() as launches:
        backward = calls.block(_images(case), 4 * case.width, kernel, infer=kernel is not None)
        with eager.EagerTraffic() as around:  # the backward of wide layers is PyTorch's
            if case.backward:
                backward()
    return _total(launches, around)


def _total(launches: Sequence[Launch], around: eager.EagerTraffic) -> tuple[int, int]:
    """Launches and bytes of kernels and of PyTorch's operators around them."""
    return len(launches) + around.launches, sum(map(bytes_of, launches)) + around.bytes


def bytes_of(recorded: Launch) -> int:
    """Bytes of the tensors that a launch is given."""
    tensors = [t for t in recorded.arguments.values() if isinstance(t, Tensor)]
    return sum(eager.distinct_bytes(t) for t in {t.data_ptr(): t for t in tensors}.values())


def _count_network(case: Case) -> tuple[int, int]:
    """Those of the fused network, and of PyTorch's operators in it."""
    chain = _fused(case.layer).to(getattr(torch, case.dtype))
    x, slot = _images(case), Slot()
    on_gpu = mock.patch.object(torch_state, "why_not_triton", return_value="")
    with on_gpu, torch.no_grad():
        with recorded_launches():
            program.run(chain.steps, x[:1], slot)  # prepares the weights
        with recorded_launches() as launches, eager.EagerTraffic() as around:
            program.run(chain.steps, x, slot)
    return _total(launches, around)


@functools.cache
def _fused(name: str) -> FusedChain:
    """The fused network, which is one chain."""
    torch.manual_seed(0)
    fused = fuse_for_inference(getattr(models, name)().eval())
    (chain,) = (part for part in fused.modules() if isinstance(part, FusedChain))
    return chain


def _images(case: Case) -> Tensor:
    """The input of a case, zeros on the CPU."""
    _, like = layer_and_input(case)
    return torch.zeros_like(like, device="cpu")


def minimum_bytes(case: Case) -> int:
    """Bytes of a layer that reads every input and writes every output once."""
    layer, x = layer_and_input(case)
    with torch.no_grad():
        out = layer(x)
    weights = sum(t.numel() for t in (*layer.parameters(), *layer.buffers()) if t.dim())
    elements = x.numel() + out.numel() + weights
    if case.backward:
        elements += 2 * x.numel() + out.numel() + 2 * weights
    return elements * x.element_size()


def kept_by_eager(case: Case) -> int:
    """What a forward keeps for the backward besides the parameters, measured on the CPU."""
    layer, _ = layer_and_input(case)
    layer = layer.to_empty(device="cpu")
    x = _images(case).requires_grad_()
    for p in layer.parameters():
        torch.nn.init.zeros_(p)
    return saved_bytes(lambda: layer(x), layer.parameters())


def run(engines: Sequence[str], wanted: Sequence[Case], out: Path) -> list[dict[str, str]]:
    """Count, and write the CSV file after each row; returns all rows."""
    path = out / BLOCKS_CSV
    rows: dict[tuple[str, ...], dict[str, str]] = {
        tuple(list(row.values())[:7]): row for row in read_csv(path)
    }
    order = [_key(engine, case) for case in cases() for engine in ENGINES]
    with Progress(len(wanted) * len(engines), "counts") as progress:
        for engine in engines:
            for case, (launches, moved) in _counted(engine, wanted):
                count = Count(
                    *_key(engine, case), launches, moved, minimum_bytes(case), _kept(case, engine),
                    torch.__version__, importlib.metadata.version("triton"),
                )  # fmt: skip
                row = {name: str(value) for name, value in vars(count).items()}
                rows[_key(engine, case)] = row
                write_csv(path, [rows[key] for key in order if key in rows], digits=6)
                progress.advance()
    return read_csv(path)


def _key(engine: str, case: Case) -> tuple[str, str, str, str, str, str, str]:
    """The first columns of a row, which identify it."""
    direction = BOTH if case.backward else FORWARD
    sizes = str(case.batch), str(case.tokens), str(case.width)
    return engine, case.layer, case.dtype, direction, *sizes


def _counted(engine: str, wanted: Sequence[Case]) -> Iterator[tuple[Case, tuple[int, int]]]:
    """Launches and bytes of the cases, as they are counted."""
    if engine == "inductor":
        for case, counted in inductor.count(wanted):
            yield case, (counted.launches, counted.bytes)
        return
    for case in wanted:
        if engine == "eager":
            found = eager.count(*layer_and_input(case), case.backward)
            yield case, (found.launches, found.bytes)
        else:
            yield case, count_ours(case)


def _kept(case: Case, engine: str) -> int | str:
    if not case.backward or engine == "inductor":
        return ""
    if engine == OURS:
        return _images(case).nbytes  # tests/interpreter/test_conv_mlp.py asserts it
    return kept_by_eager(case)


def _main() -> None:
    assert __doc__
    parser = command.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="for the CSV")
    parser.add_argument("--engines", choices=ENGINES, nargs="+", default=ENGINES)
    layers = (*KERNELS, *NETWORKS)
    parser.add_argument("--layers", choices=layers, nargs="+", default=layers)
    parser.add_argument("--batches", type=int, choices=BATCHES, nargs="+", default=BATCHES)
    options = parser.parse_args()
    wanted = [c for c in cases() if c.layer in options.layers and c.batch in options.batches]
    print(report.blocks_table(run(options.engines, wanted, options.out)))
    print(plots.draw_networks(options.out))
    print(report.write(options.out))


if __name__ == "__main__":
    sys.exit(command.run(_main))
