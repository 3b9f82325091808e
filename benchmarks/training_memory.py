"""Peak memory of a training step of SwiftFormer-XS on a CPU: this library's model and timm's.

`python -m benchmarks.training_memory` needs timm (torchvision may be missing) and writes
training_memory.csv. Every model has timm's weights and runs in its own process. A step is forward,
cross-entropy, backward and AdamW. A step on tiny images comes first: it loads libraries, starts
threads and makes the optimizer's moments. The growth of the resident set (`benchmarks.resident`) in
the step is the memory for activations, gradients and temporary tensors. If the losses of the models
differ, nothing is written.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swiftkernels
from benchmarks import resident
from swiftkernels import models
from swiftkernels.backends.cpu import library
from swiftkernels.testing.harness import isa
from swiftkernels.utils import command
from swiftkernels.utils.files import make_folder, write_csv
from swiftkernels.utils.progress import track

CSV = "training_memory.csv"
CLASSES = 1000
TOLERANCE = 1e-4
"""Largest relative difference of the losses, which another order of roundings explains."""


def _timm() -> nn.Module:
    from tests.stubs import import_timm

    torch.manual_seed(0)
    model: nn.Module = import_timm().create_model("swiftformer_xs", num_classes=CLASSES)
    return model


def _timm_accelerated() -> nn.Module:
    model = _timm()
    swiftkernels.accelerate(model)
    return model


def _timm_checkpointing() -> nn.Module:
    model = _timm()
    model.set_grad_checkpointing(True)  # type: ignore[operator]
    return model


def _ours() -> models.SwiftFormer:
    model = models.swiftformer_xs(num_classes=CLASSES)
    model.load_state_dict(_timm().state_dict())
    return model


def _ours_checkpointing() -> nn.Module:
    model = _ours()
    model.set_grad_checkpointing(True)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": _timm,
    "timm, accelerated": _timm_accelerated,
    "swiftkernels": _ours,
    "timm, checkpointing": _timm_checkpointing,
    "swiftkernels, checkpointing": _ours_checkpointing,
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> float:
    """One step of training; returns the loss."""
    optimizer.zero_grad()
    labels = torch.arange(len(images)) % CLASSES
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def measure_here(name: str, batch: int, side: int, threads: int) -> tuple[int, float]:
    """Bytes by which this process grows in a step, and the step's loss."""
    torch.set_num_threads(threads)
    model = MODELS[name]().train()
    weights = {key: t.clone() for key, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
    step(model, optimizer, images[:2, :, :32, :32].contiguous())
    model.load_state_dict(weights)
    optimizer.zero_grad()
    return resident.peak_growth(lambda: step(model, optimizer, images))


def measure(name: str, batch: int, side: int, threads: int, repeats: int) -> dict[str, Any]:
    """The row of a model; each repeat runs in its own process.

    Raises:
        RuntimeError: a process failed.
    """
    sizes = ("--batch", batch, "--side", side, "--threads", threads)
    peaks, losses = [], []
    for _ in range(repeats):
        printed = resident.run_process("benchmarks.training_memory", "--one", name, *sizes)
        peak, loss = printed.split()[-2:]
        peaks.append(int(peak))
        losses.append(float(loss))
    return {
        "model": name,
        "batch": batch,
        "side": side,
        "dtype": "float32",
        "peak_bytes": int(statistics.median(peaks)),
        "peak_bytes_min": min(peaks),
        "peak_bytes_max": max(peaks),
        "loss": statistics.median(losses),
        "repeats": repeats,
        "threads": threads,
        "processor": library.processor_name(),
        "isa": isa(),
        "torch": torch.__version__,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Peaks in MiB, and in shares of the first model's."""
    lines = [f"{'model':<30}{'peak, MiB':>10}{'share':>8}"]
    for row in rows:
        mib, share = row["peak_bytes"] / 2**20, row["peak_bytes"] / rows[0]["peak_bytes"]
        lines.append(f"{row['model']:<30}{mib:>10.0f}{share:>8.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit status, 1 if the losses differ."""
    parser = command.Parser(
        prog="python -m benchmarks.training_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--batch", type=int, default=32, help="images (%(default)s)")
    add("--side", type=int, default=224, help="pixels of a side (%(default)s)")
    add("--threads", type=int, default=1, help="(%(default)s)")
    add("--repeats", type=int, default=1, help="processes for each model (%(default)s)")
    add("--out", type=Path, default=Path("results"), help="folder to write to (%(default)s)")
    add("--one", choices=MODELS, metavar="MODEL", help="print bytes and loss of this model only")
    given = parser.parse_args(arguments)
    if given.one:
        print(*measure_here(given.one, given.batch, given.side, given.threads))
        return 0

    rows = [
        measure(name, given.batch, given.side, given.threads, given.repeats)
        for name in track(list(MODELS), "models")
    ]
    print(table(rows))
    loss = rows[0]["loss"]
    wrong = [r["model"] for r in rows if not abs(r["loss"] - loss) <= TOLERANCE * abs(loss)]
    if wrong:
        print(f"error: the loss is not timm's for {', '.join(wrong)}", file=sys.stderr)
        return 1
    make_folder("--out", given.out)
    write_csv(given.out / CSV, rows, digits=6)
    print(f"Written: {given.out / CSV}")
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
