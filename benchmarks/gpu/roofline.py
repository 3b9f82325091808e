"""Lower bounds, not times, of the layer on GPUs, without a GPU.

    python -m benchmarks.gpu.roofline

From the bytes and operations that `benchmarks.gpu.traffic` counted and the peaks of the datasheets
in datasheets.json: no GPU computes a call in less than its bytes take at the peak of the memory, or
its operations at the peak of the tensor cores (float32: of the FP32 units). The bounds do not say
how much longer it takes, so no ratio of two of them is a speed-up.

The bytes are those that cross the boundaries of kernels. Where the layer's own tensors fit in the
last-level cache, a kernel may find there what the previous one wrote, and the real time may be
below the bound: those bounds are marked (`fits_in_cache`).

The grid fill is computed too: how many programs each kernel has for the GPU's multiprocessors, and
how many programs fit on one at a time. Writes gpu_lower_bounds.csv and gpu_grid_fill.csv, draws
both, and writes the page docs/gpu_evidence.md.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import plots, report
from benchmarks.gpu.report import (
    DATASHEETS,
    GRID_FILL_CSV,
    LAUNCHES_CSV,
    LOWER_BOUNDS_CSV,
    TRAFFIC_CSV,
)
from swiftkernels.utils import command
from swiftkernels.utils.files import read_csv, write_csv

KERNELS_JSON = "gpu_kernels.json"
"""What compiled kernels use, by `benchmarks.gpu.cross_compile`."""

Facts = dict[str, Any]


@dataclass(frozen=True)
class Gpu:
    """Peaks of a GPU, by its vendor's datasheet."""

    name: str
    architecture: str
    memory_bytes_per_second: float
    float16_flops: float
    """Of the tensor cores, dense."""
    float32_flops: float
    multiprocessors: int
    cache_bytes: int
    """Of the last-level cache."""
    shared_memory_bytes: int
    """Of a multiprocessor, as are the next two."""
    registers: int
    threads: int

    @property
    def is_amd(self) -> bool:
        return self.architecture.startswith("gfx")

    def flops(self, dtype: str) -> float:
        """Operations a second on operands of that type.

        Raises:
            ValueError: the datasheets have no figure for the type.
        """
        if dtype not in ("float16", "float32"):
            raise ValueError(f"dtype must be 'float16' or 'float32'; got {dtype!r}.")
        return self.float16_flops if dtype == "float16" else self.float32_flops


def gpus(path: Path = DATASHEETS) -> list[Gpu]:
    """The GPUs of a file of datasheets."""
    fields = Gpu.__dataclass_fields__
    entries = json.loads(path.read_text())["gpus"]
    return [Gpu(**{name: entry[name] for name in fields}) for entry in entries]


def lower_bound(row: dict[str, str], gpu: Gpu) -> dict[str, Any]:
    """The lower bound of one row of gpu_traffic.csv on one GPU, in seconds."""
    memory = int(row["bytes"]) / gpu.memory_bytes_per_second
    # Unknown for Inductor: its bound is that of its bytes.
    compute = int(row["flops"]) / gpu.flops(row["dtype"]) if row["flops"] else 0.0
    return {
        "gpu": gpu.name,
        **{name: row[name] for name in list(row)[:6]},
        "bytes": row["bytes"],
        "flops": row["flops"],
        "memory_seconds": memory,
        "compute_seconds": compute or "",
        "lower_bound_seconds": max(memory, compute),
        "bound_by": "operations" if compute > memory else "bytes",
        "fits_in_cache": int(row["minimum_bytes"]) <= gpu.cache_bytes,
        # The least of any implementation: each tensor is moved once.
        "minimum_seconds": int(row["minimum_bytes"]) / gpu.memory_bytes_per_second,
    }


def resident_programs(facts: Facts, gpu: Gpu) -> int:
    """How many programs of a compiled kernel fit on one multiprocessor at a time.

    By shared memory, registers and threads; `facts` are its entry in gpu_kernels.json.
    """
    threads = facts["warps"] * (64 if gpu.is_amd else 32)
    registers = -(-facts["registers"] // 8) * 8  # allocated in units of 8
    # NVIDIA's GPUs reserve 1 KiB of shared memory in every block.
    shared = facts["shared"] + (0 if gpu.is_amd else 1024)
    limits = [gpu.registers // (registers * threads), gpu.threads // threads]
    if shared:
        limits.append(gpu.shared_memory_bytes // shared)
    return min(limits)


def grid_fill(launch: dict[str, str], gpu: Gpu, resident: int | None = None) -> dict[str, Any]:
    """How one row of gpu_launches.csv fills a GPU.

    `resident` is the number of its programs that fit on one multiprocessor, where known; "waves" is
    then how many times they fill the GPU.
    """
    programs = int(launch["programs"])
    places = gpu.multiprocessors * (resident or 0)
    return {
        "gpu": gpu.name,
        "multiprocessors": gpu.multiprocessors,
        **{name: launch[name] for name in list(launch)[:6]},
        "programs": programs,
        "programs_per_multiprocessor": programs / gpu.multiprocessors,
        "idle_multiprocessors": max(gpu.multiprocessors - programs, 0),
        "resident_per_multiprocessor": resident or "",
        "waves": programs / places if resident else "",
    }


def run(out: Path) -> None:
    """Write both CSV files from what was counted.

    Raises:
        ValueError: nothing was counted.
    """
    rows, launches = (read_csv(out / name) for name in (TRAFFIC_CSV, LAUNCHES_CSV))
    if not rows or not launches:
        raise ValueError(
            f"{out} has no {TRAFFIC_CSV} and {LAUNCHES_CSV} with rows; "
            "`python -m benchmarks.gpu.traffic` writes them."
        )
    bounds = [lower_bound(row, gpu) for gpu in gpus() for row in rows]
    write_csv(out / LOWER_BOUNDS_CSV, bounds, digits=6)
    compiled: dict[str, Facts] = {}
    if (out / KERNELS_JSON).is_file():
        compiled = json.loads((out / KERNELS_JSON).read_text())

    def resident(launch: dict[str, str], gpu: Gpu) -> int | None:
        kernel = launch["kernel"].strip("_").removesuffix("_kernel")
        dtype = launch["dtype"].replace("float", "fp")
        facts = compiled.get(f"{kernel} {gpu.architecture} {dtype} {launch['width']}")
        return resident_programs(facts, gpu) if facts and "error" not in facts else None

    fills = [grid_fill(launch, gpu, resident(launch, gpu)) for gpu in gpus() for launch in launches]
    write_csv(out / GRID_FILL_CSV, fills, digits=6)


def _main() -> None:
    assert __doc__
    parser = command.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="for CSV and PNG")
    out = parser.parse_args().out
    run(out)
    half = [row for row in read_csv(out / LOWER_BOUNDS_CSV) if row["dtype"] == "float16"]
    print("Lower bounds, not times, in microseconds (float16; * where the layer fits in the cache)")
    print(report.bounds_table(half, ("gpu", *report.CASE)))
    print("\n".join(str(path) for path in plots.draw_lower_bounds(out)))
    print(report.write(out))


if __name__ == "__main__":
    sys.exit(command.run(_main))
