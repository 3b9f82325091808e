"""Finds and loads the compiled kernels: the best library that the processor can run.

The library is loaded at the first use, once per process. torch is imported before, so the library
binds to torch's OpenMP runtime and shares its threads.

isas.json lists the instruction sets. A new instruction set needs an entry there, its vectors in
csrc/simd.h, and its detection in csrc/features.cpp.

Environment: SWIFTKERNELS_CPU_ISA chooses the library, one of `ISAS`, or "none" for no library.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from swiftkernels.backends import torch_state

DIRECTORY = Path(__file__).parent

_ISAS: dict[str, dict[str, Any]] = json.loads((DIRECTORY / "isas.json").read_text())

ISAS = tuple(_ISAS)
"""Instruction sets, best first."""

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Codes of the element types."""

DONE, OUT_OF_MEMORY, STALE, CANCELLATION = range(4)
"""What a call of a kernel returns: see `Status` in csrc/exports.h."""

# The numbers that a table of a library has to contain, by the symbol that the library exports.
_interfaces: dict[str, dict[str, int]] = {
    "swiftkernels_cpu_abi": {
        "revision": 5,
        **{str(dtype).removeprefix("torch.").upper(): code for dtype, code in TYPES.items()},
        "DONE": DONE,
        "OUT_OF_MEMORY": OUT_OF_MEMORY,
        "STALE": STALE,
        "CANCELLATION": CANCELLATION,
    }
}


class Library(NamedTuple):
    """A loaded library."""

    name: str
    """Its instruction set, one of `ISAS`."""
    path: Path
    """Where it was loaded from."""
    handle: ctypes.CDLL
    """Its functions."""


def register_interface(operator: str, numbers: dict[str, int]) -> None:
    """Require that the C++ of an operator agrees with its Python; other libraries are not loaded.

    Args:
        operator: the library exports a table `swiftkernels_<operator>_abi` (csrc/exports.h).
        numbers: the table has to contain these sizes of structs, codes and limits.
    """
    _interfaces[f"swiftkernels_{operator}_abi"] = numbers
    for cache in (loaded, why_not, _open):
        cache.cache_clear()


@functools.cache
def loaded() -> Library | None:
    """The library in use; None if there is none, and `why_not` says why.

    Raises:
        ValueError: SWIFTKERNELS_CPU_ISA names one that cannot be used.
    """
    wanted = _wanted()
    if wanted == "none":
        return None
    if wanted:
        try:
            return load(wanted)
        except ValueError as error:
            raise ValueError(
                f"SWIFTKERNELS_CPU_ISA must name kernels that can be used here; got {wanted!r}. "
                f"{error} Unset the variable to use the best, or set it to none to use no library."
            ) from None
    usable = (isa for isa in ISAS if not problem(isa))
    return next((load(isa) for isa in usable), None)


FUNCTIONS = ("forward", "forward_training", "backward")
"""Of an operator with a backward."""


def kernels_of(operator: str, *functions: str) -> Callable[[], ctypes.CDLL]:
    """A function that returns the library in use, with some functions of an operator declared."""

    @functools.cache
    def kernels() -> ctypes.CDLL:
        found = loaded()
        assert found is not None, "the backend is chosen only where there is a library"
        return declare(found.handle, operator, *functions)

    return kernels


def declare(handle: ctypes.CDLL, operator: str, *functions: str) -> ctypes.CDLL:
    """Declare the types of the functions of the backend and of an operator to ctypes."""
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    handle.swiftkernels_lanes.restype, handle.swiftkernels_lanes.argtypes = number, ()
    handle.swiftkernels_pack.restype = None
    handle.swiftkernels_pack.argtypes = (pointer, *[number] * 4, pointer)
    handle.swiftkernels_fingerprint.restype = ctypes.c_uint64
    handle.swiftkernels_fingerprint.argtypes = (ctypes.c_char_p, number)
    peak = handle.swiftkernels_peak_flops
    peak.restype, peak.argtypes = number, (number,)
    for name in functions or FUNCTIONS:
        function = getattr(handle, f"swiftkernels_{operator}_{name}")
        function.restype, function.argtypes = ctypes.c_int, (ctypes.c_char_p, ctypes.c_char_p)
    return handle


@functools.cache
def why_not() -> str:
    """Why no library is in use, as continuation of "backend='cpu' ..."; empty if one is.

    Raises:
        ValueError: SWIFTKERNELS_CPU_ISA names a library that cannot be used.
    """
    if loaded() is not None:
        return ""
    if _wanted() == "none":
        return "is switched off by SWIFTKERNELS_CPU_ISA=none (unset the variable)"
    if available():
        reasons = "; ".join(f"{isa}: {problem(isa)}" for isa in available())
        return f"cannot use its compiled kernels, {reasons} ({remedy()})"
    record = build_record()
    error = str(record["error"] or build_error("portable") or build_error("neon")).splitlines()
    # The first lines of a compiler name the place, a later one the error.
    reason = next((line for line in error if "error" in line), error[0])
    return f"needs the compiled kernels, which were not built: {reason} ({remedy()})"


def why_not_for(x: torch.Tensor) -> str:
    """Why the kernels cannot take x, as continuation of "backend='cpu' ..."; empty if they can."""
    if x.device.type != "cpu":
        return f"needs a tensor on the CPU; got one on {x.device}"
    if x.dtype == torch.float64:
        return "takes float32, bfloat16 and float16; got float64"
    return _constant_why_not()


@torch_state.constant_under_compile
def _constant_why_not() -> str:
    return why_not()


def address(name: str, t: torch.Tensor) -> int:
    """Where a tensor with elements begins.

    Raises:
        ValueError: it has no memory.
    """
    found = t.data_ptr()
    if not found:
        raise ValueError(
            f"{name} must have memory; its storage was freed. Restore its values before the call."
        )
    return found


def dense(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """t contiguous and in that type; itself, if it is."""
    return t if t.dtype is dtype and t.is_contiguous() else t.to(dtype).contiguous()


def check(status: int) -> None:
    """Raise if a kernel returned an error."""
    if status != DONE:
        raise MemoryError(
            "The CPU kernels found no memory for their tiles. Free some, or use "
            "backend='reference'."
        )


def remedy() -> str:
    """The command that builds the libraries here."""
    import shlex  # here, because only this message needs it

    editable = (DIRECTORY.parents[2] / "setup.py").exists()
    # Only an editable installation knows the path of its sources.
    sources = f"-e {shlex.quote(str(DIRECTORY.parents[2]))}" if editable else "--force-reinstall ."
    command = f"pip install --no-deps {sources}"
    if build_record()["compiler"]:
        return f"reinstall from the sources: {command}"
    return f"with a C++ compiler, as from apt install g++, reinstall: {command}"


def available() -> dict[str, bool]:
    """The libraries that were built, best first: name -> whether the processor can run it."""
    built = (isa for isa in ISAS if _path(isa).exists())
    return {isa: not _lacks(isa) for isa in built}


def load(name: str) -> Library:
    """Load the library for an instruction set.

    Raises:
        ValueError: it is unknown, not built, built from other sources, or the processor cannot run
            it.
    """
    reason = f"unknown, not one of {', '.join(ISAS)}" if name not in ISAS else problem(name)
    if not reason:
        return _open(name)
    built = ", ".join(available()) or "none"
    runs = ", ".join(isa for isa, can_run in available().items() if can_run) or "none"
    raise ValueError(
        f"The kernels {name!r} cannot be loaded: {reason}. Built: {built}; of these, the processor "
        f"can run: {runs}."
    )


def problem(isa: str) -> str:
    """Why the library for that instruction set cannot be used; empty if it can."""
    if not _path(isa).exists():
        return f"not built: {build_error(isa)}"
    lacks = _lacks(isa)
    if lacks:
        return f"the processor lacks {lacks}"
    try:
        _open(isa)
    except OSError as error:
        return f"cannot be loaded: {error}"
    except ValueError as error:
        return str(error)
    return ""


def processor_name() -> str:
    """The product name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def build_record() -> dict[str, Any]:
    """The record of the build by setup.py: compiler, error, command and error of each library."""
    path = DIRECTORY / "_build.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    return {"compiler": "", "error": f"no build was run in {DIRECTORY}", "libraries": {}}


def build_error(isa: str) -> str:
    """Why the library for that instruction set was not built."""
    record = build_record()
    library = record["libraries"].get(isa, {"error": "not made for this machine"})
    return str(record["error"] or library["error"])


def _wanted() -> str:
    return os.environ.get("SWIFTKERNELS_CPU_ISA", "")


def _path(isa: str) -> Path:
    return DIRECTORY / f"_kernels_{isa}.so"


@functools.cache
def _open(isa: str) -> Library:
    handle = ctypes.CDLL(str(_path(isa)))
    for symbol, numbers in _interfaces.items():
        _check_interface(handle, symbol, numbers)
    return Library(isa, _path(isa), handle)


class _AbiEntry(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_int64))


def _check_interface(handle: ctypes.CDLL, symbol: str, numbers: dict[str, int]) -> None:
    if not hasattr(handle, symbol):
        raise ValueError(f"built from other sources: it has no {symbol}")
    function = getattr(handle, symbol)
    function.restype = ctypes.POINTER(_AbiEntry)
    entries = itertools.takewhile(lambda entry: entry.name, function())
    built = {entry.name.decode(): entry.value for entry in entries}
    for name in {**numbers, **built}:
        if built.get(name) != numbers.get(name):
            raise ValueError(
                f"built from other sources: in {symbol}, {name} is {built.get(name)}, "
                f"{numbers.get(name)} is needed"
            )


def _lacks(isa: str) -> str:
    """The features that the library needs and the processor lacks; empty if none."""
    return "" if _processor_runs(isa) else str(_ISAS[isa]["needs"])


@functools.cache
def _processor_runs(isa: str) -> bool:
    if not _ISAS[isa]["needs"]:
        return True
    # Only a library for every processor may be called to detect features.
    for name in ISAS:
        if not _ISAS[name]["needs"] and _path(name).exists():
            with contextlib.suppress(OSError, ValueError):
                return bool(_open(name).handle.swiftkernels_processor_runs(isa.encode()))
    # Without such a library, torch's coarser detection has to do.
    runs = {"AVX2": ("avx2",), "AVX512": ("avx2", "avx512")}
    return isa in runs.get(torch.backends.cpu.get_cpu_capability(), ())
