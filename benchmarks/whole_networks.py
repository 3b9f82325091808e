"""Time and memory of complete SwiftFormers on a CPU, by PyTorch, compilers, runtimes, this library.

`python -m benchmarks.whole_networks` needs timm (torchvision may be missing). Each engine is
verified (`benchmarks.timm_networks`). Then they are timed in turn, in one process, by the process
time and by wall time. ONNX Runtime and OpenVINO are optional. The command writes

* whole_networks.csv: a forward at each batch by every engine, a training step (forward,
  cross-entropy, backward, AdamW) by the engines that can train, and the peak memory of a forward.
* whole_networks_blocks.csv: where the time of a fused network goes (`benchmarks.network_blocks`).
* whole_networks.png, if matplotlib is installed.
"""

from __future__ import annotations

import argparse
import copy
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import network_blocks, resident, timm_networks
from benchmarks.timm_networks import CLASSES, MODULES, Network, Row, call_of, installed, machine
from swiftkernels.backends.cpu import library
from swiftkernels.testing.engines import OURS, Call
from swiftkernels.testing.networks import seconds_of
from swiftkernels.testing.ratios import markdown_table
from swiftkernels.utils import command
from swiftkernels.utils.files import make_folder, read_csv, write_csv
from swiftkernels.utils.progress import Progress, track

CSV = "whole_networks.csv"
NAMES = ("xs", "s", "l1", "l3")
PROFILED = ("xs", "l1")
DIRECTIONS = ("forward", "training step")


def step_of(
    module: nn.Module,
    images: Tensor,
    compiled: bool = False,
    autocast: torch.dtype | None = None,
) -> Call:
    """A training step of a copy of a module, with AdamW; the call returns the loss."""
    module = copy.deepcopy(module).train()
    optimizer = torch.optim.AdamW(module.parameters(), 1e-5)
    forward = torch.compile(module) if compiled else module
    labels = torch.arange(len(images), device=images.device) % CLASSES

    def call() -> list[Tensor]:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        return [loss.detach()]

    return call


def _channels_last(module: nn.Module, images: Tensor) -> Call:
    return step_of(*timm_networks.in_channels_last(module, images))


TRAINED: dict[str, tuple[str, Callable[[nn.Module, Tensor], Call]]] = {
    "timm": ("timm", step_of),
    "channels_last": ("timm", _channels_last),
    "compile": ("timm", lambda module, images: step_of(module, images, compiled=True)),
    "accelerated": ("accelerated", step_of),
    "accelerated-channels_last": ("accelerated", _channels_last),
}
"""Engines of a training step: the engine in `MODULES` that they train, and how."""
TRAINING_BATCHES = {"xs": (8, 32), "l1": (8, 32)}
"""Images in a training step; 8 for other networks."""
ENGINES = (
    *("timm", "channels_last", "compile", "onnxruntime", "openvino"),
    *("accelerated", "accelerated-channels_last", OURS),
)
FORWARD = (*MODULES, *timm_networks.BUILT)
"""Engines of a forward."""
REMEMBERED = ("timm", OURS)
"""Engines of which the peak memory is measured."""


def build(network: Network, engine: str, direction: str) -> tuple[Call, float]:
    """An engine's call, and the relative error of its output in evaluation mode.

    Raises:
        RuntimeError: the error is too large.
    """
    if direction == "forward":
        call = timm_networks.build(network, engine)
        return call, network.error(call)
    trained, make = TRAINED[engine]
    module = MODULES[trained](network.model)
    error = network.error(call_of(module, network.images))
    call = make(module, network.images)
    call()  # compiles
    return call, error


def measure(
    network: Network,
    direction: str,
    names: Sequence[str],
    seconds: float,
    show: Callable[[str], None] = lambda _: None,
) -> tuple[list[Row], list[str]]:
    """Build, verify and time engines; returns a row for each one that works, and what failed."""
    calls, errors, failures = timm_networks.build_all(
        names, lambda name: build(network, name, direction), show
    )
    show("timing")
    common = timm_networks.problem_columns(network, direction)
    rows = [
        {"network": network.name, "engine": name, **common, **timed, "error": errors[name]}
        | {"peak_bytes": "", **machine()}
        for name, timed in timm_networks.time_all(calls, seconds).items()
    ]
    show("")
    return rows, failures


def peak_bytes_here(network: Network, engine: str) -> int:
    """Bytes by which this process grows in a forward; weights and images are there before."""
    module = MODULES[engine](network.model)
    # The first call, of one image, packs weights. It runs in a thread of its own, because the fused
    # network keeps memory for the next call of a thread.
    first = threading.Thread(target=call_of(module, network.images[:1]))
    first.start()
    first.join()
    return resident.peak_growth(call_of(module, network.images))[0]


def add_memory(rows: Sequence[Row]) -> None:
    """Write the peak memory of a forward at the largest batch into the rows, on Linux."""
    forwards = [row for row in rows if row["direction"] == "forward"]
    largest = max((row["batch"] for row in forwards), default=1)
    if largest == 1 or sys.platform != "linux":
        return
    wanted = [r for r in forwards if r["engine"] in REMEMBERED and r["batch"] == largest]
    for row in track(wanted, "networks", "memory"):
        row["peak_bytes"] = _measure_memory(row)


def _measure_memory(row: Row) -> int:
    """`peak_bytes_here` for the network and engine of a row, in a process of its own."""
    options = {
        "--memory-of": row["engine"],
        "--networks": row["network"].removeprefix("swiftformer_"),
        "--batches": row["batch"],
        "--side": row["side"],
        "--threads": row["threads"],
    }
    arguments = [part for option in options.items() for part in option]
    return int(resident.run_process("benchmarks.whole_networks", *arguments).split()[-1])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians and minima, and how much longer an engine takes than the fused network."""
    lines = [["network", "", "engine", "process, ms", "least", "wall, ms", "least", "/ fused"]]
    keys = ("network", "batch", "direction")
    ours = {tuple(r[k] for k in keys): r for r in rows if r["engine"] == OURS}
    for row in rows:
        times = [
            float(row[f"{clock}_{which}_seconds"])
            for clock in ("process", "wall")
            for which in ("median", "min")
        ]
        key = tuple(row[k] for k in keys)
        ratio = f"{seconds_of(row) / seconds_of(ours[key]):.2f}" if key in ours else ""
        name = f"{row['direction']}, batch {row['batch']}"
        lines.append([key[0], name, row["engine"], *(f"{1e3 * t:.1f}" for t in times), ratio])
    return markdown_table(lines, texts=(0, 1, 2))


def report(out: Path) -> None:
    """Print the tables of the files, and draw the picture."""
    print("\n" + table(read_csv(out / CSV)))
    for name, blocks in network_blocks.by_network(read_csv(out / network_blocks.CSV)).items():
        print(f"\n{name}, batch 1, 1 thread\n\n{network_blocks.table(blocks)}")
    try:
        from benchmarks import plots
    except ImportError as error:
        print(f"\nNo picture: {error}")
        return
    print(f"\nWritten: {out / CSV}, {plots.draw_networks(out)}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, with the engines that are installed."""
    parser = command.Parser(
        prog="python -m benchmarks.whole_networks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a short run: XS, batch 1, forward, few rounds")
    add("--networks", nargs="+", choices=NAMES, help="(default: all)")
    add("--batches", nargs="+", type=int, help="images (default: 1 16)")
    add("--training-batches", nargs="+", type=int, help="(default: 8, of XS and L1 also 32)")
    add("--directions", nargs="+", choices=DIRECTIONS, help="(default: both)")
    add("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="(default: all)")
    add("--profile", nargs="*", choices=NAMES, help="networks whose blocks are timed (xs l1)")
    add("--threads", type=int, default=1, help="(%(default)s)")
    add("--side", type=int, default=224, help="pixels of a side (%(default)s)")
    add("--seconds", type=float, help="for the rounds of one network (default 10; quick 2)")
    add("--out", type=Path, default=Path("results"), help="folder to write to (%(default)s)")
    add("--report", action="store_true", help="measure nothing: print and draw the files")
    add("--memory-of", choices=REMEMBERED, help="print the peak bytes of this engine only")
    given = parser.parse_args(arguments)
    given.networks = given.networks or (("xs",) if given.quick else NAMES)
    given.batches = given.batches or ((1,) if given.quick else (1, 16))
    given.directions = given.directions or (DIRECTIONS[:1] if given.quick else DIRECTIONS)
    given.seconds = (2.0 if given.quick else 10.0) if given.seconds is None else given.seconds
    if given.profile is None:
        given.profile = [name for name in PROFILED if name in given.networks]
    if given.profile and library.why_not():
        print(f"Without blocks: backend='cpu' {library.why_not()}")
        given.profile = []
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit status, 1 if an engine failed."""
    given = parse(arguments)
    if given.report:
        report(given.out)
        return 0
    torch.set_num_threads(given.threads)
    if given.memory_of:
        network = Network(f"swiftformer_{given.networks[0]}", given.batches[0], given.side)
        print(peak_bytes_here(network, given.memory_of))
        return 0
    make_folder("--out", given.out)
    names = installed(given.engines)
    problems = [
        (name, batch, direction)
        for direction in given.directions
        for name in given.networks
        for batch in (
            given.batches
            if direction == "forward"
            else given.training_batches or TRAINING_BATCHES.get(name, (8,))
        )
    ]
    rows: list[Row] = []
    blocks: list[Row] = []
    failures = []
    with Progress(len(problems) + len(given.profile), "steps") as bar:
        for name, batch, direction in problems:
            bar.show(f"{name}, batch {batch}, {direction}")
            network = Network(f"swiftformer_{name}", batch, given.side)
            can = TRAINED if direction != "forward" else FORWARD
            chosen = [n for n in names if n in can]
            found, failed = measure(network, direction, chosen, given.seconds, bar.note)
            rows += found
            for failure in failed:
                bar.write(f"{bar.text}: {failure}")
            failures += failed
            times = [f"{r['engine']} {1e3 * r['process_median_seconds']:.1f}" for r in found]
            bar.write(f"{bar.text}, ms of process time: {', '.join(times)}")
            write_csv(given.out / CSV, rows, digits=6)
            bar.advance()
        for name in given.profile:
            bar.show(f"{name}, blocks")
            network = Network(f"swiftformer_{name}", 1, given.side)
            blocks += [
                {"network": network.name, **row, **machine()}
                for row in network_blocks.measure(network.model, network.images, given.seconds)
            ]
            write_csv(given.out / network_blocks.CSV, blocks, digits=6)
            bar.advance()
    add_memory(rows)
    write_csv(given.out / CSV, rows, digits=6)
    report(given.out)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(command.run(main))
