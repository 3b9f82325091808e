"""CUDA graphs, streams and events on a CPU, for tests of what is captured, replayed and ordered."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swiftkernels.backends import torch_state


class Stream:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def wait_stream(self, other: Stream) -> None:
        self.cuda.log.append(("wait_stream", self, other))

    def wait_event(self, event: Event) -> None:
        self.cuda.log.append(("wait", self, event))


class Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self, stream: Stream) -> None:
        self.cuda.log.append(("record", stream, self))

    def synchronize(self) -> None:
        self.cuda.log.append(("synchronize", None, self))


class _Recorder(TorchDispatchMode):
    """Records the operators of a capture, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Graph:
    """Its replay computes the recorded operators again, from and into the same memory."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        self.cuda.log.append(("replay", self.cuda.current_stream(), self))
        with torch.inference_mode(False), torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class FakeCuda:
    """Stands for `torch.cuda`.

    Attributes:
        log: (what, stream, event, graph or other stream) in their order.
        graphs: those that were captured.
        pools: of the captures.
        outer_capture: whether a capture of somebody else is running.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, Any, Any]] = []
        self.graphs: list[Graph] = []
        self.pools: list[int] = []
        self.outer_capture = False
        self.handles = 0
        self.default = Stream(self)
        self._local = threading.local()

    def current_stream(self, device: Any = None) -> Stream:
        stream: Stream = getattr(self._local, "stream", self.default)
        return stream

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._local.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._local.stream = before

    @property
    def capturing(self) -> bool:
        return getattr(self._local, "capturing", False)

    @contextlib.contextmanager
    def graph(self, graph: Graph, *, pool: int, stream: Stream, **options: Any) -> Iterator[None]:
        assert options == {"capture_error_mode": "thread_local"}
        # A capture that fails leaves its stream the current one, as PyTorch's does.
        self._local.stream, self._local.capturing = stream, True
        try:
            with _Recorder() as recorder:
                yield
        finally:
            self._local.capturing = False
        graph.calls = recorder.calls
        self.graphs.append(graph)
        self.pools.append(pool)

    def graph_pool_handle(self) -> int:
        self.handles += 1
        return self.handles

    def is_current_stream_capturing(self) -> bool:
        return self.outer_capture or self.capturing

    @property
    def replays(self) -> int:
        return sum(what == "replay" for what, *_ in self.log)


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Fakes `torch.cuda`; CPU tensors are on a device with graphs."""
    fake = FakeCuda()
    monkeypatch.setattr(torch_state, "why_not_graphs", lambda device: "")
    for name in (
        "current_stream", "stream", "graph", "graph_pool_handle", "is_current_stream_capturing",
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(fake))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(fake))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(fake))
    return fake
