"""Measuring: time side by side, memory kept for the backward, FLOPs, and on what device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from swiftkernels.backends import devices
from swiftkernels.tools import bench
from swiftkernels.tools.bench import Timing

__all__ = [
    "Timing",
    "clock",
    "clock_name",
    "device_name",
    "flops",
    "interleave",
    "measure",
    "saved_bytes",
]

Call = Callable[[], object]


def interleave(
    calls: Mapping[str, Call],
    device: torch.device | str,
    seconds: float = 0.5,
    min_rounds: int = 9,
    rest: float = 0.0,
) -> dict[str, Timing]:
    """Time the calls in turn, so that all meet the same clock rate, caches and neighbours.

    A round is one call of each, in an order shuffled anew; one round is not counted. Rounds go on
    for `seconds` of wall time, and there are at least `min_rounds` of them.

    With a `rest`, every turn begins with that many seconds of sleep and a call that is not counted:
    the threads of the turn before, which wait for work in a loop, have let go of their cores by
    then, and its own are awake.

    Example:
        >>> timings = interleave({"sum": torch.ones(9).sum, "max": torch.ones(9).max}, "cpu", 0.01)
        >>> timings["sum"].median < 1
        True
    """

    def measure_one(call: Call) -> float:
        if rest:
            time.sleep(rest)
            call()
        return measure(call, device)

    return bench.interleave(calls, measure_one, seconds, min_rounds)


def measure(call: Call, device: torch.device | str) -> float:
    """Seconds of one call: between CUDA events on CUDA, by `clock` on a CPU."""
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    now = clock(device)
    began = now()
    call()
    return now() - began


def clock(device: torch.device | str) -> Callable[[], float]:
    """A clock in seconds to read before and after a call on `device`.

    On CUDA, wall time once the device is idle. On a CPU with one thread, the time of this process,
    which other programs disturb least; with several, whose times it would add up, wall time.
    """
    if torch.device(device).type == "cuda":
        return _idle_device_clock
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def clock_name(device: torch.device | str) -> str:
    """What `clock` reads on `device`."""
    return "process time" if clock(device) is time.process_time else "wall time"


def _idle_device_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def saved_bytes(forward: Callable[[], Tensor], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward after `forward`, without those of `exclude`.

    Every storage counts once and in full, as a saved view keeps all of it alive. Give as `exclude`
    the parameters and the input, which stay alive anyway.
    """
    ignored = {t.untyped_storage().data_ptr() for t in exclude}
    # Storages are held on to until the end: a freed one's address could come back.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def flops(call: Call) -> int:
    """Floating-point operations of the matrix products and convolutions in `call`, 2 per MAC."""
    # PyTorch counts the products of a fused attention on CUDA only; unfused, everywhere.
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=formulas) as counter,
    ):
        call()
    return counter.get_total_flops()


def _convolution_backward_flops(
    dout_shape: torch.Size, x_shape: torch.Size, weight_shape: torch.Size, *rest: Any, **_: Any
) -> int:
    """As many as in the forward for each gradient; PyTorch's own formula forgets the groups."""
    needs = rest[-1]  # gradients of x, weight, bias
    positions = dout_shape[0] * math.prod(dout_shape[2:])
    return 2 * positions * math.prod(weight_shape) * sum(needs[:2])


def device_name(device: torch.device | str) -> str:
    """What the CPU or GPU calls itself."""
    return devices.name(torch.device(device))
