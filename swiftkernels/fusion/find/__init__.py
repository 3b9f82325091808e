"""Finds the blocks of a network that a chain can compute, by their parts and by what they compute.

`parts` recognises layers, `atoms` modules that are read as one, `attention` additive attentions. In
a recorded run of a block on random input, `trace` finds what happens between its parts, whatever
their names; `lower` makes steps of it. The steps have to give the output of the block itself, in
float64 on random input of two sizes. For that the network is copied, and the parameters of the copy
are random: initial layer scales of 1e-5 would hide what a block adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from swiftkernels.fusion.find import atoms, parts, probes
from swiftkernels.fusion.find.atoms import Atom
from swiftkernels.fusion.find.attention import looks_like_attention, match_attention
from swiftkernels.fusion.find.lower import UnsupportedError
from swiftkernels.fusion.find.parts import (
    activation_of,
    forward_was_replaced,
    holds_weights,
    is_conv,
    is_linear,
    is_norm,
    norm_activation,
    why_left,
)
from swiftkernels.fusion.find.probes import is_near, random_input, randomise
from swiftkernels.fusion.find.trace import Program, program_of
from swiftkernels.fusion.steps import Convolution, Step

__all__ = [
    "Found", "LeftBlock", "Unit", "activation_of", "find", "forward_was_replaced", "holds_weights",
    "is_conv", "is_linear", "is_near", "is_norm", "norm_activation", "random_input", "randomise",
    "rows", "why_left",
]  # fmt: skip

MAX_ATOMS = 24
"""Parts with weights in the largest block."""


class Recipe(Protocol):
    """How the parts of a block become steps."""

    def steps(self, block: nn.Module) -> tuple[Step, ...]:
        """The steps, in float64, with the weights that the block has now."""


@dataclass(frozen=True)
class Unit:
    """A block, or some layers that are called one after the other, and how it becomes steps."""

    names: tuple[str, ...]
    """Names of the modules in the network, in the order of their calls."""
    kind: str
    """Class of the block."""
    recipe: Recipe

    def steps(self, network: nn.Module) -> tuple[Step, ...]:
        """The steps with the weights that the network has now, in float64."""
        modules = [network.get_submodule(name) for name in self.names]
        return self.recipe.steps(modules[0] if len(modules) == 1 else nn.ModuleList(modules))


@dataclass(frozen=True)
class LeftBlock:
    """A block or layer that stays as it is."""

    name: str
    kind: str
    """Its class."""
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(the model)'}: {self.kind}, {self.reason}"


@dataclass
class Found:
    """The blocks of a network that can become steps, and those that cannot."""

    units: list[Unit] = field(default_factory=list)
    left: list[LeftBlock] = field(default_factory=list)


def find(model: nn.Module, clone: nn.Module) -> Found:
    """The blocks of a model.

    Args:
        model: it is only read: its hooks, parametrizations and replaced forwards.
        clone: its copy in float64, without these, with random parameters; it is run.
    """
    finder = _Finder(model, clone)
    finder.select("", set())
    return finder.found


@dataclass
class _Match:
    """What a module is."""

    atom: Atom | None = None
    """How blocks around it read it as one part."""
    program: Program | None = None
    """How it becomes steps."""
    reason: str = ""
    """Why it does not; empty if it looks like no block."""


class _Finder:
    def __init__(self, model: nn.Module, clone: nn.Module) -> None:
        self.model, self.clone = model, clone
        self.matches: dict[nn.Module, _Match] = {}
        self.found = Found()

    def select(self, name: str, visited: set[nn.Module]) -> None:
        """Add the blocks at and below a module to `found`: the largest that match."""
        module, original = self.clone.get_submodule(name), self.model.get_submodule(name)
        if module in visited:
            return  # a module that the network holds twice
        visited.add(module)
        kind = type(original).__name__
        if forward_was_replaced(original) and next(original.children(), None) is not None:
            self.found.left.append(LeftBlock(name, kind, "its forward was replaced"))
            return
        if atoms.of_layer(module) is not None:
            return  # `rows` looks at layers
        match = self.match(module)
        reason = match.reason
        if match.program is not None or match.atom is not None:
            reason = why_left(original) or reason
        if match.program is not None and not reason and not self._is_pipeline(module):
            self.found.units.append(Unit((name,), kind, match.program))
            return
        if looks_like_attention(module):
            self.found.left.append(LeftBlock(name, kind, reason))
            return
        units, left = len(self.found.units), len(self.found.left)
        for child in module._modules:
            if module._modules[child] is not None:
                self.select(f"{name}.{child}" if name else child, visited)
        # If only single convolutions of it were found, the block is named.
        found = [unit.steps(self.clone) for unit in self.found.units[units:]]
        parts_found = any(len(s) > 1 or not isinstance(s[0], Convolution) for s in found)
        if reason and not parts_found and len(self.found.left) == left:
            self.found.left.append(LeftBlock(name, kind, reason))

    def match(self, module: nn.Module) -> _Match:
        """What a module is; it is looked at once."""
        found = self.matches.get(module)
        if found is None:
            found = self.matches[module] = self._match(module)
        return found

    def _match(self, module: nn.Module) -> _Match:
        layer = atoms.of_layer(module)
        if layer is not None:
            return _Match(layer)
        if next(module.children(), None) is None:
            return _Match(atoms.of_module(module))
        if looks_like_attention(module):
            recipe = match_attention(module)
            if isinstance(recipe, str):
                return _Match(reason=recipe)
            weights = recipe.step(module).weights
            return _Match(
                atoms.Attention(recipe, (weights.in_dims, weights.token_dim)),
                reason="it is an additive attention whose block has another form",
            )
        own: dict[str, Atom] = {}
        scales: dict[str, Tensor] = {}
        unknown = self._gather(module, "", own, scales)
        if not own:
            return _Match(atoms.of_module(module))
        if len(own) > MAX_ATOMS:
            return _Match()
        try:
            if unknown:
                raise UnsupportedError(unknown)
            return _Match(program=program_of(module, own, scales))
        except UnsupportedError as error:
            atom = atoms.of_module(module)
            if atom is None:
                return _Match(reason=str(error))
        try:
            return _Match(atom, program_of(module, {"": atom}, {}))
        except UnsupportedError as error:
            return _Match(atom, reason=str(error))

    def _gather(
        self, module: nn.Module, name: str, own: dict[str, Atom], scales: dict[str, Tensor]
    ) -> str:
        """Add the parts of a module to `own` and `scales`; returns what is unknown."""
        unknown = ""
        tensors = parts.own_tensors(module)
        for key, tensor in tensors.items():
            path = f"{name}.{key}" if name else key
            if parts.is_scale(tensor) and (module._modules or len(tensors) == 1 or not name):
                scales[path] = tensor
            elif name:
                unknown = unknown or f"its part {name} is a {type(module).__name__}"
            else:
                unknown = unknown or f"its part {key} is a parameter of unknown meaning"
        for child, part in module._modules.items():
            if part is None:
                continue
            path = f"{name}.{child}" if name else child
            match = self.match(part)
            if match.atom is not None:
                own[path] = match.atom
            else:
                unknown = self._gather(part, path, own, scales) or unknown
        return unknown

    def _is_pipeline(self, module: nn.Module) -> bool:
        """Whether a module only calls blocks that are found by themselves, one on the output of
        the other."""
        blocks = [child for child in module.children() if parts.tensors_of(child)]
        for block in blocks:
            if atoms.of_layer(block) is not None or self.match(block).program is None:
                return False
        x = probes.random_input(2, self._in_channels(module), 7, 5)
        calls: list[tuple[Tensor, Tensor]] = []
        handles = [
            block.register_forward_hook(lambda _, args, out: calls.append((args[0].clone(), out)))
            for block in blocks
        ]
        try:
            out = module(x.clone())
        finally:
            for handle in handles:
                handle.remove()
        ends = [x, *(result for _, result in calls)]
        starts = [*(start for start, _ in calls), out]
        return len(calls) == len(blocks) and all(map(probes.is_near, starts, ends))

    def _in_channels(self, module: nn.Module) -> int:
        program = self.match(module).program
        assert program is not None
        return program.steps(module)[0].in_channels


@dataclass(frozen=True)
class _Row:
    """The recipe of layers in a row, which the program names by number."""

    program: Program

    def steps(self, block: nn.Module) -> tuple[Step, ...]:
        layers = block if isinstance(block, nn.ModuleList) else nn.ModuleList([block])
        return self.program.steps(layers)


def rows(model: nn.Module, calls: Sequence[tuple[str, nn.Module]]) -> list[Unit]:
    """The blocks among layers that were called one on the output of the other.

    Args:
        model: as in `find`.
        calls: names of the layers in the model, and the layers of its copy.
    """
    found, start = [], 0
    while start < len(calls):
        unit = None
        if parts.is_conv(calls[start][1]):
            unit = _row(model, calls[start:])
        if unit is not None:
            found.append(unit)
        start += 1 if unit is None else len(unit.names)
    return found


def _row(model: nn.Module, calls: Sequence[tuple[str, nn.Module]]) -> Unit | None:
    """The first of these layers with the BatchNorm and the activation behind it, and so on."""
    operations: list[tuple[str, object]] = []
    names: list[str] = []
    for number, (name, layer) in enumerate(calls):
        atom = atoms.of_layer(layer)
        plain = not parts.tensors_of(layer) and not layer._modules
        activation = parts.activation_of(layer) if plain else None
        unknown = parts.is_linear(layer) or (atom is None and activation is None)
        if unknown or why_left(model.get_submodule(name)):
            break
        if atom is not None:
            operations.append(("atom", (str(number), atom)))
        elif activation != "none":
            operations.append(("activation", activation))
        names.append(name)
    while names:
        program = Program(tuple(operations))
        others = f" and {len(names) - 1} layers" if len(names) > 1 else ""
        unit = Unit(tuple(names), f"{type(calls[0][1]).__name__}{others}", _Row(program))
        layers = nn.ModuleList([layer for _, layer in calls[: len(names)]])
        try:
            program.steps(layers)
        except UnsupportedError:
            operations, names = _shortened(operations, names)
            continue
        return unit
    return None


def _shortened(
    operations: list[tuple[str, object]], names: list[str]
) -> tuple[list[tuple[str, object]], list[str]]:
    """Without the last layer with weights and what is behind it."""
    last = max(i for i, (kind, _) in enumerate(operations) if kind == "atom")
    number = int(operations[last][1][0])  # type: ignore[index]
    return operations[:last], names[:number]
