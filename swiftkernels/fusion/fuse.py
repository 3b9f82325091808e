"""`fuse_for_inference`: a network in which chains of blocks run as one program.

All that decides is computed on a copy in float64. One run of it records in which order the blocks
are called and on what. Then the candidates, from one chain for everything to a chain for each
block, are put into the copy, and the first one that does not change any output is taken.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor, nn

from swiftkernels.backends import torch_state
from swiftkernels.fusion import find
from swiftkernels.fusion.chain import FusedChain, Passed, plain_chains
from swiftkernels.fusion.find import LeftBlock, Unit
from swiftkernels.fusion.steps import Attention, ConvMlp, Convolution, Linear, Pool, Stem, Step
from swiftkernels.integrations import probe
from swiftkernels.ops import folding, linear_parts
from swiftkernels.ops.plan import KeepsPlans
from swiftkernels.utils import checks

TOLERANCE = 1e-6
"""Largest relative error, in float64, between the outputs of the model and of a candidate."""
SIZES = (
    (2, 64, 64),
    (1, 97, 70),
    (1, 96, 128),
    (1, 224, 224),
    (2, 224, 224),
    (1, 256, 256),
    (2, 256, 256),
)
"""Batch, height and width of the images of the probes: the first two that the model takes. Some
models take one size only, mostly 224 x 224."""
KNOWN = ("swiftkernels.models.swiftformer.network", "timm.models.swiftformer")
"""Modules of networks whose forward does nothing besides what a chain with heads computes. Others
may treat other images otherwise than those of the probes."""
PROBES = 2
"""Sizes of images on which a candidate is compared with the model."""


@dataclass(frozen=True)
class FusedBlock:
    """A block that a chain computes."""

    name: str
    kind: str
    """Its class."""
    steps: tuple[str, ...]
    """What it became: kinds of steps."""
    chain: str
    """Name of the chain in the fused network."""

    def __str__(self) -> str:
        name = self.name or "(the model)"
        return f"{name}: {self.kind}, as {', '.join(self.steps)} in chain {self.chain or '(all)'}"


@dataclass(frozen=True)
class FusionReport:
    """What `fuse_for_inference` did with each block; print it."""

    fused: tuple[FusedBlock, ...]
    left: tuple[LeftBlock, ...]
    """Blocks and layers that run as in the model, and why."""

    def __str__(self) -> str:
        chains = len({block.chain for block in self.fused})
        lines = [f"{len(self.fused)} blocks fused, chains: {chains}"]
        lines += [f"  {block}" for block in self.fused]
        if self.left:
            lines += ["not fused:", *(f"  {block}" for block in self.left)]
        return "\n".join(lines)


class FusedNetwork(nn.Module):
    """A network for inference in which chains of blocks run as one program.

    `fuse_for_inference` makes it. The parameters require no gradient. It takes the images only, by
    position or by the name that the model's forward gives them. If one chain computes all of a
    network of this library or of timm, its own forward is not run, nor are hooks that are added to
    its parts later.

    Attributes:
        network: the copy of the model, with a `FusedChain` in the place of the first block of each
            chain, and `Passed` in the place of the others. Only its forward is right: other
            methods, such as `forward_features`, and options that are set later see what chains
            return.
        report: what became of each block (`FusionReport`).

    Raises:
        TypeError, ValueError: a call with other arguments, in training mode, with images of
            another type or device than the weights, or with images that require a gradient.
    """

    def __init__(
        self, network: nn.Module, report: FusionReport, argument: str, whole: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self.report = report
        self._argument = argument
        self._whole = whole
        # In a tuple, or it would be a child module twice.
        self._chains = tuple(part for part in network.modules() if isinstance(part, FusedChain))
        self.eval()

    def forward(self, x: Any = None, /, *others: Any, **named: Any) -> Any:
        """The output of the model for images x [B, C, H, W]."""
        images = x if isinstance(x, torch.fx.Proxy) else self._checked(x, others, named)
        return self._chains[0](images).flatten(1) if self._whole else self.network(images)

    def plain(self, x: Any = None, /, *others: Any, **named: Any) -> Any:
        """The same, with all chains in PyTorch's operators."""
        with plain_chains():
            return self.forward(x, *others, **named)

    def extra_repr(self) -> str:
        chains = len({block.chain for block in self.report.fused})
        return f"{len(self.report.fused)} blocks fused, chains: {chains}"

    def _checked(self, x: Any, others: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
        """The images of a call, if the fused network can answer it."""
        given = dict(named)
        if x is None:
            x = given.pop(self._argument, None)
        elif self._argument in given:
            raise TypeError(f"a fused network takes images once; got {self._argument} twice.")
        defaults = _defaults_of(self.network) if given else {}
        for name, value in given.items():
            if name not in defaults or value is not defaults[name]:
                raise TypeError(
                    f"a fused network takes images only; got {name}, a {type(value).__name__}. "
                    "Call the original model with it, or set the option before fusing."
                )
        if others:
            raise TypeError(
                f"a fused network takes images only; got {len(others)} more. Call the original "
                "model with them."
            )
        checks.check_tensor(self._argument, x)
        like, name = self._chains[0].like, self._argument
        if self.training or self.network.training:
            raise ValueError(
                "a fused network must be in evaluation mode, because its BatchNorms are folded; "
                "got one in training mode. Call .eval(), or train the original model and fuse it "
                "again."
            )
        if not x.is_floating_point():
            raise TypeError(
                f"{name} must have the dtype of the weights, {like.dtype}; got {x.dtype}. Convert "
                f"it first: {name}.to({like.dtype})."
            )
        if x.dtype != like.dtype:
            raise TypeError(
                f"{name} must have the dtype of the weights, {like.dtype}; got {x.dtype}. Convert "
                f"it: {name}.to({like.dtype}), or convert the fused network: .to({x.dtype}), which "
                "computes float64 in PyTorch's operators."
            )
        checks.check_device(name, x, "the weights", like)
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{name} must not require a gradient: a fused network is for inference. Call it "
                f"under torch.no_grad(), pass {name}.detach(), or use the original model."
            )
        return cast(Tensor, x)


@dataclass(frozen=True)
class _Call:
    """A call of a module in the recorded run."""

    name: str
    x: Tensor
    out: Tensor


@dataclass(frozen=True)
class _End:
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
class _Run:
    """Units that become one chain."""

    units: tuple[Unit, ...]
    end: _End | None = None

    @property
    def parts(self) -> tuple[Unit | _End, ...]:
        return self.units if self.end is None else (*self.units, self.end)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.names)

    def is_worthwhile(self, network: nn.Module) -> bool:
        """Whether a chain can win what its entry and the change of memory formats cost.

        PyTorch computes convolutions over all channels as fast.
        """
        steps = self.steps(network)
        return any(isinstance(step, (Stem, ConvMlp, Attention)) for step in steps) or (
            len(steps) > 1 and not all(isinstance(step, Convolution) for step in steps)
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


def fuse_for_inference(model: nn.Module, *, example: Tensor | None = None) -> FusedNetwork:
    """A network for inference that computes the same, with chains of its blocks fused.

    For SwiftFormers of this library, timm, transformers, the official code and forks with other
    names: blocks are found by their parts. Each block is compared with the steps that replace it,
    and the fused network with the model, in float64 on random images of two sizes; the largest
    chains that change no output are taken. On a CPU a chain runs as one compiled program; elsewhere
    in PyTorch's operators.

    Blocks with hooks, replaced forwards, adapters, parametrizations or quantised layers stay as
    they are, and chains end at modules with hooks; the report says why. Hooks are copied as by
    `copy.deepcopy`.

    The model stays unchanged, and none of its hooks is called. The fused network is a copy with the
    weights as they are now; after further training, fuse the model again.

    Args:
        model: in evaluation mode, on images [B, C, H, W].
        example: images that the model takes, if it takes no random images of 64 x 64 and 97 x 70.

    Returns:
        The fused network; print its `report`.

    Raises:
        TypeError: model is no module, or example no tensor.
        ValueError: a model in training mode or without values (device meta), one that no example
            runs on, or one without a block that can be fused.

    Example:
        >>> from swiftkernels.models import SwiftFormer
        >>> model = SwiftFormer((16, 24), (1, 2), num_classes=5).eval()
        >>> fused = fuse_for_inference(model)
        >>> fused(torch.randn(2, 3, 40, 56)).shape
        torch.Size([2, 5])
        >>> len(fused.report.fused), len(fused.report.left)
        (8, 0)
    """
    _check(model, example)
    if find.forward_was_replaced(model):
        kind = type(model).__name__
        raise ValueError(_nothing(model, [LeftBlock("", kind, "its forward was replaced")]))
    with _isolated():
        clone = _clone(model)
        _check_values(clone)
        images, exact = _run_on_examples(clone, example)
        values = {name: p.detach().clone() for name, p in clone.named_parameters()}
        find.randomise(clone)
        found = find.find(model, clone)
        random = [clone(x) for x in images]
        search = _Search(model, clone, found, images[0])
        for runs in search.candidates():
            if not _gives(clone, runs, images, random):
                continue
            with _parameters(clone, values):
                if _gives(clone, runs, images, exact):
                    whole = search.is_whole(runs)
                    return _fused(model, clone, runs, search.left(runs), whole)
    raise ValueError(_nothing(model, search.left([])))


class _Search:
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
        self.calls_of: dict[str, list[_Call]] = {}
        for call in self.calls:
            self.calls_of.setdefault(call.name, []).append(call)
        self.units = {unit.names[0]: unit for unit in found.units}
        for unit in self._rows():
            self.units[unit.names[0]] = unit

    def candidates(self) -> Iterator[list[_Run]]:
        """Chains to try, from the longest to the shortest."""
        tried: list[list[_Run]] = []
        for cuts in (self._no_cuts, self._cuts_by_use, self._cuts_by_parent, self._all_cuts):
            runs = [run for run in self._runs(cuts()) if run.is_worthwhile(self.clone)]
            if runs not in tried:
                tried.append(runs)
                yield from self._with_ends(runs)

    def is_whole(self, runs: Sequence[_Run]) -> bool:
        """Whether the only chain computes all of a network whose forward is known."""
        kind = type(self.model)
        first = self.calls_of[runs[0].names[0]]
        return (
            len(runs) == 1
            and runs[0].end is not None
            and kind.__module__ in KNOWN
            and all(map(linear_parts.is_untouched, self.model.modules()))
            and len(first) == 1
            and _is_same(first[0].x, self.images)
        )

    def left(self, runs: Sequence[_Run]) -> list[LeftBlock]:
        """The blocks and layers that no run holds, and why."""
        fused = {name for run in runs for name in run.names}
        left = [block for block in self.found.left if block.name not in fused]
        for unit in self.units.values():
            if not fused.intersection(unit.names):
                reason = "its outputs differ in a chain" if runs else "no chain gave its outputs"
                if unit.names[0] not in self.calls_of:
                    reason = "it was not called with one map"
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
        rows: list[list[_Call]] = [[]]
        layers = set(self.layers)
        for call in [call for call in self.calls if call.name in layers]:
            if len(self.calls_of[call.name]) > 1 or self._under_replaced(call.name):
                rows.append([])
                continue
            last = rows[-1][-1] if rows[-1] else None
            if last is not None and (
                not _is_same(last.out, call.x) or self._hooked(last.name) != self._hooked(call.name)
            ):
                rows.append([])
            rows[-1].append(call)
        modules = [[(call.name, self.clone.get_submodule(call.name)) for call in r] for r in rows]
        return [unit for row in modules for unit in find.rows(self.model, row)]

    def _runs(self, cuts: Mapping[str, bool]) -> list[_Run]:
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
        return [_Run(tuple(units)) for units in runs]

    def _called_units(self) -> list[Unit]:
        """The units in the order of their first calls."""
        names = dict.fromkeys(call.name for call in self.calls)
        return [self.units[name] for name in names if name in self.units]

    def _takes(self, name: str, before: str) -> bool:
        """Whether each call of a module takes the output of the same call of another one."""
        calls, others = self.calls_of.get(name, []), self.calls_of.get(before, [])
        return len(calls) == len(others) > 0 and all(
            _is_same(other.out, call.x) and not self._is_touched(call.x)
            for call, other in zip(calls, others, strict=True)
        )

    def _is_touched(self, x: Tensor) -> bool:
        """Whether a layer with hooks or a replaced forward, such as a dropout, takes or returns x.

        In the copy it has neither, and may return its input.
        """
        return any(
            _is_same(t, x)
            for name in self.touched
            for call in self.calls_of.get(name, ())
            for t in (call.x, call.out)
        )

    def _with_ends(self, runs: list[_Run]) -> Iterator[list[_Run]]:
        """The runs with all heads that can join them, with one of them, without."""
        ends = {i: end for i, run in enumerate(runs) if (end := self._end(run)) is not None}
        some = [ends, *({i: end} for i, end in ends.items())] if len(ends) > 1 else [ends]
        for joined in (*some, {}) if ends else ({},):
            yield [dataclasses.replace(run, end=joined.get(i)) for i, run in enumerate(runs)]

    def _end(self, run: _Run) -> _End | None:
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
            same = len(inputs) == len(pooled) and all(map(_is_near, inputs, pooled))
            if same and find.is_linear(part) and not any(map(self._is_touched, inputs)):
                heads.append(name)
        classes = {len(cast(Tensor, layers[name].weight)) for name in heads}
        for name in (*norms, *heads):
            if find.why_left(self.model.get_submodule(name)) or self._under_replaced(name):
                return None
            if self._hooked(name) != self._hooked(last):
                return None
        return _End(norm, tuple(heads)) if len(classes) == 1 and len(norms) < 2 else None

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
        like = _first_tensor(self.model.get_submodule(unit.names[0]))
        return like.dtype, like.device


def _check(model: nn.Module, example: Tensor | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module; got {type(model).__name__}. Pass the network itself."
        )
    if example is not None:
        checks.check_tensor("example", example)
        if example.dim() != 4 or not example.is_floating_point():
            raise ValueError(
                "example must be images [B, C, H, W] of a floating-point type; got shape "
                f"{tuple(example.shape)}, {example.dtype}. Pass a batch that the model takes."
            )
    if any(isinstance(part, FusedChain) for part in model.modules()):
        raise ValueError(
            "model must be a network that is not fused yet; got a fused one. Fuse the original "
            "model again."
        )
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                "model must be in evaluation mode, because the statistics of its BatchNorms are "
                f"folded into the weights; got {name or 'a model'} in training mode. Call "
                "model.eval() first."
            )
        for own, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None and t.is_meta:
                raise ValueError(
                    "model must hold values, which are folded; got "
                    f"{f'{name}.{own}'.lstrip('.')} on device meta. Load the weights first."
                )


def _check_values(clone: nn.Module) -> None:
    for name, t in (*clone.named_parameters(), *clone.named_buffers()):
        if t.is_floating_point() and not t.isfinite().all():
            raise ValueError(
                f"model must hold finite values, or its outputs could not be compared; got {name} "
                "with infinity or NaN. Use large numbers, or write them into the fused network."
            )


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Inside, nothing outside of the copies that are run changes, nor changes what they compute."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch_state.without_global_hooks(),
    ):
        yield


def _clone(model: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, without hooks, parametrizations and replaced forwards."""
    try:
        clone = probe.copy_in_float64(model).requires_grad_(False)
    except Exception as error:  # weights of an unknown type may raise anything
        raise ValueError(
            "model must hold weights that can be converted to float64, to compare the fused "
            f"network with it; got {type(error).__name__}: {error}. Fuse before layers are "
            "quantised."
        ) from error
    for part in clone.modules():
        if find.forward_was_replaced(part):
            del part.forward
        if isinstance(part, KeepsPlans):
            part.backend = "reference"  # the kernels take no float64
    return clone


def _run_on_examples(clone: nn.Module, example: Tensor | None) -> tuple[list[Tensor], list[Any]]:
    """Images of two sizes, and the outputs of the copied model for them."""
    found: list[Tensor] = []
    outputs: list[Any] = []
    error: Exception | None = None
    for x in _examples(clone, example):
        try:
            out = clone(x)
        except Exception as raised:  # an unknown model may raise anything
            error = raised
            continue
        if not any(isinstance(t, Tensor) and t.numel() for t in _leaves(out)):
            raise ValueError(
                "model must return tensors; a copy of it without hooks returned none. Fuse the "
                "part of the model that returns tensors."
            )
        found.append(x)
        outputs.append(out)
        if len(found) == PROBES:
            return found, outputs
    message = (f"{type(error).__name__}: {error}".strip().splitlines() or [""])[0]
    raise ValueError(
        f"example must be images that the model takes; a copy of the model in float64 could not be "
        f"run on {'random images' if example is None else 'it'} ({message}). Pass "
        "example=images [B, C, H, W], fuse before layers are quantised, or fuse the part of the "
        "model that takes images, as in model.backbone = fuse_for_inference(model.backbone)."
    ) from error


def _examples(clone: nn.Module, example: Tensor | None) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if example is not None:
        batch, channels, height, width = example.shape
        yield example.detach().double().cpu()
        yield random(batch, channels, height + 33, width + 6)
        yield random(batch, channels, height, width)
        return
    convs = [part for part in clone.modules() if isinstance(part, nn.Conv2d)]
    for channels in dict.fromkeys([*(conv.in_channels for conv in convs[:1]), 3]):
        for batch, height, width in SIZES:
            yield random(batch, channels, height, width)


def _record(clone: nn.Module, names: Sequence[str], images: Tensor) -> list[_Call]:
    """The calls of modules with one tensor that return one, in order."""
    calls: list[_Call] = []
    handles = []
    unlike: set[str] = set()
    for name in names:

        def record(_: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
            if len(args) == 1 and not kwargs and all(isinstance(t, Tensor) for t in (*args, out)):
                calls.append(_Call(name, args[0], out))
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
            ends += [t for t in _leaves(clone(images)) if isinstance(t, Tensor)]
            sums = [t.sum() for t in ends if t.requires_grad]
            if not all(enabled) or not sums:
                return None
            leaves = [(name, t) for name, calls in outputs.items() for t, _ in calls]
            grads = torch.autograd.grad(sums, [t for _, t in leaves], allow_unused=True)
    except Exception:  # an unknown network may raise anything
        return None
    finally:
        for handle in handles:
            handle.remove()
    return {name for (name, _), grad in zip(leaves, grads, strict=True) if grad is not None}


def _gives(
    clone: nn.Module, runs: Sequence[_Run], images: Sequence[Tensor], expected: Sequence[Any]
) -> bool:
    """Whether the network with these chains gives the expected outputs."""
    if not runs:
        return False
    with _replaced(clone, _modules_of(clone, runs)) as network:
        for x, out in zip(images, expected, strict=True):
            try:
                if not _is_same_output(network(x), out):
                    return False
            except Exception:  # an unknown network may raise anything
                return False
    return True


def _modules_of(network: nn.Module, runs: Sequence[_Run]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for run in runs:
        found.update(run.modules(network))
    return found


@contextlib.contextmanager
def _replaced(network: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """The network with other modules, by name; at the end it is as before."""
    if "" in modules:
        yield modules[""]
        return
    before = [(part, dict(part._modules)) for part in network.modules()]
    try:
        _replace(network, modules)
        yield network
    finally:
        for part, children in before:
            part._modules.clear()
            part._modules.update(children)


def _replace(network: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Replace modules, by name, wherever the network holds them."""
    new = {id(network.get_submodule(name)): module for name, module in modules.items()}
    for part in list(network.modules()):
        for name, child in list(part._modules.items()):
            if id(child) in new:
                part._modules[name] = new[id(child)]


@contextlib.contextmanager
def _parameters(network: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The network with these values of its parameters; at the end they are as before."""
    own = dict(network.named_parameters())
    before = {name: p.detach().clone() for name, p in own.items()}
    try:
        for name, p in own.items():
            p.copy_(values[name])
        yield
    finally:
        for name, p in own.items():
            p.copy_(before[name])


def _fused(
    model: nn.Module,
    clone: nn.Module,
    runs: Sequence[_Run],
    left: Sequence[LeftBlock],
    whole: bool,
) -> FusedNetwork:
    """The fused network, with the weights of the copied model in the types of the model."""
    network = copy.deepcopy(model)
    modules: dict[str, nn.Module] = {}
    blocks: list[FusedBlock] = []
    for run in runs:
        like = _first_tensor(network.get_submodule(run.units[0].names[0]))

        def cast_to(t: Tensor, like: Tensor = like) -> Tensor:
            # Contiguous, and in memory of its own.
            return t.to(like.device, like.dtype, copy=True).contiguous()

        modules.update(run.modules(clone, cast_to))
        chain = run.names[0]
        for part in run.parts:
            kinds = tuple(step.kind for step in part.steps(clone))
            if isinstance(part, Unit):
                blocks.append(FusedBlock(part.names[0], part.kind, kinds, chain))
                continue
            for name in part.names:
                kind = type(model.get_submodule(name)).__name__
                blocks.append(FusedBlock(name, kind, kinds, chain))
    argument = next(iter(_defaults_of(network)), "x")
    if "" in modules:
        network = modules[""]
    else:
        _replace(network, modules)
    network.requires_grad_(False)
    return FusedNetwork(network, FusionReport(tuple(blocks), tuple(left)), argument, whole)


def _nothing(model: nn.Module, left: Sequence[LeftBlock]) -> str:
    seen = "".join(f"\n  {block}" for block in left[:20]) or " no blocks"
    return (
        "model must hold blocks that can be fused: [depthwise convolution ->] pointwise convolution "
        "-> activation -> pointwise convolution with BatchNorms around, additive attention, or "
        f"several of the convolutions between; in {type(model).__name__} were seen:{seen}\n"
        "Remove hooks, merge adapters and "
        "parametrizations, fuse before torch.compile, or use swiftkernels.accelerate(model)."
    )


def _defaults_of(network: nn.Module) -> dict[str, Any]:
    """The parameters of a network's forward, and their default values."""
    if isinstance(network, FusedChain):
        return {"x": inspect.Parameter.empty}
    try:
        found = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: p.default for p in found}


def _first_tensor(module: nn.Module) -> Tensor:
    """A floating-point parameter or buffer of a module: the type and device of its weights."""
    for t in (*module.parameters(), *module.buffers()):
        if t.is_floating_point():
            return t
    return torch.zeros(())


def _leaves(out: Any) -> list[Any]:
    """The tensors and other values in nested outputs, with the keys that lead to them.

    Raises:
        ValueError: outputs that cannot be compared.
    """
    if out is None or isinstance(out, (Tensor, bool, int, float, str)):
        return [out]
    if dataclasses.is_dataclass(out) and not isinstance(out, (type, Mapping)):
        out = {f.name: getattr(out, f.name) for f in dataclasses.fields(out)}
    if isinstance(out, Mapping):
        return [leaf for key, value in out.items() for leaf in (str(key), *_leaves(value))]
    if isinstance(out, (list, tuple)):
        return [leaf for value in out for leaf in (type(value).__name__, *_leaves(value))]
    raise ValueError(
        f"model must return tensors, in lists, tuples or dicts; got a {type(out).__name__}, which "
        "cannot be compared. Fuse the part of the model that returns tensors."
    )


def _is_same_output(out: Any, expected: Any) -> bool:
    mine, theirs = _leaves(out), _leaves(expected)
    if type(out) is not type(expected) or len(mine) != len(theirs):
        return False
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.dtype != b.dtype or not _is_near(a, b):
                return False
        elif type(a) is not type(b) or a != b:
            return False
    return True


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of the recorded run are the same, or equal."""
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _is_near(out: Tensor, expected: Tensor) -> bool:
    if out.shape != expected.shape:
        return False
    if out.numel() == 0 or not out.is_floating_point():
        return torch.equal(out, expected)
    error = (out - expected).abs().max()
    return bool(error <= TOLERANCE * expected.abs().max())


def _around(name: str) -> list[str]:
    """Names of the modules around a module: of stages.0.blocks.1 "", stages, stages.0, ..."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_inside(name: str, names: set[str]) -> bool:
    """Whether a module is one of these or inside of one."""
    return "" in names or name in names or any(n in names for n in _around(name))
