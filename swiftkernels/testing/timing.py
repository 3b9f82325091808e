"""Time of calls: one clock for each kind of device, and calls measured in turn.

* On a GPU, a time is measured between two events. As called: the device is idle before, so the time
  in which the host launches the kernels counts. Queued: the call waits behind other work, so only
  the device's time counts. The caches are flushed before every sample.
* On a CPU with one thread, the clock is the process time, which other programs disturb least. With
  several threads it is wall time, because the process time would be the sum over the threads.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

FLUSH_BYTES = 512 << 20
"""More than the caches of any GPU: 256 MiB in an MI300X."""

COPY_BYTES = {"cuda": 256 << 20, "xpu": 256 << 20, "cpu": 64 << 20}
"""Size of the tensor that `copy_rate` copies."""

REST = 0.02
"""Seconds of sleep before a call with several CPU threads. After a call, OpenMP's threads wait for
work in a loop for about half of that time, and would take the cores from the next call."""

Call = Callable[[], Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Times of one callable, in seconds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range."""
        lower, _, upper = statistics.quantiles(self.samples, n=4)
        return upper - lower

    @property
    def minimum(self) -> float:
        return min(self.samples)

    def columns(self, prefix: str = "") -> dict[str, float]:
        """The columns of these times in the rows of benchmarks.

        Example:
            >>> Timing((3.0, 1.0, 2.0)).columns("graph_")["graph_min_seconds"]
            1.0
        """
        return {
            f"{prefix}median_seconds": self.median,
            f"{prefix}min_seconds": self.minimum,
            f"{prefix}spread_seconds": self.spread,
        }


def clock(device: torch.device | str) -> Callable[[], float]:
    """A clock in seconds to read before and after a call: on a GPU, wall time when it is idle."""
    device = torch.device(device)
    if device.type != "cpu":
        module = torch.get_device_module(device)

        def wait_and_read() -> float:
            module.synchronize(device)
            return time.perf_counter()

        return wait_and_read
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def clock_name(device: torch.device | str) -> str:
    """What `clock` reads."""
    return "process time" if clock(device) is time.process_time else "wall time"


class Stopwatch:
    """Measures single calls on one device, in seconds; see the head of this file.

    Example:
        >>> Stopwatch("cpu")(torch.ones(9).sum) < 1
        True
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        if self.device.type != "cpu":
            self._module = torch.get_device_module(self.device)
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)

    def __call__(self, call: Call, queued: bool = False) -> float:
        if self.device.type == "cpu":
            process, wall = process_and_wall_time(call)
            return process if clock(self.device) is time.process_time else wall
        start, end = (self._module.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        if not queued:
            self._module.synchronize(self.device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def process_and_wall_time(call: Call) -> tuple[float, float]:
    """Seconds of a call on a CPU, by two clocks; process time is summed over the threads."""
    if torch.get_num_threads() > 1:
        time.sleep(REST)
        call()  # wakes the threads; not measured
    wall, process = time.perf_counter(), time.process_time()
    call()
    return time.process_time() - process, time.perf_counter() - wall


def interleave(
    calls: Mapping[str, Call],
    measure: Callable[[Call], float],
    seconds: float = 0.5,
    min_rounds: int = 9,
) -> dict[str, Timing]:
    """The times of `measure_in_turn`.

    Example:
        >>> calls = {"sum": torch.ones(9).sum, "max": torch.ones(9).max}
        >>> timings = interleave(calls, Stopwatch("cpu"), seconds=0.01)
        >>> timings["sum"].median < 1
        True
    """
    samples = measure_in_turn(calls, measure, seconds, min_rounds)
    return {name: Timing(tuple(times)) for name, times in samples.items()}


def measure_in_turn(
    calls: Mapping[str, Call], measure: Callable[[Call], T], seconds: float, min_rounds: int
) -> dict[str, list[T]]:
    """Measure the calls in turn, so that clock rate, caches and other programs affect all alike.

    A round calls each once, in a new random order; the first round is not counted. There are rounds
    for `seconds` of wall time, and at least `min_rounds`.
    """
    order = list(calls)
    samples: dict[str, list[T]] = {name: [] for name in calls}
    generator = random.Random(0)
    for call in calls.values():
        measure(call)
    end = time.perf_counter() + seconds
    rounds = 0
    while calls and (rounds < min_rounds or time.perf_counter() < end):
        generator.shuffle(order)
        for name in order:
            samples[name].append(measure(calls[name]))
        rounds += 1
    return samples


def capture(call: Call) -> Call:
    """The kernels of a call as a CUDA graph: the result launches them all at once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def copy_rate(watch: Stopwatch, rounds: int = 21) -> float:
    """Bytes per second, read and written, of a plain copy of a large tensor."""
    device = watch.device
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    copy()
    return 2 * source.nbytes / statistics.median(watch(copy, queued=True) for _ in range(rounds))
