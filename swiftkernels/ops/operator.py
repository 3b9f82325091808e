"""Operators in PyTorch, each built from a specification by names.

The specification of an `Operator` has the names of its inputs, a named tuple of weights, a named
tuple of options, its definition in PyTorch, and its backends. From these follow its schema in
`torch.library`, the fakes for torch.compile, autograd, second derivatives (through the definition)
and the formulas of the FLOP counter. No other code knows the order of the arguments.

A backend is a module with

    class Saved(NamedTuple)         the tensors that its backward needs besides the inputs
    saved_like(inputs, weights, keep) -> Saved                          uninitialised
    forward(inputs, weights, mask, options, keep) -> (out, Saved)
    backward(dout, inputs, weights, mask, saved, options, needs) -> gradients

None of these functions is differentiable. `keep` says how much a forward keeps for the backward:
"nothing" (no backward follows), "statistics" (a few numbers per token) or "rows" (also rows of the
operator's width); a backend without a choice ignores it. The gradients are in the order of the
inputs, then of the weights; None where `needs` is False or there is no bias. A backend with a
faster path for inference also has

    inference_plan(x, weights, mask, options, residual_scale, plans) -> Plan | None

(`ops/plan.py`).
"""

from __future__ import annotations

import importlib
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftkernels.backends import torch_state
from swiftkernels.backends.layouts import output_like
from swiftkernels.utils import checks


class Needs(NamedTuple):
    """Which gradients a backward computes."""

    inputs: bool
    weights: bool


class Backend(NamedTuple):
    """The module of a backend, and the inputs that it takes."""

    module: str
    """Imported at the first use, because to import Triton takes longer than the rest."""
    why_not: Callable[[Tensor, int], str]
    """Why it cannot take an input at the operator's width, as continuation of "backend='...' ...";
    empty if it can."""
    automatic: Callable[[Tensor], bool] = lambda _: True
    """Whether backend="auto" may choose it for an input that it can take."""
    torch_gradients: bool = False
    """Whether PyTorch's operators compute its gradients, in an order of sums that may depend on
    batch and threads."""


class Call(NamedTuple):
    """The arguments of an operator."""

    inputs: tuple[Tensor, ...]
    weights: Any
    mask: Tensor | None
    options: Any
    backend: str
    keep: str

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Inputs and weights; biases may be None."""
        return (*self.inputs, *self.weights)


class Operator:
    """One operator and its backward.

    Args:
        name: after "swiftkernels::".
        inputs: names of the tensors with tokens, all of one shape.
        weights: a named tuple of tensors, with `token_dim`, the width of the output.
        options: a named tuple of str, bool and float.
        reference: the definition, `(*inputs, weights, mask, options) -> out`.
        backends: by name, in the order in which backend="auto" tries them.
        eager: the backend, or "reference", for an input that no kernels take.
        flops: multiply-adds of the definition per token, from the weights' shapes by name.
        function: the public function, "module:name", with the signature
            `(*inputs, *weights, *, backend, **options)`, and `mask` if the operator takes one.
        example: `(batch, n_tokens, in_dims, token_dim) -> Call`: random arguments from torch's
            generator, for tests and benchmarks.
        variants: by name, functions that change the arguments of an example to others that the
            operator takes: other options, a mask, an image; None where `call.backend` does not
            take them.
        layer: the module with the operator's weights as parameters, "module:name"; empty if there
            is none. It takes its width as first argument, and backend, device and dtype.
        output: shape and strides of the output for an input and `token_dim`.

    Attributes:
        op, backward_op: as registered in `torch.library`.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: Sequence[str],
        weights: Any,
        options: Any,
        reference: Callable[..., Tensor],
        backends: Mapping[str, Backend],
        eager: Callable[[Tensor, int], str],
        flops: Callable[[Mapping[str, Sequence[int]]], int],
        function: str,
        example: Callable[[int, int, int, int], Call],
        variants: Mapping[str, Callable[[Call], Call | None]] = types.MappingProxyType({}),
        layer: str = "",
        output: Callable[[Tensor, int], tuple[Sequence[int], Sequence[int]]] = output_like,
    ) -> None:
        self.name, self.inputs = name, tuple(inputs)
        self.weights, self.options = weights, options
        self.reference, self.backends, self.eager = reference, dict(backends), eager
        self._modules: dict[str, Any] = {}
        self.flops_per_token, self.output_like = flops, output
        self.example, self.variants = example, dict(variants)
        self._function, self._layer = function, layer
        self._count = len(self.inputs) + len(self.weights._fields)
        tensors = [*(f"Tensor {i}" for i in inputs), *_schema(weights), "Tensor? mask"]
        arguments = ", ".join([*tensors, *_schema(options), "str backend", "str keep"])
        saved = "Tensor[] saved, bool needs_inputs, bool needs_weights"
        self.op = torch.library.custom_op(
            f"swiftkernels::{name}",
            self._run,
            mutates_args=(),
            schema=f"({arguments}) -> Tensor[]",
        )
        self.backward_op = torch.library.custom_op(
            f"swiftkernels::{name}_backward",
            self._run_backward,
            mutates_args=(),
            schema=f"(Tensor dout, {arguments}, {saved}) -> Tensor[]",
        )
        self.op.register_fake(self._fake)
        self.backward_op.register_fake(self._fake_backward)
        self.op.register_autograd(self._differentiate, setup_context=self._setup_context)

    def __call__(self, call: Call) -> Tensor:
        """The output, differentiable; `call.keep` counts only if a backward can follow."""
        tensors = call.tensors()
        needs_grad = needs_gradient(*tensors)
        if not needs_grad:
            call = call._replace(keep="nothing")
        if torch.compiler.is_compiling():
            return self.op(*self._flat(call))[0]
        if needs_grad:
            return self.differentiable(call)
        return self._dispatch(call, tensors)[0]

    def differentiable(self, call: Call) -> Tensor:
        """The output in eager mode, recorded by autograd."""
        # autograd finds tensors only among the arguments.
        return _Function.apply(self, call, *call.inputs, *call.weights)

    def _dispatch(
        self, call: Call, tensors: Sequence[Tensor | None]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Output and saved tensors; skips PyTorch's dispatcher where nothing listens there."""
        if torch_state.is_plain(*tensors):
            return self._forward(call)
        torch_state.register_flops(self._flop_formulas())
        out, *saved = self.op(*self._flat(call))
        return out, saved

    def choose_backend(self, backend: str, x: Tensor, width: int) -> str:
        """The backend for an input.

        Args:
            backend: a name, or "auto".
            x: the first input.
            width: of the operator; for additive attention E.

        Raises:
            ValueError: an unknown name, or a backend that cannot take the input.
        """
        if backend == "auto":
            return self._automatic_backend(x, width)
        checks.check_option("backend", backend, ("auto", *self.backends, "reference"))
        if reason := self.why_not(backend, x, width):
            raise ValueError(
                f"{reason}. Use backend='auto', which chooses the best that can take the input."
            )
        # torch.func and forward-mode AD need the definition: the kernels have no rules for them.
        return "reference" if torch_state.transforming() else backend

    def why_not(self, backend: str, x: Tensor, width: int) -> str:
        """Why a backend cannot take an input; empty if it can.

        Raises:
            ValueError: an unknown name.
        """
        checks.check_option("backend", backend, (*self.backends, "reference"))
        reason = "" if backend == "reference" else self.backends[backend].why_not(x, width)
        return f"backend={backend!r} {reason}" if reason else ""

    def _automatic_backend(self, x: Tensor, width: int) -> str:
        # Exported programs run elsewhere, so they get PyTorch's operators.
        if torch_state.transforming() or torch_state.being_exported():
            return "reference"
        for name, backend in self.backends.items():
            if backend.automatic(x) and not backend.why_not(x, width):
                return name
        # Inductor fuses the definition well.
        return "reference" if torch.compiler.is_compiling() else self.eager(x, width)

    def implementation(self, backend: str) -> Any:
        """The module of a backend."""
        found = self._modules.get(backend)
        if found is None:
            found = self._modules[backend] = importlib.import_module(self.backends[backend].module)
        return found

    @property
    def function(self) -> Callable[..., Tensor]:
        """The public function."""
        function: Callable[..., Tensor] = pkgutil.resolve_name(self._function)
        return function

    @property
    def layer(self) -> type[torch.nn.Module] | None:
        """The module with the operator's weights as parameters, if there is one."""
        return pkgutil.resolve_name(self._layer) if self._layer else None

    def _flat(self, call: Call) -> tuple[Any, ...]:
        """The arguments in the order of the schema."""
        return (*call.tensors(), call.mask, *call.options, call.backend, call.keep)

    def _parse(self, args: Sequence[Any]) -> Call:
        """The inverse of `_flat`."""
        tensors, (mask, *options, backend, keep) = args[: self._count], args[self._count :]
        return self._bundle(tensors, mask, self.options(*options), backend, keep)

    def _bundle(self, tensors: Sequence[Any], *rest: Any) -> Call:
        count = len(self.inputs)
        return Call(tuple(tensors[:count]), self.weights._make(tensors[count:]), *rest)

    def _forward(self, call: Call) -> tuple[Tensor, Sequence[Tensor]]:
        run = self.implementation(call.backend).forward
        with torch_state.autocast_off(call.inputs[0].device.type):
            out, saved = run(call.inputs, call.weights, call.mask, call.options, call.keep)
        return out, saved

    def _run(self, *args: Any) -> list[Tensor]:
        out, saved = self._forward(self._parse(args))
        return [out, *saved]

    def _fake(self, *args: Any) -> list[Tensor]:
        """Shapes, dtypes and strides of the output and of what is saved."""
        call = self._parse(args)
        x = call.inputs[0]
        out = x.new_empty_strided(*self.output_like(x, call.weights.token_dim))
        saved = self.implementation(call.backend).saved_like(call.inputs, call.weights, call.keep)
        return [out, *saved]

    def _run_backward(self, dout: Tensor, *args: Any) -> list[Tensor]:
        *arguments, saved, needs_inputs, needs_weights = args
        found = self._backward(
            dout, self._parse(arguments), saved, Needs(needs_inputs, needs_weights)
        )
        # A list that an operator returns cannot contain None: an empty tensor replaces it.
        return [dout.new_empty(0) if g is None else g for g in found]

    def _backward(
        self, dout: Tensor, call: Call, saved: Sequence[Tensor], needs: Needs
    ) -> Sequence[Tensor | None]:
        if call.keep == "nothing":
            raise ValueError(
                "keep must be 'statistics' or 'rows' where a backward follows; got 'nothing'."
            )
        if dout.numel() == 0:
            return [None if t is None else torch.zeros_like(t) for t in call.tensors()]
        backend = self.implementation(call.backend)
        with torch_state.autocast_off(dout.device.type):
            gradients: Sequence[Tensor | None] = backend.backward(
                dout, call.inputs, call.weights, call.mask, backend.Saved._make(saved),
                call.options, needs,
            )  # fmt: skip
        return gradients

    def _fake_backward(self, dout: Tensor, *args: Any) -> list[Tensor]:
        """Gradients of inputs with their strides, and contiguous gradients of weights."""
        *arguments, _, needs_inputs, needs_weights = args
        call = self._parse(arguments)
        return [
            *(torch.empty_like(t) if needs_inputs else dout.new_empty(0) for t in call.inputs),
            *(
                dout.new_empty(0) if t is None or not needs_weights else t.new_empty(t.shape)
                for t in call.weights
            ),
        ]

    def _save(
        self, ctx: Any, call: Call, tensors: Sequence[Tensor | None], saved: Sequence[Tensor]
    ) -> None:
        """Save what the backward needs."""
        ctx.save_for_backward(*tensors, call.mask, *saved)
        ctx.rest = call[3:]
        ctx.needs = [t is not None and t.requires_grad for t in tensors]
        ctx.set_materialize_grads(False)

    def gradients(self, ctx: Any, dout: Tensor) -> list[Tensor | None]:
        """Gradients of inputs and weights from what `_save` saved; None where not needed."""
        found = ctx.saved_tensors
        tensors, (mask, *saved) = found[: self._count], found[self._count :]
        call = self._bundle(tensors, mask, *ctx.rest)
        if torch.is_grad_enabled() or torch_state.in_batched_backward():
            # create_graph=True, or batched gradients: by the definition.
            return self._definition_gradients(call, ctx.needs, dout)
        count = len(self.inputs)
        needs = Needs(any(ctx.needs[:count]), any(ctx.needs[count:]))
        if torch_state.is_plain(dout, *tensors):
            gradients = self._backward(dout, call, saved, needs)
        else:
            torch_state.register_flops(self._flop_formulas())
            gradients = self.backward_op(dout, *self._flat(call), saved, *needs)
        return [g if need else None for g, need in zip(gradients, ctx.needs, strict=True)]

    def _definition_gradients(
        self, call: Call, needs: Sequence[bool], dout: Tensor
    ) -> list[Tensor | None]:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases give each tensor its own share. Otherwise tied weights, or an x that depends
            # on the weights by an earlier call, would get the sum.
            tensors = [
                t.view_as(t) if need and t is not None else t
                for t, need in zip(call.tensors(), needs, strict=True)
            ]
            wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
            call = self._bundle(tensors, *call[2:])
            out = self.reference(*call.inputs, call.weights, call.mask, call.options)
        found = iter(
            torch.autograd.grad(
                out, wanted, dout, create_graph=create_graph, materialize_grads=True
            )
        )
        return [next(found) if need else None for need in needs]

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        """Save under torch.compile; in eager mode `_Function` saves."""
        self._save(ctx, self._parse(inputs), inputs[: self._count], output[1:])

    def _differentiate(self, ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
        without = 3 + len(self.options._fields)  # mask, options, backend, keep
        return (*self.gradients(ctx, grads[0]), *[None] * without)

    def _flop_formulas(self) -> dict[Any, Callable[..., int]]:
        ours = torch.ops.swiftkernels
        return {
            getattr(ours, self.name): self._flops,
            getattr(ours, f"{self.name}_backward"): self._backward_flops,
        }

    def _flops(self, *shapes: Any, **_: Any) -> int:
        """FLOPs of the definition's matrix products."""
        names = (*self.inputs, *self.weights._fields)
        by_name = dict(zip(names, shapes[: self._count], strict=True))
        x = by_name[self.inputs[0]]
        n_tokens = x[1] if len(x) == 3 else x[2] * x[3]
        return 2 * x[0] * n_tokens * self.flops_per_token(by_name)

    def _backward_flops(self, _: Any, *shapes: Any, **__: Any) -> int:
        """Twice the forward, as for any chain of matrix products."""
        return 2 * self._flops(*shapes)


class _Function(torch.autograd.Function):
    """Eager autograd, in ctx style: a `setup_context` costs 20 to 30 microseconds more per call."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: Operator,
        call: Call,
        *tensors: Tensor | None,
    ) -> Tensor:
        out, saved = operator._dispatch(call, tensors)
        ctx.operator = operator
        operator._save(ctx, call, tensors, saved)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * (2 + len(ctx.needs))
        return (None, None, *ctx.operator.gradients(ctx, dout))


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call on these."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _schema(bundle: type) -> list[str]:
    """The fields of a named tuple as arguments in a schema."""
    return [f"{_SCHEMA_TYPES[_schema_key(hint)]} {name}" for name, hint in _hints(bundle).items()]


def _hints(bundle: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(bundle)
    return {name: hints[name] for name in bundle._fields}


def _schema_key(hint: Any) -> Any:
    """The key of a type in `_SCHEMA_TYPES`; of a Literal, the type of its values."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return Tensor | None
    return type(typing.get_args(hint)[0]) if origin is typing.Literal else hint


_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    bool: "bool",
    float: "float",
}
