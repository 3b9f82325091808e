"""The kernels of this library for other people's models.

`accelerate` changes the attention layers that a model has, `register` what transformers builds.
"""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from swiftkernels import checks, reference
from swiftkernels.modules import AttentionForward, Names
from swiftkernels.reference import POOLINGS, Options

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11

OFFICIAL = Names(proj="Proj")
TRANSFORMERS = "SwiftFormerEfficientAdditiveAttention"
EPS = 1e-12
PROBE = (2, 5)
"""Items and tokens that tell the variants apart."""
TOLERANCE = 1e-6
"""Relative error, in float64, up to which a variant is the layer's own."""


class Variant(NamedTuple):
    """What a layer computes beyond its weights."""

    pooling: str
    qk_norm: bool
    layout: str
    """"channels_last" for [B, N, C], "channels_first" for [B, C, H, W], "auto" for both."""

    def __str__(self) -> str:
        return f"pooling {self.pooling}{'' if self.qk_norm else ', no norms'}"


@dataclass(frozen=True)
class Layer:
    """What became of one layer that may be an additive attention."""

    name: str
    kind: str
    """Its class."""
    variant: Variant | None
    """None: it was left alone."""
    reason: str
    """Why it was left alone; empty if it was not."""

    def __str__(self) -> str:
        if self.variant is None:
            return f"{self.name or '(the model)'}: {self.kind} left alone, {self.reason}"
        return f"{self.name or '(the model)'}: {self.kind}, {self.variant}"


class Undoable:
    """Something that was done; `undo` takes it back. As a context manager it does so at the end."""

    def __init__(self, undo: list[Callable[[], None]]) -> None:
        self._undo = undo

    def undo(self) -> None:
        """Take it back; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


class Acceleration(Undoable):
    """What `accelerate` did; `undo` gives the layers their own behaviour again.

    Attributes:
        layers: every layer that was looked at, changed or not.
    """

    def __init__(self, layers: list[Layer], undo: list[Callable[[], None]]) -> None:
        super().__init__(undo)
        self.layers = layers

    def __str__(self) -> str:
        changed = sum(layer.variant is not None for layer in self.layers)
        head = f"{changed} of {len(self.layers)} additive attentions accelerated"
        return "\n".join([head, *(f"  {layer}" for layer in self.layers)])


def accelerate(
    model: nn.Module,
    *,
    names: Mapping[str, str] | None = None,
    backend: str = "auto",
    recompute: bool | None = None,
) -> Acceleration:
    """Let the additive attentions of a model run on this library's kernels, in place.

    Found are the layers of the official code, timm, transformers and forks by the parts they hold:
    `to_query`, `to_key`, `proj` or `Proj`, `final`, `w_g`, or what `names` says. What each of them
    computes, the pooling and whether it normalises queries and keys, is told by running a copy
    once, in float64 on random tokens, beside all variants. A layer that none of them matches is
    left alone, and the result says why.

    Parameters, their names, hooks, modes and references that optimizers hold stay what they are; a
    layer gets another forward by becoming an instance of a subclass of its class. Nothing global
    changes.

    Args:
        model: any module; it may be such a layer itself.
        names: what a fork calls the parts, by this library's names: {"to_query": "q", ...}.
        backend: of the accelerated layers.
        recompute: of the accelerated layers.

    Returns:
        What was done, by layers; print it. With `undo()`, and a context manager.

    Raises:
        TypeError, ValueError: a wrong argument, or a model without any such layer.

    Example:
        >>> model = timm.create_model("swiftformer_xs")  # doctest: +SKIP
        >>> print(accelerate(model))  # doctest: +SKIP
        4 of 4 additive attentions accelerated
          stages.0.blocks.2.attn: EfficientAdditiveAttention, pooling l2
          ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    checks.check_option("backend", backend, checks.BACKENDS)
    checks.check_option("recompute", recompute, (None, True, False))
    given = _given_names(names)
    layers: list[Layer] = []
    undo: list[Callable[[], None]] = []
    for name, module in model.named_modules():
        parts = _parts(module, given)
        if parts is None:
            continue
        kind = type(module).__name__
        variant, reason = _variant(module, parts)
        layers.append(Layer(name, kind, variant, reason))
        if variant is not None:
            undo.append(_swap(module, parts, variant, backend, recompute))
    if not layers:
        raise ValueError(
            f"model must hold additive attentions; {type(model).__name__} holds none. Of a fork "
            "that calls its parts otherwise, tell how: names={'to_query': ..., ...}."
        )
    return Acceleration(layers, undo)


class Registration(Undoable):
    """What `register` did; `undo` ends it for models that are built afterwards.

    Attributes:
        variant: what the attention of transformers computes, and the models built from now on do.
    """

    def __init__(self, variant: Variant, undo: Callable[[], None]) -> None:
        super().__init__([undo])
        self.variant = variant

    def __str__(self) -> str:
        return f"transformers builds {TRANSFORMERS} with these kernels, {self.variant}"


def register(*, backend: str = "auto", recompute: bool | None = None) -> Registration:
    """Let the SwiftFormers that transformers builds from now on run on this library's kernels.

    It enters a class for their attention into the patch mapping of transformers (5 or newer), which
    `from_pretrained` and `from_config` follow, and constructors within
    `transformers.monkey_patching.apply_patches()`; a bare constructor does not. The layers are
    subclasses of the replaced one, with its parameters and its outputs: what it computes is told by
    running it once. For models that exist there is `accelerate`.

    This changes how transformers builds models in the whole process, until `undo`. Models that were
    built in between stay as they are.

    Args:
        backend: of the layers.
        recompute: of the layers.

    Returns:
        What was done; print it. With `undo()`, and a context manager.

    Raises:
        ImportError: transformers is not installed, or has no patch mapping.
        ValueError: a wrong argument; the class is in the mapping already; or it computes something
            else.

    Example:
        >>> with register():  # doctest: +SKIP
        ...     model = AutoModelForImageClassification.from_pretrained("MBZUAI/swiftformer-xs")
    """
    checks.check_option("backend", backend, checks.BACKENDS)
    checks.check_option("recompute", recompute, (None, True, False))
    try:
        patching: Any = importlib.import_module("transformers.monkey_patching")
        modeling: Any = importlib.import_module(
            "transformers.models.swiftformer.modeling_swiftformer"
        )
        kind = getattr(modeling, TRANSFORMERS)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"register needs transformers 5 or newer, with its patch mapping ({error}): pip "
            "install -U transformers. swiftkernels.accelerate(model) works with any version."
        ) from error
    if TRANSFORMERS in patching.get_patch_mapping():
        raise ValueError(
            f"{TRANSFORMERS} is in the patch mapping of transformers already. Take that back "
            "first: .undo() of its registration, or unregister_patch_mapping."
        )
    with torch.random.fork_rng(devices=[]):
        example = kind(None, PROBE[1])
    names = _parts(example, None)
    variant, reason = _variant(example, names) if names else (None, "its parts are others")
    if names is None or variant is None:
        raise ValueError(f"{TRANSFORMERS} of this transformers is left alone: {reason}.")

    accelerated: Any = _accelerated(kind, names)

    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        accelerated.__init__(self, *args, **kwargs)
        vars(self).update(_attributes(self, names, variant, backend, recompute))

    # A class of its own: that of `accelerate` is given to layers which have been built.
    registered = type(accelerated.__name__, (accelerated,), {"__init__": build})
    patching.register_patch_mapping({TRANSFORMERS: registered})

    def undo() -> None:
        if patching.get_patch_mapping().get(TRANSFORMERS) is registered:
            patching.unregister_patch_mapping([TRANSFORMERS])

    return Registration(variant, undo)


def _given_names(names: Mapping[str, str] | None) -> Names | None:
    if names is None:
        return None
    ours = {"to_query": "query", "to_key": "key", "proj": "proj", "final": "final", "w_g": "w_g"}
    unknown = sorted(set(names) - set(ours))
    if unknown:
        raise ValueError(
            f"names must map some of {', '.join(ours)}; got {', '.join(map(repr, unknown))}."
        )
    return Names()._replace(**{ours[name]: theirs for name, theirs in names.items()})


def _parts(module: nn.Module, given: Names | None) -> Names | None:
    """The names of a module's parts, if it is an additive attention to all appearances."""
    for names in (given,) if given else (Names(), OFFICIAL):
        if names is None:
            continue
        linears = [getattr(module, name, None) for name in names[:4]]
        w_g = getattr(module, names.w_g, None)
        if all(isinstance(m, nn.Linear) for m in linears) and isinstance(w_g, Tensor):
            return names
    return None


def _variant(module: nn.Module, names: Names) -> tuple[Variant | None, str]:
    """What the layer computes; or None, and why it is not known."""
    if isinstance(module, AttentionForward):
        return None, "it has these kernels"
    parts = [getattr(module, name) for name in names[:4]]
    tensors = [
        *(t for part in parts[:2] for t in (part.weight, part.bias)),
        getattr(module, names.w_g).flatten(),
        *(t for part in parts[2:] for t in (part.weight, part.bias)),
    ]
    if any(t is not None and t.is_meta for t in tensors):
        return None, "its weights have no values yet (device meta)"
    exact: Any = [None if t is None else t.detach().double().cpu() for t in tensors]
    in_dims, token_dim = parts[0].in_features, parts[3].out_features
    x = torch.randn(
        *PROBE, in_dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    outputs, reason = _outputs(module, x)
    scale = _scale(module, token_dim)
    found: dict[tuple[str, bool], list[str]] = {}
    for pooling, qk_norm in itertools.product(POOLINGS, (True, False)):
        options = Options(pooling, qk_norm, scale, EPS)
        try:
            arguments: Any = (x, *exact, None, options)
            expected = reference.additive_self_attention(*arguments)
        except RuntimeError:
            return None, "its weights do not fit together as in an additive attention"
        for layout, out in outputs.items():
            if out.shape == expected.shape and _near(out, expected):
                found.setdefault((pooling, qk_norm), []).append(layout)
    if not outputs:
        return None, f"it takes neither [B, N, {in_dims}] nor [B, {in_dims}, H, W] ({reason})"
    if not found:
        return None, "it computes something else: no pooling gives its output"
    if len(found) > 1:
        return None, "with its weights several poolings give the same output"
    ((pooling, qk_norm), layouts) = found.popitem()
    return Variant(pooling, qk_norm, layouts[0] if len(layouts) == 1 else "auto"), ""


def _near(out: Tensor, expected: Tensor) -> bool:
    error, largest = (out - expected).abs().max(), expected.abs().max()
    return bool(error <= TOLERANCE * largest)


def _scale(module: nn.Module, token_dim: int) -> float:
    own = getattr(module, "scale_factor", None)
    return float(own) if isinstance(own, (int, float)) else token_dim**-0.5


def _outputs(module: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], str]:
    """What a copy of the layer makes of x [B, N, C] in either layout, past its hooks; why not."""
    outputs, reason = {}, ""
    try:
        twin = copy.deepcopy(module).double().cpu().eval()
    except Exception as error:
        return {}, f"no copy could be made: {type(error).__name__}: {error}"
    images = x.transpose(1, 2).unsqueeze(2)  # [B, C, 1, N]
    for layout, argument in (("channels_last", x), ("channels_first", images)):
        try:
            with torch.no_grad():
                out = type(module).forward(twin, argument)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        if isinstance(out, Tensor):
            outputs[layout] = out if layout == "channels_last" else out.flatten(2).transpose(1, 2)
    return outputs, reason


def _swap(
    module: nn.Module, names: Names, variant: Variant, backend: str, recompute: bool | None
) -> Callable[[], None]:
    """Give the layer the forward of this library; returns what takes that back."""
    kind = type(module)
    attributes = _attributes(module, names, variant, backend, recompute)
    before = {name: vars(module)[name] for name in attributes if name in vars(module)}
    vars(module).update(attributes)
    module.__class__ = _accelerated(kind, names)

    def undo() -> None:
        if type(module) is not _accelerated(kind, names):
            return  # changed again since: not ours to take back
        module.__class__ = kind
        for name in attributes:
            del vars(module)[name]
        vars(module).update(before)

    return undo


def _attributes(
    module: nn.Module, names: Names, variant: Variant, backend: str, recompute: bool | None
) -> dict[str, Any]:
    """What the forward of this library reads, beside the parts."""
    return {
        "in_dims": getattr(module, names.query).in_features,
        "scale_factor": _scale(module, getattr(module, names.final).out_features),
        "eps": EPS,
        "backend": backend,
        "recompute": recompute,
        **variant._asdict(),
    }


_classes: dict[tuple[type[nn.Module], Names], type[nn.Module]] = {}


def _accelerated(kind: type[nn.Module], names: Names) -> type[nn.Module]:
    """The subclass of a layer's class with the forward of this library."""
    if (kind, names) in _classes:
        return _classes[kind, names]

    def reduce(self: nn.Module, protocol: Any) -> Any:  # for pickle and copy: the class has no name
        reduced: Any = nn.Module.__reduce_ex__(self, protocol)
        return (_new, (kind, names), *reduced[2:])

    members = {"names": names, "__reduce_ex__": reduce, "__module__": kind.__module__}
    made = type(f"Accelerated{kind.__name__}", (AttentionForward, kind), members)
    _classes[kind, names] = made
    return made


def _new(kind: type[nn.Module], names: Names) -> nn.Module:
    accelerated = _accelerated(kind, names)
    return accelerated.__new__(accelerated)
