"""`accelerate`: run the attention layers of existing models on the kernels of this library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from swiftkernels.integrations import probe
from swiftkernels.integrations.probe import LayerSpec, Variant
from swiftkernels.ops import linear_parts
from swiftkernels.ops.additive_attention.layer import AttentionForward, Names
from swiftkernels.ops.types import Backend
from swiftkernels.utils import checks

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11


@dataclass(frozen=True)
class LayerReport:
    """What `accelerate` did with one layer."""

    name: str
    kind: str
    """The name of its class."""
    variant: Variant | None
    """What it computes; None if it was not changed."""
    reason: str
    """Why it was not changed; empty if it was."""
    called: Mapping[str, str] = field(default_factory=dict)
    """Its linear layers that are called, not read by the kernels, and why."""

    def __str__(self) -> str:
        name = self.name or "(the model)"
        if self.variant is None:
            return f"{name}: {self.kind} not changed, {self.reason}"
        text = f"{name}: {self.kind}, {self.variant}"
        return f"{text}, not fused: {linear_parts.listed(self.called)}" if self.called else text


class Undoable:
    """A change with a method `undo`; as a context manager it is undone at the end of the block."""

    def __init__(self, undo: list[Callable[[], None]]) -> None:
        self._undo = undo

    def undo(self) -> None:
        """Undo the change; a second call does nothing."""
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
    """What `accelerate` did; `undo` restores the forward of every layer.

    Attributes:
        layers: a report for every layer that was inspected, changed or not.
    """

    def __init__(self, layers: list[LayerReport], undo: list[Callable[[], None]]) -> None:
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
    backend: Backend = "auto",
    recompute: bool | None = None,
) -> Acceleration:
    """Run the additive attentions of a model on the kernels of this library, in place.

    Layers of the official code, timm, transformers and forks are found by the names of their parts:
    `to_query`, `to_key`, `proj` or `Proj`, `final`, `w_g`, or those in `names`. Pooling and
    normalisation of a layer are found by running a copy once, in float64 on random tokens, and
    comparing its output with that of all variants. A layer is not changed if no variant matches, if
    it has more than these parts, if its forward takes more than x, or if its `forward` was replaced
    on the instance; the result says why.

    The model itself is not run: no hook is called, and no buffer or random state changes. All
    layers are inspected before the first one changes.

    Each layer becomes an instance of a subclass of its class, with another forward. Parameters and
    their names, hooks, modes and references in optimizers stay, and nothing outside the model
    changes. A linear layer that is more than a weight and a bias (an adapter, a quantised layer, a
    layer with hooks) is called instead of read, now or when it becomes such a layer later; the
    result and `swiftkernels.doctor` report it.

    Args:
        model: any module; it may be such a layer itself.
        names: names of the parts in a fork, by the names in this library: {"to_query": "q", ...}.
        backend: backend of the accelerated layers.
        recompute: `recompute` of the accelerated layers, see `AdditiveAttention`.

    Returns:
        A report of all layers; print it. It has a method `undo()` and is a context manager.

    Raises:
        TypeError, ValueError: a wrong argument, or a model without such layers.

    Example:
        >>> model = timm.create_model("swiftformer_xs")  # doctest: +SKIP
        >>> print(accelerate(model))  # doctest: +SKIP
        4 of 4 additive attentions accelerated
          stages.0.blocks.2.attn: EfficientAdditiveAttention, pooling l2
          ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    checks.check_option("backend", backend, get_args(Backend))
    checks.check_option("recompute", recompute, (None, True, False))
    given = _given_names(names)
    layers: list[LayerReport] = []
    found: list[tuple[nn.Module, Names, LayerSpec]] = []
    for name, module in model.named_modules():
        own = probe.part_names(module, given)
        if own is None:
            continue
        spec, reason = probe.inspect_layer(module, own)
        kind = type_before_parametrizations(module).__name__
        if spec is None:
            layers.append(LayerReport(name, kind, None, reason))
            continue
        called = linear_parts.called(module, own[:4])
        layers.append(LayerReport(name, kind, spec.variant, "", called))
        found.append((module, own, spec))
    if not layers:
        raise ValueError(
            f"model must hold additive attentions; {type(model).__name__} holds none. For a fork "
            "with other names of the parts, pass them: names={'to_query': ..., ...}."
        )
    # All layers are inspected before the first one changes.
    undo = [_replace_class(*layer, backend, recompute) for layer in found]
    return Acceleration(layers, undo)


def _given_names(names: Mapping[str, str] | None) -> Names | None:
    if names is None:
        return None
    if not isinstance(names, Mapping) or not all(isinstance(n, str) for n in names.values()):
        raise TypeError(
            "names must map the names of the parts in this library to those in the layer, as in "
            f"{{'to_query': 'q'}}; got {names!r}."
        )
    ours = {"to_query": "query", "to_key": "key", "proj": "proj", "final": "final", "w_g": "w_g"}
    unknown = sorted(set(names) - set(ours))
    if unknown:
        raise ValueError(
            f"names must have keys from {', '.join(ours)}; got {', '.join(map(repr, unknown))}."
        )
    return Names()._replace(**{ours[name]: theirs for name, theirs in names.items()})


def _replace_class(
    module: nn.Module, names: Names, spec: LayerSpec, backend: Backend, recompute: bool | None
) -> Callable[[], None]:
    """Give a layer the forward of this library; returns a function that undoes it."""
    kind = type_before_parametrizations(module)
    accelerated = accelerated_class(kind, names)
    attributes = spec.attributes(backend, recompute)
    before = {name: vars(module)[name] for name in attributes if name in vars(module)}
    changed = _with_base(type(module), kind, accelerated)
    assert changed is not None
    vars(module).update(attributes)
    module.__class__ = changed

    def undo() -> None:
        restored = _with_base(type(module), accelerated, kind)
        if restored is None:
            return  # other code has changed its class since: leave it
        module.__class__ = restored
        AttentionForward.invalidate(module)  # type: ignore[arg-type]
        for name in attributes:
            vars(module).pop(name, None)
        vars(module).update(before)

    return undo


def _with_base(
    kind: type[nn.Module], old: type[nn.Module], new: type[nn.Module]
) -> type[nn.Module] | None:
    """The class `kind` with `new` in place of `old`, among its bases too; None without `old`.

    PyTorch derives classes for single layers, for parametrizations (`parametrize`) and sharding
    (`fully_shard`), and restores their base class when it removes them.
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


_classes: dict[tuple[type[nn.Module], Names], type[nn.Module]] = {}


def accelerated_class(kind: type[nn.Module], names: Names) -> type[nn.Module]:
    """The subclass of a layer's class with the forward of this library."""
    if (kind, names) in _classes:
        return _classes[kind, names]

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # For pickle and copy, which cannot find the class by its name.
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
    accelerated = accelerated_class(kind, names)
    return accelerated.__new__(accelerated)


def _scripted(
    self: Any, x: Tensor, mask: Tensor | None, return_weights: bool, residual_scale: Tensor | None
) -> Tensor:
    """For TorchScript and `torch.fx`: the forward of the layer's own class."""
    if mask is not None or return_weights or residual_scale is not None:
        raise ValueError("an accelerated layer takes only x in TorchScript and torch.fx.")
    out: Tensor = self._published_forward(x)
    return out


def _renamed(function: Any, name: str) -> Any:
    """The same function under another name: TorchScript calls methods by the function's name."""
    if not isinstance(function, FunctionType):
        return function
    same = FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    same.__kwdefaults__, same.__annotations__ = function.__kwdefaults__, function.__annotations__
    vars(same).update(vars(function))
    return same
