"""Launches prepared once and started again and again.

At every `kernel[grid](...)` Triton looks at each of some thirty arguments to find the compiled
kernel, and that takes the host longer than a small layer takes the GPU. A `Prepared` launch keeps
the kernel that the first call found. Its maker answers for it that later calls differ in addresses
alone: types, alignments and None's of the pointers, numbers and constants are those of the first,
or says that it cannot (`reusable`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from triton import knobs
from triton.runtime import driver

Pointer = Tensor | int | None
"""A tensor or, once the kernel is compiled, an address on the device; None stands for nothing."""


class Prepared:
    """One launch of a kernel whose parameters are pointers, then numbers, then constants."""

    __slots__ = ("_constants", "_grid", "_kernel", "_numbers", "_rest", "_reusable", "_start")

    def __init__(
        self,
        kernel: Any,
        programs: int,
        numbers: tuple[int, ...],
        constants: dict[str, Any],
        reusable: bool = True,
    ) -> None:
        self._kernel, self._grid = kernel, (programs, 1, 1)
        self._numbers, self._constants = numbers, constants
        self._reusable = reusable
        self._start: Any = None
        self._rest: tuple[Any, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether the kernel is compiled; the interpreter, which compiles nothing, never is."""
        return self._start is not None

    def __call__(self, *pointers: Pointer) -> None:
        """Launch in the current stream of the current device; with tensors until it is `ready`."""
        if not self._grid[0]:
            return
        if self._start is not None:
            addresses = [p.data_ptr() if isinstance(p, Tensor) else p for p in pointers]
            self._start(*addresses, *self._rest)
            return
        compiled = self._kernel[self._grid](*pointers, *self._numbers, **self._constants)
        if compiled is not None and self._reusable:
            # A compiled kernel takes all its parameters in order; num_warps and the like are none.
            names = self._kernel.arg_names[len(pointers) + len(self._numbers) :]
            self._rest = (*self._numbers, *(self._constants[name] for name in names))
            self._start = _starter(compiled, self._grid)


def _starter(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
    """`compiled[grid]`, but for what that gathers for profilers before every launch.

    Where one listens, or where Triton's insides are others than in 3.6 to 3.9, it is that itself.
    Like it, it knows nothing of `pre_run_hooks` of the kernel and later changes of Triton's knobs.
    """
    start: Callable[..., None] = compiled[grid]
    try:
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        knobs.runtime.launch_enter_hook.calls, knobs.runtime.launch_exit_hook.calls  # noqa: B018
    except AttributeError:
        return start

    def start_unheard(*args: Any) -> None:
        runtime = knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if enter.calls or leave.calls:
            start(*args)
            return
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        run(*grid, stream, function, metadata, None, enter, leave, *args)

    return start_unheard
