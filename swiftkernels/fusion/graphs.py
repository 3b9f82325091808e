"""CUDA graphs of a fused network: all its launches as one, for each shape of images that repeats.

A captured graph reads its input, the weights and whatever was packed of them, and writes its
output, at fixed addresses. So a call copies the images in and the output out, and all graphs are
dropped when a weight was written or moved.

The graphs of a network share a pool of memory: they use the same memory, one after the other. A
lock and an event keep the calls of several threads and streams in turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from swiftkernels.backends import cache, torch_state
from swiftkernels.fusion.chain import FusedChain
from swiftkernels.utils.text import first_line

MAX_GRAPHS = 16
"""Graphs kept for a network; each has its own input and output."""

MAX_SHAPES = 256
"""Shapes of images that a network remembers."""

WARM_UPS = 2
"""Calls before a capture: in the second, kernels are launched as they will be in the graph."""

Network = Callable[[Tensor], Any]
"""A function of images."""

ONCE = "such images came once; the next ones are captured"

_CAPTURES = threading.Lock()
"""PyTorch makes one capture at a time in a process."""


class GraphNote(NamedTuple):
    """What became of images of a shape and strides."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    reason: str
    """Why they run without a graph; empty if they have one."""

    def __str__(self) -> str:
        what = f"without a graph: {self.reason}" if self.reason else "captured"
        return f"{list(self.shape)}, strides {list(self.strides)}: {what}"


_Key = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides of images."""


def _key(x: Tensor) -> _Key:
    return tuple(x.shape), x.stride()


class _Graph(NamedTuple):
    """A captured call."""

    graph: Any
    """`torch.cuda.CUDAGraph`"""
    images: Tensor
    """Its input."""
    out: Any
    """Its output, nested tensors."""
    kept: list[Any]
    """What was packed of the weights."""


class Graphs:
    """The CUDA graphs of a network. Copies and pickles have none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._skipped: dict[_Key, str] = {}
        """Reasons of calls that no graph could answer."""
        self._restart()

    def __reduce__(self) -> Any:
        return Graphs, ()

    def _restart(self, state: Any = None, weights: Sequence[Tensor] = ()) -> None:
        """Without graphs, for weights in that state."""
        self._state = state
        # Held, so that no other tensor gets the address of a weight that is replaced.
        self._memory = [t.untyped_storage() for t in weights]
        self._found: dict[_Key, _Graph | str] = {}
        """The graph for such images, or why there is none."""
        self._stream: Any = None
        self._pool: Any = None
        self._done: Any = None
        """Recorded behind the last call."""

    def release(self) -> None:
        """Drop all graphs and free their memory, after the calls that run."""
        with self._lock:
            self._wait()
            self._skipped.clear()
            self._restart()

    def _wait(self) -> None:
        if self._done is not None:
            self._done.synchronize()

    @property
    def notes(self) -> tuple[GraphNote, ...]:
        """What became of the images, by shape and strides."""
        with self._lock:
            found = {key: v if isinstance(v, str) else "" for key, v in self._found.items()}
            reasons = self._skipped | found
        return tuple(GraphNote(*key, reason) for key, reason in reasons.items())

    def run(self, network: Network, parts: Iterable[nn.Module], x: Tensor) -> Any:
        """The output of the network, in new memory.

        Where a shape comes for the second time, with the same strides, it is captured.

        Args:
            network: what to compute.
            parts: the modules of which it reads the weights.
            x: images [B, C, H, W] on the device of the weights.
        """
        parts = list(parts)
        reason = _why_not(x, parts)
        if reason:
            with self._lock:
                if len(self._skipped) >= MAX_SHAPES:
                    self._skipped.clear()
                self._skipped[_key(x)] = reason
            return network(x)
        with torch_state.device_guard(x), self._lock:
            graph = self._find(network, parts, x)
            if isinstance(graph, _Graph):
                return self._replay(graph, x)
        return network(x)

    def _find(self, network: Network, parts: Sequence[nn.Module], x: Tensor) -> _Graph | str:
        """The graph for such images, captured now if they came before; or why there is none."""
        weights = [
            t
            for part in parts
            for own in (part._parameters, part._buffers)
            for t in own.values()
            if t is not None
        ]
        state = cache.state(tuple(weights)), torch_state.numerics()
        if state != self._state:
            self._wait()
            self._restart(state, weights)
        key = _key(x)
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= MAX_SHAPES:
                self._found = {k: v for k, v in self._found.items() if isinstance(v, _Graph)}
            found = ONCE
        elif found is ONCE:
            found = self._captured(network, parts, x)
        self._found[key] = found
        return found

    def _captured(self, network: Network, parts: Sequence[nn.Module], x: Tensor) -> _Graph | str:
        if sum(isinstance(found, _Graph) for found in self._found.values()) >= MAX_GRAPHS:
            return f"{MAX_GRAPHS} others are captured; release_graphs() drops them"
        if self._done is None:
            self._stream, self._done = torch.cuda.Stream(x.device), torch.cuda.Event()
            self._pool = torch.cuda.graph_pool_handle()
        try:
            return self._capture(network, parts, x)
        except Exception as error:  # an unknown network may raise anything
            self._pool = torch.cuda.graph_pool_handle()  # the other one may still be recording
            return f"the capture failed ({first_line(error)})"

    def _capture(self, network: Network, parts: Sequence[nn.Module], x: Tensor) -> _Graph:
        stream, current = self._stream, torch.cuda.current_stream(x.device)
        stream.wait_stream(current)
        try:
            # Tensors of inference mode could not be written outside of it.
            with torch.cuda.stream(stream), torch.inference_mode(False), torch.no_grad():
                images = torch.empty_like(x).copy_(x)
                for _ in range(WARM_UPS):
                    _check_output(network(images))
                graph = torch.cuda.CUDAGraph()
                # "thread_local": other threads may allocate and synchronise meanwhile.
                with (
                    _CAPTURES,
                    torch_state.new_workspaces(),
                    torch.cuda.graph(
                        graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
                    ),
                ):
                    out = network(images)
        finally:
            current.wait_stream(stream)
        kept = [part.slot for part in parts if isinstance(part, FusedChain)]
        return _Graph(graph, images, out, kept)

    def _replay(self, graph: _Graph, x: Tensor) -> Any:
        """The output of a graph, copied before the next call overwrites it."""
        stream = torch.cuda.current_stream(x.device)
        stream.wait_event(self._done)
        try:
            graph.images.copy_(x)
            graph.graph.replay()
            return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, graph.out)
        finally:
            self._done.record(stream)


def _check_output(out: Any) -> None:
    """Only outputs of which all tensors are known can be copied."""
    for leaf in tree_leaves(out):
        if leaf is not None and not isinstance(leaf, (Tensor, bool, int, float, str)):
            raise TypeError(f"the network returns a {type(leaf).__name__}")


def _why_not(x: Tensor, parts: Sequence[nn.Module]) -> str:
    """Why no graph can answer this call; empty if one can."""
    if reason := torch_state.why_not_graphs(x.device):
        return reason
    if not torch_state.nothing_listens() or not torch_state.is_plain(x):
        return "PyTorch has to see the operators (a trace, transform or mode)"
    if torch_state.any_autocast():
        return "autocast is on"
    if x.numel() == 0:
        return "there are no images"
    if torch.cuda.is_current_stream_capturing():
        return "the call is captured in another graph"
    if torch_state.has_global_hooks() or any(map(torch_state.has_hooks, parts)):
        return "hooks have to be called"
    return ""
