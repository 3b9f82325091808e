"""Weights of the public SwiftFormers: the official code, timm, transformers.

The tensors are the same, except for the shape of the layer scales; the names differ:

============================  ==========================  ==========================================
official                      timm, and this library      transformers
============================  ==========================  ==========================================
patch_embed.k                 stem.k                      swiftformer.patch_embed.patch_embedding.k
network.2i.j                  stages.i.blocks.j           swiftformer.encoder.network.2i.blocks.j
network.(2i+1)                stages.(i+1).downsample     swiftformer.encoder.network.(2i+1)
local_representation.dwconv   the same                    ...depth_wise_conv
pwconv1, pwconv2              the same                    point_wise_conv1, point_wise_conv2
layer_scale, layer_scale_1    ....gamma                   as official
attn.Proj                     attn.proj                   attn.proj
dist_head                     head_dist                   dist_head
============================  ==========================  ==========================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from swiftkernels.models.family import SOURCES, Source, listed
from swiftkernels.utils import checks


def convert_state_dict(
    state_dict: Mapping[str, Tensor], source: Source, target: Source
) -> dict[str, Tensor]:
    """The same tensors under the names of another implementation.

    Args:
        state_dict: of a model with or without heads, or of a backbone.
        source, target: "official", "timm" (also the names of this library) or "transformers".

    Returns:
        A new dict in the same order; the tensors are not copied.

    Raises:
        ValueError: an unknown source or target, or keys that no SwiftFormer of the source has.

    Example:
        >>> official = {"network.2.0.layer_scale": torch.ones(56, 1, 1)}
        >>> list(convert_state_dict(official, "official", "timm"))
        ['stages.1.blocks.0.layer_scale.gamma']
    """
    checks.check_option("source", source, SOURCES)
    checks.check_option("target", target, SOURCES)
    names = {key: _from_source(key, source) if isinstance(key, str) else None for key in state_dict}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        guess = guess_source(state_dict)
        hint = f" They look like source={guess!r}." if guess and guess != source else ""
        raise ValueError(
            f"state_dict must have the keys of a SwiftFormer of source={source!r}; unknown: "
            f"{listed([repr(key) for key in unknown])}.{hint}"
        )
    return {
        _to_target(name, target): state_dict[key] for key, name in names.items() if name is not None
    }


def guess_source(state_dict: Mapping[str, Tensor]) -> Source | None:
    """The source that has all these names; None if there is none."""
    for source in SOURCES:
        if state_dict and all(_from_source(key, source) is not None for key in state_dict):
            return source
    return None


_PARTS = {
    "official": (("attn.proj", "attn.Proj"), ("head_dist", "dist_head"), ("stem", "patch_embed")),
    "transformers": (
        ("dwconv", "depth_wise_conv"),
        ("pwconv", "point_wise_conv"),
        ("head_dist", "dist_head"),
        ("stem", "swiftformer.patch_embed.patch_embedding"),
    ),
}
"""Names of parts: here, and in the source."""

_NUMBER = "[0-9]{1,12}"
"""A number in a name; int() refuses those of more than 4300 digits."""
_ENCODER = r"(dwconv|norm|pwconv[12])\.\w+|layer_scale\.gamma"
_BLOCK_PART = (
    rf"(local_representation\.)?({_ENCODER})|layer_scale_[12]\.gamma"
    r"|attn\.(w_g|(to_query|to_key|proj|final)\.\w+)|linear\.(norm1|fc1|fc2)\.\w+"
)
_NAME = re.compile(
    rf"stages\.{_NUMBER}\.(downsample\.(proj|norm)\.\w+|blocks\.{_NUMBER}\.({_BLOCK_PART}))"
    rf"|(stem\.[0134]|norm|head|head_dist|feature_norms\.{_NUMBER})\.\w+"
)
"""All parameter and buffer names of this library's networks."""


def _to_target(name: str, target: Source) -> str:
    """The name in the target for a name of this library."""
    if target == "timm":
        return name
    name = name.removesuffix(".gamma")
    for ours, theirs in _PARTS[target]:
        name = name.replace(ours, theirs)
    prefix, blocks = ("swiftformer.encoder.", "blocks.") if target == "transformers" else ("", "")
    # There, downsamplings are modules between the stages.
    name = re.sub(
        rf"^stages\.({_NUMBER})\.downsample\.",
        lambda m: f"{prefix}network.{2 * int(m[1]) - 1}.",
        name,
    )
    name = re.sub(
        rf"^stages\.({_NUMBER})\.blocks\.",
        lambda m: f"{prefix}network.{2 * int(m[1])}.{blocks}",
        name,
    )
    return re.sub(rf"^feature_norms\.({_NUMBER})", lambda m: f"norm{2 * int(m[1])}", name)


def _from_source(key: str, source: Source) -> str | None:
    """The name in this library for a key of the source; None if the source has no such key."""
    name = key
    if source != "timm":
        if source == "transformers" and key.startswith(("patch_embed.", "encoder.")):
            key = f"swiftformer.{key}"  # from a model without heads
        name = re.sub(r"(layer_scale(_[12])?)$", r"\1.gamma", key)
        for ours, theirs in _PARTS[source]:
            name = name.replace(theirs, ours)
        name = re.sub(rf"^norm({_NUMBER})", lambda m: f"feature_norms.{int(m[1]) // 2}", name)
        name = re.sub(rf"^(swiftformer\.encoder\.)?network\.({_NUMBER})\.(blocks\.)?", _stage, name)
    known = _NAME.fullmatch(name) is not None and _to_target(name, source) == key
    return name if known else None


def _stage(match: re.Match[str]) -> str:
    number = int(match[2])
    part = "downsample" if number % 2 else "blocks"
    return f"stages.{(number + 1) // 2}.{part}."


def architecture(state_dict: Mapping[str, Tensor], name: str = "state_dict") -> dict[str, Any]:
    """The arguments of the `SwiftFormer` that has these weights.

    Args:
        state_dict: tensors by this library's names, with all their data.
        name: what error messages call the state dict.

    Raises:
        ValueError: tensors that determine the sizes are missing or have too few dimensions, or
            stages or blocks are not numbered from 0 without a gap.

    Example:
        >>> from swiftkernels.models import SwiftFormer
        >>> options = {"num_classes": 3, "in_chans": 1, "use_layer_scale": False}
        >>> model = SwiftFormer((8, 16), (1, 2), **options)
        >>> found = architecture(model.state_dict())
        >>> found["widths"], found["depths"], {name: found[name] for name in options}
        ((8, 16), (1, 2), {'num_classes': 3, 'in_chans': 1, 'use_layer_scale': False})
    """
    depths = _depths(state_dict, name)
    last = [f"stages.{i}.blocks.{depth - 1}.linear.fc1.weight" for i, depth in enumerate(depths)]
    hidden, widths = zip(*(_two_sizes(state_dict, key, name) for key in last), strict=True)
    _, in_chans = _two_sizes(state_dict, "stem.0.weight", name)
    head = state_dict.get("head.weight")
    norms = sorted(int(k.split(".")[1]) for k in state_dict if _FEATURE_NORM.fullmatch(k))
    features_only = bool(norms) and "norm.weight" not in state_dict
    return {
        "widths": widths,
        "depths": depths,
        "in_chans": in_chans,
        "mlp_ratio": _ratio(hidden, widths),
        "num_classes": 0 if head is None else _two_sizes(state_dict, "head.weight", name)[0],
        "use_layer_scale": any("layer_scale_1" in k for k in state_dict),
        "distillation": head is None or "head_dist.weight" in state_dict,
        "features_only": features_only,
        "out_indices": tuple(norms) if features_only else None,
    }


_BLOCK = re.compile(rf"stages\.({_NUMBER})\.blocks\.({_NUMBER})\..+")
_FEATURE_NORM = re.compile(rf"feature_norms\.{_NUMBER}\.weight")


def _depths(state_dict: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The number of blocks of each stage."""
    blocks: dict[int, set[int]] = {}
    for match in filter(None, map(_BLOCK.fullmatch, state_dict)):
        blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    groups = {"stages": set(blocks), **{f"blocks of stage {i}": blocks[i] for i in sorted(blocks)}}
    for group, numbers in groups.items():
        if numbers != set(range(max(1, len(numbers)))):
            found = listed([str(n) for n in sorted(numbers)]) or "none"
            raise ValueError(
                f"{name} must hold all stages and blocks of a SwiftFormer, numbered from 0 without "
                f"a gap; its {group} are {found}."
            )
    return tuple(len(blocks[i]) for i in sorted(blocks))


def _two_sizes(state_dict: Mapping[str, Tensor], key: str, name: str) -> tuple[int, int]:
    """The numbers of outputs and inputs of a convolution or linear layer."""
    weight = state_dict.get(key)
    if weight is None:
        raise ValueError(
            f"{name} must hold the stem and all stages of a SwiftFormer, which determine its "
            f"sizes; it has no {key!r}."
        )
    if weight.dim() < 2:
        raise ValueError(
            f"{name} must have at least two dimensions in {key!r}; its shape is "
            f"{tuple(weight.shape)}."
        )
    return weight.shape[0], weight.shape[1]


def _ratio(hidden: Sequence[int], widths: Sequence[int]) -> float:
    """A ratio with int(ratio * width) = hidden width in every stage, if one exists."""
    ratio = max(h / w for h, w in zip(hidden, widths, strict=True))
    if any(int(w * ratio) < h for h, w in zip(hidden, widths, strict=True)):
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def fold_layer_scales(weights: dict[str, Tensor]) -> bool:
    """Multiply the layer scales of convolutions into the preceding weights, in place.

    For the weights of transformers with use_layer_scale=False: there only attention and MLP have no
    layer scales, here no module has. Weights with layer scales of the attention stay as they are.

    Returns:
        Whether there were any.
    """
    if any("layer_scale_1" in k for k in weights):
        return False
    folded = False
    for key in [k for k in weights if k.endswith(".layer_scale.gamma")]:
        names = [key.replace("layer_scale.gamma", f"pwconv2.{part}") for part in ("weight", "bias")]
        gamma = weights[key].double().flatten()
        if all(k in weights and weights[k].shape[:1] == gamma.shape for k in names):
            del weights[key]
            for k in names:
                weights[k] = weights[k].double() * gamma.view(-1, *[1] * (weights[k].dim() - 1))
            folded = True
    return folded


def unit_layer_scales(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer scales of 1 for the convolutions of weights without any, as transformers has them."""
    return {
        k.replace("pwconv2.bias", "layer_scale.gamma"): torch.ones_like(t)[:, None, None]
        for k, t in weights.items()
        if k.endswith("pwconv2.bias")
    }
