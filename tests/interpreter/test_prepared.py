"""Launches by address, without Triton's lookup: as on a GPU, but run by the interpreter."""

from __future__ import annotations

import ctypes
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from swiftkernels import AdditiveAttention
from swiftkernels.ops.additive_attention.triton import config, launch, wide


class Compiled:
    """Takes a kernel's parameters as a compiled one does, pointers as addresses."""

    def __init__(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.kernel, self.args, self.kwargs = kernel, args, kwargs
        self.calls = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any) -> None:
            self.calls += 1
            given = [self._tensor(i, arg) for i, arg in enumerate(args)]
            names = list(inspect.signature(self.kernel.fn).parameters)
            # What Triton compiles for is as it was.
            for name, arg, first in zip(names, given, self.args, strict=False):
                if not isinstance(first, Tensor):
                    assert arg == first, name
            numbers = len(self.args)
            constants = dict(zip(names[numbers:], given[numbers:], strict=True))
            assert constants == {name: self.kwargs[name] for name in constants}
            self.kernel[grid](*given[:numbers], **self.kwargs)

        return run

    def _tensor(self, i: int, arg: Any) -> Any:
        """The memory at an address, as long as the tensor of the first call."""
        if i >= len(self.args) or not isinstance(self.args[i], Tensor):
            return arg
        first: Tensor = self.args[i]
        assert type(arg) is int
        assert arg % 16 == first.data_ptr() % 16 == 0
        size = first.untyped_storage().nbytes() - first.storage_offset() * first.itemsize
        memory = (ctypes.c_char * size).from_address(arg)
        return torch.frombuffer(memory, dtype=first.dtype)


class Compiler:
    """A kernel whose calls return what they compiled."""

    def __init__(self, kernel: Any, compiled: list[Compiled]) -> None:
        self.kernel, self.compiled = kernel, compiled
        self.arg_names = list(inspect.signature(kernel.fn).parameters)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **kwargs: Any) -> Compiled:
            self.kernel[grid](*args, **kwargs)
            self.compiled.append(Compiled(self.kernel, args, kwargs))
            return self.compiled[-1]

        return run


@pytest.fixture
def compiled(monkeypatch):
    """All that is compiled from here on."""
    found: list[Compiled] = []
    for module in (launch, wide):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Compiler(getattr(module, name), found))
    launch.forget_launches()
    yield found
    launch.forget_launches()


def results(layer: AdditiveAttention, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        inferred = layer(x)
    x = x.detach().requires_grad_()
    out = layer(x)
    grads = torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])
    return [inferred, out.detach(), *grads]


def images(width: int, seed: int = 0, channels_last: bool = False) -> Tensor:
    x = torch.randn(2, width, 3, 5, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=torch.channels_last) if channels_last else x


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("tokens", None),
        ("images", None),
        ("channels_last", None),
        ("images", "MAX_FUSED_WIDTH"),
        ("images", "MAX_PROJECTED_WIDTH"),
    ],
)
def test_later_calls_launch_by_address(compiled, monkeypatch, kind, limit):
    """Also by the kernels of wider layers, which are for these what a limit of 16 makes them."""
    width = 24
    if limit is not None:
        monkeypatch.setattr(config, limit, 16)
    layer = AdditiveAttention(width, width, 1, backend="triton")

    def make(seed: int) -> Tensor:
        x = images(width, seed, kind == "channels_last")
        return x.flatten(2).mT.contiguous() if kind == "tokens" else x

    inputs = [make(seed) for seed in range(2)]
    layer.backend = "reference"
    expected = [t for x in inputs for t in results(layer, x)]
    layer.backend = "triton"
    found = [t for x in inputs for t in results(layer, x)]
    kernels = len(compiled)
    assert all(c.calls > 0 for c in compiled)
    again = [t for x in inputs for t in results(layer, x)]
    assert len(compiled) == kernels
    for ours, same, theirs in zip(found, again, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours, same)
        assert ours.stride() == same.stride()


def test_unaligned_tensors_are_launched_by_triton(compiled):
    layer = AdditiveAttention(24, 24, 1, backend="triton")
    x = torch.randn(2 * 15 * 24 + 1)[1:].view(2, 15, 24)
    first = results(layer, x)
    kernels = len(compiled)
    second = results(layer, x)
    assert len(compiled) == 2 * kernels
    assert not any(c.calls for c in compiled)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_replaced_weights_are_seen(compiled):
    layer = AdditiveAttention(24, 24, 1, backend="triton")
    x = images(24)
    for _ in range(2):
        results(layer, x)
    other = AdditiveAttention(24, 24, 1, backend="triton")
    for ours, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        ours.data = theirs.data.clone()
    with torch.no_grad():
        # As a view of other strides at the same address.
        layer.proj.weight.data = layer.proj.weight.data.t()
        other.proj.weight.data = other.proj.weight.data.t().contiguous()
    for a, b in zip(results(layer, x), results(other, x), strict=True):
        torch.testing.assert_close(a, b)


def test_images_have_second_derivatives(compiled):
    layer = AdditiveAttention(16, 16, 1, backend="triton")
    with torch.no_grad():
        layer(images(16))
    seconds = []
    for backend in ("triton", "reference"):
        layer.backend = backend
        layer(images(16))
        x = images(16).requires_grad_()
        (grad,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-6)
