"""The kernels of this library for other people's models.

`accelerate` changes the attention layers that a model has, `register` what transformers builds.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from swiftkernels.backends import torch_state
from swiftkernels.ops import linear_parts
from swiftkernels.ops.additive_attention import reference
from swiftkernels.ops.additive_attention.api import BACKENDS
from swiftkernels.ops.additive_attention.layer import AttentionForward, Names
from swiftkernels.ops.additive_attention.reference import POOLINGS, Options
from swiftkernels.utils import checks

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11

OFFICIAL = Names(proj="Proj")
TRANSFORMERS = "SwiftFormerEfficientAdditiveAttention"
EPS = 1e-12
PROBES = ((2, 5, 1.0), (1, 80, 1e-6))
"""Batch elements, tokens and size of the random tokens that tell the variants apart."""
PROBE_WIDTH = 5
"""Of the layer of transformers that is probed."""
TOLERANCE = 1e-6
"""Relative error, in float64, up to which a variant is the layer's own."""


class Variant(NamedTuple):
    """What a layer computes besides its weights."""

    pooling: str
    qk_norm: bool
    layout: str
    """"channels_last" for [B, N, C], "channels_first" for [B, C, H, W], "auto" for both."""

    def __str__(self) -> str:
        return f"pooling {self.pooling}{'' if self.qk_norm else ', no norms'}"


class Known(NamedTuple):
    """What the forward of this library has to know of a layer."""

    variant: Variant
    in_dims: int
    scale: float


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
    called: Mapping[str, str] = field(default_factory=dict)
    """Its linear layers that are called, and why: it does not run fused."""

    def __str__(self) -> str:
        name = self.name or "(the model)"
        if self.variant is None:
            return f"{name}: {self.kind} left alone, {self.reason}"
        text = f"{name}: {self.kind}, {self.variant}"
        return f"{text}, not fused: {linear_parts.listed(self.called)}" if self.called else text


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
    left alone, and the result says why, as is one that holds more than these parts, whose forward
    takes more than x, or whose `forward` was replaced on the instance.

    The model itself is looked at, not run: no hook is called, no buffer and no random state is
    changed. All layers are judged before the first one changes.

    Parameters, their names, hooks, modes and references that optimizers hold stay what they are; a
    layer gets another forward by becoming an instance of a subclass of its class. Nothing global
    changes. Linear layers that are more than a weight and a bias (adapters, quantised layers, those
    with hooks) are called, now or whenever they come to be so; the result and `swiftkernels.doctor`
    say where.

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
    checks.check_option("backend", backend, BACKENDS)
    checks.check_option("recompute", recompute, (None, True, False))
    given = _given_names(names)
    layers: list[Layer] = []
    found: list[tuple[nn.Module, Names, Known]] = []
    for name, module in model.named_modules():
        own = part_names(module, given)
        if own is None:
            continue
        known, reason = _look(module, own)
        kind = type_before_parametrizations(module).__name__
        if known is None:
            layers.append(Layer(name, kind, None, reason))
            continue
        layers.append(Layer(name, kind, known.variant, "", linear_parts.called(module, own[:4])))
        found.append((module, own, known))
    if not layers:
        raise ValueError(
            f"model must hold additive attentions; {type(model).__name__} holds none. Of a fork "
            "that calls its parts otherwise, tell how: names={'to_query': ..., ...}."
        )
    # All layers are judged before the first one changes.
    undo = [_swap(*layer, backend, recompute) for layer in found]
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
    checks.check_option("backend", backend, BACKENDS)
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
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        example = kind(None, PROBE_WIDTH)
    names = part_names(example)
    known, reason = _look(example, names) if names else (None, "its parts are others")
    if names is None or known is None:
        raise ValueError(f"{TRANSFORMERS} of this transformers is left alone: {reason}.")
    variant = known.variant

    accelerated: Any = _accelerated(kind, names)

    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        accelerated.__init__(self, *args, **kwargs)
        in_dims, token_dim = _widths(self, names)
        own = Known(variant, in_dims, _scale(self, token_dim))
        vars(self).update(_attributes(own, backend, recompute))

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
    if not isinstance(names, Mapping) or not all(isinstance(n, str) for n in names.values()):
        raise TypeError(
            "names must map this library's names of the parts to the layer's, as in "
            f"{{'to_query': 'q'}}; got {names!r}."
        )
    ours = {"to_query": "query", "to_key": "key", "proj": "proj", "final": "final", "w_g": "w_g"}
    unknown = sorted(set(names) - set(ours))
    if unknown:
        raise ValueError(
            f"names must map some of {', '.join(ours)}; got {', '.join(map(repr, unknown))}."
        )
    return Names()._replace(**{ours[name]: theirs for name, theirs in names.items()})


def part_names(module: nn.Module, given: Names | None = None) -> Names | None:
    """The names of a module's parts, if it is an additive attention to all appearances.

    Nothing is computed: a parametrized w_g would be, at a look at it.
    """
    for names in (given,) if given else (Names(), OFFICIAL):
        found = [module._modules.get(name) for name in names[:4]]
        if all(part is not None for part in found) and _has_tensor(module, names.w_g):
            return names
    return None


def _has_tensor(module: nn.Module, name: str) -> bool:
    if is_parametrized(module, name):
        return True
    tensors = (module._parameters, module._buffers, vars(module))
    return any(isinstance(of.get(name), Tensor) for of in tensors)


def _look(module: nn.Module, names: Names) -> tuple[Known | None, str]:
    """What the layer computes; or None, and why it is left alone. The layer itself is not run."""
    if isinstance(module, AttentionForward):
        return None, "it has these kernels"
    if "forward" in vars(module):
        return None, "its forward was replaced"
    more = _more(module, names)
    if more:
        return None, f"it has more than the parts of an additive attention: {more}"
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return None, "its weights have no values yet (device meta)"
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch_state.without_global_hooks(),
        ):
            known, reason = _probe(_twin(module), names)
    except Exception as error:  # whatever a copy of somebody's layer may raise
        said = (f"{type(error).__name__}: {error}".strip().splitlines() or [""])[0]
        return None, f"no copy of it could be run ({said})"
    if known is not None:
        taken = _collisions(module, _attributes(known, "auto", None))
        if taken:
            return None, f"its own {', '.join(taken)} would be overwritten. Rename them"
    return known, reason


def _more(module: nn.Module, names: Names) -> str:
    """What a layer has or takes besides its five parts and x, which the kernels would leave out."""
    own = {*module._modules, *module._parameters, *module._buffers} - {*names, "parametrizations"}
    if own:
        return ", ".join(sorted(own))
    arguments = list(inspect.signature(type(module).forward).parameters)[2:]
    if arguments:
        return f"arguments {', '.join(arguments)} of its forward"
    return ""


def _collisions(module: nn.Module, attributes: Mapping[str, Any]) -> list[str]:
    """Names that this library needs and that mean something else to the layer."""
    kinds = type_before_parametrizations(module).__mro__
    theirs = {name for kind in kinds[: kinds.index(nn.Module)] for name in vars(kind)}
    ours = {name for name in vars(AttentionForward) if not name.startswith("__")} - {"forward"}
    differing = {n for n, value in attributes.items() if vars(module).get(n, value) != value}
    return sorted((ours & (theirs | vars(module).keys())) | differing)


def _twin(module: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, without hooks."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, dict) and name.endswith("hooks"):
                memo[id(value)] = type(value)()
            elif isinstance(value, Tensor):  # made by a hook: neither a parameter nor a buffer
                memo[id(value)] = _exact(value.detach())
    twin: nn.Module = copy.deepcopy(module, memo)
    return twin._apply(_exact)


def _exact(t: Tensor) -> Tensor:
    return t.double().cpu() if t.is_floating_point() else t.cpu()


def _probe(twin: nn.Module, names: Names) -> tuple[Known | None, str]:
    """What a copy of a layer computes: its output on random tokens, compared with all variants'."""
    in_dims, token_dim = _widths(twin, names)
    scale = _scale(twin, token_dim)
    generator = torch.Generator().manual_seed(0)
    candidates: set[tuple[str, bool, str]] | None = None
    for batch, n_tokens, size in PROBES:
        x = size * torch.randn(batch, n_tokens, in_dims, generator=generator, dtype=torch.float64)
        for training in (False, True) if not linear_parts.called(twin, names[:4]) else (False,):
            outputs, reason = _outputs(twin.train(training), x)
            if not outputs:
                shapes = f"[B, N, {in_dims}] nor [B, {in_dims}, H, W]"
                return None, f"it takes neither {shapes} ({reason})"
            found = _matches(twin, names, x, outputs, scale)
            candidates = found if candidates is None else candidates & found
    if not candidates:
        return None, "it computes something else: no pooling gives its output"
    variants = {(pooling, qk_norm) for pooling, qk_norm, _ in candidates}
    if len(variants) > 1:
        return None, (
            "with its weights several poolings give the same output. Load weights that are not "
            "zero first"
        )
    ((pooling, qk_norm),) = variants
    layouts = [layout for _, _, layout in candidates]
    variant = Variant(pooling, qk_norm, layouts[0] if len(layouts) == 1 else "auto")
    return Known(variant, in_dims, scale), ""


def _matches(
    twin: nn.Module, names: Names, x: Tensor, outputs: Mapping[str, Tensor], scale: float
) -> set[tuple[str, bool, str]]:
    """The poolings, norms and layouts that give these outputs for x."""
    query, key, proj, final = (getattr(twin, name) for name in names[:4])
    w_g = getattr(twin, names.w_g).flatten()
    found = set()
    for pooling, qk_norm in itertools.product(POOLINGS, (True, False)):
        options = Options(pooling, qk_norm, scale, EPS)
        expected = reference.attend(query(x), key(x), w_g, proj, final, None, options)
        for layout, out in outputs.items():
            if out.shape == expected.shape and _near(out, expected):
                found.add((pooling, qk_norm, layout))
    return found


def _widths(module: nn.Module, names: Names) -> tuple[int, int]:
    """C and D, as the query layer and `final` tell them.

    Raises:
        ValueError: they do not.
    """
    widths = []
    for name, attribute, axis in (
        (names.query, "in_features", 1),
        (names.final, "out_features", 0),
    ):
        part = getattr(module, name)
        width, weight = getattr(part, attribute, None), getattr(part, "weight", None)
        if not isinstance(width, int):
            if not isinstance(weight, Tensor) or weight.dim() != 2:
                raise ValueError(f"{name}, a {type(part).__name__}, has no {attribute}")
            width = weight.shape[axis]
        widths.append(width)
    return widths[0], widths[1]


def _near(out: Tensor, expected: Tensor) -> bool:
    error, largest = (out - expected).abs().max(), expected.abs().max()
    return bool(error <= TOLERANCE * largest)


def _scale(module: nn.Module, token_dim: int) -> float:
    own = getattr(module, "scale_factor", None)
    return float(own) if isinstance(own, (int, float)) else token_dim**-0.5


def _outputs(twin: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], str]:
    """What a copy of a layer makes of x [B, N, C] in either layout; why it makes nothing."""
    outputs, reason = {}, ""
    images = x.transpose(1, 2).unsqueeze(2)  # [B, C, 1, N]
    for layout, argument in (("channels_last", x), ("channels_first", images)):
        try:
            out = type(twin).forward(twin, argument)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        if isinstance(out, Tensor):
            outputs[layout] = out if layout == "channels_last" else out.flatten(2).transpose(1, 2)
    return outputs, reason


def _swap(
    module: nn.Module, names: Names, known: Known, backend: str, recompute: bool | None
) -> Callable[[], None]:
    """Give the layer the forward of this library; returns what takes that back."""
    kind = type_before_parametrizations(module)
    accelerated = _accelerated(kind, names)
    attributes = _attributes(known, backend, recompute)
    before = {name: vars(module)[name] for name in attributes if name in vars(module)}
    changed = _with_base(type(module), kind, accelerated)
    assert changed is not None
    vars(module).update(attributes)
    module.__class__ = changed

    def undo() -> None:
        changed_back = _with_base(type(module), accelerated, kind)
        if changed_back is None:
            return  # it has become another class since: not ours to take back
        module.__class__ = changed_back
        for name in attributes:
            vars(module).pop(name, None)
        vars(module).update(before)

    return undo


def _with_base(
    kind: type[nn.Module], old: type[nn.Module], new: type[nn.Module]
) -> type[nn.Module] | None:
    """kind with `new` in the place of `old`, itself or among the bases of classes made on the fly.

    PyTorch makes such classes of one layer each, for parametrizations (`parametrize`) and sharding
    (`fully_shard`), and takes the layer back to the base when they are removed. None: it has no
    such base.
    """
    if kind is old:
        return new
    for i, base in enumerate(kind.__bases__):
        changed = _with_base(base, old, new)
        if changed is not None:
            bases = (*kind.__bases__[:i], changed, *kind.__bases__[i + 1 :])
            members = {
                name: member
                for name, member in vars(kind).items()
                if name not in ("__dict__", "__weakref__")
            }
            return type(kind.__name__, bases, members)
    return None


def _attributes(known: Known, backend: str, recompute: bool | None) -> dict[str, Any]:
    """What the forward of this library reads, besides the parts."""
    return {
        "in_dims": known.in_dims,
        "scale_factor": known.scale,
        "eps": EPS,
        "backend": backend,
        "recompute": recompute,
        **known.variant._asdict(),
    }


def _scripted(
    self: Any, x: Tensor, mask: Tensor | None, return_weights: bool, residual_scale: Tensor | None
) -> Tensor:
    """For TorchScript and `torch.fx`: the layer's own forward."""
    if mask is not None or return_weights or residual_scale is not None:
        raise ValueError("an accelerated layer takes x alone in TorchScript and torch.fx.")
    out: Tensor = self._published_forward(x)
    return out


def _renamed(function: Any, name: str) -> Any:
    """The same function under another name, which is what TorchScript calls a method by."""
    if not isinstance(function, FunctionType):
        return function
    same = FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    same.__kwdefaults__, same.__annotations__ = function.__kwdefaults__, function.__annotations__
    vars(same).update(vars(function))
    return same


_classes: dict[tuple[type[nn.Module], Names], type[nn.Module]] = {}


def _accelerated(kind: type[nn.Module], names: Names) -> type[nn.Module]:
    """The subclass of a layer's class with the forward of this library."""
    if (kind, names) in _classes:
        return _classes[kind, names]

    def reduce(self: nn.Module, protocol: Any) -> Any:  # for pickle and copy: the class has no name
        reduced: Any = nn.Module.__reduce_ex__(self, protocol)
        return (_new, (kind, names), *reduced[2:])

    members = {
        "names": names,
        "_published_forward": _renamed(kind.forward, "_published_forward"),
        "_scripted": _scripted,
        "__reduce_ex__": reduce,
        "__module__": kind.__module__,
    }
    made = type(f"Accelerated{kind.__name__}", (AttentionForward, kind), members)
    _classes[kind, names] = made
    return made


def _new(kind: type[nn.Module], names: Names) -> nn.Module:
    accelerated = _accelerated(kind, names)
    return accelerated.__new__(accelerated)
