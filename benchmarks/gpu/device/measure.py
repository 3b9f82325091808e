"""One step of `benchmarks/gpu/run`: `python -m benchmarks.gpu.device.measure STEP --out FOLDER`."""

from __future__ import annotations

import ctypes
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.gpu.device import checks, recorded_tests, times
from benchmarks.gpu.device.cases import Settings
from benchmarks.gpu.device.networks import DTYPES, SIZES
from swiftkernels.backends import devices
from swiftkernels.testing import harness
from swiftkernels.utils import command


def device_step(settings: Settings) -> int:
    """Print the machine."""
    print(describe(settings.device))
    return 0


def describe(device: torch.device) -> str:
    """The machine, the same in every process on it."""
    versions = {"torch": torch.__version__, "triton": harness.version("triton") or "missing"}
    versions |= {"python": platform.python_version(), "driver": driver() or "unknown"}
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    facts = "" if device.type == "cpu" else f", {devices.facts(device)}"
    return f"{devices.name(device)}{facts}, {named}"


def driver() -> str:
    """The version of NVIDIA's driver; "" if it is unknown."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()
    return found[0].strip() if found else ""


def pictures_step(settings: Settings) -> int:
    """Draw the pictures from the CSV files."""
    from benchmarks.gpu.device import plots

    drawn = plots.draw(settings.out)
    print(", ".join(path.name for path in drawn) or "nothing to draw")
    return 0


STEPS: dict[str, Callable[[Settings], int]] = {
    "device": device_step,
    "verify": checks.verify_step,
    "networks": times.networks_step,
    "training": times.training_step,
    "operators": times.operators_step,
    "tests": recorded_tests.tests_step,
    "pictures": pictures_step,
}


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that started it ends, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a step; returns its exit status."""
    die_with_parent()
    parser = command.Parser(prog="python -m benchmarks.gpu.device.measure", description=__doc__)
    add = parser.add_argument
    add("step", choices=STEPS)
    add("--out", type=Path, required=True, help="folder of the results")
    add("--device", help="(default: the first GPU)")
    add("--networks", nargs="+", choices=SIZES, default=SIZES)
    add("--dtypes", nargs="+", choices=DTYPES, default=tuple(DTYPES)[:3])
    add("--batches", nargs="+", type=int, default=(64,))
    add("--first", action="store_true", help="only the most important checks")
    add("--compiled", action="store_true", help="also torch.compile")
    add("--tiny", action="store_true", help="tiny sizes, to try the command")
    given = parser.parse_args(arguments)
    device = devices.find(given.device)
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)  # that of graphs and events
    settings = Settings(
        given.out.absolute(), device, tuple(given.networks), tuple(given.dtypes),
        tuple(given.batches), given.first, given.compiled, given.tiny,
    )  # fmt: skip
    return STEPS[given.step](settings)


if __name__ == "__main__":
    sys.exit(command.run(main))
