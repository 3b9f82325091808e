"""Launches on a GPU that is not there, by a launcher that takes notes."""

from __future__ import annotations

import contextlib
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.runtime import JITFunction

from benchmarks.gpu import launch_cost, report
from swiftkernels import AdditiveAttention, additive_attention
from swiftkernels.backends import torch_state
from swiftkernels.backends.triton import kernel_launch
from swiftkernels.backends.triton.kernel_launch import KernelLaunch
from swiftkernels.ops import plan
from swiftkernels.ops.additive_attention.triton import launch

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
    monkeypatch.setattr(torch_state, "triton_takes", lambda device: True)
    monkeypatch.setattr(triton.runtime.driver, "_active", recorder)
    launch.forget_launches()
    yield recorder.launches
    launch.forget_launches()


class Address:
    """What Triton's binder asks of a tensor, of an address."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


class Watch:
    """Asks Triton at every launch by address what it would compile for.

    Attributes:
        checked: how many launches were looked at.
        compiled: how many times a kernel was asked for of Triton.
        wrong: launches for which it would have been something else.
    """

    def __init__(self) -> None:
        self.checked, self.compiled = 0, 0
        self.wrong: list[str] = []
        self._first: dict[KernelLaunch, tuple[Any, list[Any]]] = {}

    def call(self, kernel_launch: KernelLaunch, *pointers: Any) -> None:
        if kernel_launch.ready:
            self.checked += 1
            expected, dtypes = self._first[kernel_launch]
            given = [
                Address(p, dtype) if type(p) is int else p
                for p, dtype in zip(pointers, dtypes, strict=True)
            ]
            found = self._specialisation(kernel_launch, given)
            if found != expected:
                names = kernel_launch._kernel.arg_names
                different = [n for n, a, b in zip(names, expected, found, strict=True) if a != b]
                self.wrong.append(f"{kernel_launch._kernel.__name__}: {', '.join(different)}")
        else:
            self.compiled += 1
            launch_by_triton(kernel_launch, *pointers)
            dtypes = [None if p is None else p.dtype for p in pointers]
            self._first[kernel_launch] = self._specialisation(kernel_launch, pointers), dtypes
            return
        launch_by_triton(kernel_launch, *pointers)

    def _specialisation(self, kernel_launch: KernelLaunch, pointers: Any) -> Any:
        binder = kernel_launch._kernel.device_caches[0][4]
        _, found, _ = binder(
            *pointers, *kernel_launch._numbers, **kernel_launch._constants, debug=False
        )
        return found


launch_by_triton = KernelLaunch.__call__


class Kernel:
    """As compiled, but not for real."""

    run = function = packed_metadata = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_: None

    def launch_metadata(self, *_: Any) -> None:
        return None


@pytest.fixture
def watch(launches, monkeypatch) -> Watch:
    """Nothing is compiled; launches by address are compared with Triton's lookup."""

    def compile_nothing(kernel: Any, key: Any, *_: Any) -> Any:
        compiled = Kernel()
        compiled.run = lambda *_: None  # type: ignore[assignment]
        kernel.device_caches[0][0][key] = compiled
        return compiled

    found = Watch()
    for kernel in [k for k in vars(launch).values() if isinstance(k, JITFunction)]:
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(KernelLaunch, "__call__", lambda self, *p: found.call(self, *p))
    return found


def lying(shape: tuple[int, ...], dtype: torch.dtype, choose: random.Random) -> Tensor:
    """A tensor of that shape that lies somehow."""
    how = choose.choice(("contiguous", "last", "gaps", "unaligned", "expanded", "permuted"))
    axis = choose.randrange(len(shape))
    if how == "last" and len(shape) == 4:
        return torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)
    if how == "gaps":
        wide = [2 * n + 1 if i == axis else n for i, n in enumerate(shape)]
        return torch.randn(wide, dtype=dtype).narrow(axis, choose.randrange(2), shape[axis])
    if how == "unaligned":
        return torch.randn(math.prod(shape) + 1, dtype=dtype)[1:].view(shape)
    if how == "expanded":
        narrow = [1 if i == axis else n for i, n in enumerate(shape)]
        return torch.randn(narrow, dtype=dtype).expand(shape)
    if how == "permuted":
        order = choose.sample(range(len(shape)), len(shape))
        t = torch.randn([shape[i] for i in order], dtype=dtype)
        return t.permute([order.index(i) for i in range(len(shape))])
    return torch.randn(shape, dtype=dtype)


WIDTHS = ((16, 16, 1), (24, 24, 1), (1, 1, 1), (48, 32, 2), (80, 80, 1), (260, 260, 1), (16, 1, 1))


@pytest.mark.parametrize("seed", range(4))
def test_triton_would_compile_the_same_for_every_launch_by_address(watch, seed):
    """Whatever tokens, images, masks and gradients come, however they lie."""
    choose = random.Random(seed)
    layers: dict[Any, AdditiveAttention] = {}
    for _ in range(100):
        widths, bias = choose.choice(WIDTHS), choose.random() < 0.7
        dtype = choose.choice((torch.float16, torch.float32))
        key = widths, bias, dtype
        if key not in layers:
            layers[key] = AdditiveAttention(*widths, backend="triton", bias=bias, dtype=dtype)
        layer = layers[key]
        batch, rows, columns = choose.choice((1, 2)), *choose.choices((1, 3, 4), k=2)
        image = choose.random() < 0.6
        shape = (batch, widths[0], rows, columns) if image else (batch, rows * columns, widths[0])
        torch.set_float32_matmul_precision(choose.choice(("highest", "high")))
        x = lying(shape, dtype, choose)
        for _ in range(3):
            x = x if choose.random() < 0.6 else lying(shape, dtype, choose)
            kind = choose.choice(("infer", "train", "train", "mask", "frozen", "weights alone"))
            if kind == "infer":
                with torch.no_grad():
                    layer(x)
                continue
            x = x.detach().requires_grad_(kind != "weights alone")
            layer.requires_grad_(kind != "frozen")
            mask = torch.rand(batch, rows * columns) > 0.3 if kind == "mask" else None
            out = layer(x, mask)
            leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]
            dout = lying(tuple(out.shape), dtype, choose)
            grads = torch.autograd.grad(out, leaves, dout)
            assert [g.shape for g in grads] == [t.shape for t in leaves]
            layer.requires_grad_(True)
    torch.set_float32_matmul_precision("highest")
    assert not watch.wrong
    assert watch.checked > 150
    assert watch.compiled > 150


def test_queries_and_keys_are_launched_by_address(watch):
    q, k, w = (torch.randn(2, 9, 24, requires_grad=True) for _ in range(3))
    matrix, vector = torch.randn(24, 24), torch.randn(24)
    for bias in (vector, None, vector):
        out = additive_attention(q, k, vector, matrix, bias, matrix, None, backend="triton")
        torch.autograd.grad(out, (q, k), w)
    assert not watch.wrong
    assert watch.checked == 4
    assert watch.compiled == 8


@pytest.mark.parametrize("which", ["dout", "mask", "a weight", "saved"])
def test_unaligned_tensors_are_left_to_triton(watch, which):
    layer = AdditiveAttention(24, 24, 1, backend="triton")
    x = torch.randn(2, 9, 24, requires_grad=True)
    mask = torch.ones(2, 9, dtype=torch.bool)

    def moved(t: Tensor) -> Tensor:
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    def step(displaced: str = "") -> None:
        hooks: Any = contextlib.nullcontext()
        if displaced == "saved":
            hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, moved)
        with hooks:
            out = layer(x, moved(mask) if displaced == "mask" else mask)
        dout = torch.ones_like(out)
        torch.autograd.grad(out, x, moved(dout) if displaced == "dout" else dout)

    for _ in range(2):
        step()
    compiled = watch.compiled
    if which == "a weight":
        layer.proj.bias.data = moved(layer.proj.bias.data)
    step(which)
    assert watch.compiled > compiled
    assert not watch.wrong


def test_plans_are_forgotten_when_there_are_many(watch):
    layer = AdditiveAttention(8, 8, 1, backend="triton").requires_grad_(False)
    with torch.no_grad():
        for n in range(1, 2 * plan.MAX_PLANS):
            for _ in range(2):
                layer(torch.randn(1, n, 8))
    assert 0 < len(layer._plans().by_key) <= plan.MAX_PLANS
    assert not watch.wrong


def test_a_kernel_without_triton_s_insides_is_started_by_triton():
    class Foreign:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return grid

    assert kernel_launch._starter(Foreign(), (3, 1, 1)) == (3, 1, 1)


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
