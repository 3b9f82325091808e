"""Modules of a fused network: `FusedChain` runs several blocks, `Passed` stands for the others."""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swiftkernels.backends import cache, torch_state
from swiftkernels.backends.cpu import library
from swiftkernels.fusion.steps import ACTIVATIONS, Step, run

Runner = Callable[[tuple[Step, ...], Tensor, "Slot"], Tensor]
"""Runs steps on x, and keeps what it prepares for later calls in the slot.

x [B, C, H, W] is on the device of the steps, not empty, of their type (float32, bfloat16 or
float16), with the channels of the first step; its strides are any, as are those of the tensors.
Several threads may call it with one slot.
"""


class Slot:
    """Where the program of a chain keeps its packed weights and plans.

    A chain has a new, empty slot whenever its tensors may have changed.
    """

    program: Any = None


class FusedChain(nn.Module):
    """Several steps, one after the other, as one program.

    On a CPU the compiled kernels run the chain; on a GPU Triton kernels run its blocks, attention
    and small convolutions, where tensor cores may be used, and PyTorch's operators the rest. Where
    there are no kernels (float64, other devices and processors) and where PyTorch has to see
    operators (export, compilation, tracing, gradients), it computes `plain`, the same in PyTorch's
    operators.

    The tensors of the steps are buffers, named by step: `conv_mlp3_weight1`. New values are used
    from the next call on, except those written through `.data`.

    Args:
        steps: what to compute, with weights; all tensors are of one type and on one device.

    Shapes:
        x [B, C, H, W] -> [B, D, H', W'].

    Raises:
        ValueError: no steps, or an x of another shape.

    Example:
        >>> from swiftkernels.fusion.steps import Convolution
        >>> step = Convolution(torch.randn(8, 3, 3, 3), torch.randn(8))
        >>> FusedChain([step])(torch.randn(2, 3, 9, 11)).shape
        torch.Size([2, 8, 5, 6])
    """

    slot: Slot

    def __init__(self, steps: Sequence[Step]) -> None:
        super().__init__()
        if not any(t is not None for step in steps for t in step.tensors().values()):
            raise ValueError(
                f"steps must hold at least one step with weights; got {list(steps)}. Pass what to "
                "compute."
            )
        self._forms = tuple(step.with_tensors(dict.fromkeys(step.tensors())) for step in steps)
        self._names: tuple[dict[str, str | None], ...] = ()
        for i, step in enumerate(steps):
            names: dict[str, str | None] = {}
            for name, tensor in step.tensors().items():
                # None is no buffer: torch.export would count it, but not find it.
                names[name] = None if tensor is None else f"{step.kind}{i}_{name}"
                if tensor is not None:
                    self.register_buffer(f"{step.kind}{i}_{name}", tensor)
            self._names += (names,)
        self.in_channels = steps[0].in_channels
        self.renew()

    @property
    def steps(self) -> tuple[Step, ...]:
        """What the chain computes, with the tensors as they are now."""
        self._renew_if_changed()
        found: tuple[Step, ...] | None = self.__dict__["_steps"]
        if found is None:
            found = tuple(
                form.with_tensors(self._tensors(names))
                for form, names in zip(self._forms, self._names, strict=True)
            )
            self.__dict__["_steps"] = found
        return found

    @property
    def like(self) -> Tensor:
        """A tensor of the type and on the device of all tensors of the chain."""
        return next(t for t in self._buffers.values() if t is not None)

    def renew(self) -> None:
        """Forget what was prepared for the present tensors; the next call prepares it again."""
        self.__dict__["slot"] = Slot()
        self.__dict__["_steps"] = None

    def _renew_if_changed(self) -> None:
        """`renew` if a tensor was replaced, or written in a way that PyTorch counts."""
        # `steps` keeps the tensors, so that others cannot have their addresses.
        tensors = cache.present(tuple(self._buffers.values()))
        now = list(map(Tensor.data_ptr, tensors)), cache.versions(tensors)
        if self.__dict__.get("_state") != now:
            self.renew()
            self.__dict__["_state"] = now

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, D, H', W']"""
        if torch.jit.is_scripting() or not _may_run(x, self):
            return self.plain(x)
        if x.dim() != 4 or (self.in_channels and x.shape[1] != self.in_channels):
            raise ValueError(
                f"x must have shape [B, {self.in_channels or 'C'}, H, W]; got {tuple(x.shape)}. "
                "Pass what the first of the fused blocks takes."
            )
        runner = _runner(x.device)
        if runner is None:
            return self.plain(x)
        steps = self.steps  # first: it renews the slot
        return runner(steps, x, self.slot)

    def plain(self, x: Tensor) -> Tensor:
        """The same in PyTorch's operators."""
        # Not by `steps`: a trace has to find the tensors as buffers of this module.
        return run(self._forms, x, [self._tensors(names) for names in self._names])

    def _tensors(self, names: dict[str, str | None]) -> dict[str, Tensor | None]:
        """The tensors of a step, of which these are the names here."""
        return {name: None if key is None else getattr(self, key) for name, key in names.items()}

    def extra_repr(self) -> str:
        return " -> ".join(form.kind for form in self._forms)

    def __getstate__(self) -> dict[str, Any]:
        """The state without what was prepared, which holds for this process only."""
        return {k: v for k, v in self.__dict__.items() if k not in ("slot", "_steps", "_state")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.renew()


class Passed(nn.Module):
    """Returns its input: in the place of a module that an earlier chain has computed.

    Args:
        computed_by: name of the chain.
    """

    def __init__(self, computed_by: str) -> None:
        super().__init__()
        self.computed_by = computed_by

    def forward(self, x: Tensor) -> Tensor:
        """x"""
        return x

    def extra_repr(self) -> str:
        return f"computed by {self.computed_by or 'the chain'}"


class Activation(nn.Module):
    """An activation of `ACTIVATIONS`: what is left of a BatchNorm with an activation."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """activation(x)"""
        return ACTIVATIONS[self.name](x)

    def extra_repr(self) -> str:
        return self.name


_local = threading.local()


@contextlib.contextmanager
def plain_chains() -> Iterator[None]:
    """Inside, chains compute `plain` in this thread."""
    before = getattr(_local, "plain", False)
    _local.plain = True
    try:
        yield
    finally:
        _local.plain = before


def chains_are_plain() -> bool:
    """Whether this thread is inside of `plain_chains`."""
    return bool(getattr(_local, "plain", False))


def _may_run(x: Tensor, chain: FusedChain) -> bool:
    """Whether the compiled program of a chain may take x, as far as PyTorch is concerned."""
    # The first test is a constant under torch.compile.
    like = chain.like
    return (
        torch_state.nothing_listens()
        and not torch_state.being_exported()
        and torch_state.is_plain(x)
        and x.device == like.device
        and x.dtype in library.TYPES
        and x.layout is torch.strided
        and x.numel() > 0
        and x.dtype is like.dtype
        and not (x.requires_grad and torch.is_grad_enabled())
        and not chains_are_plain()
    )


def _runner(device: torch.device) -> Runner | None:
    """What runs a chain on that device; None where there is nothing."""
    if not torch_state.why_not_triton(device):
        return _program("swiftkernels.fusion.triton.program")
    if device.type != "cpu":
        return None
    run = _program("swiftkernels.fusion.cpu")
    # Asked after the import, which may declare what the library has to contain.
    return None if library.why_not() else run


@functools.cache
def _program(module: str) -> Runner:
    # At the first use, because a library is compared with what its module declares.
    found: Runner = importlib.import_module(module).run
    return found
