"""The command line.

`swiftkernels doctor` shows what works here, `verify` checks the kernels, `bench` times them, and
`predict` classifies images.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

import swiftkernels
from swiftkernels.backends import devices, torch_state
from swiftkernels.backends.cpu import library
from swiftkernels.models.family import SOURCES
from swiftkernels.ops.additive_attention.op import SELF_ATTENTION
from swiftkernels.ops.types import Backend, Pooling
from swiftkernels.tools import verify
from swiftkernels.utils import command
from swiftkernels.utils.images import CROP
from swiftkernels.utils.text import shown

SHAPE = (8, 196, 64)
"""Shape of the tokens for which doctor shows the backends, [B, N, C] with E = C."""

TRIAL = verify.Case(1, 16, 16, 16, 1)
"""The case that doctor compiles and runs on every GPU."""

DRIVERS = {"/dev/nvidiactl": "an NVIDIA", "/dev/kfd": "an AMD"}
"""Device file of a driver -> maker of the GPU."""

HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""Environment variables that select GPUs."""

GET_TORCH = "install a build of torch for it: https://pytorch.org/get-started/locally"

REMEDIES = {
    "C compiler": "Triton builds its launcher with one: apt install gcc",
    "CalledProcessError": (
        "The C compiler failed, see its output above; often Python's headers are missing: "
        "apt install python3-dev"
    ),
    "libcuda.so": (
        "The library of the driver was not found: run ldconfig, or start the container with "
        "--gpus all"
    ),
    "active drivers": "Triton and torch do not match: reinstall both; torch installs triton",
    "no kernel image": f"This torch has no code for the GPU: {GET_TORCH}",
    "ptxas": "This Triton is too old for the GPU: install a newer torch, which has a newer Triton",
    "out of memory": "Other programs use the memory of the GPU: nvidia-smi or rocm-smi shows which",
    "budget": "The kernels give wrong results: please report the output of swiftkernels verify",
}
"""Text in an error message -> remedy; the first match counts."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status, see `swiftkernels.utils.command`."""
    return command.run(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = command.Parser(prog="swiftkernels", description=swiftkernels.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="show what works here, and how to fix the rest")
    _add_verify(commands.add_parser("verify", help="check all kernels that run here"))
    _add_bench(commands.add_parser("bench", help="time the operator and its alternatives"))
    _add_predict(commands.add_parser("predict", help="classify images, draw token weights"))
    options = vars(parser.parse_args(arguments))
    name = options.pop("command")
    if name == "doctor":
        return doctor()
    if name == "verify":
        return verify.run(**options)
    if name == "bench":
        from swiftkernels.tools import bench

        return bench.run(**options)
    from swiftkernels.tools import predict

    return predict.run(**options)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare all kernels that run on a device, forward and backward, with the definition in "
        "float64. Exit status: 0 all correct, 1 an error above its bound, 2 nothing could run."
    )
    _add_device(parser)
    parser.add_argument("--backend", choices=verify.BACKENDS, help="check only this backend")
    parser.add_argument("--quick", action="store_true", help="about half of the cases")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time the operator, eager PyTorch, torch.compile and other attentions at the shapes of "
        "SwiftFormer, and write a CSV file, plots and a report. Engines with wrong results are not "
        "timed. A full run takes long, because torch.compile compiles again for every shape; after "
        "Ctrl-C the report has the results so far. Exit status: 0, or 1 if an engine was wrong."
    )
    _add_device(parser)
    add = parser.add_argument
    add("--out", type=Path, default=Path("results"), help="folder to write to (%(default)s)")
    add("--quick", action="store_true", help="few shapes and types, less time each")
    add(
        "--threads",
        type=int,
        default=1,
        help="threads on a CPU (%(default)s measures process time)",
    )


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print the most likely classes of images; with options also draw token weights and feature "
        "maps. The size of the model follows from the checkpoint; the pooling from the file, its "
        "source, or --pooling. Exit status: 0, or 1 if an image could not be read."
    )
    add = parser.add_argument
    add(
        "checkpoint",
        help="a .pth or .safetensors file of the official code, timm, transformers or this "
        "library; a folder that holds one and config.json; or a repository of huggingface.co",
    )
    add("images", type=Path, nargs="+", help="image files, or folders of them")
    add(
        "--labels", "--classes", type=Path, metavar="FILE",
        help="class names, one a line (default: config.json, or ImageNet for 1000 classes)",
    )  # fmt: skip
    add("--top", type=int, metavar="N", help="number of classes to print (5)")
    add(
        "--size", type=int, nargs="+", default=(224,), metavar="PIXELS",
        help="size of the input: side of a square, or height and width (224)",
    )  # fmt: skip
    add(
        "--crop", type=float, default=CROP, metavar="SHARE",
        help="share of the shorter side that is cropped (%(default)s, as in the official code; "
        "timm: 0.95)",
    )  # fmt: skip
    add("--attention", action="store_true", help="draw the token weights of each stage")
    add("--features", action="store_true", help="draw the feature map of each stage")
    add("--out", type=Path, default=Path("results"), help="folder for the pictures (%(default)s)")
    add("--source", choices=SOURCES, help="implementation with these names (found by the names)")
    add("--prefix", default="", help="load only names that start with it: backbone. in a detector")
    add(
        "--pooling",
        choices=get_args(Pooling),
        help="pooling of the attention (from file or source)",
    )
    add("--ema", action="store_true", help="load the moving average of the weights")
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, xpu (default: the first GPU or cpu)"
    )


def doctor() -> int:
    """Print what works on this machine; returns 1 if something needs a fix, else 0."""
    _section("Versions", _versions())
    _section("CPU", _cpu())
    _section("CPU kernels", _cpu_kernels())
    _section("GPUs", _gpus())
    _section(f'backend="auto" for tokens {list(SHAPE)}, without gradients', _choices())
    problems = list(_problems())
    if not problems:
        print("No problems found.")
        return 0
    print("To fix:")
    for problem in problems:
        print(f"  * {problem}")
    return 1


def _versions() -> Iterator[tuple[str, str]]:
    yield "swiftkernels", swiftkernels.__version__
    yield "torch", f"{torch.__version__}, built for {devices.built_for()}"
    yield "triton", _version("triton")
    yield "python", platform.python_version()
    yield "platform", platform.platform()
    yield "installed in", str(Path(swiftkernels.__file__).parent)


def _cpu() -> Iterator[tuple[str, str]]:
    yield "processor", library.processor_name()
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} logical processors"
    yield "compiler", _compiler()


def _cpu_kernels() -> Iterator[tuple[str, str]]:
    record = library.build_record()
    if record["compiler"]:
        yield "compiled by", record["compiler"]
    try:
        chosen = library.loaded()
    except ValueError:  # a wrong SWIFTKERNELS_CPU_ISA is listed under "To fix"
        chosen = None
    if record["error"] and not library.available():
        yield "not built", record["error"]
    made = {} if record["error"] else record["libraries"]
    for isa in library.ISAS:
        if isa in made or isa in library.available():
            yield isa, _indented(_state(isa, chosen))
    if chosen is None:
        yield "in use", "none"
    else:
        yield "in use", str(chosen.path)


def _state(isa: str, chosen: library.Library | None) -> str:
    problem = library.problem(isa)
    if isa not in library.available():
        return problem
    if problem:
        return f"built, not usable: {problem}"
    if chosen is not None and isa == chosen.name:
        return "built, in use"
    return "built, usable, not in use"


def _gpus() -> Iterator[tuple[str, str]]:
    for device in devices.gpus():
        try:
            text = "\n".join(_gpu(device))
        except RuntimeError as error:
            text = f"cannot be used: {_first_line(error)}"
        yield str(device), _indented(text)
    if not devices.gpus():
        yield "none", f"torch finds no CUDA, ROCm or XPU device ({_why_no_gpu()})"


def _gpu(device: torch.device) -> Iterator[str]:
    """Name, architecture and memory, and whether the kernels run."""
    yield devices.name(device)
    free = ""
    if device.type == "cuda":
        free = f", {torch.cuda.mem_get_info(device)[0] / 2**30:.1f} free"
    yield devices.facts(device) + free
    too_old = torch_state.too_old_for_triton(device)
    if too_old:
        yield f"compute capability {too_old}: too old for the kernels, which need 8.0"
    elif torch_state.has_triton():
        yield _trial(device) or "the kernels compile and run on it, with correct results"


@functools.cache
def _trial(device: torch.device) -> str:
    """The failure of a small case that is compiled and run on a GPU; empty if it passes."""
    return verify.verify_case(TRIAL, "triton", torch.float32, device).failure


def _why_no_gpu() -> str:
    if not (torch.version.cuda or torch.version.hip):
        return f"it was built for {devices.built_for()}"
    hiding = [f"{name}={os.environ[name]}" for name in HIDING if name in os.environ]
    if hiding:
        return f"{', '.join(hiding)} may hide it"
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return _first_line(error)
    return "the driver lists none"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _choices() -> Iterator[tuple[str, str]]:
    shown: set[str] = set()  # reasons that hold for several dtypes are shown once
    # One GPU of each type: the choice rarely differs among the GPUs of a machine.
    kinds = {"cpu": torch.device("cpu")} | {d.type: d for d in reversed(devices.gpus())}
    for device in kinds.values():
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            try:
                x = torch.empty(SHAPE, dtype=dtype, device=device)
                with torch.no_grad():
                    chosen = SELF_ATTENTION.choose_backend("auto", x, SHAPE[-1])
                reasons = [reason for reason in _why_not(x, chosen) if reason not in shown]
                shown.update(reasons)
                text = "\n".join((chosen, *reasons))
            except (RuntimeError, ValueError) as error:
                text = f"error: {_first_line(error)}"
            yield f"{device.type} {str(dtype).removeprefix('torch.')}", _indented(text)


def _why_not(x: Tensor, chosen: str) -> Iterator[str]:
    """Why "auto" chose none of the backends before the chosen one."""
    others = get_args(Backend)[1:]
    for backend in others[: others.index(chosen)]:
        reason = SELF_ATTENTION.why_not(backend, x, SHAPE[-1])
        yield "  " + (reason or f"backend={backend!r} works too, if it is requested.")


def _problems() -> Iterator[str]:
    try:
        reason = library.why_not()
    except ValueError as error:
        yield str(error)
    else:
        if reason:
            yield f"backend='cpu' {reason}."
        else:
            for isa, can_run in library.available().items():
                problem = library.problem(isa)
                if problem and can_run:
                    yield f"CPU kernels for {isa} cannot be used: {problem} ({library.remedy()})."
    yield from _gpu_problems()


def _gpu_problems() -> Iterator[str]:
    gpus = devices.gpus()
    if not gpus and not any(name in os.environ for name in HIDING):
        for path, maker in DRIVERS.items():
            if Path(path).exists():
                yield (
                    f"{path} is the driver of {maker} GPU, which torch does not find "
                    f"({_why_no_gpu()}): {GET_TORCH}."
                )
    if gpus and not torch_state.has_triton():
        yield (
            f"{gpus[0]} needs the package triton for backend='triton'. In a clone of this library, "
            "run: pip install '.[triton]'"
        )
        return
    for device in gpus:
        failure = "" if torch_state.too_old_for_triton(device) else _trial(device)
        if failure:
            yield f"backend='triton' fails on {device}: {failure}. {_remedy(failure)}."


def _remedy(failure: str) -> str:
    unknown = "Please report the output of swiftkernels verify"
    return next((text for words, text in REMEDIES.items() if words in failure), unknown)


def _section(title: str, rows: Iterator[tuple[str, str]]) -> None:
    print(title)
    for name, value in rows:
        print(f"  {name:<14}  {value}")
    print()


def _indented(text: str) -> str:
    return text.replace("\n", "\n" + " " * 18)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _compiler() -> str:
    """The compiler that an installation would use now, as in setup.py."""
    names = ("c++", "g++", "clang++")
    given = os.environ.get("CXX", "")
    try:
        compiler = shlex.split(given) or [n for n in names if shutil.which(n)][:1]
    except ValueError as error:
        return f"CXX={shown(given)} is no command: {error}"
    if not compiler:
        return f"none found ({', '.join(names)})"
    call = shown(shlex.join(compiler))
    try:
        done = subprocess.run(
            [*compiler, "--version"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        )  # fmt: skip
    except OSError as error:
        return f"{call} does not run: {error.strerror}"
    if done.returncode:
        return f"{call} does not run: it ended with status {done.returncode}"
    return f"{call}: {shown((done.stdout.splitlines() or [''])[0])}"
