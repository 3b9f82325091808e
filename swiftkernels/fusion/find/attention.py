"""Additive attention: which layer computes it, and with which options."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast, get_args

from torch import Tensor, nn

from swiftkernels.fusion.find import probes
from swiftkernels.fusion.find.parts import (
    activation_of,
    is_linear,
    is_scale,
    own_tensors,
    parameter,
    tensors_of,
    width,
)
from swiftkernels.fusion.steps import Attention
from swiftkernels.integrations import probe
from swiftkernels.ops.additive_attention import reference
from swiftkernels.ops.additive_attention.layer import AttentionForward
from swiftkernels.ops.additive_attention.weights import Options, Weights
from swiftkernels.ops.types import Pooling

INPUTS = ((2, 5, 1.0), (1, 80, 1e-11))
"""Batch, tokens and scale of the random inputs of attentions. Tiny inputs show another eps of the
norms, without biases; more tokens show layers that process only some of them."""
LINEARS = 4
"""Linear layers of an attention."""


class AttentionRecipe(NamedTuple):
    """Names of the four linear layers in the order of their use, and of w_g."""

    linears: tuple[str, str, str, str]
    w_g: str
    options: Options

    def step(self, layer: nn.Module) -> Attention:
        """The step with the weights that the layer has now, in float64."""
        weights: list[Tensor | None] = []
        for name in self.linears:
            linear: Any = layer.get_submodule(name)
            weights += [_double(linear.weight), _double(linear.bias)]
            if len(weights) == LINEARS:  # behind those of query and key
                weights.append(_double(parameter(layer, self.w_g)))
        return Attention(Weights(*cast("list[Any]", weights)), self.options, None)


def looks_like_attention(module: nn.Module) -> bool:
    """Whether a module has the parts of an additive attention: four linear layers and w_g."""
    if isinstance(module, AttentionForward) or probe.part_names(module) is not None:
        return True
    linears = [part for part in module.children() if is_linear(part)]
    w_g = [p for p in module._parameters.values() if p is not None and is_scale(p)]
    return len(linears) == LINEARS and len(w_g) == 1


def match_attention(module: nn.Module) -> AttentionRecipe | str:
    """What an additive attention computes, or why it is none."""
    known = module.names if isinstance(module, AttentionForward) else probe.part_names(module)
    linears = [name for name, part in module.named_children() if is_linear(part)]
    w_gs = [name for name, p in module._parameters.items() if p is not None and is_scale(p)]
    for name, part in module.named_children():
        if name not in linears and (tensors_of(part) or activation_of(part) != "none"):
            return f"its part {name} is a {type(part).__name__}"
    if len(linears) != LINEARS or len(w_gs) != 1 or len(own_tensors(module)) != 1:
        return "it has other parts than four linear layers and a scoring vector"
    first = [] if known is None else [tuple(known[:LINEARS])]
    orders = [*first, *itertools.permutations(linears)]
    inputs = []
    for batch, tokens, size in INPUTS:
        layer = module if size == 1 else _without_biases(module)
        x = size * probes.random_input(batch, tokens, width(module.get_submodule(orders[0][0]), -1))
        outputs = _attention_outputs(layer, x)
        if not outputs:
            return "it takes neither tokens [B, N, C] nor images [B, C, H, W]"
        inputs.append((layer, x, outputs))
    for order in orders:
        for options in _options(module, order):
            recipe = AttentionRecipe(cast("tuple[str, str, str, str]", order), w_gs[0], options)
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
    widths = (width(final, 0), width(query, 0), width(query, -1))
    own = [v for v in vars(module).values() if type(v) is float]
    scales = dict.fromkeys((probe.score_scale(module, widths[0]), *own, *(w**-0.5 for w in widths)))
    for scale, pooling, norm in itertools.product(scales, get_args(Pooling), (True, False)):
        yield Options(pooling, norm, scale, probe.EPS)


def _attends(
    recipe: AttentionRecipe, module: nn.Module, x: Tensor, outputs: Sequence[Tensor]
) -> bool:
    """Whether a recipe gives one of the outputs of a layer for tokens x."""

    def output(tokens: Tensor) -> Tensor:
        step = recipe.step(module)
        return reference.additive_self_attention(tokens, step.weights, None, step.options)

    return any(probes.fits(out, output, x) for out in outputs)


def _attention_outputs(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of a layer for x [B, N, C], and for x as images, as tokens."""
    found = [probes.output(module, x)]
    image = probes.output(module, x.transpose(1, 2).unsqueeze(2))
    found.append(
        image.flatten(2).transpose(1, 2) if image is not None and image.dim() > 2 else None
    )
    return [out for out in found if out is not None]


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().double()
