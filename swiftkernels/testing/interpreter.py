"""Hooks into Triton's interpreter. All uses of its private parts (triton 3.6 to 3.9) are here.

The interpreter runs a kernel program by program in Python, on tensors in the host's memory
(TRITON_INTERPRET=1, set before triton is imported). `observe` reports every launch, program, load,
store, atomic and dot product to an `Observer`, which may replace arguments and mask lanes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter

_Builder = type(interpreter.interpreter_builder)
_TRITON = str(Path(triton.__file__).parent)


class Observer(Protocol):
    """Receives what interpreted kernels do."""

    def begin(self, kernel: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """A kernel is launched; returns the arguments, by name, to launch it with."""

    def grid(self, grid: tuple[int, int, int]) -> None:
        """The numbers of programs of that launch, by axis."""

    def program(self, index: int) -> None:
        """The program with that number begins."""

    def access(
        self, kind: str, addresses: np.ndarray, mask: np.ndarray, itemsize: int
    ) -> np.ndarray:
        """A "load", "store" or "atomic" of elements of `itemsize` bytes.

        Addresses and mask have one entry per lane. Returns the mask to use.
        """

    def dot(self, flops: int) -> None:
        """A dot product with that many operations, padding included."""

    def end(self) -> None:
        """The kernel that began has ended, or failed."""


def interpreting() -> bool:
    """Whether kernels that are defined after this call run in the interpreter."""
    return bool(triton.knobs.runtime.interpret)


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Report what interpreted kernels do inside this context to the observer."""
    original: dict[str, Any] = {
        name: getattr(_Builder, name)
        for name in (
            "create_masked_load",
            "create_masked_store",
            "create_atomic_rmw",
            "create_atomic_cas",
            "create_dot",
            "set_grid_dim",
            "set_grid_idx",
        )
    }
    launch = interpreter.GridExecutor.__call__

    def permitted(kind: str, pointers: Any, mask: Any) -> Any:
        """The mask that the observer allows."""
        shape = pointers.data.shape
        lanes = np.broadcast_to(np.asarray(mask.data, bool), shape)
        allowed = observer.access(kind, pointers.data, lanes, _itemsize(pointers))
        return interpreter.TensorHandle(allowed.reshape(shape), tl.int1)

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        mask = permitted("load", pointers, mask)
        return original["create_masked_load"](self, pointers, mask, *rest, **options)

    def create_masked_store(
        self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any
    ) -> Any:
        mask = permitted("store", pointers, mask)
        return original["create_masked_store"](self, pointers, value, mask, *rest, **options)

    def create_atomic_rmw(
        self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        mask = permitted("atomic", pointers, mask)
        return original["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)

    def create_atomic_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        everywhere = np.ones(pointers.data.shape, bool)
        allowed = observer.access("atomic", pointers.data, everywhere, _itemsize(pointers))
        # It has no mask.
        if not allowed.all():
            raise IndexError("atomic_cas outside of the kernel's arguments; see the findings")
        return original["create_atomic_cas"](self, pointers, *rest)

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        observer.dot(2 * accumulator.data.size * a.data.shape[-1])
        return original["create_dot"](self, a, b, accumulator, *rest)

    def set_grid_dim(self: Any, *grid: int) -> None:
        observer.grid(grid)  # type: ignore[arg-type]
        original["set_grid_dim"](self, *grid)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        across, down, _ = self.grid_dim
        observer.program((z * down + y) * across + x)
        original["set_grid_idx"](self, x, y, z)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        signature = inspect.signature(self.fn)
        own = {name: value for name, value in options.items() if name in signature.parameters}
        # Dispatch modes must not see the calls of PyTorch by the interpreter and the observer.
        with _disable_current_modes(), _patch_language_once():
            arguments = signature.bind(*args, **own).arguments
            try:
                return launch(self, **observer.begin(self.fn.__name__, arguments))
            finally:
                observer.end()

    with contextlib.ExitStack() as patches:
        for hook in (
            create_masked_load,
            create_masked_store,
            create_atomic_rmw,
            create_atomic_cas,
            create_dot,
            set_grid_dim,
            set_grid_idx,
        ):
            patches.enter_context(mock.patch.object(_Builder, hook.__name__, hook))
        patches.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", call))
        yield


@contextlib.contextmanager
def _patch_language_once() -> Iterator[None]:
    """Within a launch, let the interpreter replace `triton.language` once for every module.

    By default it does that at every call of a function, which takes a third of its time.
    """
    patch = interpreter._patch_lang
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None  # the scope of a function's call is never used
        patched.add(module)
        return patch(function)

    with mock.patch.object(interpreter, "_patch_lang", patch_once):
        yield


def map_tensors(argument: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The argument of a kernel with `function` applied to the tensors in it.

    Tensors come plain, reinterpreted (`triton.reinterpret`), in tensor descriptors and in tuples.
    """
    if isinstance(argument, Tensor):
        return function(argument)
    if isinstance(argument, tuple):
        parts = [map_tensors(part, function) for part in argument]
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    if isinstance(getattr(argument, "base", None), Tensor):
        base = function(argument.base)
        if dataclasses.is_dataclass(argument):
            return dataclasses.replace(argument, base=base)  # type: ignore[type-var]
        return triton.reinterpret(base, argument.dtype)
    return argument


def kernel_frames() -> list[traceback.FrameSummary]:
    """The current lines of the running kernel and of the functions it called, outermost first."""
    frames = []
    frame = sys._getframe()
    while frame and frame.f_code.co_filename != interpreter.__file__:
        frame = frame.f_back  # type: ignore[assignment]
    while frame and not (frame.f_code.co_name == "call" and frame.f_code.co_filename == __file__):
        if not frame.f_code.co_filename.startswith(_TRITON):
            code = frame.f_code
            frames.append(traceback.FrameSummary(code.co_filename, frame.f_lineno, code.co_name))
        frame = frame.f_back  # type: ignore[assignment]
    return frames[::-1]


def _itemsize(pointers: Any) -> int:
    bits: int = pointers.get_element_ty().primitive_bitwidth
    return max(bits, 8) // 8
