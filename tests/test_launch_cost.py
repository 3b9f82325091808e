"""Kernels compiled for a GPU that is not there, launched by a launcher that takes notes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton

from benchmarks.gpu import launch_cost, report
from swiftkernels import AdditiveAttention, compat
from swiftkernels.triton import launch

Launched = tuple[tuple[Any, ...], tuple[Any, ...]]
"""Grid and stream; the kernel's arguments."""


class Recorder(launch_cost.Driver):
    """Notes what is launched."""

    def __init__(self) -> None:
        self.launches: list[Launched] = []

    def get_current_stream(self, _: int) -> int:
        return 7

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        def launcher(x: int, y: int, z: int, stream: int, *args: Any) -> None:
            _, _, described, enter, _, *parameters = args
            enter(described)  # as Triton's launchers do
            self.launches.append(((x, y, z, stream), tuple(parameters)))

        return launcher


@pytest.fixture
def launches(monkeypatch) -> Iterator[list[Launched]]:
    recorder = Recorder()
    monkeypatch.setattr(compat, "triton_takes", lambda device: True)
    plans = launch._forward_plan, launch._backward_plan
    for plan in plans:
        plan.cache_clear()
    monkeypatch.setattr(triton.runtime.driver, "_active", recorder)
    yield recorder.launches
    for plan in plans:
        plan.cache_clear()


def addresses(parameters: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(p.data_ptr() if isinstance(p, Tensor) else p for p in parameters)


def train(layer: AdditiveAttention, x: Tensor) -> None:
    torch.autograd.grad(layer(x), [x, *layer.parameters()], torch.ones_like(x))


def test_launches_by_address_are_those_of_triton(launches):
    """All that the first call, which Triton itself launches, gives a kernel, but for addresses."""
    layer = AdditiveAttention(32, 32, 1, backend="triton")
    x = torch.randn(2, 16, 32, requires_grad=True)
    for _ in range(3):
        train(layer, x)
    first, *later = (launches[i : i + 5] for i in range(0, 15, 5))
    assert len(launches) == 15
    for again in later:
        for (grid, theirs), (same_grid, ours) in zip(first, again, strict=True):
            assert grid == same_grid
            assert grid[-1] == 7
            for a, b in zip(theirs, ours, strict=True):
                if isinstance(a, Tensor):
                    assert type(b) is int
                    if a.data_ptr() in {p.data_ptr() for p in (x, *layer.parameters())}:
                        assert a.data_ptr() == b
                else:
                    assert a == b
                    assert type(a) is type(b)
    # The output layers' weights, for one, are at their places.
    assert addresses(first[0][1])[5] == later[0][0][1][5] == layer.proj.weight.data_ptr()


def test_inference_hands_over_each_result_at_its_place(launches):
    layer = AdditiveAttention(32, 32, 1, backend="triton").requires_grad_(False)
    x = torch.randn(2, 16, 32)
    for _ in range(3):
        out = layer(x)
    (_, pool), (_, output) = launches[-2:]
    pool_names = launch._pool_forward_kernel.arg_names
    names = launch._output_forward_kernel.arg_names
    first, second = dict(zip(pool_names, pool, strict=True)), dict(zip(names, output, strict=True))
    assert second["out_ptr"] == out.data_ptr()
    shared = ("m_ptr", "pooled_ptr", "stat_ptr", "wq_ptr", "bq_ptr", "final_ptr")
    for name in shared:
        assert first[name] == second[name], name
    temporary = [second[n] for n in ("g_ptr", "g_stat_ptr", "m_ptr", "pooled_ptr", "stat_ptr")]
    sizes = [2 * 32 * 4, 2 * 2 * 4, 32 * 32 * 4, 2 * 32 * 4, 2 * 2 * 4]
    assert all(address % 16 == 0 for address in temporary)
    for i, (begin, size) in enumerate(zip(temporary, sizes, strict=True)):
        for other in temporary[i + 1 :]:
            assert not begin <= other < begin + size


def test_a_profiler_hears_of_every_launch(launches):
    layer = AdditiveAttention(32, 32, 1, backend="triton").requires_grad_(False)
    x = torch.randn(2, 16, 32)
    heard: list[str] = []

    def listen(described: Any) -> None:
        heard.append(described.get()["name"])

    for _ in range(2):
        layer(x)
    triton.knobs.runtime.launch_enter_hook.add(listen)
    try:
        layer(x)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(listen)
    layer(x)
    assert heard == ["_pool_forward_kernel", "_output_forward_kernel"]


def test_the_page_has_every_measurement(tmp_path):
    row = {
        "what": "AdditiveAttention", "input": "tokens", "dtype": "float16", "direction": "forward",
        "microseconds": "21.5", "spread": "1.5", "fastest": "20.1",
        "device": "A1", "torch": "2.9", "triton": "3.8",
    }  # fmt: skip
    other = row | {"dtype": "float32", "microseconds": "23.5"}
    results = tmp_path / "results"
    results.mkdir()
    text = "\n".join(",".join(line) for line in (row, row.values(), other.values()))
    (results / report.LAUNCH_COST_CSV).write_text(text)
    page = report.write(results).read_text()
    assert "on\nA1, torch 2.9, Triton 3.8." in page
    assert "| forward | AdditiveAttention | 21.5 (1.5, 20.1) | 23.5 (1.5, 20.1) |" in page
