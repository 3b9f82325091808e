"""What a convolutional block of another library computes, found by running a copy of it.

A block is a module with two pointwise convolutions, and at most one depthwise convolution, one
BatchNorm and one layer scale besides. Its parts may have any names. The `Form` of a block is the
one that gives its output, in float64 on random images, in evaluation and in training.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from swiftkernels.fusion import find
from swiftkernels.integrations import probe
from swiftkernels.ops import linear_parts
from swiftkernels.ops.conv_mlp.layer import ConvMlpForward, Form, skipped_parts
from swiftkernels.ops.conv_mlp.reference import ACTIVATIONS
from swiftkernels.utils.text import first_line

MOST = 6
"""Layers with weights in a module that may be a block: two adapters have four."""
PAIR = 2
SIZES = ((2, 7, 5), (1, 9, 13))
"""Batch, height and width of the random inputs of blocks."""

MakeClass = Callable[[type[nn.Module]], type[nn.Module]]


@dataclass(frozen=True)
class FoundBlock:
    """A module that looks like a convolutional block."""

    name: str
    module: nn.Module
    form: Form | None
    """What it computes; None if it cannot be accelerated."""
    reason: str
    """Why not."""


def find_blocks(model: nn.Module, make_class: MakeClass) -> list[FoundBlock]:
    """The blocks of a model, accelerated or not; only copies of them run.

    Args:
        model: any module; it may be such a block itself.
        make_class: the subclass of a block's class with the forward of this library.
    """
    owners: Counter[int] = Counter()
    for module in model.modules():
        owners.update(id(p) for p in module._parameters.values() if p is not None)
    shared = {p for p, count in owners.items() if count > 1}
    return _visit(model, "", shared, make_class, set())


def _visit(
    module: nn.Module, name: str, shared: set[int], make_class: MakeClass, seen: set[nn.Module]
) -> list[FoundBlock]:
    if module in seen or probe.part_names(module) is not None:
        return []
    seen.add(module)
    looks_like_one = isinstance(module, ConvMlpForward) or _looks_like_block(module)
    form: Form | str = _inspect(module, shared, make_class) if looks_like_one else ""
    if isinstance(form, Form):
        return [FoundBlock(name, module, form, "")]
    below = [
        block
        for child, part in module._modules.items()
        if part is not None and not isinstance(module, ConvMlpForward)
        for block in _visit(part, f"{name}.{child}" if name else child, shared, make_class, seen)
    ]
    if looks_like_one and not any(block.form for block in below):
        return [FoundBlock(name, module, None, form)]
    return below


def _looks_like_block(module: nn.Module) -> bool:
    """Whether a module has two pointwise convolutions or more, and few other layers."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    layers = [part for part in module.modules() if part._parameters and find.holds_weights(part)]
    return sum(map(_is_1x1, module.modules())) >= PAIR and len(layers) <= MOST


def _is_1x1(part: nn.Module) -> bool:
    return isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1)


def _inspect(module: nn.Module, shared: set[int], make_class: MakeClass) -> Form | str:
    """What a block computes, or why it cannot be accelerated."""
    if isinstance(module, ConvMlpForward):
        return "it has these kernels"
    if "forward" in vars(module):
        return "its forward was replaced"
    if arguments := list(inspect.signature(type(module).forward).parameters)[2:]:
        return f"its forward has the arguments {', '.join(arguments)}"
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return "its weights have no values yet (device meta)"
    if taken := probe.collisions(module, ConvMlpForward, {"form": None, "backend": "auto"}):
        return f"its own {', '.join(taken)} would be overwritten. Rename them"
    parts = _parts(module)
    if isinstance(parts, str):
        return parts
    for name in parts.pointwise:
        part: Any = module.get_submodule(name)
        if why := linear_parts.why_not_plain(part, nn.Conv2d):
            return f"its part {name} cannot be read, because {why}"
        if id(part.weight) in shared:
            return f"its part {name} shares its weight with another layer"
    try:
        with probe.isolated():
            clone = probe.copy_in_float64(module).requires_grad_(False)
            find.randomise(clone)
            return _match(clone, parts, make_class)
    except Exception as error:  # a copy of an unknown block may raise anything
        return f"a copy of it could not be run ({first_line(error)})"


@dataclass
class _Parts:
    """Paths of the parts of a block."""

    pointwise: list[str] = field(default_factory=list)
    depthwise: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    scales: list[str] = field(default_factory=list)
    """Parameters."""
    plain: list[str] = field(default_factory=list)
    """Modules without weights and without parts."""


def _parts(module: nn.Module) -> _Parts | str:
    """The parts of a block, or why it is none."""
    parts = _Parts()
    for name, part in module.named_modules():
        if any(name.startswith(f"{pointwise}.") for pointwise in parts.pointwise):
            continue  # its parametrizations
        if _is_1x1(part):
            parts.pointwise.append(name)
        elif isinstance(part, nn.Conv2d) and part.groups == part.in_channels == part.out_channels:
            parts.depthwise.append(name)
        elif isinstance(part, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            parts.norms.append(name)
        elif part._buffers or (name and find.holds_weights(part) and not part._modules):
            return f"its part {name} is a {type(part).__name__}"
        elif part._parameters:
            for own, p in part._parameters.items():
                if p is None or p.numel() != max(p.shape, default=0):
                    return f"its parameter {own} is of unknown meaning"
                parts.scales.append(f"{name}.{own}" if name else own)
        elif not part._modules:
            parts.plain.append(name)
    if len(parts.pointwise) != PAIR:
        return (
            f"it has {len(parts.pointwise)} pointwise convolutions; two are supported, without "
            "adapters"
        )
    for what, names in (
        ("depthwise convolutions", parts.depthwise),
        ("BatchNorms", parts.norms),
        ("layer scales", parts.scales),
    ):
        if len(names) > 1:
            return f"it has {len(names)} {what}, one is supported"
    for name in parts.pointwise:
        convolution: Any = module.get_submodule(name)
        if not linear_parts.is_pointwise(convolution):
            c = convolution
            return (
                f"its part {name} has stride {c.stride}, padding {c.padding} and {c.groups} groups"
            )
    return parts


def _match(clone: nn.Module, parts: _Parts, make_class: MakeClass) -> Form | str:
    """The form that gives the outputs of a copied block, or why none does."""
    theirs: Any = clone.eval()
    ours: Any = copy.deepcopy(clone)
    ours.__class__ = make_class(type_before_parametrizations(clone))
    activations = {name: find.activation_of(theirs.get_submodule(name)) for name in parts.plain}
    for name, activation in activations.items():
        if activation not in ACTIVATIONS:
            kind = type(theirs.get_submodule(name)).__name__
            return f"its part {name} is a {kind}, not one of {', '.join(_KNOWN)}"
    forms = _forms(theirs, parts, {a for a in activations.values() if a != "none"})
    form = next((f for f in forms if all(_gives(theirs, ours, f, s) for s in SIZES)), None)
    if form is None:
        return "no arrangement of its parts gives its output"
    theirs.train()
    ours.train()
    for drop in ("", *(name for name, activation in activations.items() if activation == "none")):
        form = _with_skipped(theirs, form._replace(drop=drop))
        if all(_gives(theirs, ours, form, shape) for shape in SIZES):
            return form
    return "its output in training is another: a dropout stands between its layers"


_KNOWN = [name for name in ACTIVATIONS if name != "none"]


def _forms(clone: Any, parts: _Parts, activations: set[str | None]) -> Iterator[Form]:
    """What a block with these parts may compute, except in training."""
    depthwise, norm, scale = (
        next(iter(names), "") for names in (parts.depthwise, parts.norms, parts.scales)
    )
    named = [a for a in activations if a]
    for pair, activation, residual in itertools.product(
        (parts.pointwise, parts.pointwise[::-1]), named or _KNOWN, (True, False)
    ):
        first, second = pair
        if clone.get_submodule(first).out_channels == clone.get_submodule(second).in_channels:
            yield Form(first, second, depthwise, norm, scale, "", activation, residual)


def _with_skipped(clone: nn.Module, form: Form) -> Form:
    """The form, with all modules of the block that its forward does not call."""
    called = (form.first, form.second, form.depthwise, form.norm, form.drop)
    skipped = [name for name, _ in clone.named_modules() if name and name not in called]
    return form._replace(skipped=skipped_parts(clone, *skipped))


def _gives(theirs: nn.Module, ours: Any, form: Form, shape: tuple[int, int, int]) -> bool:
    """Whether a form gives the output of a block on random images of this shape.

    Args:
        theirs, ours: copies of the block, with its own forward and with that of this library.
        form: for `ours`.
        shape: batch, height and width.
    """
    batch, height, width = shape
    ours.form = form
    x = find.random_input(batch, ours.get_submodule(form.first).in_channels, height, width)
    try:
        torch.manual_seed(0)
        out = theirs(x.clone())
        torch.manual_seed(0)
        expected = ours.compose(x, "reference")
    except (RuntimeError, ValueError):  # the shapes of the parts do not fit in this order
        return False
    return isinstance(out, Tensor) and find.is_near(out, expected)
