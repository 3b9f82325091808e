"""Clocks and rounds. Nothing here judges a time."""

from __future__ import annotations

import time

import pytest
import torch

from swiftkernels.testing import timing


class Recorder:
    """In place of torch.cuda: what the device was asked to do, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def synchronize(self, device: object = None) -> None:
        self.log.append("wait")

    def Event(self, enable_timing: bool):  # noqa: N802
        recorder = self

        class Event:
            def record(self) -> None:
                recorder.log.append("event")

            def synchronize(self) -> None:
                recorder.log.append("wait for the event")

            def elapsed_time(self, end: object) -> float:
                return 5.0

        return Event()

    def zero_(self) -> None:
        self.log.append("flush")


@pytest.mark.parametrize("queued", [False, True])
def test_caches_are_flushed_before_the_clock_runs(monkeypatch, queued):
    recorder = Recorder()
    monkeypatch.setattr(torch, "get_device_module", lambda device: recorder)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: recorder)
    watch = timing.Stopwatch(torch.device("cuda", 0))
    assert watch(lambda: recorder.log.append("call"), queued=queued) == 5e-3
    idle = [] if queued else ["wait"]
    assert recorder.log == ["flush", *idle, "event", "call", "event", "wait for the event"]


@pytest.mark.parametrize(
    ("threads", "clock", "calls"), [(1, time.process_time, 1), (2, time.perf_counter, 2)]
)
def test_threads_decide_the_clock_and_the_rest(monkeypatch, threads, clock, calls):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(timing, "REST", 0.0)
    assert timing.clock("cpu") is clock
    log: list[str] = []
    timing.Stopwatch("cpu")(lambda: log.append("call"))
    assert len(log) == calls


def test_every_round_measures_every_call_once_after_a_round_that_is_not_counted():
    log: list[str] = []

    def measure(call: timing.Call) -> float:
        log.append(call())
        return float(len(log))

    calls = {"a": lambda: "a", "b": lambda: "b", "c": lambda: "c"}
    found = timing.interleave(calls, measure, seconds=0.0, min_rounds=5)
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert len(rounds) == 6
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    counted = sorted(s for t in found.values() for s in t.samples)
    assert counted == [float(i) for i in range(4, 19)]
