"""Which chains the blocks of a network make, and which BatchNorms outside of them are folded.

A chain is a run of blocks of which each takes the output of the one before, in a recorded run.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from swiftkernels.backends import torch_state
from swiftkernels.fusion import find
from swiftkernels.fusion.chain import Activation, FusedChain, Passed
from swiftkernels.fusion.find import LeftBlock, Unit
from swiftkernels.fusion.outputs import is_near, is_same, leaves
from swiftkernels.fusion.steps import Attention, ConvMlp, Convolution, Linear, Pool, Stem, Step
from swiftkernels.ops import folding, linear_parts

KNOWN = ("swiftkernels.models.swiftformer.network", "timm.models.swiftformer")
"""Modules of networks whose forward does nothing besides what a chain with heads computes. Others
may treat other images otherwise than those of the probes."""


@dataclass(frozen=True)
class Call:
    """A call of a module in the recorded run."""

    name: str
    x: Tensor
    out: Tensor


@dataclass(frozen=True)
class End:
    """The final BatchNorm, mean and heads, which join a chain."""

    norm: str
    """Name of the BatchNorm, "" without."""
    heads: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (*([self.norm] if self.norm else []), *self.heads)

    def steps(self, network: nn.Module) -> tuple[Step, ...]:
        """The mean over the pixels, and the mean of the heads."""
        pairs = [folding.weight_and_bias(network.get_submodule(name)) for name in self.heads]
        sums = [cast(Tensor, sum(tensors)) for tensors in zip(*pairs, strict=True)]
        weight, bias = (t / len(pairs) for t in sums)
        norm = network.get_submodule(self.norm) if self.norm else None
        return (Pool(), Linear(*folding.norm_before(weight, bias, norm)))


@dataclass(frozen=True)
class Run:
    """Units that become one chain."""

    units: tuple[Unit, ...]
    end: End | None = None

    @property
    def parts(self) -> tuple[Unit | End, ...]:
        return self.units if self.end is None else (*self.units, self.end)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.names)

    def is_worthwhile(self, network: nn.Module) -> bool:
        """Whether a chain can win what its entry and the change of memory formats cost.

        PyTorch computes single convolutions over all channels as fast. Networks with chains of two
        layers, such as a depthwise convolution and a pointwise one, took as long as without.
        """
        steps = self.steps(network)
        return any(isinstance(step, (Stem, ConvMlp, Attention)) for step in steps) or (
            len(steps) > 2 and not all(isinstance(step, Convolution) for step in steps)
        )

    def steps(self, network: nn.Module) -> list[Step]:
        """The steps with the weights that the network has now, in float64."""
        found: list[Step] = []
        for part in self.parts:
            for step in part.steps(network):
                # The stem reads the images themselves.
                split = found and isinstance(step, Stem)
                found += step.convolutions if split else [step]  # type: ignore[attr-defined]
        return found

    def modules(
        self, network: nn.Module, cast_to: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, nn.Module]:
        """The chain, and what takes the place of the other modules, by name."""
        found = self.steps(network)
        if cast_to is not None:
            found = [
                step.with_tensors(
                    {k: None if t is None else cast_to(t) for k, t in step.tensors().items()}
                )
                for step in found
            ]
        chain = FusedChain(found).eval()
        first, *others = self.names
        return {first: chain, **{name: Passed(first).eval() for name in others}}


@dataclass(frozen=True)
class Fold:
    """A convolution outside of the chains, and the BatchNorm that only takes its output."""

    conv: str
    norm: str

    @property
    def names(self) -> tuple[str, ...]:
        return self.conv, self.norm

    def modules(
        self, network: nn.Module, cast_to: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, nn.Module]:
        """A convolution with the weights of both, and the activation that the norm had, by name."""
        conv = copy.deepcopy(network.get_submodule(self.conv))
        norm = network.get_submodule(self.norm)
        folded = folding.norm_behind(*folding.weight_and_bias(conv), norm)
        conv.weight, conv.bias = (
            nn.Parameter(t if cast_to is None else cast_to(t), requires_grad=False) for t in folded
        )
        activation = find.norm_activation(norm)
        assert activation is not None
        return {self.conv: conv, self.norm: Activation(activation).eval()}


class Search:
    """The candidates for the chains of a network.

    Args:
        model: the model; only its hooks are read.
        clone: its copy, with random parameters.
        found: the blocks.
        images: for the recorded runs.
    """

    def __init__(
        self, model: nn.Module, clone: nn.Module, found: find.Found, images: Tensor
    ) -> None:
        self.model, self.clone, self.images = model, clone, images
        self.found = found
        inside = {name for unit in found.units for name in unit.names}
        layers = [
            name for name, part in clone.named_modules() if next(part.children(), None) is None
        ]
        self.layers = [name for name in layers if not _is_inside(name, inside)]
        self.touched = [
            name for name in self.layers if not linear_parts.is_untouched(model.get_submodule(name))
        ]
        self.order = list(dict.fromkeys([*inside, *self.layers]))
        self.calls = _record(clone, self.order, images)
        self.calls_of: dict[str, list[Call]] = {}
        for call in self.calls:
            self.calls_of.setdefault(call.name, []).append(call)
        self.units = {unit.names[0]: unit for unit in found.units}
        for unit in self._rows():
            self.units[unit.names[0]] = unit

    def candidates(self) -> Iterator[list[Run]]:
        """Chains to try, from the longest to the shortest."""
        tried: list[list[Run]] = []
        for cuts in (self._no_cuts, self._cuts_by_use, self._cuts_by_parent, self._all_cuts):
            runs = [run for run in self._runs(cuts()) if run.is_worthwhile(self.clone)]
            if runs not in tried:
                tried.append(runs)
                yield from self._with_ends(runs)

    def folds(self, runs: Sequence[Run]) -> list[Fold]:
        """The convolutions that no run holds, with a BatchNorm that takes their output."""
        fused = {name for run in runs for name in run.names}
        layers: dict[str, bool] = {}
        for name, part in self.clone.named_modules():
            is_norm = find.norm_activation(part) is not None
            readable = not find.why_left(self.model.get_submodule(name))
            if (is_norm or find.is_conv(part)) and readable and not _is_inside(name, fused):
                layers[name] = is_norm
        calls = _record(self.clone, list(layers), self.images)
        names = [call.name for call in calls]
        return [
            Fold(conv.name, norm.name)
            for conv, norm in itertools.pairwise(calls)
            if not layers[conv.name] and layers[norm.name] and norm.x is conv.out
            if names.count(conv.name) == names.count(norm.name) == 1
            if self._hooked(conv.name) == self._hooked(norm.name)
        ]

    def is_whole(self, runs: Sequence[Run]) -> bool:
        """Whether the only chain computes all of a network whose forward is known."""
        kind = type(self.model)
        first = self.calls_of[runs[0].names[0]]
        return (
            len(runs) == 1
            and runs[0].end is not None
            and kind.__module__ in KNOWN
            and all(map(linear_parts.is_untouched, self.model.modules()))
            and len(first) == 1
            and is_same(first[0].x, self.images)
        )

    def left(self, runs: Sequence[Run], folds: Sequence[Fold] = ()) -> list[LeftBlock]:
        """The blocks and layers that no run holds, and why."""
        fused = {name for part in (runs, folds) for run in part for name in run.names}
        left = [block for block in self.found.left if block.name not in fused]
        for unit in self.units.values():
            if not any(_is_inside(name, set(unit.names)) for name in fused):
                reason = "its outputs differ in a chain" if runs else "no chain gave its outputs"
                if unit.names[0] not in self.calls_of:
                    reason = "it was not called with one map"
                elif not Run((unit,)).is_worthwhile(self.clone):
                    reason = "it would gain nothing in a chain"
                left.append(LeftBlock(unit.names[0], unit.kind, reason))
        known = {*fused, *(block.name for block in left)}
        for name in self.layers:
            layer = self.clone.get_submodule(name)
            if not _is_inside(name, known) and find.holds_weights(layer):
                reason = find.why_left(self.model.get_submodule(name))
                reason = reason or "it belongs to no block of a known form"
                left.append(LeftBlock(name, type(layer).__name__, reason))
        return left

    def _rows(self) -> list[Unit]:
        """Stems and downsamplings of which only the layers are modules."""
        rows: list[list[Call]] = [[]]
        layers = set(self.layers)
        for call in [call for call in self.calls if call.name in layers]:
            if len(self.calls_of[call.name]) > 1 or self._under_replaced(call.name):
                rows.append([])
                continue
            last = rows[-1][-1] if rows[-1] else None
            if last is not None and (
                not is_same(last.out, call.x) or self._hooked(last.name) != self._hooked(call.name)
            ):
                rows.append([])
            rows[-1].append(call)
        modules = [[(call.name, self.clone.get_submodule(call.name)) for call in r] for r in rows]
        return [unit for row in modules for unit in find.rows(self.model, row)]

    def _runs(self, cuts: Mapping[str, bool]) -> list[Run]:
        """The longest runs of units of which each takes the output of the one before.

        Args:
            cuts: names of units behind which a run has to end.
        """
        runs: list[list[Unit]] = []
        for unit in self._called_units():
            for units in runs:
                last = units[-1]
                if (
                    not cuts.get(last.names[0])
                    and self._takes(unit.names[0], last.names[-1])
                    and self._hooked(last.names[0]) == self._hooked(unit.names[0])
                    and self._like(last) == self._like(unit)
                ):
                    units.append(unit)
                    break
            else:
                runs.append([unit])
        return [Run(tuple(units)) for units in runs]

    def _called_units(self) -> list[Unit]:
        """The units in the order of their first calls."""
        names = dict.fromkeys(call.name for call in self.calls)
        return [self.units[name] for name in names if name in self.units]

    def _takes(self, name: str, before: str) -> bool:
        """Whether each call of a module takes the output of the same call of another one."""
        calls, others = self.calls_of.get(name, []), self.calls_of.get(before, [])
        return len(calls) == len(others) > 0 and all(
            is_same(other.out, call.x) and not self._is_touched(call.x)
            for call, other in zip(calls, others, strict=True)
        )

    def _is_touched(self, x: Tensor) -> bool:
        """Whether a layer with hooks or a replaced forward, such as a dropout, takes or returns x.

        In the copy it has neither, and may return its input.
        """
        return any(
            is_same(t, x)
            for name in self.touched
            for call in self.calls_of.get(name, ())
            for t in (call.x, call.out)
        )

    def _with_ends(self, runs: list[Run]) -> Iterator[list[Run]]:
        """The runs with all heads that can join them, with one of them, without."""
        ends = {i: end for i, run in enumerate(runs) if (end := self._end(run)) is not None}
        some = [ends, *({i: end} for i, end in ends.items())] if len(ends) > 1 else [ends]
        for joined in (*some, {}) if ends else ({},):
            yield [dataclasses.replace(run, end=joined.get(i)) for i, run in enumerate(runs)]

    def _end(self, run: Run) -> End | None:
        """The BatchNorm and the heads behind the last unit of a run."""
        last = run.units[-1].names[-1]
        layers = {name: self.clone.get_submodule(name) for name in self.layers}
        norms = [n for n, part in layers.items() if find.is_norm(part) and self._takes(n, last)]
        norm = norms[0] if norms else ""
        maps = [call.out for call in self.calls_of[norm or last]]
        if any(x.dim() != 4 for x in maps):
            return None
        pooled = [x.mean((2, 3)) for x in maps]
        heads = []
        for name, part in layers.items():
            inputs = [call.x for call in self.calls_of.get(name, [])]
            same = len(inputs) == len(pooled) and all(map(is_near, inputs, pooled))
            if same and find.is_linear(part) and not any(map(self._is_touched, inputs)):
                heads.append(name)
        classes = {len(cast(Tensor, layers[name].weight)) for name in heads}
        for name in (*norms, *heads):
            if find.why_left(self.model.get_submodule(name)) or self._under_replaced(name):
                return None
            if self._hooked(name) != self._hooked(last):
                return None
        return End(norm, tuple(heads)) if len(classes) == 1 and len(norms) < 2 else None

    def _links(self) -> list[tuple[Unit, Unit]]:
        """The pairs of units of which the second takes the output of the first."""
        runs = self._runs({})
        return [(a, b) for run in runs for a, b in zip(run.units, run.units[1:], strict=False)]

    def _no_cuts(self) -> dict[str, bool]:
        return {}

    def _cuts_by_use(self) -> dict[str, bool]:
        """Runs end at units of which something else than the next unit uses the output."""
        links = {a.names[0]: b.names[0] for a, b in self._links()}
        units = list(self.units.values())
        used = _used_elsewhere(self.clone, units, links, self.images)
        return dict.fromkeys(used or (), True)

    def _cuts_by_parent(self) -> dict[str, bool]:
        """Runs end where the module that holds the units changes, such as a stage."""
        return {a.names[0]: _parent(a.names[0]) != _parent(b.names[0]) for a, b in self._links()}

    def _all_cuts(self) -> dict[str, bool]:
        return dict.fromkeys(self.units, True)

    def _hooked(self, name: str) -> list[str]:
        """The modules around a module, except the network, that have hooks."""
        around = _around(name)
        return [n for n in around if n and torch_state.has_hooks(self.model.get_submodule(n))]

    def _under_replaced(self, name: str) -> bool:
        return any(find.forward_was_replaced(self.model.get_submodule(n)) for n in _around(name))

    def _like(self, unit: Unit) -> tuple[torch.dtype, torch.device]:
        like = first_tensor(self.model.get_submodule(unit.names[0]))
        return like.dtype, like.device


def _record(clone: nn.Module, names: Sequence[str], images: Tensor) -> list[Call]:
    """The calls of modules with one tensor that return one, in order."""
    calls: list[Call] = []
    handles = []
    unlike: set[str] = set()
    for name in names:

        def record(_: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
            if len(args) == 1 and not kwargs and all(isinstance(t, Tensor) for t in (*args, out)):
                calls.append(Call(name, args[0], out))
            else:
                unlike.add(name)

        module = clone.get_submodule(name)
        handles.append(module.register_forward_hook(record, with_kwargs=True))
    try:
        clone(images)
    finally:
        for handle in handles:
            handle.remove()
    return [call for call in calls if call.name not in unlike]


def _used_elsewhere(
    clone: nn.Module, units: Sequence[Unit], links: Mapping[str, str], images: Tensor
) -> set[str] | None:
    """The units of which not only the linked unit uses the output; None if that is unknown.

    The outputs of all units become leaves of an autograd graph. It ends in the outputs of the
    network and in the inputs of the units, except those that are the output of the linked unit.

    Args:
        clone: the network.
        units: its units.
        links: name of a unit -> name of the unit that takes its output.
        images: for the run.
    """
    outputs: dict[str, list[tuple[Tensor, int]]] = {unit.names[0]: [] for unit in units}
    ends: list[Tensor] = []
    before = {following: name for name, following in links.items()}
    handles = []
    enabled = [True]

    def take(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any) -> Any:
            linked = outputs.get(before.get(name, ""), [])
            for t in args:
                # A change in place since then is a use, too.
                if not any(t is out and t._version == version for out, version in linked):
                    ends.append(t)
            return tuple(t.detach() for t in args)

        return hook

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: Any, out: Tensor) -> Tensor:
            enabled.append(torch.is_grad_enabled() and not torch.is_inference_mode_enabled())
            with torch.enable_grad():
                kept = out.detach().requires_grad_() * 1
            outputs[name].append((kept, kept._version))
            return kept

        return hook

    for unit in units:
        first, last = unit.names[0], unit.names[-1]
        handles.append(clone.get_submodule(first).register_forward_pre_hook(take(first)))
        handles.append(clone.get_submodule(last).register_forward_hook(keep(first)))
    try:
        with torch.enable_grad():
            ends += [t for t in leaves(clone(images)) if isinstance(t, Tensor)]
            sums = [t.sum() for t in ends if t.requires_grad]
            if not all(enabled) or not sums:
                return None
            starts = [(name, t) for name, calls in outputs.items() for t, _ in calls]
            grads = torch.autograd.grad(sums, [t for _, t in starts], allow_unused=True)
    except Exception:  # an unknown network may raise anything
        return None
    finally:
        for handle in handles:
            handle.remove()
    return {name for (name, _), grad in zip(starts, grads, strict=True) if grad is not None}


def first_tensor(module: nn.Module) -> Tensor:
    """A floating-point parameter or buffer of a module: the type and device of its weights."""
    for t in (*module.parameters(), *module.buffers()):
        if t.is_floating_point():
            return t
    return torch.zeros(())


def _around(name: str) -> list[str]:
    """Names of the modules around a module: of stages.0.blocks.1 "", stages, stages.0, ..."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_inside(name: str, names: set[str]) -> bool:
    """Whether a module is one of these or inside of one."""
    return "" in names or name in names or any(n in names for n in _around(name))
