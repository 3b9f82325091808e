"""Build entry point: compiles the CPU kernels. All metadata is in pyproject.toml.

Each instruction set gets a shared library, `swiftkernels/backends/cpu/_kernels_<isa>.so`. ctypes
loads its plain C interface, so it works with every version of Python and torch. If a library cannot
be compiled, the package is installed without it, and `_build.json` records the reason for
`swiftkernels doctor`.

Environment: CXX, CXXFLAGS, LDFLAGS; SWIFTKERNELS_BUILD=0 skips the kernels.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

PACKAGE = Path("swiftkernels", "backends", "cpu")
# Of all operators, and of the backend, whose headers they include.
SOURCES = sorted(str(path) for path in Path("swiftkernels").glob("**/csrc/*.cpp"))
HEADERS = sorted(str(path) for path in Path("swiftkernels").glob("**/csrc/*.h"))

# Never -ffast-math, not even by CXXFLAGS: gcc would link code that switches denormals off for the
# process.
FLAGS = (
    "-std=c++17 -O3 -fPIC -shared -fvisibility=hidden "
    "-fno-fast-math -fno-unsafe-math-optimizations -fno-math-errno -ffp-contract=fast "
    f"-I{(PACKAGE / 'csrc').as_posix()}"
)
ALL_ISAS = json.loads((PACKAGE / "isas.json").read_text())
MACHINE = platform.machine().lower()
ISAS = {isa: entry["flags"] for isa, entry in ALL_ISAS.items() if MACHINE in entry["machines"]}
ISAS = ISAS or {"portable": ""}
JOBS = 2
ERROR_LINES = 8


class BuildKernels(build_ext):
    """Compiles one library for each extension, next to the package's modules."""

    def get_ext_filename(self, fullname: str) -> str:
        """The name of the file, without Python's ABI."""
        return str(Path(*fullname.split("."))) + ".so"

    def get_outputs(self) -> list[str]:
        """The files of the build in build_lib; libraries that did not compile are missing."""
        directory = Path(self.build_lib) / PACKAGE
        return [str(path) for path in (*directory.glob("*.so"), *directory.glob("_build.json"))]

    def get_output_mapping(self) -> dict[str, str]:
        """For an editable install: the files of build_lib by their places in the source tree."""
        made = (*PACKAGE.glob("*.so"), *PACKAGE.glob("_build.json")) if self.inplace else ()
        return {str(self.build_lib / path): str(path) for path in made}

    def run(self) -> None:
        """Compile outdated libraries, remove those that no longer compile, record the reasons."""
        directory = PACKAGE if self.inplace else Path(self.build_lib) / PACKAGE
        directory.mkdir(parents=True, exist_ok=True)
        record_path = directory / "_build.json"
        old = read_record(record_path)
        compiler, version, error = find_compiler()
        try:
            own = {name: shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS")}
        except ValueError as reason:
            own, error = {}, error or f"CXXFLAGS or LDFLAGS cannot be split into words: {reason}"
        new = {"compiler": "" if error else version, "error": error, "libraries": {}}
        common = FLAGS.split()
        if not error and openmp_works(compiler):
            common.append("-fopenmp")
        newest = max(os.stat(path).st_mtime for path in (*SOURCES, *HEADERS, "setup.py"))

        def build(isa: str) -> None:
            target = directory / f"_kernels_{isa}.so"
            # The user's flags come first, so that a -march in them does not replace the library's.
            flags = [*own.get("CXXFLAGS", ()), *common, *ISAS[isa].split()]
            command = [*compiler, *flags, f"-DSWIFTKERNELS_ISA_{isa.upper()}=1", *SOURCES]
            command += own.get("LDFLAGS", ())
            record = {"command": shlex.join(command), "error": error}
            new["libraries"][isa] = record
            fresh = target.exists() and target.stat().st_mtime > newest
            same = old["libraries"].get(isa) == record and old["compiler"] == version
            if not error and not (fresh and same):
                record["error"] = compile_library(command, target)
            if record["error"]:
                target.unlink(missing_ok=True)

        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(build, ISAS))
        new["libraries"] = {isa: new["libraries"][isa] for isa in ISAS}
        record_path.write_text(json.dumps(new, indent=1) + "\n")
        failed = {isa: made["error"] for isa, made in new["libraries"].items() if made["error"]}
        if error:
            self.warn(f"CPU kernels not built: {error}. The package works without, more slowly.")
        else:
            for isa, reason in failed.items():
                self.warn(f"CPU kernels for {isa} not built:\n{reason}")


class PlatformWheel(bdist_wheel):
    """Tags the wheel for every Python, and for a platform if it has libraries."""

    def get_tag(self) -> tuple[str, str, str]:
        """Called after the build."""
        build_lib = Path(self.get_finalized_command("build_ext").build_lib)
        self.root_is_pure = not list((build_lib / PACKAGE).glob("*.so"))
        return "py3", "none", super().get_tag()[2]


def read_record(path: Path) -> dict[str, Any]:
    """The record of the last build; an empty one if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        if isinstance(found, dict) and isinstance(found.get("libraries"), dict):
            return {"compiler": "", **found}
    return {"compiler": "", "libraries": {}}


def find_compiler() -> tuple[list[str], str, str]:
    """The command of the compiler and its version, or the reason why there is none."""
    if os.environ.get("SWIFTKERNELS_BUILD") == "0":
        return [], "", "SWIFTKERNELS_BUILD=0 was set"
    names = ("c++", "g++", "clang++")
    given = os.environ.get("CXX", "")
    try:
        command = shlex.split(given) or [n for n in names if shutil.which(n)][:1]
    except ValueError as error:
        return [], "", f"CXX={given} is no command: {error}"
    if not command:
        return [], "", f"no C++ compiler was found ({', '.join(names)})"
    try:
        done = call([*command, "--version"])
        reason = f"it ended with status {done.returncode}" if done.returncode else ""
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        return [], "", f"the C++ compiler {shlex.join(command)} does not run: {reason}"
    return command, (done.stdout.splitlines() or [""])[0], ""


def call(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler; its output may have any encoding."""
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )


def openmp_works(compiler: list[str]) -> bool:
    """Whether a library with OpenMP can be compiled and linked; Apple's clang lacks OpenMP."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.cpp")
        source.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
        command = [*compiler, *FLAGS.split(), "-fopenmp", str(source)]
        return not compile_library(command, Path(directory, "probe.so"))


def compile_library(command: list[str], target: Path) -> str:
    """Compile to `target`; returns the first lines of the compiler's errors, or ""."""
    # Not written in place, because processes may have the old library mapped.
    made = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        done = call([*command, "-o", str(made)])
    except OSError as error:
        return f"the compiler does not run: {error.strerror}"
    if done.returncode:
        made.unlink(missing_ok=True)
        errors = "\n".join(done.stderr.splitlines()[:ERROR_LINES])
        return errors or f"the compiler ended with status {done.returncode}"
    if not made.is_file():
        return "the compiler wrote no file; is it a C++ compiler?"
    made.replace(target)
    return ""


setup(
    # Only descriptions: they make the wheel platform-specific and the sdist complete.
    ext_modules=[
        Extension(f"swiftkernels.backends.cpu._kernels_{isa}", SOURCES, depends=HEADERS)
        for isa in ISAS
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
