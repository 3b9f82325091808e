"""Launches of compiled kernels without Triton's lookup.

At every `kernel[grid](...)` Triton looks at each of some thirty arguments to find the compiled
kernel. That takes the host longer than a small layer takes the GPU. A `KernelLaunch` keeps the
kernel that its first call found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from triton import knobs
from triton.runtime import driver

Pointer = Tensor | int | None
"""A tensor or, once the kernel is compiled, an address on the device; None for no tensor."""


class KernelLaunch:
    """A launch of a kernel whose parameters are pointers, then numbers, then constants.

    Args:
        kernel: a `triton.jit` function.
        programs: size of the grid.
        numbers, constants: the arguments after the pointers.
        reusable: whether all calls differ in addresses only, so that one compiled kernel serves
            them: the pointers have the types, alignments and Nones of the first call.
    """

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
        """Whether the kernel is compiled. In the interpreter, which does not compile, never."""
        return self._start is not None

    def __call__(self, *pointers: Pointer) -> None:
        """Launch in the current stream of the current device; with tensors until it is `ready`."""
        if not self._grid[0]:
            return
        if self._start is not None:
            # To test for Tensor would take twice as long.
            addresses = [p if p is None or isinstance(p, int) else p.data_ptr() for p in pointers]
            self._start(*addresses, *self._rest)
            return
        compiled = self._kernel[self._grid](*pointers, *self._numbers, **self._constants)
        if compiled is not None and self._reusable:
            # A compiled kernel takes its parameters in order; num_warps and the like are not among
            # them.
            names = self._kernel.arg_names[len(pointers) + len(self._numbers) :]
            self._rest = (*self._numbers, *(self._constants[name] for name in names))
            self._start = _starter(compiled, self._grid)


def _starter(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
    """`compiled[grid]`, without the record that it makes for profilers before every launch.

    It is `compiled[grid]` itself while a profiler listens, and where Triton's internals are not
    those of 3.6 to 3.9. Both ignore `pre_run_hooks` of the kernel and later changes of Triton's
    knobs.
    """
    start: Callable[..., None] = compiled[grid]
    try:
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        knobs.runtime.launch_enter_hook.calls, knobs.runtime.launch_exit_hook.calls  # noqa: B018
    except AttributeError:
        return start

    def start_without_record(*args: Any) -> None:
        runtime = knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if enter.calls or leave.calls:
            start(*args)
            return
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        run(*grid, stream, function, metadata, None, enter, leave, *args)

    return start_without_record
