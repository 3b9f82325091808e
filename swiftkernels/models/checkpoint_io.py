"""Checkpoint files of any family of networks: read, load, write."""

from __future__ import annotations

import argparse
import contextlib
import math
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swiftkernels.models.family import (
    POOLINGS,
    SOURCES,
    Family,
    Source,
    families,
    family_of,
    listed,
)
from swiftkernels.models.network import HEADS, Network
from swiftkernels.ops.additive_attention.layer import AttentionForward
from swiftkernels.ops.types import Pooling
from swiftkernels.utils import checks
from swiftkernels.utils.extras import need
from swiftkernels.utils.files import check_file, replacing
from swiftkernels.utils.text import shown

WEIGHTS = ("model", "state_dict")
"""Entries in which training scripts store the weights."""
AVERAGES = ("model_ema", "state_dict_ema")
"""Entries in which they store the exponential moving average of the weights."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile add to every name."""

COUNTER = "num_batches_tracked"
"""End of the names of integer tensors: counters of BatchNorms."""
COUNTERS = (*checks.DTYPES, torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
"""Types of counters; some training scripts convert all tensors of a file."""
VARIANCE = "running_var"
"""End of the names of tensors without negative values."""

HARMLESS = ("torch.", "collections.", "argparse.Namespace")
"""Starts of the names that a file of tensors and plain values calls."""

SYSTEM = (
    *("posix", "nt", "os", "sys", "builtins", "__builtin__", "eval", "exec", "getattr", "open"),
    *("__import__", "subprocess", "commands", "runpy", "shutil", "importlib", "socket", "pty"),
    *("ctypes", "code", "codeop", "pickle", "_pickle", "timeit", "webbrowser", "multiprocessing"),
)
"""Modules and functions that no file of weights needs."""
MOST_COMPRESSED = 1 << 24
"""Bytes that an archive may hold in compressed form, such as the code of TorchScript."""

MOST_LISTED = 10
"""Keys of each kind that an error or a report lists."""

Mismatched = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Name -> shape in the file, shape in the model."""


class Checkpoint(NamedTuple):
    """The weights of a file."""

    state_dict: dict[str, Tensor]
    """By this library's names."""
    family: Family
    """The family that has these names."""
    source: Source
    """The implementation that has the names in the file."""
    guessed: bool
    """Whether the source was found by the names."""
    name: str
    """The name of the file, for messages."""
    entry: str
    """The entry of the file that holds the weights; empty if the file is the state dict."""
    average: str
    """The entry with the moving average, where the plain weights were read; empty if none."""
    pooling: Pooling | None
    """The pooling that the file records."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did; print it."""

    name: str
    """The name of the file."""
    source: Source
    """The implementation with the names in the file: "official", "timm" (also the names of this
    library) or "transformers"."""
    entry: str
    """The entry of the file that held the weights; empty if the file is the state dict."""
    pooling: Pooling
    """The pooling of the model's attentions from now on."""
    tensors: int
    """Number of tensors loaded."""
    notes: tuple[str, ...]
    """Choices and adaptations, as sentences."""
    missing: tuple[str, ...] = ()
    """Names that the file lacks; these tensors are unchanged (`strict=False`)."""
    unexpected: tuple[str, ...] = ()
    """Names that the model lacks (`strict=False`)."""
    mismatched: tuple[str, ...] = ()
    """Names of tensors with another shape; they are unchanged (`strict=False`)."""

    def __str__(self) -> str:
        where = f"{self.name}, entry {self.entry!r}" if self.entry else self.name
        lines = [f"{self.tensors} tensors from {where}, named as in {self.source}", *self.notes]
        for kind in ("missing", "unexpected", "mismatched"):
            keys = getattr(self, kind)
            if keys:
                lines.append(f"{kind}: {listed(keys, MOST_LISTED)}")
        return "\n  ".join(lines)


class CheckpointMismatchError(ValueError):
    """A checkpoint does not fit the model.

    Attributes:
        missing: names that only the model has.
        unexpected: names that only the file has.
        mismatched: name -> shape in the file, shape in the model.
    """

    def __init__(
        self, message: str, missing: list[str], unexpected: list[str], mismatched: Mismatched
    ) -> None:
        self.missing, self.unexpected, self.mismatched = missing, unexpected, mismatched
        shapes = [
            f"{shown(key)}: {theirs} in the file, {ours} in the model"
            for key, (theirs, ours) in mismatched.items()
        ]
        kinds = (
            ("Only in the model", missing),
            ("Only in the file", unexpected),
            ("Of different shape", shapes),
        )
        lines = [message]
        for title, keys in kinds:
            listing = [f"    {shown(key)}" for key in keys[:MOST_LISTED]]
            lines += [f"{title}:", *listing] if keys else []
            if len(keys) > MOST_LISTED:
                lines.append(f"    and {len(keys) - MOST_LISTED} more")
        super().__init__("\n  ".join(lines))


def load_checkpoint(
    model: Network,
    checkpoint: str | Path | Mapping[str, Any] | nn.Module,
    *,
    source: Source | None = None,
    prefix: str = "",
    ema: bool = False,
    pooling: Pooling | None = None,
    fresh_heads: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Load weights of the official code, timm, transformers or this library, and set the pooling.

    The same weights with another pooling give other outputs. So the pooling of the attentions is
    set as well: to the one that the file records (files of `save_checkpoint` do), else to the one
    that the source computes. The report says which.

    If anything does not fit, or cannot be copied, the model stays unchanged. Weights of another
    floating-point type are cast, which the report says. Three differences are adapted:

    * Heads. A model with one head gets the mean of two heads, a model with two heads gets a single
      head twice; the outputs in evaluation mode stay the same.
    * Models without heads (`features_only`, `num_classes=0`) ignore heads, and with `out_indices`
      the stages that they do not have. Their `feature_norms`, which classifiers lack, stay
      unchanged.
    * Layer scales. A model with use_layer_scale=False takes the weights of a transformers model
      with use_layer_scale=False, of which the convolutions still have layer scales: these are
      multiplied into the preceding weights.

    Args:
        model: a network of this library.
        checkpoint: a .pth or .safetensors file, or its content: a dict, or a module, of which the
            state dict is used. Training checkpoints hold the weights in the entry "model" or
            "state_dict"; prefixes of wrappers are removed.
        source: implementation with the names in the file: "official", "timm" (also the names of
            this library) or "transformers"; None finds it by the names.
        prefix: load only the names that start with it, such as "backbone." in a detector.
        ema: load the moving average of the weights ("model_ema" or "state_dict_ema").
        pooling: "l2", "softmax", "sum" or "linear"; None takes that of the file or source.
        fresh_heads: keep the heads of the model, for another number of classes.
        strict: False loads the tensors that fit and reports the others.

    Returns:
        A report; print it.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a file that is missing, damaged or holds something else; tensors without data
            of their own (on the meta device, expanded, sparse, empty), with NaN or infinity, of
            another type than float16, bfloat16, float32 and float64, or that cannot be copied; a
            source or pooling that is ambiguous; no moving average with ema=True.
        CheckpointMismatchError: a ValueError that lists the names that do not fit.
        ImportError: a .safetensors file without safetensors installed.

    Example:
        >>> from swiftkernels.models import SwiftFormer
        >>> model = SwiftFormer((8, 16), (1, 2), num_classes=5)
        >>> weights = SwiftFormer((8, 16), (1, 2), num_classes=5).state_dict()
        >>> print(load_checkpoint(model, {"model": weights, "epoch": 3}))
        106 tensors from the dict, entry 'model', named as in timm
          pooling: l2, as in timm
    """
    for name, flag in (("ema", ema), ("fresh_heads", fresh_heads), ("strict", strict)):
        checks.check_option(name, flag, (True, False))
    family = family_of(model)
    found = read_checkpoint(checkpoint, source=source, prefix=prefix, ema=ema, family=family)
    return load_weights(model, found, pooling=pooling, fresh_heads=fresh_heads, strict=strict)


def load_weights(
    model: Network,
    found: Checkpoint,
    *,
    pooling: Pooling | None = None,
    fresh_heads: bool = False,
    strict: bool = True,
) -> LoadReport:
    """The second step of `load_checkpoint`, after `read_checkpoint`."""
    chosen, reason = _choose_pooling(model, found, pooling)
    own = model.state_dict()
    if any(t.is_meta for t in own.values()):
        raise ValueError(
            "model must have memory for the weights; it is on the meta device. Allocate the memory "
            "first: model.to_empty(device='cpu')."
        )
    fit = fit_to(own, found, fresh_heads=fresh_heads, strict=strict)
    too_large = [
        k
        for k, t in fit.weights.items()
        if _is_narrower(own[k].dtype, t.dtype) and not _is_finite(t.to(own[k].dtype))
    ]
    if too_large:
        raise ValueError(
            f"{found.name} must hold values that the types of the model can represent; those of "
            f"{listed(too_large)} become infinite. Convert the model: model.double()."
        )
    _change(model, own, fit.weights, chosen, found.name)
    notes = [f"pooling: {chosen}, {reason}", *_casts(found.state_dict, own, fit.weights)]
    if found.average:
        notes.append(
            f"weights: the file also holds their moving average, {found.average!r}; ema=True "
            "loads it"
        )
    return LoadReport(
        name=found.name,
        source=found.source,
        entry=found.entry,
        pooling=chosen,
        tensors=len(fit.weights),
        notes=(*notes, *fit.notes),
        missing=tuple(fit.missing),
        unexpected=tuple(fit.unexpected),
        mismatched=tuple(fit.mismatched),
    )


class Fit(NamedTuple):
    """The weights of a checkpoint, compared with those of a model."""

    weights: dict[str, Tensor]
    """The weights that fit, by the model's names, in its shapes."""
    missing: list[str]
    unexpected: list[str]
    mismatched: Mismatched
    notes: list[str]
    """What was adapted."""


def fit_to(
    own: Mapping[str, Tensor], found: Checkpoint, *, fresh_heads: bool = False, strict: bool = True
) -> Fit:
    """The weights of a checkpoint for a model with the state dict `own`, which may be on meta.

    Raises:
        CheckpointMismatchError: something does not fit, or with strict=False nothing fits.
    """
    given, unchanged, notes = _adapt(found, own, fresh_heads)
    missing = [k for k in own if k not in given and k not in unchanged]
    unexpected = [k for k in given if k not in own]
    both = {k: t for k, t in given.items() if k in own}
    mismatched = {
        k: (tuple(t.shape), tuple(own[k].shape))
        for k, t in both.items()
        if not _same_without_ones(t, own[k])
    }
    fitting = {k: t.reshape(own[k].shape) for k, t in both.items() if k not in mismatched}
    if not fitting or (strict and (missing or unexpected or mismatched)):
        if mismatched and set(mismatched) <= set(HEADS):
            reason = (
                "It was trained on another number of classes: pass fresh_heads=True to keep the "
                "model's own heads and train them."
            )
        else:
            reason = found.family.explain_mismatch(found.state_dict, own)
        message = f"{found.name} does not fit the model. {reason}".rstrip()
        raise CheckpointMismatchError(message, missing, unexpected, mismatched)
    return Fit(fitting, missing, unexpected, mismatched, notes)


def _casts(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], loaded: Iterable[str]
) -> Iterator[str]:
    """Notes on the weights that were given in another type than that of the model."""
    casts: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    for k in loaded:
        if k in given and given[k].dtype != own[k].dtype:
            casts.setdefault((given[k].dtype, own[k].dtype), []).append(k)
    for (theirs, ours), names in casts.items():
        yield f"cast from {theirs} to {ours}: {listed(names, 2)}"


def _is_narrower(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a type has infinities where another one has finite values."""
    if not (dtype.is_floating_point and other.is_floating_point):
        return False
    return torch.finfo(dtype).max < torch.finfo(other).max


@torch.no_grad()
def _change(
    model: nn.Module,
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    pooling: Pooling,
    name: str,
) -> None:
    """Copy weights into a model with the state dict `own`, and set its pooling.

    If anything fails, or is interrupted, the model is restored.
    """
    before = {k: own[k].clone() for k in weights}
    poolings = [(attention, attention.pooling) for attention in _attentions(model)]
    try:
        for k, t in weights.items():
            own[k].copy_(t)
        for attention, _ in poolings:
            attention.pooling = pooling
    except BaseException as error:
        for attention, old in poolings:
            attention.pooling = old
        for k, t in before.items():
            with contextlib.suppress(RuntimeError):  # of a tensor that was not changed either
                own[k].copy_(t)
        if not isinstance(error, Exception):  # an interruption
            raise
        reason = str(error).strip().split("\n")[-1].strip()
        raise ValueError(
            f"{name} cannot be copied into the model, which is unchanged. {reason}"
        ) from error


def read_checkpoint(
    checkpoint: str | Path | Mapping[str, Any] | nn.Module,
    *,
    source: Source | None = None,
    prefix: str = "",
    ema: bool = False,
    family: Family | None = None,
) -> Checkpoint:
    """The weights of a file by this library's names.

    Args:
        checkpoint, source, prefix, ema: as in `load_checkpoint`, with the same errors.
        family: the family of the weights; None finds it by the names.
    """
    if source is not None:
        checks.check_option("source", source, SOURCES)
    content: Mapping[str, Any]
    if isinstance(checkpoint, nn.Module):
        name, content = f"the {type(checkpoint).__name__}", {WEIGHTS[0]: checkpoint}
    elif isinstance(checkpoint, Mapping):
        name, content = "the dict", checkpoint
    elif isinstance(checkpoint, (str, Path)):
        name, content = shown(checkpoint), _read(Path(checkpoint))
    else:
        raise TypeError(
            "checkpoint must be a path, or a dict or module read from a file; got "
            f"{type(checkpoint).__name__}."
        )
    content = _without_modules(content)
    entry, average = _entry(content, ema, name)
    weights = _unwrap(content[entry] if entry else content, prefix, name)
    if isinstance(checkpoint, nn.Module):
        entry = ""
    candidates = families() if family is None else (family,)
    guesses = {f: guess for f in candidates if (guess := f.guess_source(weights)) is not None}
    guessed = source is None
    if source is not None:
        # A family without these names raises the error that lists them.
        family = next((f for f, guess in guesses.items() if guess == source), candidates[0])
    elif guesses:
        family, source = next(iter(guesses.items()))
    else:
        known = " or ".join(f.network.__name__ for f in candidates)
        raise ValueError(
            f"{name} must hold the weights of a {known}, with the names of {', '.join(SOURCES)}; "
            f"it has {listed(list(weights), 5)}. If they are part of a larger model, pass the "
            "start of their names, as prefix='backbone.'. To list unknown names, pass "
            "source='official'."
        )
    state_dict = family.convert(weights, source, family.own_names)
    recorded = _recorded_pooling(content)
    return Checkpoint(state_dict, family, source, guessed, name, entry, average, recorded)


def save_checkpoint(model: Network, path: str | Path, target: Source = "timm") -> None:
    """Write the weights of a model for another implementation, or for `load_checkpoint`.

    Args:
        model: a network of this library.
        path: a .safetensors file, else a file as from torch.save. The latter holds the weights in
            "model" and the pooling in "pooling"; for transformers, which expects it, the weights
            only.
        target: implementation of which to write the names: "official", "timm" (also the names of
            this library) or "transformers". The official code and transformers always have two
            heads: a single head is written twice, which gives the same outputs in evaluation mode.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown target, a target that computes another pooling than the model, or a
            path that is not a file in an existing folder.
        OSError: the file could not be written; an older file is unchanged.
        ImportError: a .safetensors file without safetensors installed.
    """
    family = family_of(model)
    checks.check_option("target", target, tuple(family.implementations))
    path = check_file("path", path)
    implementation = family.implementations[target]
    pooling = own_pooling(model)
    if pooling not in implementation.runnable:
        raise ValueError(
            f"target={target!r} computes pooling {' or '.join(implementation.runnable)}; the model "
            f"has {pooling!r}, so its weights would give other outputs there. To write them "
            "anyway, use convert_state_dict."
        )
    weights = {k: t.detach().cpu().contiguous() for k, t in model.state_dict().items()}
    weights = family.convert(family.complete(weights, target), family.own_names, target)
    if path.suffix.lower() == ".safetensors":
        content = _safetensors().torch.save(weights, {"format": "pt", "pooling": pooling})
        with replacing(path) as file:
            file.write(content)
        return
    entries = weights if implementation.weights_only else {"model": weights, "pooling": pooling}
    with replacing(path) as file:
        torch.save(entries, file)


def _adapt(
    found: Checkpoint, own: Mapping[str, Tensor], fresh_heads: bool
) -> tuple[dict[str, Tensor], set[str], list[str]]:
    """Weights for a model with other parts, names of tensors that stay unchanged, and notes."""
    given = dict(found.state_dict)
    notes = found.family.adapt(given, own)
    # Old files lack these counters, which have no effect with a fixed momentum.
    unchanged = {k for k in own if k.endswith("num_batches_tracked")}
    heads = {k for k in HEADS if k in own}
    if not heads:
        norms = {k for k in own if k.startswith("feature_norms.")}
        if norms and not norms & set(given):
            unchanged |= norms
            notes.append("feature_norms: unchanged, the file has none")
        parts = {_part(k) for k in own}
        # A backbone may also lack stages and the final BatchNorm.
        optional = ("norm.", "stages.", "feature_norms.") if norms else ()
        ignored = [k for k in HEADS if k in given]
        ignored += [k for k in given if k.startswith(optional) and _part(k) not in parts]
        if ignored:
            given = {k: t for k, t in given.items() if k not in ignored}
            listing = ", ".join(dict.fromkeys(map(_part, ignored)))
            notes.append(f"ignored, as the model has none: {listing}")
    elif fresh_heads:
        unchanged |= heads
        given = {k: t for k, t in given.items() if k not in HEADS}
        notes.append("heads: unchanged, those of the file are ignored (fresh_heads)")
    elif "head_dist.weight" in own and "head.weight" in given and HEADS[2] not in given:
        given |= {k.replace("head.", "head_dist."): given[k] for k in HEADS[:2] if k in given}
        notes.append("heads: both are copies of the only head of the file")
    elif "head_dist.weight" not in own and all(k in given for k in HEADS):
        dist = given.pop("head_dist.weight"), given.pop("head_dist.bias")
        if all(given[k].shape == t.shape for k, t in zip(HEADS, dist, strict=False)):
            for k, t in zip(HEADS, dist, strict=False):
                given[k] = (given[k] + t) / 2
        notes.append("head: the mean of the two heads of the file, so the output is the same")
    return given, unchanged, notes


def _part(name: str) -> str:
    """The stage, or other top-level part, that holds a tensor."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] in ("stages", "feature_norms") else 1])


def _choose_pooling(
    model: Network, found: Checkpoint, requested: Pooling | None
) -> tuple[Pooling, str]:
    """The pooling for these weights, and the reason."""
    if requested is not None:
        checks.check_option("pooling", requested, POOLINGS)
        return requested, "as requested"
    if found.pooling is not None:
        return found.pooling, "as recorded in the file"
    implementation, own = found.family.implementations[found.source], own_pooling(model)
    own_names = found.source == found.family.own_names
    if own_names and found.guessed and own != implementation.pooling:
        raise ValueError(
            f"pooling must be given for {found.name}: it records none, and its names are those of "
            f"{found.source} and of this library. The model has {own!r}, {found.source} computes "
            f"{implementation.pooling!r}. Pass pooling={own!r}, or source={found.source!r}."
        )
    return implementation.pooling, implementation.reason


def _same_without_ones(a: Tensor, b: Tensor) -> bool:
    # Layer scales are [C] or [C, 1, 1], and pointwise convolutions may be linear layers.
    return [n for n in a.shape if n != 1] == [n for n in b.shape if n != 1]


def _attentions(model: nn.Module) -> list[AttentionForward]:
    return [m for m in model.modules() if isinstance(m, AttentionForward)]


def own_pooling(model: nn.Module) -> Pooling:
    """The pooling of the attentions of a model.

    Raises:
        ValueError: they have several.
    """
    poolings: set[Any] = {attention.pooling for attention in _attentions(model)}
    if len(poolings) > 1:
        raise ValueError(
            f"model must have one pooling; its attentions have {', '.join(sorted(poolings))}."
        )
    return poolings.pop()


def _read(path: Path) -> Mapping[str, Any]:
    """The content of a file; for safetensors with its recorded pooling in the entry "pooling"."""
    if path.is_dir():
        raise ValueError(
            f"checkpoint must be a .pth or .safetensors file; {shown(path)} is a folder; "
            "from_pretrained reads those."
        )
    content = read_file(path, "checkpoint")
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{shown(path)} must hold a dict of weights; it holds a {type(content).__name__}."
        )
    return content


def read_file(path: Path, argument: str) -> Any:
    """The content of a file of torch.save or safetensors, on the CPU; no code in it is run.

    Args:
        path: the file; one of safetensors gives a dict, as of `save_checkpoint`.
        argument: name of the argument in errors.

    Raises:
        ValueError: no such file, a damaged file, or one that holds more than tensors and values.
        ImportError: a .safetensors file without safetensors installed.
    """
    name = shown(path)
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise ValueError(f"{argument} must be a .pth or .safetensors file; {name} {what}.")
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(
            f"{argument} must be a file that can be read; {name}: {error.strerror}."
        ) from error
    is_safe = path.suffix.lower() == ".safetensors"
    library = _safetensors() if is_safe else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about the format
            if library is not None:
                with library.safe_open(path, framework="pt") as file:
                    tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
                    pooling = (file.metadata() or {}).get("pooling")
                return {"model": tensors, "pooling": pooling} if pooling else tensors
            _check_zip(path)
            # Training scripts store their arguments in a Namespace, which holds only values. On
            # exit, the context removes all its classes from the list of the process, so pass only
            # new ones.
            new = {argparse.Namespace} - set(torch.serialization.get_safe_globals())
            with torch.serialization.safe_globals(list(new)):
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every format raises its own errors
        held = [] if is_safe else _refused(error, path)
        if not held:
            raise ValueError(_damaged(path, error)) from error
        if held[0].split(".")[0] in SYSTEM:
            raise ValueError(
                f"{name} holds code, a call of {held[0]}, which was not run. A file of weights has "
                "no use for it: it may be an attack."
            ) from error
        raise ValueError(
            f"{name} holds a {held[0]}, which is neither a tensor nor a plain value; loading it "
            "could run any code, and nothing was run. If you trust the file: load_checkpoint("
            "model, torch.load(path, map_location='cpu', weights_only=False)). Then "
            "save_checkpoint(model, 'weights.pth') writes a file of tensors only."
        ) from error


def _check_zip(path: Path) -> None:
    """Raise ValueError if an archive of torch.save claims much more data than it has.

    PyTorch allocates the claimed memory before it reads; torch.save compresses nothing.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            claimed = sum(record.file_size for record in archive.infolist())
        if claimed > path.stat().st_size + MOST_COMPRESSED:
            raise ValueError(f"it claims to hold {claimed:,} bytes, more than its size")


def _refused(error: Exception, path: Path) -> list[str]:
    """The functions and classes that a file calls, if it was refused for one of them."""
    if not isinstance(error, pickle.UnpicklingError):
        return []
    named = re.search(r"nsupported (?:global: )?GLOBAL (.+?)(?: was not| whose module)", str(error))
    called = [named[1]] if named else [n for n in _called(path) if not n.startswith(HARMLESS)]
    return [shown(name) for name in called]


def _called(path: Path) -> Iterator[str]:
    """The functions and classes named in a pickle, which is not run."""
    with contextlib.suppress(Exception):  # of damaged files
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = b"".join(archive.read(n) for n in archive.namelist() if n.endswith(".pkl"))
        else:
            data = path.read_bytes()
        texts: list[str] = []
        for operation, argument, _ in pickletools.genops(data):
            if operation.name in ("GLOBAL", "INST"):
                yield str(argument).replace(" ", ".")
            elif operation.name == "STACK_GLOBAL":
                yield ".".join(texts[-2:])
            elif isinstance(argument, str):
                texts.append(argument)


def _damaged(path: Path, error: Exception) -> str:
    text = "the file is empty" if path.stat().st_size == 0 else str(error).strip()
    lines = text.split("\n")
    # PyTorch's own advice comes first.
    reason = next((line for line in lines[1:] if line and line[0] not in "\tPC"), lines[0])
    return (
        f"{shown(path)} cannot be read as a checkpoint ({type(error).__name__}: "
        f"{shown(reason.split('. ')[0])}). It must be a .safetensors file, or a file written by "
        "torch.save."
    )


def _safetensors() -> Any:
    need("safetensors.torch", "hub", "A .safetensors file")
    return need("safetensors", "hub", "A .safetensors file")


def _entry(content: Mapping[str, Any], ema: bool, name: str) -> tuple[str, str]:
    """The entry to read ("": the content itself), and a moving average that is not read."""
    plain = [k for k in WEIGHTS if isinstance(content.get(k), Mapping)]
    averages = [k for k in AVERAGES if isinstance(content.get(k), Mapping)]
    if ema:
        if not averages:
            entries = [str(k) for k, value in content.items() if value is not None]
            held = listed(entries, 8) if plain else "only weights"
            raise ValueError(
                f"{name} must hold a moving average of the weights for ema=True, in "
                f"{' or '.join(map(repr, AVERAGES))}; it holds {held}. Leave out ema=True to load "
                "the weights."
            )
        return averages[0], ""
    if averages and not plain:
        raise ValueError(
            f"{name} holds only the moving average of the weights, {averages[0]!r}: pass ema=True "
            "to load it."
        )
    return (plain or [""])[0], (averages or [""])[0]


def _without_modules(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The content with state dicts in place of modules, and with their pooling if it has none."""
    modules = {k: m for k, m in content.items() if isinstance(m, nn.Module)}
    poolings = {a.pooling for m in modules.values() for a in _attentions(m)}
    recorded = {"pooling": poolings.pop()} if len(poolings) == 1 else {}
    return recorded | dict(content) | {k: m.state_dict() for k, m in modules.items()}


def _check_numbers(weights: Mapping[str, Tensor], name: str) -> None:
    """Raise ValueError unless all tensors are stored, and hold numbers that weights can be."""
    check_stored(weights, name)
    for key, t in weights.items():
        if t.dtype not in (COUNTERS if key.endswith(COUNTER) else checks.DTYPES):
            what = f"has the type {t.dtype}"
        elif key.endswith(VARIANCE) and bool((t < 0).any()):
            what = "has negative variances"
        else:
            continue
        raise ValueError(
            f"{name} must hold weights of type float16, bfloat16, float32 or float64; "
            f"{shown(key)!r} {what}."
        )
    check_finite(weights, name)


def check_stored(weights: Mapping[str, Tensor], name: str) -> None:
    """Raise ValueError unless every tensor stores all its values.

    A small file can name tensors of any size without data, for which copying would allocate memory.
    """
    for key, t in weights.items():
        if t.layout is not torch.strided:
            what = f"is not dense: its layout is {t.layout}"
        elif t.is_meta:
            what = "has no data: it is on the meta device"
        elif t.numel() == 0:
            what = f"is empty: its shape is {tuple(t.shape)}"
        elif t.untyped_storage().nbytes() < t.numel() * t.element_size():
            what = f"is expanded: it has less data than its shape {tuple(t.shape)} needs"
        else:
            continue
        raise ValueError(f"{name} must hold tensors with all their data; {shown(key)!r} {what}.")


def check_finite(weights: Mapping[str, Tensor], name: str) -> None:
    """Raise ValueError if there is NaN or infinity in the tensors; the message names them."""
    infinite = [key for key, t in weights.items() if not _is_finite(t)]
    if infinite:
        raise ValueError(
            f"{name} must hold finite values; NaN or infinity is in {listed(infinite)}. Its "
            "training may have diverged: use an earlier checkpoint."
        )


def _is_finite(t: Tensor) -> bool:
    # The sum needs no memory, and is not finite if a value is not; it may also overflow.
    return math.isfinite(t.sum()) or bool(t.isfinite().all())


def _unwrap(weights: Mapping[str, Any], prefix: str, name: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without the prefixes of wrappers."""
    weights = dict(weights)
    if len(weights) > 1:
        weights.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
    unnamed = [repr(k) for k in weights if not isinstance(k, str)]
    if unnamed:
        raise ValueError(f"{name} must hold tensors by their names; got {listed(unnamed)}.")
    others = [k for k, t in weights.items() if not isinstance(t, Tensor)]
    if others or not weights:
        held = f"not a tensor: {listed(others, 5)}" if others else "it is empty"
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
            f"prefix must be the start of names in {name}; got {prefix!r}, and the names are "
            f"{listed(list(weights), 5)}."
        )
    weights = {k.removeprefix(prefix): t for k, t in weights.items() if k.startswith(prefix)}
    _check_numbers(weights, name)
    return weights


def _recorded_pooling(content: Mapping[str, Any]) -> Pooling | None:
    """The pooling that a file of this library records; training checkpoints do in "args"."""
    arguments = content.get("args", {})
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    found = content.get("pooling")
    if found is None and isinstance(arguments, Mapping):
        found = arguments.get("pooling")
    return next((pooling for pooling in POOLINGS if pooling == found), None)
