"""What this library knows of SwiftFormer's models, sources, configurations and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from swiftkernels.models.family import POOLINGS, Family, Implementation, Source
from swiftkernels.models.network import HEADS
from swiftkernels.models.swiftformer import checkpoints
from swiftkernels.models.swiftformer.network import (
    WIDTHS_AND_DEPTHS,
    SwiftFormer,
    swiftformer_l1,
    swiftformer_l3,
    swiftformer_s,
    swiftformer_xs,
)


def adapt(weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """See `Family.adapt`."""
    if any("layer_scale" in k for k in own) or not checkpoints.fold_layer_scales(weights):
        return []
    return ["layer scales of convolutions: multiplied into pwconv2, the model has none"]


def complete(weights: dict[str, Tensor], target: Source) -> dict[str, Tensor]:
    """See `Family.complete`."""
    if target == "transformers" and not any("layer_scale" in k for k in weights):
        weights = weights | checkpoints.unit_layer_scales(weights)
    if target != "timm" and "head.weight" in weights and "head_dist.weight" not in weights:
        # They always have two heads. Clones: safetensors refuses to write one tensor twice.
        copies = {k.replace("head.", "head_dist."): weights[k].clone() for k in HEADS[:2]}
        weights = weights | copies
    return weights


def explain_mismatch(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """See `Family.explain_mismatch`."""
    try:
        theirs, ours = checkpoints.architecture(weights), checkpoints.architecture(own)
    except ValueError:
        return ""
    if _size(theirs) != _size(ours):
        return f"It is a SwiftFormer {_size(theirs)}, the model is a SwiftFormer {_size(ours)}."
    if theirs["use_layer_scale"] != ours["use_layer_scale"]:
        if ours["use_layer_scale"]:
            return "It has no layer scales: build the model with use_layer_scale=False."
        return "It has layer scales: build the model with use_layer_scale=True."
    for option in ("in_chans", "mlp_ratio"):
        if theirs[option] != ours[option]:
            return f"It has {option} {theirs[option]}, the model {ours[option]}."
    if theirs["features_only"] and not ours["features_only"]:
        return "It is from a model with features_only=True, without heads."
    return ""


def _size(options: Mapping[str, Any]) -> str:
    size = (options["widths"], options["depths"])
    known = (name.upper() for name, sizes in WIDTHS_AND_DEPTHS.items() if sizes == size)
    return next(known, f"of widths {size[0]}, depths {size[1]}")


FAMILY = Family(
    name="swiftformer",
    network=SwiftFormer,
    build=SwiftFormer,
    constructors={
        "swiftformer_xs": swiftformer_xs,
        "swiftformer_s": swiftformer_s,
        "swiftformer_l1": swiftformer_l1,
        "swiftformer_l3": swiftformer_l3,
    },
    # The official commands train the small models with less augmentation.
    recipes={
        "swiftformer_xs": {"rand_augment": False, "mixup": 0.0, "cutmix": 0.0},
        "swiftformer_s": {"mixup": 0.0, "cutmix": 0.0},
    },
    own_names="timm",
    implementations={
        "official": Implementation(
            pooling="l2",
            reason="as in the official code since July 2023; for older weights: pooling='sum'",
            runnable=("l2", "sum"),
        ),
        "timm": Implementation(pooling="l2", reason="as in timm", runnable=POOLINGS),
        "transformers": Implementation(
            pooling="sum", reason="as in transformers", runnable=("sum",), weights_only=True
        ),
    },
    derived_options=("widths", "depths", "in_chans", "mlp_ratio", "use_layer_scale"),
    fixed_config={
        "hidden_act": "gelu",
        "batch_norm_eps": 1e-5,
        "down_patch_size": 3,
        "down_stride": 2,
        "down_pad": 1,
    },
    guess_source=checkpoints.guess_source,
    convert=checkpoints.convert_state_dict,
    architecture=checkpoints.architecture,
    adapt=adapt,
    complete=complete,
    explain_mismatch=explain_mismatch,
)
