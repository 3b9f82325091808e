"""Where the time of a fused SwiftFormer goes, block by block, for `benchmarks.whole_networks`.

The blocks of one network are timed on one thread, in turn with the library's loop of multiply-adds
in registers: its rate is the peak that the blocks are compared with. Floating-point operations are
those of the products and depthwise convolutions in the form that runs; activations, norms and
borders that are computed twice count as time only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor, nn

import swiftkernels
from swiftkernels.fusion import cpu, steps
from swiftkernels.fusion.chain import FusedChain
from swiftkernels.fusion.steps import Step
from swiftkernels.ops.additive_attention.cpu.packing import FOLDED, PLAIN, TRIANGULAR
from swiftkernels.testing.ratios import markdown_table
from swiftkernels.testing.timing import measure_in_turn

CSV = "whole_networks_blocks.csv"
PEAK_STEPS = 2_000_000
"""Of the loop in registers, so that it takes about as long as a network."""
MIN_ROUNDS = 5
FORMS = {PLAIN: "plain", TRIANGULAR: "triangular", FOLDED: "folded"}

Row = dict[str, Any]


class Block(NamedTuple):
    """Blocks with one name differ in their weights only."""

    name: str
    flops: float


def measure(model: nn.Module, x: Tensor, seconds: float) -> list[Row]:
    """A row for each kind of block, and one for the sum.

    Raises:
        ValueError: not all of the network became one chain, or there are no compiled kernels.
    """
    fused = swiftkernels.fuse_for_inference(model)
    chains = [part for part in fused.network.modules() if isinstance(part, FusedChain)]
    if len(chains) != 1 or fused.report.left:
        raise ValueError(f"model must become one chain to be timed by blocks; got {fused.report}")
    (chain,) = chains
    samples = measure_in_turn(
        {"peak": peak_flops, "steps": lambda: cpu.seconds_of_steps(chain.steps, x, chain.slot)},
        lambda call: call(),
        seconds,
        MIN_ROUNDS,
    )
    height, width = x.shape[2:]
    blocks = list(blocks_of(chain.steps, chain.slot.program.forms(height, width), height, width))
    peak = max(samples["peak"])
    rows = []
    for found in (*dict.fromkeys(block.name for block in blocks), "sum"):
        own = [i for i, block in enumerate(blocks) if found in (block.name, "sum")]
        times = [sum(step_times[i] for i in own) for step_times in samples["steps"]]
        flops = len(x) * sum(blocks[i].flops for i in own)
        rows.append(
            {
                "batch": len(x),
                "side": height,
                "block": found,
                "count": len(own),
                "median_seconds": statistics.median(times),
                "min_seconds": min(times),
                "flops": float(flops),
                "arithmetic_seconds": flops / peak,
                "peak_flops": peak,
                "rounds": len(times),
                "threads": 1,
            }
        )
    return rows


def peak_flops() -> float:
    """Floating-point operations per second of multiply-adds in registers, on one thread."""
    began = time.perf_counter()
    flops: int = cpu.kernels().swiftkernels_peak_flops(PEAK_STEPS)
    return flops / (time.perf_counter() - began)


def blocks_of(
    chain: Sequence[Step], forms: Sequence[int], height: int, width: int
) -> Iterator[Block]:
    """The blocks of a chain; `forms` are those of its attentions."""
    remaining = iter(forms)
    for step in chain:
        before = height, width
        height, width = steps.size_after(step, height, width)
        pixels, size = height * width, f"{height} x {width}"
        if isinstance(step, steps.Stem):
            middle = (before[0] + 1) // 2 * ((before[1] + 1) // 2)
            flops = 2 * (middle * step.weight1.numel() + pixels * step.weight2.numel())
            yield Block(f"stem to {len(step.weight1)}, {len(step.weight2)}, {size}", flops)
        elif isinstance(step, steps.Convolution):
            channels = " to ".join(map(str, step.weight.shape[1::-1]))
            yield Block(f"downsampling {channels}, {size}", 2 * pixels * step.weight.numel())
        elif isinstance(step, steps.ConvMlp):
            hidden, dims = step.weight1.shape
            k = 0 if step.depthwise_weight is None else step.depthwise_weight.shape[-1]
            name = f"depthwise {k} x {k}, MLP" if k else "MLP"
            flops = 2 * pixels * dims * (k * k + 2 * hidden)
            yield Block(f"{name} {dims}, {hidden}, {size}", flops)
        elif isinstance(step, steps.Attention):
            form, dims = next(remaining), step.in_channels
            # README.md of the operator; q, k and the output have as many channels as the input.
            products = {PLAIN: 4, TRIANGULAR: 3.5, FOLDED: 3 + dims / pixels}[form]
            name = f"attention {dims}, {FORMS[form]}, {size}"
            yield Block(name, 2 * products * pixels * dims**2)
        elif isinstance(step, steps.Linear):
            classes, dims = step.weight.shape
            yield Block(f"head {dims} to {classes}", 2 * step.weight.numel())
        else:
            yield Block("mean over the pixels", 0)


def by_network(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each network."""
    return {name: list(own) for name, own in groupby(rows, key=lambda row: str(row["network"]))}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of one network, by their least times: other programs lengthen some of the others."""
    lines = [["block", "number", "ms", "ms at peak", "GFLOP/s", "share of peak"]]
    for row in rows:
        took, flops, peak = (float(row[k]) for k in ("min_seconds", "flops", "peak_flops"))
        lines.append(
            [
                str(row["block"]),
                str(row["count"]),
                f"{1e3 * took:.2f}",
                f"{1e3 * float(row['arithmetic_seconds']):.2f}",
                f"{flops / took / 1e9:.0f}",
                f"{100 * flops / took / peak:.0f} %",
            ]
        )
    return markdown_table(lines, texts=(0,))
