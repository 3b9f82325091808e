"""State dicts of the public SwiftFormers: the official code, timm, transformers.

The tensors are the same everywhere (but for the shape of the layer scales), under other names:

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

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from swiftkernels.utils import checks

SOURCES = ("official", "timm", "transformers")


def convert_state_dict(
    state_dict: Mapping[str, Tensor], source: str, target: str
) -> dict[str, Tensor]:
    """The same tensors under the names of another implementation.

    Args:
        state_dict: of a whole model, of one without its heads, or of a backbone.
        source, target: "official", "timm" (this library's own names too) or "transformers".

    Returns:
        A new dict in the same order; the tensors are not copied.

    Raises:
        ValueError: an unknown source or target, or keys that no SwiftFormer of that source has.

    Example:
        >>> official = {"network.2.0.layer_scale": torch.ones(56, 1, 1)}
        >>> list(convert_state_dict(official, "official", "timm"))
        ['stages.1.blocks.0.layer_scale.gamma']
    """
    checks.check_option("source", source, SOURCES)
    checks.check_option("target", target, SOURCES)
    names = {key: _to_ours(key, source) for key in state_dict}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        guess = guess_source(state_dict)
        hint = f" They look like {guess!r}." if guess and guess != source else ""
        raise ValueError(
            f"state_dict must have the keys of a SwiftFormer of source={source!r}; unknown: "
            f"{listed([repr(key) for key in unknown])}.{hint}"
        )
    return {
        _from_ours(name, target): state_dict[key] for key, name in names.items() if name is not None
    }


def guess_source(state_dict: Mapping[str, Tensor]) -> str | None:
    """Whose names these are, None if nobody's."""
    for source in SOURCES:
        if state_dict and all(_to_ours(key, source) is not None for key in state_dict):
            return source
    return None


def listed(keys: Sequence[str], most: int = 5) -> str:
    """The first keys, for a message, and how many more there are."""
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


# Our name of a part, and theirs.
_PARTS = {
    "official": (("attn.proj", "attn.Proj"), ("head_dist", "dist_head"), ("stem", "patch_embed")),
    "transformers": (
        ("dwconv", "depth_wise_conv"),
        ("pwconv", "point_wise_conv"),
        ("head_dist", "dist_head"),
        ("stem", "swiftformer.patch_embed.patch_embedding"),
    ),
}

_ENCODER = r"(dwconv|norm|pwconv[12])\.\w+|layer_scale\.gamma"
_BLOCK = (
    rf"(local_representation\.)?({_ENCODER})|layer_scale_[12]\.gamma"
    r"|attn\.(w_g|(to_query|to_key|proj|final)\.\w+)|linear\.(norm1|fc1|fc2)\.\w+"
)
_NAME = re.compile(
    rf"stages\.\d+\.(downsample\.(proj|norm)\.\w+|blocks\.\d+\.({_BLOCK}))"
    r"|(stem\.[0134]|norm|head|head_dist|feature_norms\.\d+)\.\w+"
)
"""All names of this library's models."""


def _from_ours(name: str, target: str) -> str:
    if target == "timm":
        return name
    name = name.removesuffix(".gamma")
    for ours, theirs in _PARTS[target]:
        name = name.replace(ours, theirs)
    prefix, blocks = ("swiftformer.encoder.", "blocks.") if target == "transformers" else ("", "")
    # Their downsamplings stand between the stages.
    name = re.sub(
        r"^stages\.(\d+)\.downsample\.", lambda m: f"{prefix}network.{2 * int(m[1]) - 1}.", name
    )
    name = re.sub(
        r"^stages\.(\d+)\.blocks\.", lambda m: f"{prefix}network.{2 * int(m[1])}.{blocks}", name
    )
    return re.sub(r"^feature_norms\.(\d+)", lambda m: f"norm{2 * int(m[1])}", name)


def _to_ours(key: str, source: str) -> str | None:
    """This library's name for a key of the source; None if it has no such key."""
    name = key
    if source != "timm":
        if source == "transformers" and key.startswith(("patch_embed.", "encoder.")):
            key = f"swiftformer.{key}"  # of a model without heads
        name = re.sub(r"(layer_scale(_[12])?)$", r"\1.gamma", key)
        for ours, theirs in _PARTS[source]:
            name = name.replace(theirs, ours)
        name = re.sub(r"^norm(\d+)", lambda m: f"feature_norms.{int(m[1]) // 2}", name)
        name = re.sub(r"^(swiftformer\.encoder\.)?network\.(\d+)\.(blocks\.)?", _stage, name)
    known = _NAME.fullmatch(name) is not None and _from_ours(name, source) == key
    return name if known else None


def _stage(match: re.Match[str]) -> str:
    number = int(match[2])
    part = "downsample" if number % 2 else "blocks"
    return f"stages.{(number + 1) // 2}.{part}."
