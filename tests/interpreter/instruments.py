"""Repairs of the interpreter and counters around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

_Builder = type(interpreter.interpreter_builder)


def _nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, rounded to nearest even as GPUs do."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def round_bfloat16_to_nearest() -> None:
    """The interpreter truncates to bfloat16 and computes with its bits: fix and forbid."""
    cast, binary = _Builder.cast_impl, _Builder.binary_op

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_nearest_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        assert tl.bfloat16 not in (lhs.dtype.scalar, rhs.dtype.scalar), "arithmetic in bfloat16"
        return binary(self, lhs, rhs, op)

    _Builder.cast_impl, _Builder.binary_op = cast_impl, binary_op


@contextlib.contextmanager
def count_launches() -> Iterator[list[str]]:
    """The names of the kernels launched inside."""
    names: list[str] = []
    call = interpreter.GridExecutor.__call__

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        # The interpreter itself calls PyTorch; no instrument is to see that.
        with _disable_current_modes():
            return call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = counting
    try:
        yield names
    finally:
        interpreter.GridExecutor.__call__ = call


class TorchKernels(TorchDispatchMode):
    """Records the PyTorch operators that would launch a kernel: no views, no allocations.

    For use inside `count_launches`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        allocates = "empty" in name or "fill" in name or name == "detach"
        if not (func.is_view or allocates):
            shapes = [a.shape for a in args if isinstance(a, torch.Tensor)]
            self.calls.append((name, shapes))
        return func(*args, **(kwargs or {}))
