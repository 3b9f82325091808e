"""Runs the CPU kernels in another process: built with sanitizers, or for another processor."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.builds import CSRC, ROOT

FUNCTIONS = (
    "lanes",
    "pack",
    "fingerprint",
    "forward",
    "forward_training",
    "backward",
    "conv_mlp",
    "conv_mlp_backward",
)
"""The functions of a library, in the order of their numbers in cpu_driver.cpp."""

OPERATORS = ROOT / "swiftkernels" / "ops"

FOLDERS = (ROOT / CSRC, *(OPERATORS / name / "csrc" for name in ("additive_attention", "conv_mlp")))
KERNELS = [path for folder in FOLDERS for path in sorted(folder.glob("*.cpp"))]

FLAGS = ("-std=c++17", "-fopenmp", "-ffp-contract=fast", f"-I{ROOT / CSRC}")


def compile_driver(target: Path, compiler: str, *flags: str) -> Path:
    """Compile the sources of the kernels and tests/cpu_driver.cpp to a program."""
    driver = ROOT / "tests" / "cpu_driver.cpp"
    sources = map(str, (*KERNELS, driver))
    command = [compiler, *FLAGS, f"-I{OPERATORS}", *flags, *sources, "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


class RemoteKernels:
    """Replaces the loaded library: passes its calls to a process of tests/cpu_driver.cpp.

    It copies the tensors at the addresses in the arguments to the process, and back.
    """

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        self.command, self.environment = command, {"OMP_WAIT_POLICY": "passive"} | environment
        self.process = self._start()
        gc.freeze()  # the present objects: `_buffers` searches only later ones
        self.lanes = self._call("lanes")

    def _start(self) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.command, stdin=pipe, stdout=pipe, stderr=pipe, env=self.environment
        )

    def close(self) -> None:
        """End the process."""
        gc.unfreeze()
        self.process.communicate()
        assert self.process.returncode == 0, self.process.returncode

    def swiftkernels_lanes(self) -> int:
        return self.lanes

    def swiftkernels_pack(self, *arguments: int) -> None:
        self._call("pack", struct.pack("6q", *arguments))

    def swiftkernels_fingerprint(self, fingerprint: bytes, all_bytes: int) -> int:
        return self._call("fingerprint", fingerprint, struct.pack("q", all_bytes)) % 2**64

    def swiftkernels_additive_forward(self, layer: bytes, call: bytes) -> int:
        return self._call("forward", layer, call)

    def swiftkernels_additive_forward_training(self, layer: bytes, call: bytes) -> int:
        return self._call("forward_training", layer, call)

    def swiftkernels_additive_backward(self, layer: bytes, call: bytes) -> int:
        return self._call("backward", layer, call)

    def swiftkernels_conv_mlp_forward(self, weights: bytes, call: bytes) -> int:
        return self._call("conv_mlp", weights, call)

    def swiftkernels_conv_mlp_backward(self, weights: bytes, call: bytes) -> int:
        return self._call("conv_mlp_backward", weights, call)

    def _call(self, name: str, *arguments: bytes) -> int:
        words = {w for a in arguments for w in struct.unpack(f"{len(a) // 8}q", a)}
        buffers = _buffers(words)
        message = struct.pack("2q", FUNCTIONS.index(name), len(buffers))
        for address, nbytes in buffers:
            content = ctypes.string_at(address, nbytes)
            message += struct.pack("2q", address, nbytes) + content
        message += struct.pack("q", len(arguments))
        for argument in arguments:
            message += struct.pack("q", len(argument)) + argument
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(message)
            stdin.flush()
            (result,) = struct.unpack("q", stdout.read(8))
        except (BrokenPipeError, struct.error):
            with contextlib.suppress(BrokenPipeError):
                stdin.close()
            printed = self.process.stderr.read() if self.process.stderr else b""
            status = self.process.wait()
            self.process = self._start()
            raise AssertionError(
                f"{name} ended the process with status {status}: {printed.decode()}"
            ) from None
        for address, nbytes in buffers:
            ctypes.memmove(address, stdout.read(nbytes), nbytes)
        return int(result)


def _buffers(words: set[int]) -> list[tuple[int, int]]:
    """Address and bytes of the storages that contain an address among the words."""
    words = {w for w in words if w > 2**16}
    found = {}
    for t in gc.get_objects():
        class_: Any = type(t)
        if class_ in (Tensor, torch.nn.Parameter) and t.device.type == "cpu":
            storage = t.untyped_storage()
            begin, nbytes = storage.data_ptr(), storage.nbytes()
            if nbytes and any(begin <= w < begin + nbytes for w in words):
                found[begin] = nbytes
    return sorted(found.items())
