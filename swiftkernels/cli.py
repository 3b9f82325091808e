"""The command line: `swiftkernels doctor` tells what works here and how to mend the rest."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

import swiftkernels
from swiftkernels import checks, compat, ops
from swiftkernels.cpu import library

SHAPE = (8, 196, 64)
"""The tokens that the doctor asks about, [B, N, C], with E = C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="swiftkernels", description=swiftkernels.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="tell what works here, and how to mend what does not")
    parser.parse_args(arguments)
    return doctor()


def doctor() -> int:
    """Print what was found; 1 if something that should work here does not, else 0."""
    _section("Versions", _versions())
    _section("CPU", _cpu())
    _section("CPU kernels", _cpu_kernels())
    _section("GPUs", _gpus())
    _section(f'backend="auto" for tokens {list(SHAPE)}, without gradients', _choices())
    faults = list(_faults())
    if not faults:
        print("All that should work here does.")
        return 0
    print("To mend:")
    for fault in faults:
        print(f"  * {fault}")
    return 1


def _versions() -> Iterator[tuple[str, str]]:
    yield "swiftkernels", swiftkernels.__version__
    yield "torch", torch.__version__
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
    except ValueError:  # SWIFTKERNELS_CPU_ISA cannot be followed: told under "To mend"
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
    return "built, usable, not chosen"


def _gpus() -> Iterator[tuple[str, str]]:
    for device in _gpu_devices():
        name = torch.get_device_module(device).get_device_name(device)
        too_old = compat.too_old_for_triton(device)
        note = f" (compute capability {too_old}: too old for the kernels)" if too_old else ""
        yield str(device), f"{name}{note}"
    if not _gpu_devices():
        yield "none", "torch sees no CUDA, ROCm or XPU device"


def _choices() -> Iterator[tuple[str, str]]:
    # One of each type is enough: what the choice depends on rarely differs among several GPUs.
    devices = {"cpu": torch.device("cpu")} | {d.type: d for d in reversed(_gpu_devices())}
    for device in devices.values():
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x = torch.empty(SHAPE, dtype=dtype, device=device)
            try:
                with torch.no_grad():
                    chosen = ops.choose_backend("auto", x, SHAPE[-1])
                text = "\n".join((chosen, *_why_not(x, chosen)))
            except ValueError as error:
                text = f"error: {error}"
            yield f"{device.type} {str(dtype).removeprefix('torch.')}", _indented(text)


def _why_not(x: Tensor, chosen: str) -> Iterator[str]:
    """Why "auto" took none of the backends that stand before the chosen one."""
    others = checks.BACKENDS[1:]
    for backend in others[: others.index(chosen)]:
        try:
            ops.choose_backend(backend, x, SHAPE[-1])
        except ValueError as error:
            yield "  " + str(error).removesuffix(
                " Use backend='auto', which takes the best there is."
            )
        else:
            yield f"  backend={backend!r} works as well, when asked for."


def _faults() -> Iterator[str]:
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
    if _gpu_devices() and not compat.has_triton():
        yield (
            f"{_gpu_devices()[0]} needs the package triton for backend='triton': "
            "pip install swiftkernels[triton]."
        )


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
    """The compiler that an installation would find now, as in setup.py."""
    names = ("c++", "g++", "clang++")
    command = shlex.split(os.environ.get("CXX", "")) or [n for n in names if shutil.which(n)][:1]
    if not command:
        return f"none found ({', '.join(names)})"
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{shlex.join(command)} does not run: {getattr(error, 'strerror', error)}"
    return f"{shlex.join(command)}: {(done.stdout.splitlines() or [''])[0]}"


def _gpu_devices() -> list[torch.device]:
    counts = {"cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count()}
    return [torch.device(kind, i) for kind, count in counts.items() for i in range(count)]
