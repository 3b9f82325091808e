"""The parts of a block that are read as one: layers, and modules that compute what a layer does."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.fusion.find import lower, parts, probes
from swiftkernels.fusion.find.attention import AttentionRecipe
from swiftkernels.fusion.find.lower import Item
from swiftkernels.fusion.steps import (
    ACTIVATIONS,
    GATES,
    Normalise,
    PartialConvolution,
    SqueezeExcite,
)
from swiftkernels.ops import folding

MAX_BRANCHES = 12
"""Layers in the largest module that is merged to one convolution."""


class Atom(Protocol):
    """How a part of a block is read."""

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of its input and output."""

    def items(self, name: str, module: nn.Module) -> list[Item]:
        """What it computes, with the weights that it has now, in float64."""


def of_layer(module: nn.Module) -> Atom | None:
    """A convolution, a linear layer or a BatchNorm."""
    if parts.is_conv(module):
        conv: Any = module
        return Layer((conv.in_channels, conv.out_channels))
    if parts.is_linear(module):
        linear: Any = module
        return Layer((linear.in_features, linear.out_features))
    activation = parts.norm_activation(module)
    if activation is not None:
        return Norm((cast(Any, module).num_features,) * 2, activation)
    return _normalising(module)


def of_module(module: nn.Module) -> Atom | None:
    """A module whose parts are not called one after the other, but that computes a known form."""
    for match in (_pooling, _partial, _squeeze_excite, _merged):
        found = match(module)
        if found is not None:
            return found
    return None


@dataclass(frozen=True)
class Layer:
    channels: tuple[int, int]

    def items(self, name: str, module: nn.Module) -> list[Item]:
        weight, bias = folding.weight_and_bias(module)
        if isinstance(module, nn.Conv2d):
            padding = cast(int, parts.padding_of(module))
            return [lower.Layer(name, weight, bias, module.stride[0], padding, module.groups)]
        return [lower.Layer(name, weight[:, :, None, None], bias)]


@dataclass(frozen=True)
class Norm:
    channels: tuple[int, int]
    activation: str

    def items(self, name: str, module: nn.Module) -> list[Item]:
        affine = lower.Affine(name, *folding.affine(module))
        return [affine] if self.activation == "none" else [affine, lower.Activate(self.activation)]


@dataclass(frozen=True)
class Normalising:
    """A norm of each pixel, or of each image."""

    channels: tuple[int, int]
    eps: float
    over_image: bool

    def items(self, name: str, module: nn.Module) -> list[Item]:
        return [lower.Ready(self.step(module))]

    def step(self, module: nn.Module) -> Normalise:
        own = parts.own_tensors(module)
        weight = own["weight"].detach().double()
        bias = own["bias"].detach().double() if "bias" in own else torch.zeros_like(weight)
        return Normalise(weight, bias, self.eps, self.over_image)


def _normalising(module: nn.Module) -> Normalising | None:
    own = parts.own_tensors(module)
    eps = getattr(module, "eps", None)
    if module._modules or not {"weight"} <= {*own} <= {"weight", "bias"}:
        return None
    if not isinstance(eps, float) or any(t.dim() != 1 for t in own.values()):
        return None
    channels = len(own["weight"])
    # Tiny numbers show another eps.
    x = 1e-2 * probes.random_input(2, channels, 7, 5)
    for over_image in (False, True):
        found = Normalising((channels, channels), eps, over_image)
        expected = found.step(module).plain(x)
        for out in (probes.output(module, x), _output_last(module, x)):
            if out is not None and probes.is_near(out, expected):
                return found
    return None


def _output_last(module: nn.Module, x: Tensor) -> Tensor | None:
    """The output of a module that takes the channels as the last axis."""
    out = probes.output(module, x.movedim(1, -1))
    return None if out is None or out.dim() != 4 else out.movedim(-1, 1)


@dataclass(frozen=True)
class Attention:
    recipe: AttentionRecipe
    channels: tuple[int, int]

    def items(self, name: str, module: nn.Module) -> list[Item]:
        return [lower.Ready(self.recipe.step(module))]


# The pooling of PoolFormer.


@dataclass(frozen=True)
class Pooling:
    """The mean of the pixels around minus x; channels 0 for any number."""

    kernel: int
    channels: tuple[int, int] = (0, 0)

    def items(self, name: str, module: nn.Module) -> list[Item]:
        return [lower.Pooling(self.kernel, self.channels[0])]


def _pooling(module: nn.Module) -> Pooling | None:
    if parts.tensors_of(module):
        return None
    pools = [part for part in module.modules() if isinstance(part, nn.AvgPool2d)]
    if len(pools) != 1:
        return None
    kernel = pools[0].kernel_size
    k = kernel if isinstance(kernel, int) else kernel[0]
    x = probes.random_input(2, 3, 9, 7)

    def difference(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, k, 1, k // 2, count_include_pad=False) - x

    out = probes.output(module, x)
    fits = k % 2 == 1 and out is not None and probes.fits(out, difference, x)
    return Pooling(k) if fits else None


# The partial convolution of FasterNet.


@dataclass(frozen=True)
class Partial:
    """A convolution of the first channels; channels 0 for any number."""

    conv: str
    channels: tuple[int, int] = (0, 0)

    def items(self, name: str, module: nn.Module) -> list[Item]:
        weight, bias = folding.weight_and_bias(module.get_submodule(self.conv))
        return [lower.Ready(PartialConvolution(weight, bias, self.channels[0]))]


def _partial(module: nn.Module) -> Partial | None:
    convs = [(name, part) for name, part in module.named_modules() if parts.is_conv(part)]
    if len(convs) != 1 or len(parts.tensors_of(module)) != len(parts.tensors_of(convs[0][1])):
        return None
    name, conv = convs[0][0], cast(nn.Conv2d, convs[0][1])
    k = conv.kernel_size[0]
    if not name or k % 2 == 0 or conv.in_channels != conv.out_channels:
        return None
    if (conv.stride, conv.groups, parts.padding_of(conv)) != ((1, 1), 1, k // 2):
        return None
    width = conv.in_channels
    own = [value for value in vars(module).values() if type(value) is int]
    totals = (*own, *(width + n for n in own), *(width * n for n in (2, 3, 4, 8)))
    for channels in dict.fromkeys(n for n in totals if n > width):
        found = Partial(name, (channels, channels))
        (item,) = found.items("", module)
        assert isinstance(item, lower.Ready)
        x = probes.random_input(2, channels, 7, 5)
        out = probes.output(module, x)
        if out is not None and probes.fits(out, item.step.plain, x):
            return found
    return None


# Squeeze and excitation.


@dataclass(frozen=True)
class Excite:
    names: tuple[str, str]
    activation: str
    gate: str
    channels: tuple[int, int]

    def items(self, name: str, module: nn.Module) -> list[Item]:
        return [lower.Ready(self.step(module))]

    def step(self, module: nn.Module) -> SqueezeExcite:
        first, second = (folding.weight_and_bias(module.get_submodule(n)) for n in self.names)
        return SqueezeExcite(
            first[0].flatten(1), first[1], second[0].flatten(1), second[1], self.activation,
            self.gate,
        )  # fmt: skip


def _squeeze_excite(module: nn.Module) -> Excite | None:
    layers = [
        (name, cast(Any, part))
        for name, part in module.named_modules()
        if name and (parts.is_conv(part) or parts.is_linear(part))
    ]
    if len(layers) != 2 or len(parts.tensors_of(module)) > 4:
        return None
    for (first, up), (second, down) in (layers, layers[::-1]):
        (hidden, channels), (out, columns) = up.weight.shape[:2], down.weight.shape[:2]
        if out != channels or columns != hidden or up.weight[0].numel() != channels:
            continue
        if down.weight[0].numel() != hidden:
            continue
        inputs = [size * probes.random_input(b, channels, h, w) for b, h, w, size in probes.INPUTS]
        outputs = [probes.output(module, x) for x in inputs]
        for activation, gate in itertools.product(ACTIVATIONS, GATES):
            found = Excite((first, second), activation, gate, (channels, channels))
            compute = found.step(module).plain
            pairs = zip(inputs, outputs, strict=True)
            if all(out is not None and probes.fits(out, compute, x) for x, out in pairs):
                return found
    return None


# Several convolutions and BatchNorms side by side, as while training a reparametrised network.


@dataclass(frozen=True)
class Merged:
    """A module that computes one convolution and an activation. The kernel is what the module,
    without activation, makes of single pixels."""

    kernel: int
    stride: int
    groups: int
    channels: tuple[int, int]
    activation: str

    def items(self, name: str, module: nn.Module) -> list[Item]:
        layer = self.layer(name, _without_activations(module))
        return [layer] if self.activation == "none" else [layer, lower.Activate(self.activation)]

    def layer(self, name: str, module: nn.Module) -> lower.Layer:
        """The convolution that a module without activations computes.

        With stride s and padding p, output pixel o reads input pixel s o - p + t with number t of
        the kernel. So a pixel at i shows the numbers t = i + p - s o of the kernel for all o.
        """
        k, s, p = self.kernel, self.stride, self.kernel // 2
        inputs, outputs = self.channels
        per_group = inputs // self.groups
        side = s * (2 * k + 2)
        middle = s * k
        zeros = torch.zeros(1, inputs, side, side, dtype=torch.float64)
        bias = module(zeros.clone())[0, :, k, k].clone()
        weight = torch.zeros(outputs, per_group, k, k, dtype=torch.float64)
        for c in range(per_group):
            for dy, dx in itertools.product(range(s), repeat=2):
                x = zeros.clone()
                x[:, c::per_group, middle + dy, middle + dx] = 1
                out = module(x)[0] - bias[:, None, None]
                for i, j in itertools.product(range(k), repeat=2):
                    y, rest_y = divmod(middle + dy + p - i, s)
                    z, rest_x = divmod(middle + dx + p - j, s)
                    if rest_y == rest_x == 0:
                        weight[:, c, i, j] = out[:, y, z]
        return lower.Layer(name, weight, bias, s, p, self.groups)


def _merged(module: nn.Module) -> Merged | None:
    convs: list[nn.Conv2d] = []
    norms = 0
    for part in module.modules():
        if parts.is_conv(part):
            convs.append(cast(nn.Conv2d, part))
        elif parts.norm_activation(part) == "none":
            norms += 1
        elif not part._modules and not all(map(parts.is_scale, parts.own_tensors(part).values())):
            return None
    if not convs or len(convs) + norms > MAX_BRANCHES:
        return None
    largest = max(convs, key=lambda conv: conv.kernel_size[0])
    k, s = largest.kernel_size[0], largest.stride[0]
    channels = largest.in_channels, largest.out_channels
    per_group = channels[0] // largest.groups
    # Each input channel of a group takes a run of the module.
    if k % 2 == 0 or per_group > 1024 or (k > 1 and per_group > 64):
        return None
    linear = _without_activations(module)
    if not _is_linear(linear, channels[0]):
        return None
    found = Merged(k, s, largest.groups, channels, "none")
    try:
        layer = found.layer("", linear)
    except Exception:  # an unknown module may raise anything
        return None
    activations = set(ACTIVATIONS)
    for batch, height, width, size in probes.INPUTS:
        x = size * probes.random_input(batch, channels[0], height, width)
        result = probes.output(module, x)
        out = F.conv2d(x, layer.weight, layer.bias, s, layer.padding, groups=layer.groups)
        if result is None:
            return None
        activations &= {n for n, act in ACTIVATIONS.items() if probes.is_near(result, act(out))}
    if not activations:
        return None
    return dataclasses.replace(found, activation=min(activations, key=list(ACTIVATIONS).index))


def _without_activations(module: nn.Module) -> nn.Module:
    """A copy in which the modules that are activations return their input."""
    clone = copy.deepcopy(module)
    for part in list(clone.modules()):
        for name, child in part._modules.items():
            if child is None or child._modules or parts.tensors_of(child):
                continue
            if parts.activation_of(child) not in (None, "none"):
                part._modules[name] = nn.Identity()
    return clone


def _is_linear(module: nn.Module, channels: int) -> bool:
    """Whether a module seems to add and scale its inputs only."""
    x = probes.random_input(1, channels, 5, 5)
    zero, one, two = (probes.output(module, factor * x) for factor in (0, 1, 2))
    if zero is None or one is None or two is None:
        return False
    return zero.shape == one.shape and probes.is_near(two - zero, 2 * (one - zero))


def with_channels(atom: Atom, channels: int) -> Atom:
    """The atom for a map of that many channels, if it takes any."""
    if isinstance(atom, Pooling):
        return dataclasses.replace(atom, channels=(channels, channels))
    return atom


def widths(atoms: Sequence[Atom]) -> list[int]:
    """All channels of inputs, without repetitions."""
    return list(dict.fromkeys(atom.channels[0] for atom in atoms if atom.channels[0]))
