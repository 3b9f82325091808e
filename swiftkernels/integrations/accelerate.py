"""`accelerate`: run layers of existing models on the kernels of this library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from swiftkernels.integrations import blocks, probe
from swiftkernels.integrations.probe import Variant
from swiftkernels.ops import linear_parts
from swiftkernels.ops.additive_attention.layer import AttentionForward, Names
from swiftkernels.ops.conv_mlp.layer import ConvMlpForward, Form, block_backend
from swiftkernels.ops.plan import KeepsPlans
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


@dataclass(frozen=True)
class BlockReport:
    """What `accelerate` did with one convolutional block."""

    name: str
    kind: str
    """The name of its class."""
    form: Form | None
    """What it computes; None if it was not changed."""
    reason: str
    """Why it was not changed; empty if it was."""

    def __str__(self) -> str:
        name = self.name or "(the model)"
        if self.form is None:
            return f"{name}: {self.kind} not changed, {self.reason}"
        return f"{name}: {self.kind}, {self.form.first} to {self.form.second} fused"


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
        layers: a report for every attention that was inspected, changed or not.
        blocks: the same for every convolutional block.
    """

    def __init__(
        self,
        layers: list[LayerReport],
        blocks: list[BlockReport],
        undo: list[Callable[[], None]],
    ) -> None:
        super().__init__(undo)
        self.layers, self.blocks = layers, blocks

    def __str__(self) -> str:
        attentions = sum(layer.variant is not None for layer in self.layers)
        blocks = sum(block.form is not None for block in self.blocks)
        lines = []
        if self.layers:
            lines += [f"{attentions} of {len(self.layers)} additive attentions accelerated"]
            lines += [f"  {layer}" for layer in self.layers]
        if self.blocks:
            lines += [f"{blocks} of {len(self.blocks)} convolutional blocks accelerated"]
            lines += [f"  {block}" for block in self.blocks]
        return "\n".join(lines)


def accelerate(
    model: nn.Module,
    *,
    names: Mapping[str, str] | None = None,
    backend: Backend = "auto",
    recompute: bool | None = None,
) -> Acceleration:
    """Run the attentions and convolutional blocks of a model on these kernels, in place.

    It is for training: a step takes less time, and less memory, because the backward of a block
    computes its hidden channels again instead of keeping them. For inference, `fuse_for_inference`
    gains more.

    Layers of the official code, timm, transformers and forks are found by the names of their parts:
    `to_query`, `to_key`, `proj` or `Proj`, `final`, `w_g`, or those in `names`. Pooling and
    normalisation of a layer are found by running a copy once, in float64 on random tokens, and
    comparing its output with that of all variants. A layer is not changed if no variant matches, if
    it has more than these parts, if its forward takes more than x, or if its `forward` was replaced
    on the instance; the result says why.

    Blocks with two pointwise convolutions and an activation between them, such as the convolutional
    encoders and MLPs of SwiftFormer, are found by the kinds of their parts, whatever their names.
    What a block computes is found in the same way, in training too. Their outputs are in
    channels_last memory format; a network that is in it throughout is faster still:
    `model.to(memory_format=torch.channels_last)`. While a part of a block is more than a layer (an
    adapter, a layer with hooks), the block runs in its own code.

    The model itself is not run: no hook is called, and no buffer or random state changes. All
    layers are inspected before the first one changes.

    Each layer becomes an instance of a subclass of its class, with another forward. Parameters and
    their names, hooks, modes and references in optimizers stay, and nothing outside the model
    changes. A linear layer that is more than a weight and a bias (an adapter, a quantised layer, a
    layer with hooks) is called instead of read, now or when it becomes such a layer later; the
    result and `swiftkernels.doctor` report it.

    Args:
        model: any module; it may be such a layer itself.
        names: names of the parts of the attention in a fork, by the names in this library:
            {"to_query": "q", ...}.
        backend: backend of the accelerated layers. Blocks without that backend are not changed.
        recompute: `recompute` of the attentions, see `AdditiveAttention`.

    Returns:
        A report of all layers; print it. It has a method `undo()` and is a context manager.

    Raises:
        TypeError, ValueError: a wrong argument, or a model without such layers and blocks.

    Example:
        >>> model = timm.create_model("swiftformer_xs")  # doctest: +SKIP
        >>> print(accelerate(model))  # doctest: +SKIP
        4 of 4 additive attentions accelerated
          stages.0.blocks.2.attn: EfficientAdditiveAttention, pooling l2
          ...
        20 of 20 convolutional blocks accelerated
          stages.0.blocks.0: ConvEncoder, pwconv1 to pwconv2 fused
          ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    checks.check_option("backend", backend, get_args(Backend))
    checks.check_option("recompute", recompute, (None, True, False))
    given = _given_names(names)
    layers: list[LayerReport] = []
    replacements: list[_Replacement] = []
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
        made = accelerated_class(type_before_parametrizations(module), own)
        replacements.append(_Replacement(module, made, spec.attributes(backend, recompute)))
    reports = []
    for block in blocks.find_blocks(model, accelerated_class):
        kind = type_before_parametrizations(block.module).__name__
        form, reason = block.form, block.reason
        if form is not None and (of_block := block_backend(backend)) != "reference":
            made = accelerated_class(type_before_parametrizations(block.module))
            attributes = {"form": form, "backend": of_block}
            replacements.append(_Replacement(block.module, made, attributes))
        elif form is not None:
            form, reason = None, f"blocks have no backend {backend!r}"
        reports.append(BlockReport(block.name, kind, form, reason))
    if not layers and not reports:
        raise ValueError(
            "model must hold additive attentions, or blocks with a pointwise convolution, an "
            f"activation and a pointwise convolution; {type(model).__name__} holds none. For a "
            "fork with other names of the parts of the attention, pass them: names={'to_query': "
            "..., ...}."
        )
    # All layers are inspected before the first one changes. Either all change, or none.
    undo: list[Callable[[], None]] = []
    try:
        for replacement in replacements:
            undo.append(replacement.make())
    except BaseException as error:
        Undoable(undo).undo()
        if not isinstance(error, TypeError):  # of Python, about the class
            raise
        raise ValueError(
            "model must hold layers whose class can be replaced; "
            f"{type(replacement.module).__name__} cannot ({error}). The model is unchanged."
        ) from error
    return Acceleration(layers, reports, undo)


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


class _Replacement(NamedTuple):
    """A layer, its new class, and the attributes that this class reads."""

    module: nn.Module
    accelerated: type[nn.Module]
    attributes: Mapping[str, Any]

    def make(self) -> Callable[[], None]:
        """Give the layer its new class; returns a function that undoes it."""
        module, accelerated, attributes = self
        kind = type_before_parametrizations(module)
        before = {name: vars(module)[name] for name in attributes if name in vars(module)}
        changed = _with_base(type(module), kind, accelerated)
        assert changed is not None
        module.__class__ = changed
        vars(module).update(attributes)

        def undo() -> None:
            restored = _with_base(type(module), accelerated, kind)
            if restored is None:
                return  # other code has changed its class since: leave it
            module.__class__ = restored
            KeepsPlans.invalidate(module)  # type: ignore[arg-type]
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


_classes: dict[tuple[type[nn.Module], Names | None], type[nn.Module]] = {}


def accelerated_class(kind: type[nn.Module], names: Names | None = None) -> type[nn.Module]:
    """The subclass of a layer's class with the forward of this library.

    Args:
        kind: of an attention or of a convolutional block.
        names: of the parts of an attention; None for a block.
    """
    if (kind, names) in _classes:
        return _classes[kind, names]

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # For pickle and copy, which cannot find the class by its name.
        reduced: Any = nn.Module.__reduce_ex__(self, protocol)
        return (_new, (kind, names), *reduced[2:])

    members: dict[str, Any] = {"__reduce_ex__": reduce, "__module__": kind.__module__}
    base: type[nn.Module] = ConvMlpForward
    if names is None:
        members["_call_parts"] = _renamed(kind.forward, "_call_parts")
    else:
        base = AttentionForward
        members["names"], members["_scripted"] = names, _scripted
        members["_published_forward"] = _renamed(kind.forward, "_published_forward")
    made = type(f"Accelerated{kind.__name__}", (base, kind), members)
    _classes[kind, names] = made
    return made


def _new(kind: type[nn.Module], names: Names | None) -> nn.Module:
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
