"""Checkpoint files of the public SwiftFormers and of this library: read, loaded, written."""

from __future__ import annotations

import argparse
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swiftkernels.models.swiftformer.checkpoints import (
    SOURCES,
    convert_state_dict,
    guess_source,
    listed,
)
from swiftkernels.models.swiftformer.network import WIDTHS_AND_DEPTHS, SwiftFormer
from swiftkernels.ops.additive_attention.layer import AttentionForward
from swiftkernels.ops.additive_attention.reference import POOLINGS
from swiftkernels.utils import checks
from swiftkernels.utils.extras import need
from swiftkernels.utils.files import check_file, replacing

WEIGHTS = ("model", "state_dict")
"""Where training scripts keep the weights."""
AVERAGES = ("model_ema", "state_dict_ema")
"""Where they keep the weights' exponential moving average."""
WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""

POOLING = {"official": "l2", "timm": "l2", "transformers": "sum"}
"""What a source computes with its weights."""
REASONS = {
    "official": "as the official code since July 2023; for weights from before: pooling='sum'",
    "timm": "as timm",
    "transformers": "as transformers",
}
LISTED = 10
"""Keys of each kind that an error or a report lists."""


class Checkpoint(NamedTuple):
    """The weights of a file."""

    state_dict: dict[str, Tensor]
    """By this library's names."""
    source: str
    """Whose names they had."""
    guessed: bool
    """Whether that was told by the names."""
    name: str
    """The file's, for messages."""
    entry: str
    """Where in the file they are; empty if they are the file."""
    other: str
    """The entry with the average that was not asked for; empty if there is none."""
    pooling: str | None
    """That of the model they were saved from, if the file records it."""


@dataclass(frozen=True)
class Loaded:
    """What `load_checkpoint` did; print it."""

    name: str
    """Of the file."""
    source: str
    """Whose names the weights had: "official", "timm" (this library's own too), "transformers"."""
    entry: str
    """Where in the file they were; empty if they are the file."""
    pooling: str
    """Of the model's attentions now."""
    tensors: int
    """How many were loaded."""
    notes: tuple[str, ...]
    """What else there is to know, in sentences."""
    missing: tuple[str, ...] = ()
    """Names that the file lacks, left as they were (`strict=False`)."""
    unexpected: tuple[str, ...] = ()
    """Names that the model lacks (`strict=False`)."""
    misfits: tuple[str, ...] = ()
    """Names of tensors with another shape, left as they were (`strict=False`)."""

    def __str__(self) -> str:
        where = f"{self.name}, {self.entry!r}" if self.entry else self.name
        lines = [f"{self.tensors} tensors from {where}, with the names of {self.source}"]
        lines += self.notes
        for what in ("missing", "unexpected", "misfits"):
            keys = getattr(self, what)
            if keys:
                lines.append(f"{what}: {listed(keys, LISTED)}")
        return "\n  ".join(lines)


class CheckpointMismatchError(ValueError):
    """A checkpoint does not fit the model.

    Attributes:
        missing: names that only the model has.
        unexpected: names that only the file has.
        misfits: name -> shape in the file, shape in the model.
    """

    def __init__(
        self,
        message: str,
        missing: list[str],
        unexpected: list[str],
        misfits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
    ) -> None:
        self.missing, self.unexpected, self.misfits = missing, unexpected, misfits
        shapes = [f"{key} {theirs}, model {ours}" for key, (theirs, ours) in misfits.items()]
        kinds = (
            ("Only in the model", missing),
            ("Only in the file", unexpected),
            ("Of another shape, in the file", shapes),
        )
        lines = [message]
        for title, keys in kinds:
            lines += [f"{title}:", *(f"    {key}" for key in keys[:LISTED])] if keys else []
            lines += [f"    and {len(keys) - LISTED} more"] if len(keys) > LISTED else []
        super().__init__("\n  ".join(lines))


def load_checkpoint(
    model: SwiftFormer,
    checkpoint: str | Path | Mapping[str, Any] | nn.Module,
    *,
    source: str | None = None,
    prefix: str = "",
    ema: bool = False,
    pooling: str | None = None,
    fresh_heads: bool = False,
    strict: bool = True,
) -> Loaded:
    """Load the weights of the official code, timm, transformers or this library, and their pooling.

    The same weights under another pooling give other outputs, so the pooling of the model's
    attentions is set as well: to what the file records (those of `save_checkpoint` do), else to
    what the source computes. The result tells which.

    Nothing changes unless everything fits and is copied. Three differences are no mismatch:

    * Heads. A model with one gets the mean of two, a model with two gets the only one twice; the
      outputs in evaluation stay the same.
    * Models without heads (`features_only`, `num_classes=0`) take none, and with `out_indices` skip
      the stages that they do not have. Their `feature_norms`, which classifiers lack, stay as they
      are.
    * Layer scales. A model with use_layer_scale=False takes the weights of transformers'
      use_layer_scale=False, whose convolutions still have some: these are multiplied into the
      weights before them.

    Args:
        model: a model of this library.
        checkpoint: a .pth or .safetensors file, or what was read from one: a dict, or a module of
            which the state dict is taken. Training checkpoints keep the weights in "model" or
            "state_dict"; prefixes of wrappers are taken off.
        source: whose names the weights have, "official", "timm" (this library's own too) or
            "transformers"; None: told by the names.
        prefix: take the names under it alone: "backbone." of a detector's or segmenter's.
        ema: take the moving average of the weights ("model_ema" or "state_dict_ema").
        pooling: "l2", "softmax", "sum" or "linear", whatever file and source say.
        fresh_heads: leave the model's heads as they are, for another number of classes.
        strict: False loads what fits and reports the rest.

    Returns:
        What was done; print it.

    Raises:
        TypeError: a wrong type of argument.
        ValueError: a file that is missing, damaged, or holds something else; tensors without data
            of their own (on the device meta, expanded, sparse, empty), or that cannot be copied; a
            source that cannot be told; a pooling that cannot; no average where one is asked for.
        CheckpointMismatchError: a ValueError that names what does not fit.
        ImportError: a .safetensors file, and safetensors is not installed.

    Example:
        >>> model = SwiftFormer((8, 16), (1, 2), num_classes=5)
        >>> weights = SwiftFormer((8, 16), (1, 2), num_classes=5).state_dict()
        >>> print(load_checkpoint(model, {"model": weights, "epoch": 3}))
        106 tensors from the dict, 'model', with the names of timm
          pooling: l2, as timm
    """
    for name, flag in (("ema", ema), ("fresh_heads", fresh_heads), ("strict", strict)):
        checks.check_option(name, flag, (True, False))
    _check_model(model)
    found = read_checkpoint(checkpoint, source=source, prefix=prefix, ema=ema)
    return put_into(model, found, pooling=pooling, fresh_heads=fresh_heads, strict=strict)


def put_into(
    model: SwiftFormer,
    found: Checkpoint,
    *,
    pooling: str | None = None,
    fresh_heads: bool = False,
    strict: bool = True,
) -> Loaded:
    """The second half of `load_checkpoint`: weights that have been read."""
    chosen, reason = _pooling(model, found, pooling)
    own = model.state_dict()
    if any(t.is_meta for t in own.values()):
        raise ValueError(
            "model must have memory for the weights; it is on the device meta. Give it some first: "
            "model.to_empty(device='cpu')."
        )
    fit = fit_to(own, found, fresh_heads=fresh_heads, strict=strict)
    _copy(model, fit.weights, found.name)
    for attention in _attentions(model):
        attention.pooling = chosen
    average = [f"weights: not their moving average, {found.other!r} (ema=True takes it)"]
    return Loaded(
        name=found.name,
        source=found.source,
        entry=found.entry,
        pooling=chosen,
        tensors=len(fit.weights),
        notes=(f"pooling: {chosen}, {reason}", *(average if found.other else ()), *fit.notes),
        missing=tuple(fit.missing),
        unexpected=tuple(fit.unexpected),
        misfits=tuple(fit.misfits),
    )


class Fit(NamedTuple):
    """What of a checkpoint fits a model."""

    weights: dict[str, Tensor]
    """By the model's names, in its shapes."""
    missing: list[str]
    unexpected: list[str]
    misfits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Name -> shape in the file, shape in the model."""
    notes: list[str]
    """What was adapted."""


def fit_to(
    own: Mapping[str, Tensor], found: Checkpoint, *, fresh_heads: bool = False, strict: bool = True
) -> Fit:
    """The weights of a checkpoint for a model with the state dict `own`, which may be on meta.

    Raises:
        CheckpointMismatchError: something does not fit, or with strict=False nothing does.
    """
    given, kept, notes = _adapted(found.state_dict, own, fresh_heads)
    missing = [k for k in own if k not in given and k not in kept]
    unexpected = [k for k in given if k not in own]
    both = {k: t for k, t in given.items() if k in own}
    misfits = {
        k: (tuple(t.shape), tuple(own[k].shape))
        for k, t in both.items()
        if not _same_but_for_ones(t, own[k])
    }
    fitting = {k: t.reshape(own[k].shape) for k, t in both.items() if k not in misfits}
    if not fitting or (strict and (missing or unexpected or misfits)):
        message = f"{found.name} does not fit the model.{_remedy(found, own, misfits)}"
        raise CheckpointMismatchError(message, missing, unexpected, misfits)
    return Fit(fitting, missing, unexpected, misfits, notes)


def _copy(model: SwiftFormer, weights: Mapping[str, Tensor], name: str) -> None:
    """Copy all weights, or leave the model as it was."""
    before = {k: t.clone() for k, t in model.state_dict().items()}
    try:
        model.load_state_dict(weights, strict=False)
    except BaseException as error:
        model.load_state_dict(before)
        if not isinstance(error, Exception):  # an interruption
            raise
        reason = str(error).strip().split("\n")[-1].strip()
        raise ValueError(
            f"{name} cannot be copied into the model, which is as it was. {reason}"
        ) from error


def read_checkpoint(
    checkpoint: str | Path | Mapping[str, Any] | nn.Module,
    *,
    source: str | None = None,
    prefix: str = "",
    ema: bool = False,
) -> Checkpoint:
    """The weights of a file by this library's names; arguments and errors as `load_checkpoint`."""
    if source is not None:
        checks.check_option("source", source, SOURCES)
    content: Mapping[str, Any]
    if isinstance(checkpoint, nn.Module):
        name, content = f"the {type(checkpoint).__name__}", {WEIGHTS[0]: checkpoint}
    elif isinstance(checkpoint, Mapping):
        name, content = "the dict", checkpoint
    elif isinstance(checkpoint, (str, Path)):
        name, content = str(checkpoint), _read(Path(checkpoint))
    else:
        raise TypeError(
            "checkpoint must be a path, or a dict or module read from a file; got "
            f"{type(checkpoint).__name__}."
        )
    content = _without_modules(content)
    entry, other = _entry(content, ema, name)
    weights = _unwrapped(content[entry] if entry else content, prefix, name)
    if isinstance(checkpoint, nn.Module):
        entry = ""
    guessed = source is None
    if source is None:
        source = guess_source(weights)
        if source is None:
            raise ValueError(
                f"{name} must hold the weights of a SwiftFormer, by the names of "
                f"{', '.join(SOURCES)}; it has {listed(list(weights), 5)}. Of a larger model, name "
                "the part, as prefix='backbone.'; else the source, as source='official', to see "
                "which names are unknown."
            )
    state_dict = convert_state_dict(weights, source, "timm")
    return Checkpoint(state_dict, source, guessed, name, entry, other, _recorded(content))


def save_checkpoint(model: SwiftFormer, path: str | Path, target: str = "timm") -> None:
    """Write the weights of a model for another implementation, or for `load_checkpoint`.

    Args:
        model: a model of this library.
        path: a .safetensors file, else one as of torch.save: the weights in "model", and the
            pooling in "pooling"; for transformers, which expects so, the weights alone.
        target: whose names to write, "official", "timm" (this library's own too) or
            "transformers". The official code and transformers know two heads: they get a single
            one twice, which gives the same outputs in evaluation.

    Raises:
        TypeError: a wrong type of argument.
        ValueError: an unknown target, one that computes another pooling than the model, or a path
            of no file in an existing folder.
        OSError: the file could not be written; an older one is as it was.
        ImportError: a .safetensors file, and safetensors is not installed.
    """
    _check_model(model)
    checks.check_option("target", target, SOURCES)
    path = check_file("path", path)
    computed = {"official": ("l2", "sum"), "transformers": ("sum",)}.get(target, POOLINGS)
    pooling = own_pooling(model)
    if pooling not in computed:
        raise ValueError(
            f"target={target!r} computes pooling {' or '.join(computed)}; the model has "
            f"{pooling!r}, so its weights would give other outputs there. Use convert_state_dict "
            "if you want that."
        )
    weights = {k: t.detach().cpu().contiguous() for k, t in model.state_dict().items()}
    if target == "transformers" and not any("layer_scale" in k for k in weights):
        # Its convolutions keep theirs with use_layer_scale=False.
        weights |= {
            k.replace("pwconv2.bias", "layer_scale.gamma"): torch.ones_like(t)[:, None, None]
            for k, t in weights.items()
            if k.endswith("pwconv2.bias")
        }
    if target != "timm" and "head.weight" in weights and "head_dist.weight" not in weights:
        # Clones: safetensors refuses to write one tensor twice.
        weights |= {k.replace("head.", "head_dist."): weights[k].clone() for k in HEADS[:2]}
    weights = convert_state_dict(weights, "timm", target)
    if path.suffix.lower() == ".safetensors":
        content = _safetensors().torch.save(weights, {"format": "pt", "pooling": pooling})
        with replacing(path) as file:
            file.write(content)
        return
    with replacing(path) as file:
        torch.save(
            weights if target == "transformers" else {"model": weights, "pooling": pooling}, file
        )


def architecture(state_dict: Mapping[str, Tensor], name: str = "state_dict") -> dict[str, Any]:
    """The arguments of the `SwiftFormer` that has these weights, by this library's names.

    Args:
        state_dict: tensors with all their data.
        name: what errors call it.

    Raises:
        ValueError: tensors that tell the sizes are missing, or have too few axes; blocks of a stage
            or stages that are not numbered from 0 on without a gap.

    Example:
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


_BLOCK = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\..+")
_FEATURE_NORM = re.compile(r"feature_norms\.\d+\.weight")


def _depths(state_dict: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The number of blocks of each stage, which are all there."""
    blocks: dict[int, set[int]] = {}
    for match in filter(None, map(_BLOCK.fullmatch, state_dict)):
        blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    groups = {"stages": set(blocks), **{f"blocks of stage {i}": blocks[i] for i in sorted(blocks)}}
    for group, numbers in groups.items():
        if numbers != set(range(max(1, len(numbers)))):
            found = listed([str(n) for n in sorted(numbers)]) or "none"
            raise ValueError(
                f"{name} must hold all stages and blocks of a SwiftFormer, numbered from 0 on "
                f"without a gap; its {group} are {found}."
            )
    return tuple(len(blocks[i]) for i in sorted(blocks))


def _two_sizes(state_dict: Mapping[str, Tensor], key: str, name: str) -> tuple[int, int]:
    """The outputs and inputs of a convolution or linear layer."""
    weight = state_dict.get(key)
    if weight is None:
        raise ValueError(
            f"{name} must hold the stem and all stages of a SwiftFormer, which tell its sizes; "
            f"it has no {key!r}."
        )
    if weight.dim() < 2:
        raise ValueError(
            f"{name} must have two axes or more in {key!r}; its shape is {tuple(weight.shape)}."
        )
    return weight.shape[0], weight.shape[1]


def _ratio(hidden: Sequence[int], widths: Sequence[int]) -> float:
    """A ratio of which int(ratio * width) is the hidden width in every stage, if there is one."""
    ratio = max(h / w for h, w in zip(hidden, widths, strict=True))
    if any(int(w * ratio) < h for h, w in zip(hidden, widths, strict=True)):
        ratio = math.nextafter(ratio, math.inf)
    return ratio


HEADS = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")


def _adapted(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], fresh_heads: bool
) -> tuple[dict[str, Tensor], set[str], list[str]]:
    """Weights for a model with other heads, names that it keeps its own tensors of, and notes."""
    given, notes = dict(weights), []
    # Old files lack these counters, which count for nothing with a fixed momentum.
    kept = {k for k in own if k.endswith("num_batches_tracked")}
    if not any("layer_scale" in k for k in own):
        notes += _fold_scales(given)
    heads = {k for k in HEADS if k in own}
    if not heads:
        norms = {k for k in own if k.startswith("feature_norms.")}
        if norms and not norms & set(given):
            kept |= norms
            notes.append("feature_norms: as they were in the model, the file has none")
        parts = {_part(k) for k in own}
        ends = ("norm.", "stages.", "feature_norms.") if norms else ()  # of the model with classes
        unused = [k for k in HEADS if k in given]
        unused += [k for k in given if k.startswith(ends) and _part(k) not in parts]
        if unused:
            given = {k: t for k, t in given.items() if k not in unused}
            listing = ", ".join(dict.fromkeys(map(_part, unused)))
            notes.append(f"not used, as the model has none: {listing}")
    elif fresh_heads:
        kept |= heads
        given = {k: t for k, t in given.items() if k not in HEADS}
        notes.append("heads: as they were in the model, none of the file (fresh_heads)")
    elif "head_dist.weight" in own and "head.weight" in given and HEADS[2] not in given:
        given |= {k.replace("head.", "head_dist."): given[k] for k in HEADS[:2] if k in given}
        notes.append("heads: both are the only one of the file")
    elif "head_dist.weight" not in own and all(k in given for k in HEADS):
        dist = given.pop("head_dist.weight"), given.pop("head_dist.bias")
        if dist[0].shape == given["head.weight"].shape:
            for k, t in zip(HEADS, dist, strict=False):
                given[k] = (given[k] + t) / 2
        notes.append("heads: the only one is the mean of the file's two, as their outputs are")
    return given, kept, notes


def _part(name: str) -> str:
    """The stage, or another large part, that a tensor is of."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] in ("stages", "feature_norms") else 1])


def _fold_scales(given: dict[str, Tensor]) -> list[str]:
    """Multiply the layer scales of convolutions into the weights before them; notes on it.

    Of transformers with use_layer_scale=False, where only attention and MLP have none.
    """
    scales = [k for k in given if k.endswith(".layer_scale.gamma")]
    if any("layer_scale_1" in k for k in given):
        return []
    notes = []
    for key in scales:
        names = [key.replace("layer_scale.gamma", f"pwconv2.{part}") for part in ("weight", "bias")]
        gamma = given[key].double().flatten()
        if all(k in given and given[k].shape[:1] == gamma.shape for k in names):
            del given[key]
            for k in names:
                given[k] = given[k].double() * gamma.view(-1, *[1] * (given[k].dim() - 1))
            notes = ["layer scales of convolutions: multiplied into pwconv2, as the model has none"]
    return notes


def _pooling(model: SwiftFormer, found: Checkpoint, asked: str | None) -> tuple[str, str]:
    """The pooling for those weights, and why."""
    if asked is not None:
        checks.check_option("pooling", asked, POOLINGS)
        return asked, "as asked for"
    if found.pooling is not None:
        return found.pooling, "as the file records"
    pooling, own = POOLING[found.source], own_pooling(model)
    if found.source == "timm" and found.guessed and own != pooling:
        raise ValueError(
            f"{found.name} has the names of timm, which are this library's too, and does not "
            f"record its pooling; the model has {own!r}, timm's have {pooling!r}. Say which: "
            f"pooling={own!r}, or source='timm'."
        )
    return pooling, REASONS[found.source]


def _remedy(
    found: Checkpoint, own: Mapping[str, Tensor], misfits: Mapping[str, tuple[Any, ...]]
) -> str:
    """What may be meant by weights that do not fit, if it can be told."""
    if misfits and set(misfits) <= set(HEADS):
        return (
            " It was trained on another number of classes: fresh_heads=True keeps the model's own "
            "heads, to train them anew."
        )
    try:
        theirs, ours = architecture(found.state_dict), architecture(own)
    except ValueError:
        return ""
    if _size(theirs) != _size(ours):
        return f" It is a SwiftFormer {_size(theirs)}, the model one {_size(ours)}."
    if theirs["use_layer_scale"] != ours["use_layer_scale"]:
        if ours["use_layer_scale"]:
            return " It has no layer scales: make the model with use_layer_scale=False."
        return " It has layer scales: make the model with use_layer_scale=True."
    for option in ("in_chans", "mlp_ratio"):
        if theirs[option] != ours[option]:
            return f" It has {option} {theirs[option]}, the model {ours[option]}."
    if theirs["features_only"] and not ours["features_only"]:
        return " It is of a model with features_only=True, without classes."
    return ""


def _size(options: Mapping[str, Any]) -> str:
    size = (options["widths"], options["depths"])
    known = (name.upper() for name, sizes in WIDTHS_AND_DEPTHS.items() if sizes == size)
    return next(known, f"of widths {size[0]}, depths {size[1]}")


def _same_but_for_ones(a: Tensor, b: Tensor) -> bool:
    # Layer scales are [C] or [C, 1, 1], pointwise convolutions may be linear layers.
    return [n for n in a.shape if n != 1] == [n for n in b.shape if n != 1]


def _check_model(model: object) -> None:
    if not isinstance(model, SwiftFormer):
        raise TypeError(
            "model must be a swiftkernels.models.SwiftFormer, without wrappers; got a "
            f"{type(model).__module__}.{type(model).__name__}. For models of others there are "
            "convert_state_dict, which gives their names, and swiftkernels.accelerate."
        )


def _attentions(model: nn.Module) -> list[AttentionForward]:
    return [m for m in model.modules() if isinstance(m, AttentionForward)]


def own_pooling(model: SwiftFormer) -> str:
    """The pooling of a model's attentions.

    Raises:
        ValueError: they have several.
    """
    poolings = {attention.pooling for attention in _attentions(model)}
    if len(poolings) > 1:
        raise ValueError(
            f"model must have one pooling; its attentions have {', '.join(sorted(poolings))}."
        )
    return poolings.pop()


def _read(path: Path) -> Mapping[str, Any]:
    """What a file holds; the metadata of safetensors beside its tensors, in "pooling"."""
    if not path.is_file():
        what = "is a folder; from_pretrained takes those" if path.is_dir() else "does not exist"
        raise ValueError(f"checkpoint must be a .pth or .safetensors file; {path} {what}.")
    try:
        if path.suffix.lower() == ".safetensors":
            with _safetensors().safe_open(path, framework="pt") as file:
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
                pooling = (file.metadata() or {}).get("pooling")
            return {"model": tensors, "pooling": pooling} if pooling else tensors
        # Training scripts keep their arguments in the file; a Namespace holds values alone. The
        # context takes all that it is given off the list of the process at its end.
        more = {argparse.Namespace} - set(torch.serialization.get_safe_globals())
        with torch.serialization.safe_globals(list(more)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except pickle.UnpicklingError as error:
        needed = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if needed is None:
            raise ValueError(_damaged(path, error)) from error
        raise ValueError(
            f"{path} holds a {needed[1]}, more than tensors and plain values, and loading such "
            "could run any code. If you trust the file: load_checkpoint(model, torch.load(path, "
            "map_location='cpu', weights_only=False)). save_checkpoint(model, 'weights.pth') then "
            "writes a file without such."
        ) from error
    except Exception as error:  # every format has errors of its own
        raise ValueError(_damaged(path, error)) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} must hold a dict of weights; it holds a {type(content).__name__}."
        )
    return content


def _damaged(path: Path, error: Exception) -> str:
    said = str(error).strip().split("\n")[0].split(". ")[0]
    return (
        f"{path} cannot be read as a checkpoint ({type(error).__name__}: {said}). It must be a "
        ".safetensors file, or one of torch.save."
    )


def _safetensors() -> Any:
    need("safetensors.torch", "hub", "A .safetensors file")
    return need("safetensors", "hub", "A .safetensors file")


def _entry(content: Mapping[str, Any], ema: bool, name: str) -> tuple[str, str]:
    """The entry with the weights, "" for the file itself, and one with the other kind of them."""
    plain = [k for k in WEIGHTS if isinstance(content.get(k), Mapping)]
    averages = [k for k in AVERAGES if isinstance(content.get(k), Mapping)]
    if ema:
        if not averages:
            entries = [str(k) for k, value in content.items() if value is not None]
            held = listed(entries, 8) if plain else "weights alone"
            raise ValueError(
                f"{name} must hold a moving average of the weights for ema=True, in "
                f"{' or '.join(map(repr, AVERAGES))}; it holds {held}. Without ema=True it "
                "gives the weights."
            )
        return averages[0], ""
    if averages and not plain:
        raise ValueError(
            f"{name} holds the moving average of the weights alone, {averages[0]!r}: ema=True "
            "takes it."
        )
    return (plain or [""])[0], (averages or [""])[0]


def _without_modules(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The content of a file with state dicts for modules, and their pooling if none is recorded."""
    modules = {k: m for k, m in content.items() if isinstance(m, nn.Module)}
    poolings = {a.pooling for m in modules.values() for a in _attentions(m)}
    recorded = {"pooling": poolings.pop()} if len(poolings) == 1 else {}
    return recorded | dict(content) | {k: m.state_dict() for k, m in modules.items()}


def _check_stored(weights: Mapping[str, Tensor], name: str) -> None:
    """Raise unless every tensor holds its numbers: what has sizes without data can ask for any
    amount of memory."""
    for key, t in weights.items():
        if t.layout is not torch.strided:
            what = f"is not dense: its layout is {t.layout}"
        elif t.is_meta:
            what = "has no data: it is on the device meta"
        elif t.numel() == 0:
            what = f"is empty: its shape is {tuple(t.shape)}"
        elif t.untyped_storage().nbytes() < t.numel() * t.element_size():
            what = f"is expanded: it has less data than its shape {tuple(t.shape)} says"
        else:
            continue
        raise ValueError(f"{name} must hold tensors with all their data; {key!r} {what}.")


def _unwrapped(weights: Mapping[str, Any], prefix: str, name: str) -> dict[str, Tensor]:
    weights = dict(weights)
    if len(weights) > 1:
        weights.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
    unnamed = [repr(k) for k in weights if not isinstance(k, str)]
    if unnamed:
        raise ValueError(f"{name} must hold tensors by their names; got {listed(unnamed)}.")
    others = [k for k, t in weights.items() if not isinstance(t, Tensor)]
    if others or not weights:
        held = f"{listed(others, 5)} are none" if others else "it is empty"
        raise ValueError(
            f"{name} must hold tensors by their names, itself or in 'model' or 'state_dict'; "
            f"{held}."
        )
    while True:
        wrapper = next((w for w in WRAPPERS if all(k.startswith(w) for k in weights)), None)
        if wrapper is None:
            break
        weights = {k.removeprefix(wrapper): t for k, t in weights.items()}
    if prefix and not any(k.startswith(prefix) for k in weights):
        raise ValueError(
            f"prefix must be the start of names in {name}; got {prefix!r}, and there are "
            f"{listed(list(weights), 5)}."
        )
    weights = {k.removeprefix(prefix): t for k, t in weights.items() if k.startswith(prefix)}
    _check_stored(weights, name)
    return weights


def _recorded(content: Mapping[str, Any]) -> str | None:
    """The pooling that this library's files record, those of training among their arguments."""
    arguments = content.get("args", {})
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    found = content.get("pooling")
    if found is None and isinstance(arguments, Mapping):
        found = arguments.get("pooling")
    return found if found in POOLINGS else None
