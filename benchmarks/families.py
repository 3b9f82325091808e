"""What `fuse_for_inference` gains for the networks of timm, family by family.

`python -m benchmarks.families` needs timm (torchvision may be missing). For a small network of each
family it counts the blocks, compares the outputs with float64, and times eager PyTorch and the
fused network in turn, in one process, by the process time. Networks that are trained with branches
side by side and have a method to merge them, such as FastViT and RepViT, are timed after it too.
The command writes families.csv; with `--families` it replaces the rows of these only.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import swiftkernels
from benchmarks import timm_networks
from benchmarks.timm_networks import TOLERANCE, call_of, machine
from swiftkernels.fusion.network import FusionReport
from swiftkernels.testing.engines import OURS
from swiftkernels.testing.ratios import markdown_table
from swiftkernels.testing.timing import Timing, clock_name, measure_in_turn, process_and_wall_time
from swiftkernels.testing.tolerance import relative_error
from swiftkernels.utils import command
from swiftkernels.utils.files import make_folder, read_csv, write_csv
from swiftkernels.utils.progress import Progress

CSV = "families.csv"
FAMILIES: dict[str, tuple[str, ...]] = {
    "RepViT": ("repvit_m0_9", "repvit_m1"),
    "FastViT": ("fastvit_t8", "fastvit_sa12"),
    "EfficientFormer": ("efficientformer_l1",),
    "EfficientFormerV2": ("efficientformerv2_s0",),
    "PoolFormer": ("poolformer_s12",),
    "FasterNet": ("fasternet_t0", "fasternet_s"),
    "SHViT": ("shvit_s1",),
    "CPUBone": ("cpubone_b0_bfrobust",),
    "ConvNeXt": ("convnext_atto", "convnext_tiny"),
    "EdgeNeXt": ("edgenext_xx_small",),
    "InceptionNeXt": ("inception_next_atto",),
    "EfficientViT (MSRA)": ("efficientvit_m1",),
    "EfficientViT (MIT)": ("efficientvit_b0",),
    "TinyViT": ("tiny_vit_5m_224",),
    "MobileNetV2": ("mobilenetv2_100",),
    "MobileNetV3": ("mobilenetv3_large_100",),
    "MobileNetV4": ("mobilenetv4_conv_small",),
    "EfficientNet": ("efficientnet_b0",),
    "LCNet": ("lcnet_100",),
    "MobileOne": ("mobileone_s0",),
    "StarNet": ("starnet_s1",),
    "MobileViTv2": ("mobilevitv2_100",),
    "ConvFormer": ("convformer_s18",),
    "NextViT": ("nextvit_small",),
    "SwiftFormer": ("swiftformer_xs",),
    "ResNet": ("resnet50",),
    "DeiT": ("deit_tiny_patch16_224",),
}
"""Small networks of timm by family."""
MERGED = "merged"
"""The network after the method of its own that merges branches."""
SIDE = 224
MIN_ROUNDS = 5

Row = dict[str, Any]


def make_model(name: str) -> nn.Module:
    """timm's model in evaluation mode, with random weights that hide no error.

    The BatchNorms have the statistics of random images. With others, maps of deep networks grow
    until attentions magnify rounding errors a thousandfold.
    """
    model = timm_networks.make_model(name)
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        model(torch.randn(4, 3, SIDE, SIDE))
    return model.eval()


def merged(model: nn.Module) -> nn.Module | None:
    """A copy with its branches merged by its own method; None if it has none."""
    methods = ("fuse", "reparameterize", "switch_to_deploy")
    if not any(hasattr(part, name) for part in model.modules() for name in methods):
        return None
    return timm_networks.merged(model)


def blocks(report: FusionReport) -> Row:
    """How many blocks were found and fused, and what they became."""
    layers = "it belongs to no block of a known form"
    fused = [block for block in report.fused if block.steps != ("pool", "linear")]
    left = [block for block in report.left if block.reason != layers]
    steps = Counter(step for block in fused for step in block.steps)
    return {
        "blocks_found": len(fused) + len(left),
        "blocks_fused": len(fused),
        "chains": len({block.chain for block in fused}),
        "folded_norms": len(report.folded),
        "steps": ", ".join(f"{count} {kind}" for kind, count in steps.most_common()),
    }


def measure(family: str, name: str, seconds: float) -> Row:
    """A row of the file.

    Raises:
        RuntimeError: the error of the fused network is too large.
    """
    model = make_model(name)
    images = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    (exact,) = call_of(copy.deepcopy(model).double(), images.double())()
    modules = {"eager": model, MERGED: merged(model)}
    row: Row = {"family": family, "model": name, "blocks_found": 0, "blocks_fused": 0}
    row |= {"chains": 0, "folded_norms": 0, "steps": "", "reason": ""}
    try:
        fused = swiftkernels.fuse_for_inference(model)
        modules[OURS] = fused
        row |= blocks(fused.report)
    except ValueError as error:
        row["reason"] = str(error).split(" in ")[0]
    calls = {key: call_of(m, images) for key, m in modules.items() if m is not None}
    errors = {key: relative_error(call()[0], exact) for key, call in calls.items()}
    if not errors.get(OURS, 0.0) <= max(TOLERANCE, 2 * errors["eager"]):
        raise RuntimeError(f"{name}: the fused network has a relative error of {errors[OURS]:.1e}")
    samples = measure_in_turn(calls, process_and_wall_time, seconds, MIN_ROUNDS)
    for key in ("eager", MERGED, OURS):
        column = "fused" if key == OURS else key
        row[f"{column}_error"] = errors.get(key, "")
        timing = Timing(tuple(process for process, _ in samples[key])) if key in calls else None
        row[f"{column}_median_seconds"] = timing.median if timing else ""
        row[f"{column}_min_seconds"] = timing.minimum if timing else ""
    row["ratio"] = ratio(row, "eager")
    row |= {"batch": 1, "side": SIDE, "dtype": "float32", "threads": torch.get_num_threads()}
    row |= {"clock": clock_name("cpu"), "rounds": len(samples["eager"])}
    return row | {key: machine()[key] for key in ("device", "isa", "torch", "timm")}


def ratio(row: Mapping[str, Any], column: str) -> float | str:
    """How many times as long a call of another network takes; empty if there is none."""
    ours, other = row["fused_median_seconds"], row[f"{column}_median_seconds"]
    return "" if "" in (ours, other) else float(other) / float(ours)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Blocks, errors and times of all networks."""
    head = ["family", "model", "found", "fused", "error", "eager", "eager, ms", "merged", "fused"]
    lines = [[*head, "gain", "of merged"]]
    for row in rows:
        errors = [f"{float(row[k]):.0e}" if row[k] else "" for k in ("fused_error", "eager_error")]
        keys = ("eager_median_seconds", "merged_median_seconds", "fused_median_seconds")
        times = [f"{1e3 * float(row[k]):.1f}" if row[k] else "" for k in keys]
        gains = [ratio(row, "eager"), ratio(row, MERGED)]
        shown = [f"{gain:.2f}" if isinstance(gain, float) else "" for gain in gains]
        names = [str(row[k]) for k in ("family", "model", "blocks_found", "blocks_fused")]
        lines.append([*names, *errors, *times, *shown])
    return markdown_table(lines, texts=(0, 1))


def merge(path: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows of a file with those of the same models replaced, in the order of `FAMILIES`."""
    by_name: dict[str, Row] = {}
    if path.exists():
        by_name = {row["model"]: dict(row) for row in read_csv(path)}
    by_name |= {row["model"]: row for row in rows}
    order = [name for names in FAMILIES.values() for name in names]
    return [by_name[name] for name in order if name in by_name]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit status, 1 if a network failed."""
    parser = command.Parser(
        prog="python -m benchmarks.families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    short = {family.split()[0].lower(): family for family in reversed(FAMILIES)}
    names = [*FAMILIES, *short]
    add("--families", nargs="+", choices=names, metavar="FAMILY", help=f"of {', '.join(FAMILIES)}")
    add("--models", nargs="+", metavar="MODEL", help="of these families only these")
    add("--seconds", type=float, default=2.0, help="for the rounds of a network (%(default)s)")
    add("--threads", type=int, default=1, help="(%(default)s)")
    add("--out", type=Path, default=Path("results"), help="folder to write to (%(default)s)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    make_folder("--out", given.out)
    chosen = [short.get(family, family) for family in given.families or FAMILIES]
    models = [(family, name) for family in chosen for name in FAMILIES[family]]
    if given.models:
        models = [(family, name) for family, name in models if name in given.models]
    path, status = given.out / CSV, 0
    rows: list[Row] = []
    with Progress(len(models), "networks") as bar:
        for family, name in models:
            bar.show(name)
            try:
                row = measure(family, name, given.seconds)
            except Exception as error:  # of one network; the others are measured
                bar.write(f"{name}: {type(error).__name__}: {str(error)[:200]}")
                status = 1
            else:
                rows.append(row)
                gain = row["ratio"] and f", gain {row['ratio']:.2f}"
                bar.write(f"{name}: {row['blocks_fused']} blocks fused{gain}")
                write_csv(path, merge(path, rows), digits=6)
            bar.advance()
    if path.exists():
        print("\n" + table(read_csv(path)) + f"\n\nWritten: {path}")
    return status


if __name__ == "__main__":
    sys.exit(command.run(main))
