"""From what a block computes, layer by layer, to the steps of a chain.

A block is a list of items in the order of their computation. BatchNorms and scales are folded into
the layers next to them; then the forms of `FORMS` are looked for, the largest first. A new form of
step is a function in that list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftkernels.fusion.steps import (
    Attention,
    Average,
    ConvMlp,
    Convolution,
    Depthwise,
    Stem,
    Step,
)
from swiftkernels.ops import folding
from swiftkernels.ops.conv_mlp.reference import ACTIVATIONS
from swiftkernels.ops.conv_mlp.weights import KERNEL_SIZES


class UnsupportedError(Exception):
    """A block that has no steps; the message says why."""


@dataclass(frozen=True)
class Layer:
    """A convolution, or a linear layer of every pixel."""

    name: str
    weight: Tensor
    """[D, C / groups, k, k]"""
    bias: Tensor
    """[D]"""
    stride: int = 1
    padding: int = 0
    groups: int = 1

    @property
    def kernel(self) -> int:
        return self.weight.shape[-1]

    @property
    def is_pointwise(self) -> bool:
        return (self.kernel, self.stride, self.padding, self.groups) == (1, 1, 0, 1)

    @property
    def is_depthwise(self) -> bool:
        return (
            self.groups > 1
            and self.weight.shape[1] == 1
            and self.kernel in KERNEL_SIZES
            and self.padding == self.kernel // 2
            and self.stride in (1, 2)
        )


@dataclass(frozen=True)
class Affine:
    """A BatchNorm or a scale: x * scale + shift."""

    name: str
    scale: Tensor
    """[C], or one number"""
    shift: Tensor | None = None


@dataclass(frozen=True)
class Activate:
    name: str


@dataclass(frozen=True)
class Pooling:
    """The mean of the pixels around, minus x."""

    kernel: int
    channels: int


@dataclass(frozen=True)
class Ready:
    """What is a step already."""

    step: Step


@dataclass(frozen=True)
class Save:
    """The map at this place is added later."""

    number: int


@dataclass(frozen=True)
class Add:
    number: int


Item = Layer | Affine | Activate | Pooling | Ready | Save | Add
Form = Callable[[Sequence[Item]], tuple[Step, int] | None]
"""The step that the first items are, and the number of these items."""


def lower(items: Sequence[Item]) -> tuple[Step, ...]:
    """The steps of a block.

    Raises:
        UnsupportedError: there are no such steps.
    """
    items = _folded(list(items))
    steps: list[Step] = []
    saved: dict[int, int] = {}
    while items:
        if isinstance(items[0], Save):
            saved[items[0].number] = len(steps)
            items = items[1:]
        elif isinstance(items[0], Add):
            steps[-1] = _adding(steps[-1], len(steps) - saved[items[0].number])
            items = items[1:]
        else:
            step, count = _first_step(items)
            items = items[count:]
            steps.append(step)
            follows = items[0] if items else None
            if isinstance(step, Attention) and not (
                isinstance(follows, Add) and saved[follows.number] == len(steps) - 1
            ):
                raise UnsupportedError("its attention does not add its input")
    return tuple(steps)


def _folded(items: list[Item]) -> list[Item]:
    """The items with all BatchNorms and scales in the layers before or behind them."""
    at = 0
    while at < len(items):
        item = items[at]
        before = items[at - 1] if at else None
        behind = items[at + 1] if at + 1 < len(items) else None
        if not isinstance(item, Affine):
            at += 1
        elif isinstance(behind, Affine):
            shift = item.shift
            shift = behind.shift if shift is None else shift * behind.scale + _or_zero(behind.shift)
            items[at : at + 2] = [Affine(item.name, item.scale * behind.scale, shift)]
        elif isinstance(before, Layer):
            scale = item.scale.expand(len(before.weight))
            bias = before.bias * scale
            bias = bias if item.shift is None else bias + item.shift
            weight = folding.scaled(before.weight, scale)
            items[at - 1 : at + 1] = [dataclasses.replace(before, weight=weight, bias=bias)]
        elif item.shift is None and isinstance(before, (Pooling, Ready)) and _takes_scale(before):
            at += 1  # the form takes it
        elif isinstance(behind, Layer) and behind.is_pointwise:
            matrix = behind.weight.flatten(1)
            bias = behind.bias
            bias = bias if item.shift is None else bias + matrix @ item.shift
            weight = (matrix * item.scale)[:, :, None, None]
            items[at : at + 2] = [dataclasses.replace(behind, weight=weight, bias=bias)]
        elif isinstance(behind, Layer):
            kind = "depthwise convolution" if behind.is_depthwise else "convolution"
            raise UnsupportedError(
                f"its BatchNorm stands in front of a padded {kind}, where it cannot be folded"
            )
        else:
            raise UnsupportedError(f"its part {item.name} stands next to no layer")
    return items


def _or_zero(t: Tensor | None) -> Tensor | float:
    return 0.0 if t is None else t


def _takes_scale(item: Item) -> bool:
    return isinstance(item, Pooling) or (isinstance(item, Ready) and item.step.kind == "attention")


def _adding(step: Step, count: int) -> Step:
    """The step that also adds the input of the step `count - 1` steps before."""
    if isinstance(step, Attention):
        return step  # it does
    if isinstance(step, ConvMlp) and not (step.residual or step.adds):
        own = count == 1
        return dataclasses.replace(step, residual=own, adds=0 if own else count)
    if isinstance(step, Convolution) and (step.adds, step.activation) == (0, "none"):
        return dataclasses.replace(step, adds=count)
    if isinstance(step, Average) and not step.adds:
        return dataclasses.replace(step, adds=count)
    plain = isinstance(step, Depthwise) and (step.stride, step.activation) == (1, "none")
    if plain and count == 1 and step.multiplier == 1:  # type: ignore[attr-defined]
        weight = step.weight.clone()  # type: ignore[attr-defined]
        weight[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] += 1
        return dataclasses.replace(step, weight=weight)  # type: ignore[call-arg]
    raise UnsupportedError(f"it adds a map to its {step.kind}")


def _first_step(items: Sequence[Item]) -> tuple[Step, int]:
    for form in FORMS:
        found = form(items)
        if found is not None:
            return found
    first = items[0]
    if isinstance(first, Activate):
        raise UnsupportedError(f"its activation {first.name} stands behind no layer")
    if isinstance(first, Layer):
        k, groups = first.kernel, first.groups
        of = "" if groups == 1 else f", {groups} groups"
        raise UnsupportedError(
            f"its part {first.name} is a convolution of {k} x {k}, stride {first.stride}{of}"
        )
    raise UnsupportedError("it holds a part of another form")


def _activation(items: Sequence[Item], at: int) -> tuple[str, int]:
    """The activation at a place, and the place behind it."""
    item = items[at] if at < len(items) else None
    return (item.name, at + 1) if isinstance(item, Activate) else ("none", at)


def _stem(items: Sequence[Item]) -> tuple[Step, int] | None:
    activation1, at = _activation(items, 1)
    first, second = items[0], items[at] if at < len(items) else None
    if not (_is_halving(first) and _is_halving(second)):
        return None
    assert isinstance(first, Layer)
    assert isinstance(second, Layer)
    activation2, at = _activation(items, at + 1)
    step = Stem(first.weight, first.bias, second.weight, second.bias, activation1, activation2)
    return step, at


def _is_halving(item: Item | None) -> bool:
    return isinstance(item, Layer) and (
        (item.kernel, item.stride, item.padding, item.groups) == (3, 2, 1, 1)
    )


def _conv_mlp(items: Sequence[Item]) -> tuple[Step, int] | None:
    first = items[0]
    at, weight, bias = 0, None, None
    if (
        isinstance(first, Layer)
        and first.is_depthwise
        and first.stride == 1
        and first.groups == len(first.weight)
    ):
        at, weight, bias = 1, first.weight, first.bias
    up = items[at] if at < len(items) else None
    activation, at = _activation(items, at + 1)
    down = items[at] if at < len(items) else None
    if not (isinstance(up, Layer) and isinstance(down, Layer)):
        return None
    if (
        activation not in ACTIVATIONS
        or not (up.is_pointwise and down.is_pointwise)
        or _activation(items, at + 1)[0] != "none"
    ):
        return None
    step = ConvMlp(
        weight, bias, up.weight.flatten(1), up.bias, down.weight.flatten(1), down.bias,
        activation, False,
    )  # fmt: skip
    return step, at + 1


def _depthwise(items: Sequence[Item]) -> tuple[Step, int] | None:
    first = items[0]
    if not isinstance(first, Layer) or not first.is_depthwise:
        return None
    activation, at = _activation(items, 1)
    multiplier = len(first.weight) // first.groups
    return Depthwise(first.weight, first.bias, first.stride, activation, multiplier), at


def _convolution(items: Sequence[Item]) -> tuple[Step, int] | None:
    first = items[0]
    if not isinstance(first, Layer) or first.groups != 1:
        return None
    activation, at = _activation(items, 1)
    return Convolution(first.weight, first.bias, first.stride, first.padding, activation), at


def _attention(items: Sequence[Item]) -> tuple[Step, int] | None:
    first = items[0]
    if not isinstance(first, Ready) or not isinstance(first.step, Attention):
        return None
    if len(items) > 1 and isinstance(items[1], Affine):
        scale = items[1].scale.expand(first.step.in_channels).clone()
        return dataclasses.replace(first.step, residual_scale=scale), 2
    return first.step, 1


def _average(items: Sequence[Item]) -> tuple[Step, int] | None:
    first = items[0]
    if not isinstance(first, Pooling):
        return None
    if len(items) > 1 and isinstance(items[1], Affine):
        return Average(items[1].scale.expand(first.channels).clone(), first.kernel), 2
    return Average(torch.ones(first.channels, dtype=torch.float64), first.kernel), 1


def _ready(items: Sequence[Item]) -> tuple[Step, int] | None:
    first = items[0]
    return (first.step, 1) if isinstance(first, Ready) else None


FORMS: tuple[Form, ...] = (
    _stem, _conv_mlp, _depthwise, _convolution, _attention, _average, _ready,
)  # fmt: skip
"""The forms of steps. Each takes the first items of a list, as many as it can."""
