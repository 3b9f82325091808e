"""Finds the blocks of a network that a chain can compute, by their parts and a numeric probe.

A block is recognised by the kinds and shapes of its parts, whatever their names. The parts can be
arranged in several ways; the arrangement is the one that gives the output of the block itself, in
float64 on random input of two sizes. For that the network is copied, and the parameters of the
copy are random: initial layer scales of 1e-5 would hide what a block adds.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from swiftkernels.backends import torch_state
from swiftkernels.fusion.steps import Attention, ConvMlp, Convolution, Stem, Step
from swiftkernels.integrations import probe
from swiftkernels.ops import folding
from swiftkernels.ops.additive_attention import reference
from swiftkernels.ops.additive_attention.layer import AttentionForward
from swiftkernels.ops.additive_attention.weights import Options, Weights
from swiftkernels.ops.conv_mlp.reference import ACTIVATIONS
from swiftkernels.ops.conv_mlp.weights import KERNEL_SIZES
from swiftkernels.ops.types import Pooling

TOLERANCE = 1e-6
"""Largest relative error, in float64, between a block and the steps that replace it."""
SIZES = ((2, 7, 5), (1, 9, 13))
"""Batch, height and width of the random inputs of blocks."""
ATTENTION_INPUTS = ((2, 5, 1.0), (1, 80, 1e-11))
"""Batch, tokens and scale of the random inputs of attentions. Tiny inputs show another eps of the
norms, without biases; more tokens show layers that process only some of them."""
MAX_WEIGHTED = 12
"""Layers with weights in the largest block: an encoder has 11."""
LINEARS = 4
"""Linear layers of an attention."""


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


def randomise(network: nn.Module) -> None:
    """Random parameters, so that every part of a block shows in its output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            if not p.is_floating_point() or p.numel() == 0:
                continue
            fan_in = p[0].numel() if p.dim() > 1 else 1
            if fan_in > 1:
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(fan_in))
            else:
                p.copy_(0.2 + 0.4 * torch.rand(p.shape, generator=generator))


def find(model: nn.Module, clone: nn.Module) -> Found:
    """The blocks of a model.

    Args:
        model: it is only read: its hooks, parametrizations and replaced forwards.
        clone: its copy in float64, without these, with random parameters; it is run.
    """
    found = Found()
    _visit(model, clone, "", found, set())
    return found


def why_left(module: nn.Module) -> str:
    """Why a module and its parts cannot be read instead of called; empty if they can."""
    for name, part in module.named_modules():
        which = f"its part {name}" if name else "it"
        if "forward" in vars(part):
            return f"the forward of {which} was replaced"
        if torch_state.has_hooks(part):
            return f"{which} has hooks"
        if is_parametrized(part):
            return f"{which} is parametrized"
        for own, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and type(tensor) not in (nn.Parameter, Tensor, nn.Buffer):
                return f"{own} of {which} is a {type(tensor).__name__}"
    return ""


def _visit(
    model: nn.Module, clone: nn.Module, name: str, found: Found, visited: set[nn.Module]
) -> None:
    """Add the blocks at and below a module to `found`: the largest that match."""
    module, original = clone.get_submodule(name), model.get_submodule(name)
    if module in visited:
        return  # a module that the network holds twice
    visited.add(module)
    kind = type(original).__name__
    if "forward" in vars(original) and next(original.children(), None) is not None:
        found.left.append(LeftBlock(name, kind, "its forward was replaced"))
        return
    matched = _match(module)
    reason = why_left(original) if matched else ""
    if not isinstance(matched, str) and not reason:
        found.units.append(Unit((name,), kind, matched))
        return
    before = len(found.units) + len(found.left)
    for child in module._modules:
        if module._modules[child] is not None:
            _visit(model, clone, f"{name}.{child}" if name else child, found, visited)
    if matched and len(found.units) + len(found.left) == before:
        reason = reason or cast(str, matched)
        found.left.append(LeftBlock(name, kind, reason))


def _match(module: nn.Module) -> Recipe | str:
    """How a block becomes steps, or why it does not; "" if it looks like no block at all."""
    if isinstance(module, nn.Sequential) and len(module) == 1:
        return ""  # the block is the part of it
    parts = _parts(module)
    weighted = [*parts.convs, *parts.linears, *parts.norms]
    if next(module.children(), None) is None or not weighted or len(weighted) > MAX_WEIGHTED:
        return ""
    if _attention_like(module):
        recipe = _match_attention(module)
        if isinstance(recipe, str):
            return recipe
        return "it is an additive attention whose block has another form"
    if not (parts.has_own or _attentions(module)):
        return ""  # a container of blocks
    for match in (_match_stem, _match_downsampling, _match_conv_mlp, _match_encoder):
        matched = match(module, parts)
        if matched is not None:
            return matched
    return ""


# The parts of a block.


@dataclass
class _Parts:
    """The layers of a block by kind, with their names in it, in the order of registration."""

    convs: dict[str, nn.Conv2d] = field(default_factory=dict)
    linears: dict[str, nn.Module] = field(default_factory=dict)
    norms: dict[str, nn.Module] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)
    """Their names in `ACTIVATIONS`."""
    scales: dict[str, Tensor] = field(default_factory=dict)
    """One number for each channel."""
    unknown: dict[str, str] = field(default_factory=dict)
    """What else is there: why it cannot be part of a step."""
    has_own: bool = False
    """Whether the block itself holds a layer with weights, or a parameter."""

    @property
    def pointwise(self) -> dict[str, nn.Module]:
        """Linear layers over the channels."""
        convs = {name: conv for name, conv in self.convs.items() if _is_pointwise(conv)}
        return {**convs, **self.linears}

    @property
    def depthwise(self) -> dict[str, nn.Conv2d]:
        return {name: conv for name, conv in self.convs.items() if _is_depthwise(conv)}

    @property
    def strided(self) -> dict[str, nn.Conv2d]:
        return {name: conv for name, conv in self.convs.items() if _is_strided(conv)}

    def why_unknown(self) -> str:
        name, reason = next(iter(self.unknown.items()))
        return f"its part {name} {reason}"


def _parts(module: nn.Module) -> _Parts:
    parts = _Parts()
    _sort(module, "", parts)
    return parts


def _sort(part: nn.Module, name: str, parts: _Parts) -> None:
    """Sort a part of a block, and its own parts, by kind."""
    direct = bool(name) and "." not in name
    if is_conv(part):
        parts.convs[name] = cast(nn.Conv2d, part)
    elif is_linear(part):
        parts.linears[name] = part
    elif is_norm(part):
        parts.norms[name] = part
    else:
        tensors: dict[str, Any] = {**part._parameters, **part._buffers}
        for own, tensor in tensors.items():
            path = f"{name}.{own}" if name else own
            if tensor is None:
                continue
            if _is_scale(tensor) and (part._modules or len(tensors) == 1 or not name):
                parts.scales[path] = tensor
                parts.has_own |= not name
            else:
                parts.unknown[name or own] = (
                    f"is a {type(part).__name__}" if name else "is a parameter of unknown meaning"
                )
        if not tensors and not part._modules:
            activation = activation_of(part)
            if activation is None:
                parts.unknown[name] = f"is a {type(part).__name__}"
            elif activation != "none":
                parts.activations[name] = activation
        for child, inner in part._modules.items():
            if inner is not None:
                _sort(inner, f"{name}.{child}" if name else child, parts)
        return
    parts.has_own |= direct


def is_conv(part: nn.Module) -> bool:
    """Whether a module is a plain 2d convolution."""
    return (
        isinstance(part, nn.Conv2d)
        and type(part).forward is nn.Conv2d.forward
        and type(part)._conv_forward is nn.Conv2d._conv_forward
        and _holds_only(part, "weight", "bias")
        and part.padding_mode == "zeros"
        and part.dilation == (1, 1)
    )


def is_linear(part: nn.Module) -> bool:
    """Whether a module computes F.linear with its weight and bias, and holds nothing else."""
    if not isinstance(part, nn.Linear) or not _holds_only(part, "weight", "bias"):
        return False
    if type(part).forward is nn.Linear.forward:
        return True
    try:  # a class derived from nn.Linear may compute the same, as that of timm does
        x = random_input(3, part.in_features).to(part.weight)
        return is_near(part(x), nn.Linear.forward(part, x))
    except Exception:  # an unknown module may raise anything
        return False


def is_norm(part: nn.Module) -> bool:
    """Whether a module is a plain BatchNorm with statistics."""
    forwards = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    own = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return (
        isinstance(part, (nn.BatchNorm2d, nn.SyncBatchNorm))
        and type(part).forward in forwards
        and _holds_only(part, *own)
        and part.running_mean is not None
        and part.running_var is not None
    )


def holds_weights(part: nn.Module) -> bool:
    """Whether a layer has weights, and not only a scale."""
    tensors = list(part.parameters())
    return len(tensors) > 1 or not all(map(_is_scale, tensors))


def _holds_only(part: nn.Module, *names: str) -> bool:
    return not part._modules and {*part._parameters, *part._buffers} <= {*names}


def _is_scale(t: Tensor) -> bool:
    """Whether a tensor is [C] in any shape, with C > 1 or one axis that is not the last."""
    return t.is_floating_point() and t.numel() > 0 and t.numel() == max(t.shape, default=0)


def _is_depthwise(conv: nn.Conv2d) -> bool:
    k = conv.kernel_size[0]
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size == (k, k)
        and k in KERNEL_SIZES
        and conv.stride == (1, 1)
        and conv.padding in ((k // 2, k // 2), "same")
    )


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (1, 1)
        and conv.groups == 1
        and conv.stride == (1, 1)
        and conv.padding in ((0, 0), "same", "valid")
    )


def _is_strided(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (3, 3)
        and conv.groups == 1
        and conv.stride == (2, 2)
        and conv.padding == (1, 1)
    )


def activation_of(part: nn.Module) -> str | None:
    """The name of an activation in `ACTIVATIONS`, "none" for identities; None if unknown."""
    x = torch.linspace(-8, 8, 2 * 3 * 4 * 5, dtype=torch.float64).reshape(2, 3, 4, 5)
    try:
        out = part(x.clone())  # it may work in place
    except Exception:  # an unknown module may raise anything
        return None
    for name, function in ACTIVATIONS.items():
        if isinstance(out, Tensor) and out.shape == x.shape and is_near(out, function(x)):
            return name
    return None


# Blocks of convolutions.


class _StemRecipe(NamedTuple):
    conv1: str
    norm1: str
    conv2: str
    norm2: str

    def steps(self, block: nn.Module) -> tuple[Step, ...]:
        conv1, norm1, conv2, norm2 = map(block.get_submodule, self)
        first = folding.norm_behind(*folding.weight_and_bias(conv1), norm1)
        return (Stem(*first, *folding.norm_behind(*folding.weight_and_bias(conv2), norm2)),)


class _ConvolutionRecipe(NamedTuple):
    conv: str
    norm: str

    def steps(self, block: nn.Module) -> tuple[Step, ...]:
        conv, norm = map(block.get_submodule, self)
        return (Convolution(*folding.norm_behind(*folding.weight_and_bias(conv), norm)),)


class _ConvMlpRecipe(NamedTuple):
    """Names of the parts; `place` says behind or before which of them the BatchNorm stands."""

    depthwise: str
    norm: str
    place: str
    first: str
    second: str
    activation: str
    scale: str
    """Name of the layer scale within the block, a parameter."""
    residual: bool

    def steps(self, block: nn.Module) -> tuple[Step, ...]:
        return (self.step(block, None),)

    def step(self, block: nn.Module, scale: Tensor | None) -> ConvMlp:
        """The step; with `scale` [C] the scaled residual branch of a larger block."""

        def norm(place: str) -> nn.Module | None:
            return block.get_submodule(self.norm) if self.place == place else None

        depthwise = depthwise_bias = None
        if self.depthwise:
            depthwise, depthwise_bias = folding.norm_behind(
                *folding.weight_and_bias(block.get_submodule(self.depthwise)), norm("depthwise")
            )
        weight1, bias1 = folding.weight_and_bias(block.get_submodule(self.first))
        weight1, bias1 = folding.norm_before(weight1.flatten(1), bias1, norm("before"))
        weight1, bias1 = folding.norm_behind(weight1, bias1, norm("first"))
        weight2, bias2 = folding.weight_and_bias(block.get_submodule(self.second))
        weight2, bias2 = folding.norm_behind(weight2.flatten(1), bias2, norm("second"))
        own = [_parameter(block, self.scale)] if self.scale else []
        for factor in (*own, *([] if scale is None else [scale])):
            flat = factor.detach().double().flatten()
            weight2, bias2 = folding.scaled(weight2, flat), bias2 * flat
        return ConvMlp(
            depthwise, depthwise_bias, weight1, bias1, weight2, bias2, self.activation,
            self.residual or scale is not None,
        )  # fmt: skip


def _match_stem(module: nn.Module, parts: _Parts) -> Recipe | str | None:
    if len(parts.strided) != 2 or len(parts.convs) != 2 or len(parts.norms) != 2:
        return None
    if parts.unknown:
        return parts.why_unknown()
    (conv1, conv2), (norm1, norm2) = parts.strided, parts.norms
    channels = parts.strided[conv1].in_channels
    return _first_that_fits(module, channels, [_StemRecipe(conv1, norm1, conv2, norm2)])


def _match_downsampling(module: nn.Module, parts: _Parts) -> Recipe | str | None:
    if len(parts.strided) != 1 or len(parts.convs) != 1 or len(parts.norms) != 1:
        return None
    if parts.linears or parts.unknown:
        return parts.why_unknown() if parts.unknown else None
    ((conv, layer),) = parts.strided.items()
    return _first_that_fits(module, layer.in_channels, [_ConvolutionRecipe(conv, *parts.norms)])


def _match_conv_mlp(module: nn.Module, parts: _Parts) -> Recipe | str | None:
    if not (parts.depthwise or parts.norms) or _attentions(module):
        return None
    if parts.unknown:
        return parts.why_unknown()
    layers = parts.pointwise
    if len(layers) != 2 or len(layers) + len(parts.depthwise) != len(parts.convs | layers):
        return "it has other convolutions than those of a known block"
    several: dict[str, Mapping[str, object]] = {
        "depthwise convolutions": parts.depthwise,
        "BatchNorms": parts.norms,
        "activations": parts.activations,
        "layer scales": parts.scales,
    }
    for what, names in several.items():
        if len(names) > 1:
            return f"it has {len(names)} {what}, one is supported"
    orders = [tuple(layers), tuple(layers)[::-1]]
    depthwise, norm = next(iter(parts.depthwise), ""), next(iter(parts.norms), "")
    scale = next(iter(parts.scales), "")
    places = ["depthwise", "before", "first", "second"] if norm else [""]
    if not depthwise and norm:
        places.remove("depthwise")
    activations = list(parts.activations.values()) or list(ACTIVATIONS)
    matched: Recipe | str = ""
    for first, second in orders:
        channels = _width(layers[first], -1)
        if depthwise and parts.depthwise[depthwise].in_channels != channels:
            continue
        recipes = [
            _ConvMlpRecipe(depthwise, norm, place, first, second, activation, scale, residual)
            for place in places
            for activation in activations
            for residual in (True, False)
        ]
        matched = _first_that_fits(module, channels, recipes)
        if not isinstance(matched, str):
            return matched
        if depthwise and norm and _norm_first(module, channels, recipes):
            return (
                "its BatchNorm stands in front of a padded depthwise convolution, where it cannot "
                "be folded"
            )
    return matched or "its convolutions do not fit each other"


def _norm_first(module: nn.Module, channels: int, recipes: Sequence[_ConvMlpRecipe]) -> bool:
    """Whether a BatchNorm in front of the depthwise convolution explains the block's output."""

    def output(recipe: _ConvMlpRecipe, x: Tensor) -> Tensor:
        branch = recipe._replace(place="", residual=False).step(module, None)
        out = branch.plain(module.get_submodule(recipe.norm)(x))
        return x + out if recipe.residual else out

    x = random_input(2, channels, 7, 5)
    out = _output(module, x)
    return out is not None and any(_fits(out, functools.partial(output, r), x) for r in recipes)


# Additive attention, and the encoder blocks around it.


class _AttentionRecipe(NamedTuple):
    linears: tuple[str, str, str, str]
    w_g: str
    options: Options

    def step(self, layer: nn.Module, scale: Tensor | None) -> Attention:
        weights: list[Tensor | None] = []
        for name in self.linears:
            linear: Any = layer.get_submodule(name)
            weights += [_double(linear.weight), _double(linear.bias)]
            if len(weights) == LINEARS:  # behind those of query and key
                weights.append(_double(_parameter(layer, self.w_g)))
        step = Attention(Weights(*cast("list[Any]", weights)), self.options, None)
        if scale is None:
            return step
        flat = scale.detach().double().flatten().expand(step.weights.token_dim).clone()
        return replace(step, residual_scale=flat)


class _EncoderRecipe(NamedTuple):
    """The parts of an encoder block in the order of their computation, each with a scale."""

    parts: tuple[tuple[str, _AttentionRecipe | _ConvMlpRecipe, str], ...]
    """Name of the part, its recipe, name of the parameter that scales it."""

    def steps(self, block: nn.Module) -> tuple[Step, ...]:
        found: list[Step] = []
        for name, recipe, scale in self.parts:
            part = block.get_submodule(name)
            factor = _parameter(block, scale) if scale else None
            if isinstance(recipe, _AttentionRecipe):
                found.append(recipe.step(part, factor))
            elif recipe.residual:
                found.append(recipe.step(part, None))
            else:
                ones = torch.ones(recipe.step(part, None).in_channels, dtype=torch.float64)
                found.append(recipe.step(part, ones if factor is None else factor))
        return tuple(found)


def _match_encoder(module: nn.Module, parts: _Parts) -> Recipe | str | None:
    if not _attentions(module):
        return None
    components: dict[str, _AttentionRecipe | _ConvMlpRecipe] = {}
    scales: list[str] = []
    reason = _components(module, "", components, scales)
    if reason:
        return reason
    attentions = [n for n, recipe in components.items() if isinstance(recipe, _AttentionRecipe)]
    if len(attentions) != 1 or len(components) > 3 or len(scales) > len(components):
        return "it has other parts than local representation, additive attention and MLP"
    attention = components[attentions[0]]
    assert isinstance(attention, _AttentionRecipe)
    step = attention.step(module.get_submodule(attentions[0]), None)
    if step.weights.in_dims != step.weights.token_dim:
        return "its attention has another width than its input"
    recipes = []
    for order in itertools.permutations(components.items()):
        open_parts = [
            i for i, (_, r) in enumerate(order)
            if isinstance(r, _AttentionRecipe) or not r.residual
        ]  # fmt: skip
        if len(scales) > len(open_parts):
            continue
        for places in itertools.permutations(open_parts, len(scales)):
            by_place = dict(zip(places, scales, strict=True))
            recipes.append(
                _EncoderRecipe(tuple((n, r, by_place.get(i, "")) for i, (n, r) in enumerate(order)))
            )
    return _first_that_fits(module, step.in_channels, recipes)


def _components(
    part: nn.Module,
    name: str,
    components: dict[str, _AttentionRecipe | _ConvMlpRecipe],
    scales: list[str],
) -> str:
    """Add the parts of an encoder block to `components` and `scales`; returns what is unknown."""
    for own, tensor in (*part._parameters.items(), *part._buffers.items()):
        path = f"{name}.{own}" if name else own
        if tensor is None:
            continue
        if not _is_scale(tensor):
            return f"its part {path} is a parameter of unknown meaning"
        scales.append(path)
    for child, inner in part._modules.items():
        if inner is None:
            continue
        path = f"{name}.{child}" if name else child
        parts, reason = _parts(inner), ""
        matched = None if _attentions(inner) else _match_conv_mlp(inner, parts)
        if _attention_like(inner):
            attention = _match_attention(inner)
            if isinstance(attention, str):
                return f"its part {path} does not match: {attention}"
            components[path] = attention
        elif isinstance(matched, _ConvMlpRecipe):
            components[path] = matched
        elif _attentions(inner):
            reason = _components(inner, path, components, scales)
        elif isinstance(matched, str):
            reason = f"its part {path} does not match: {matched}"
        elif parts.convs or parts.linears or parts.norms or parts.activations or parts.unknown:
            reason = f"its part {path} is a {type(inner).__name__}"
        else:
            scales += [f"{path}.{scale}" for scale in parts.scales]
        if reason:
            return reason
    return ""


def _attentions(module: nn.Module) -> list[str]:
    """Names of the modules below that look like additive attentions."""
    return [name for name, part in module.named_modules() if name and _attention_like(part)]


def _attention_like(module: nn.Module) -> bool:
    """Whether a module has the parts of an additive attention: four linear layers and w_g."""
    if isinstance(module, AttentionForward) or probe.part_names(module) is not None:
        return True
    linears = [part for part in module.children() if is_linear(part)]
    w_g = [p for p in module._parameters.values() if p is not None and _is_scale(p)]
    return len(linears) == LINEARS and len(w_g) == 1


def _match_attention(module: nn.Module) -> _AttentionRecipe | str:
    """What an additive attention computes, or why it is none."""
    known = module.names if isinstance(module, AttentionForward) else probe.part_names(module)
    linears = [name for name, part in module.named_children() if is_linear(part)]
    w_gs = [name for name, p in module._parameters.items() if p is not None and _is_scale(p)]
    for name, part in module.named_children():
        if name not in linears and (_tensors(part) or activation_of(part) != "none"):
            return f"its part {name} is a {type(part).__name__}"
    if len(linears) != LINEARS or len(w_gs) != 1 or len(_own_tensors(module)) != 1:
        return "it has other parts than four linear layers and a scoring vector"
    first = [] if known is None else [tuple(known[:LINEARS])]
    orders = [*first, *itertools.permutations(linears)]
    inputs = []
    for batch, tokens, size in ATTENTION_INPUTS:
        layer = module if size == 1 else _without_biases(module)
        x = size * random_input(batch, tokens, _width(module.get_submodule(orders[0][0]), -1))
        outputs = _attention_outputs(layer, x)
        if not outputs:
            return "it takes neither tokens [B, N, C] nor images [B, C, H, W]"
        inputs.append((layer, x, outputs))
    for order in orders:
        for options in _options(module, order):
            recipe = _AttentionRecipe(cast("tuple[str, str, str, str]", order), w_gs[0], options)
            if all(_attends(recipe, *probed) for probed in inputs):
                return recipe
    return "no pooling and no order of its parts give its output"


def _without_biases(module: nn.Module) -> nn.Module:
    """A copy of a layer in which all biases are 0."""
    layer = copy.deepcopy(module)
    for part in layer.children():
        if is_linear(part) and part.bias is not None:
            cast(Tensor, part.bias).detach().zero_()
    return layer


def _options(module: nn.Module, order: Sequence[str]) -> Iterator[Options]:
    """The variants of additive attention that a layer may compute, the likeliest first."""
    if isinstance(module, AttentionForward):
        pooling = cast(Pooling, module.pooling)
        yield Options(pooling, module.qk_norm, float(module.scale_factor), module.eps)
        return
    query, final = module.get_submodule(order[0]), module.get_submodule(order[3])
    widths = (_width(final, 0), _width(query, 0), _width(query, -1))
    own = [v for v in vars(module).values() if type(v) is float]
    scales = dict.fromkeys((probe.score_scale(module, widths[0]), *own, *(w**-0.5 for w in widths)))
    for scale, pooling, norm in itertools.product(scales, get_args(Pooling), (True, False)):
        yield Options(pooling, norm, scale, probe.EPS)


def _attends(
    recipe: _AttentionRecipe, module: nn.Module, x: Tensor, outputs: Sequence[Tensor]
) -> bool:
    """Whether a recipe gives one of the outputs of a layer for tokens x."""

    def output(tokens: Tensor) -> Tensor:
        step = recipe.step(module, None)
        return reference.additive_self_attention(tokens, step.weights, None, step.options)

    return any(_fits(out, output, x) for out in outputs)


def _attention_outputs(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of a layer for x [B, N, C], and for x as images, as tokens."""
    found = [_output(module, x)]
    image = _output(module, x.transpose(1, 2).unsqueeze(2))
    found.append(
        image.flatten(2).transpose(1, 2) if image is not None and image.dim() > 2 else None
    )
    return [out for out in found if out is not None]


# Layers in a row: blocks that are no modules of their own.


def rows(model: nn.Module, calls: Sequence[tuple[str, nn.Module]]) -> list[Unit]:
    """The stems and downsamplings among layers that were called one on the output of the other.

    Args:
        model: as in `find`.
        calls: names of the layers in the model, and the layers of its copy.
    """
    kinds = [_layer_kind(layer) for _, layer in calls]
    patterns: dict[tuple[str, ...], Recipe] = {
        ("conv", "norm", "relu", "conv", "norm", "relu"): _StemRecipe("0", "1", "3", "4"),
        ("conv", "norm"): _ConvolutionRecipe("0", "1"),
    }
    found, start = [], 0
    while start < len(calls):
        for pattern, recipe in patterns.items():
            names = [name for name, _ in calls[start : start + len(pattern)]]
            if tuple(kinds[start : start + len(pattern)]) == pattern and not any(
                why_left(model.get_submodule(name)) for name in names
            ):
                kind = type(calls[start][1]).__name__
                found.append(Unit(tuple(names), f"{kind} and {len(names) - 1} layers", recipe))
                start += len(pattern)
                break
        else:
            start += 1
    return found


def _layer_kind(layer: nn.Module) -> str:
    if is_conv(layer):
        return "conv" if _is_strided(cast(nn.Conv2d, layer)) else ""
    if is_norm(layer):
        return "norm"
    plain = not _tensors(layer) and not layer._modules
    return (activation_of(layer) or "") if plain else ""


# Probes.


def _first_that_fits(module: nn.Module, channels: int, recipes: Sequence[Any]) -> Any:
    """The first recipe that gives the outputs of a block, or why none does."""
    inputs = []
    for batch, height, width in SIZES:
        x = random_input(batch, channels, height, width)
        out = _output(module, x)
        if out is None:
            return f"it does not run on a map [B, {channels}, H, W]"
        inputs.append((x, out))
    for recipe in recipes:
        compute = functools.partial(_run, recipe, module)
        if all(_fits(out, compute, x) for x, out in inputs):
            return recipe
    return "no arrangement of its parts gives its output"


def _run(recipe: Recipe, module: nn.Module, x: Tensor) -> Tensor:
    for step in recipe.steps(module):
        x = step.plain(x)
    return x


def _output(module: nn.Module, x: Tensor) -> Tensor | None:
    """The output of an unknown module, None if that is no tensor."""
    try:
        out = module(x.clone())
    except Exception:  # an unknown module may raise anything
        return None
    return out if isinstance(out, Tensor) and out.dtype == x.dtype else None


def _fits(out: Tensor, compute: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    try:
        return is_near(out, compute(x))
    except (RuntimeError, ValueError):  # the shapes of the parts do not fit in this order
        return False


def is_near(out: Tensor, expected: Tensor) -> bool:
    """Whether an output is the expected one, up to rounding in float64."""
    if out.shape != expected.shape:
        return False
    return bool((out - expected).abs().max() <= TOLERANCE * expected.abs().max())


def random_input(*shape: int) -> Tensor:
    """Numbers in float64, the same at every call with this shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _width(layer: nn.Module, axis: int) -> int:
    """Channels of the input (axis -1) or output (axis 0) of a pointwise or linear layer."""
    return cast(Tensor, layer.weight).flatten(1).shape[axis]


def _parameter(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return cast(Tensor, getattr(module.get_submodule(owner), name))


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().double()


def _own_tensors(module: nn.Module) -> list[Tensor]:
    own: Mapping[str, Any] = {**module._parameters, **module._buffers}
    return [t for t in own.values() if t is not None]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
