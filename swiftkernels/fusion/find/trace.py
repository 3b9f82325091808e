"""What a block computes, read from a recorded run.

The run shows in which order the parts of a block are called, on what, and what they return. What
lies between two calls is explained by numbers: an activation, a scale, or the sum with an earlier
map, whether modules or functions compute them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swiftkernels.fusion.find import lower, parts, probes
from swiftkernels.fusion.find.atoms import Atom, widths, with_channels
from swiftkernels.fusion.find.lower import Item, UnsupportedError
from swiftkernels.fusion.steps import ACTIVATIONS, Step, run

MAX_SCALES = 2
"""Scales between two parts, such as one in a branch and one behind it."""


class Program(NamedTuple):
    """A block as a list of operations, each a kind and what belongs to it."""

    operations: tuple[tuple[str, Any], ...]
    """("atom", (name, atom)), ("activation", name), ("scale", name of a parameter), and
    ("save", number) and ("add", number) for maps that are added."""

    def steps(self, block: nn.Module) -> tuple[Step, ...]:
        """The steps with the weights that the block has now, in float64."""
        return lower.lower(list(self._items(block)))

    def _items(self, block: nn.Module) -> Iterator[Item]:
        for kind, value in self.operations:
            if kind == "atom":
                name, atom = value
                yield from atom.items(name, block.get_submodule(name))
            elif kind == "activation":
                yield lower.Activate(value)
            elif kind == "scale":
                scale = parts.parameter(block, value)
                yield lower.Affine(value, scale.detach().double().flatten())
            else:
                yield (lower.Save if kind == "save" else lower.Add)(value)


def program_of(
    module: nn.Module, atoms: Mapping[str, Atom], scales: Mapping[str, Tensor]
) -> Program:
    """The program of a block, which gives its outputs.

    Args:
        module: the block, in float64, with random parameters.
        atoms: its parts with weights, by name.
        scales: its other parameters, by name.

    Raises:
        UnsupportedError: there is none.
    """
    reason = "it runs on no map [B, C, H, W]"
    for channels in widths(list(atoms.values())):
        inputs = [size * probes.random_input(b, channels, h, w) for b, h, w, size in _inputs(atoms)]
        outputs = [probes.output(module, x) for x in inputs]
        if any(out is None or out.dim() != 4 for out in outputs):
            continue
        program = _program(module, atoms, scales, inputs[0])
        for x, out in zip(inputs, outputs, strict=True):
            assert out is not None
            if not probes.is_near(out, run(program.steps(module), x)):
                raise UnsupportedError("its parts, in the order of their calls, differ from it")
        return program
    raise UnsupportedError(reason)


def _inputs(atoms: Mapping[str, Atom]) -> list[tuple[int, int, int, float]]:
    """`probes.INPUTS` for images in which no axis is as long as that of the channels."""
    taken = {channels for atom in atoms.values() for channels in atom.channels}
    found = []
    for batch, height, width, size in probes.INPUTS:
        while not taken.isdisjoint((height, width, height * width)):
            height, width = height + 1, width + 1
        found.append((batch, height, width, size))
    return found


class _Call(NamedTuple):
    name: str
    x: Tensor
    """[B, C, P]"""
    out: Tensor
    between: list[str]
    """The layers without weights that were called since the last call."""


def _program(
    module: nn.Module, atoms: Mapping[str, Atom], scales: Mapping[str, Tensor], x: Tensor
) -> Program:
    calls, last_between, out = _record(module, atoms, x)
    first = x.flatten(2)
    states, before = [first], ("its input", first)
    found: list[tuple[str, Any]] = [("save", 0)]
    for call in calls:
        found += _relation(module, call.x, before, states, scales, call.between, call.name)
        found.append(("save", len(states)))
        states.append(call.x)
        found.append(("atom", (call.name, with_channels(atoms[call.name], call.x.shape[1]))))
        before = call.name, call.out
    end = out.flatten(2)
    found += _relation(module, end, before, states, scales, last_between, "its output")
    added = {value for kind, value in found if kind == "add"}
    return Program(tuple(op for op in found if op[0] != "save" or op[1] in added))


def _record(
    module: nn.Module, atoms: Mapping[str, Atom], x: Tensor
) -> tuple[list[_Call], list[str], Tensor]:
    """The calls of the atoms in a run, the layers that were called behind them, the output."""
    calls: list[_Call] = []
    between: list[str] = []
    handles = []

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            tensors = [t for t in (*args, out) if isinstance(t, Tensor)]
            if len(args) != 1 or len(tensors) != 2:
                raise UnsupportedError(f"its part {name} takes or returns more than one map")
            channels = atoms[name].channels
            x, result = (_as_map(t, c) for t, c in zip(tensors, channels, strict=True))
            calls.append(_Call(name, x, result, list(between)))
            between.clear()

        return hook

    def note(name: str) -> Any:
        return lambda *_: between.append(name)

    for name, part in module.named_modules():
        if name in atoms:
            handles.append(part.register_forward_hook(record(name)))
        elif not part._modules and not any(name.startswith(f"{atom}.") for atom in atoms):
            handles.append(part.register_forward_hook(note(name)))
    try:
        out = module(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    names = [call.name for call in calls]
    for name in atoms:
        if names.count(name) != 1:
            raise UnsupportedError(f"its part {name} is called {names.count(name)} times")
    return calls, between, out


def _as_map(t: Tensor, channels: int) -> Tensor:
    """Images [B, C, H, W] or [B, H, W, C] or tokens [B, N, C] or [B, C, N] as [B, C, P], copied."""
    if t.dim() in (3, 4) and channels in (0, t.shape[1]):
        return t.flatten(2).clone()
    if t.dim() in (3, 4) and t.shape[-1] == channels:
        return t.reshape(len(t), -1, channels).mT.clone()
    raise UnsupportedError("its parts take other tensors than images and tokens")


def _relation(
    module: nn.Module,
    z: Tensor,
    before: tuple[str, Tensor],
    states: Sequence[Tensor],
    scales: Mapping[str, Tensor],
    between: Sequence[str],
    following: str,
) -> list[tuple[str, Any]]:
    """What makes z of what the part before returned and of the maps so far.

    Raises:
        UnsupportedError: nothing that is known does.
    """
    name, f = before
    known = [parts.activation_of(module.get_submodule(n)) for n in between]
    for operations, branch in _branches(f, scales):
        if probes.is_near(branch, z):
            # Small numbers do not show the difference.
            relu6 = operations == [("activation", "relu")] and "relu6" in known
            return [("activation", "relu6")] if relu6 else operations
        for number in reversed(range(len(states))):
            x = states[number]
            # A sum with a map of all zeros, or of one pixel, would have another shape.
            if x.shape == z.shape == branch.shape and probes.is_near(x + branch, z):
                return [*operations, ("add", number)]
    for layer, activation in zip(between, known, strict=True):
        part = module.get_submodule(layer)
        if activation is None:
            raise UnsupportedError(f"its part {layer} is a {type(part).__name__}")
    if any(x.shape == z.shape and probes.is_near(x, z) for x in states):
        raise UnsupportedError(f"its parts {name} and {following} are called side by side")
    raise UnsupportedError(f"it computes something unknown between {name} and {following}")


def _branches(
    f: Tensor, scales: Mapping[str, Tensor]
) -> Iterator[tuple[list[tuple[str, Any]], Tensor]]:
    """A map, and what activations and scales make of it."""
    for name, activation in ACTIVATIONS.items():
        yield [] if name == "none" else [("activation", name)], activation(f)
    for count in range(1, MAX_SCALES + 1):
        for names in itertools.combinations(scales, count):
            factors = [scales[name].detach().double().flatten() for name in names]
            if all(len(factor) in (1, f.shape[1]) for factor in factors):
                product = torch.ones(1, dtype=torch.float64)
                for factor in factors:
                    product = product * factor
                yield [("scale", name) for name in names], product.view(-1, 1) * f
