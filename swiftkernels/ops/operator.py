"""The operators as PyTorch knows them: choice of backend, torch.library registration, autograd.

Two operators, each with its backward: `swiftkernels::additive_self_attention` from tokens and all
weights, and `swiftkernels::additive_attention` from queries and keys. Their outputs are (out, G,
statistics, folded): what the caller wants, and what the backward needs beside the inputs. `keep`
tells the CPU kernels how much that may be: "nothing" (no backward follows), "statistics" (a few
numbers for each token) or "rows" (the unit rows of q and k too); the other backends have no choice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from swiftkernels.backends import torch_state
from swiftkernels.backends.cpu import library
from swiftkernels.backends.layouts import as_tokens, output_like
from swiftkernels.ops.additive_attention import eager, reference
from swiftkernels.ops.additive_attention.cpu import config as cpu_config
from swiftkernels.ops.additive_attention.cpu.packing import Weights
from swiftkernels.ops.additive_attention.reference import Options
from swiftkernels.ops.additive_attention.triton import config
from swiftkernels.utils import checks

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def choose_backend(backend: str, x: Tensor, width: int, from_tokens: bool = True) -> str:
    """The backend for x, tokens or (not `from_tokens`) queries; raises where an explicit one cannot
    take it."""
    checks.check_option("backend", backend, checks.BACKENDS)
    if backend == "auto":
        return _automatic_backend(x, width, from_tokens)
    if backend in ("triton", "cpu"):
        reason = _why_not_triton(x, width) if backend == "triton" else _why_not_cpu(x, from_tokens)
        if reason:
            raise ValueError(
                f"backend={backend!r} {reason}. Use backend='auto', which takes the best there is."
            )
    # torch.func and forward-mode AD differentiate the definition itself: the kernels have no such
    # rules.
    return "reference" if torch_state.transforming() else backend


def why_not(backend: str, x: Tensor, width: int) -> str:
    """Why a backend cannot take the tokens x at E = width; empty if it can."""
    try:
        choose_backend(backend, x, width)
    except ValueError as error:
        return str(error).removesuffix(" Use backend='auto', which takes the best there is.")
    return ""


def _automatic_backend(x: Tensor, width: int, from_tokens: bool) -> str:
    # Exported programs run elsewhere: they get plain operators.
    if torch_state.transforming() or torch_state.being_exported():
        return "reference"
    # Compiled, a CPU tensor does not even ask: that would trace what is cached here.
    may_be_triton = x.device.type != "cpu" or not torch.compiler.is_compiling()
    if may_be_triton and _takes_triton(x, width):
        return "triton"
    if not _why_not_cpu(x, from_tokens):
        return "cpu"
    if torch.compiler.is_compiling():
        return "reference"  # Inductor fuses the definition well
    # Measured on a CPU: the rewrite pays where the eager layer streams far more through memory than
    # it multiplies, that is for much input of narrow tokens; otherwise eager's larger GEMMs win.
    enough = (2 if torch.is_grad_enabled() else 5) * eager.CHUNK_BYTES
    pays = x.shape[1] >= 8 * width and x.numel() * x.element_size() >= enough
    return "aten" if pays else "reference"


def _takes_triton(x: Tensor, width: int) -> bool:
    # float64 is for checking: its tiles need more memory on chip than many GPUs have.
    return x.dtype != torch.float64 and not _why_not_triton(x, width)


def _why_not_triton(x: Tensor, width: int) -> str:
    """Why the Triton kernels cannot take x; empty if they can."""
    if not torch_state.has_triton():
        return "needs the package triton, which is not installed (pip install swiftkernels[triton])"
    if not torch_state.triton_takes(x.device):
        return f"needs a tensor on a CUDA, ROCm or XPU device; got one on {x.device}"
    old_triton = torch_state.too_old_triton()
    if old_triton:
        return f"needs triton 3.6 or newer, which newer builds of torch bring; got {old_triton}"
    too_old = torch_state.too_old_for_triton(x.device)
    if too_old:
        return f"needs compute capability 8.0 or newer; {x.device} has {too_old}"
    max_width = config.max_width(x.dtype)
    if width > max_width:
        return f"takes token_dim * num_heads up to {max_width} in {x.dtype}; got {width}"
    return ""


def _why_not_cpu(x: Tensor, from_tokens: bool = True) -> str:
    """Why the compiled CPU kernels cannot take x; empty if they can."""
    if not from_tokens:
        return "takes tokens and computes queries and keys itself (additive_self_attention)"
    if x.device.type != "cpu":
        return f"needs a tensor on the CPU; got one on {x.device}"
    if x.dtype == torch.float64:
        return "takes float32, bfloat16 and float16; got float64"
    return _why_no_kernels()


@torch_state.constant_under_compile
def _why_no_kernels() -> str:
    return library.why_not()


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd wants to know of a call on these."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def infer_on_cpu(x: Tensor, layer: Weights, mask: Tensor | None, options: Options) -> Tensor:
    """attention(x) by the CPU kernels or, with a layer scale, x + layer_scale * attention(x) with
    the strides of x."""
    if layer.layer_scale is None:
        out = x.new_empty(*x.shape[:2], layer.wf.shape[0])
    else:
        out = torch.empty_like(x)
    filled: Tensor = implementation("cpu").run(x, out, layer, mask, options)
    return filled


@functools.cache
def implementation(backend: str) -> ModuleType:
    """The module that launches the kernels of a backend."""
    if backend == "cpu":
        from swiftkernels.ops.additive_attention.cpu import launch as cpu_launch

        return cpu_launch
    if backend == "triton":
        # Imported at the first use: importing triton takes longer than the rest of the package.
        from swiftkernels.ops.additive_attention.triton import launch

        return launch
    return eager


class _Operator:
    """One operator and its backward: what they run, schemas, fakes, autograd, FLOP formulas.

    Attributes:
        name: after "swiftkernels::" and in the backends, where `<name>_forward` and `_backward`
            stand.
        definition: the function of `swiftkernels.ops.additive_attention.reference`.
        inputs: schema of the tensors that tokens come in; `n_inputs` is their number.
    """

    def __init__(
        self, name: str, definition: Callable[..., Tensor], inputs: str, layers: str
    ) -> None:
        self.name = name
        self.definition = definition
        self.n_inputs = inputs.count("Tensor")
        tensors = f"{inputs}, {layers}{_OUTPUT_LAYERS}"
        self.op = torch.library.custom_op(
            f"swiftkernels::{name}",
            self.run,
            mutates_args=(),
            schema=f"({tensors}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
        )
        self.backward_op = torch.library.custom_op(
            f"swiftkernels::{name}_backward",
            self.run_backward,
            mutates_args=(),
            schema=f"(Tensor dout, {tensors}, {_OPTIONS}, {_SAVED}) -> Tensor[]",
        )
        self.op.register_fake(self.fake)
        self.backward_op.register_fake(self.fake_backward)
        self.op.register_autograd(self.autograd_backward, setup_context=self.setup_context)
        # That module imports triton; whoever counts FLOPs imports it anyway.
        torch_state.when_imported("torch.utils.flop_counter", self.register_flops)

    # Tensors below are the inputs, then the weights: 1 + 9 or 2 + 5 of them, biases may be None.
    # The CPU and Triton kernels also take w_g as [E, 1], as layers have it, and the Triton kernels
    # x as an image [B, C, H, W]: every view made before would be one more node for autograd.

    def __call__(
        self,
        *tensors: Tensor | None,
        mask: Tensor | None,
        options: Options,
        backend: str,
        recompute: bool | None = None,
    ) -> Tensor:
        """The output [B, N, D], differentiable."""
        keep = "nothing"
        needs_grad = needs_gradient(*tensors)
        if needs_grad:
            if recompute is None and backend == "cpu":
                tokens, final_weight = tensors[0], tensors[-2]
                assert tokens is not None
                assert final_weight is not None
                batch, n_tokens, _ = tokens.shape
                recompute = not cpu_config.keeps_rows(batch, n_tokens, final_weight.shape[1])
            keep = "statistics" if recompute else "rows"
        if torch.compiler.is_compiling():
            return self.op(*tensors, mask, *options, backend, keep)[0]
        if needs_grad:
            return _Attention.apply(self, mask, options, backend, keep, *tensors)
        return self.call(tensors, mask, options, backend, keep)[0]

    def call(
        self,
        tensors: tuple[Tensor | None, ...],
        mask: Tensor | None,
        options: Options,
        backend: str,
        keep: str,
    ) -> Outputs:
        """The operator, past PyTorch's dispatcher where nothing listens there."""
        call = self.run if torch_state.is_plain(*tensors) else self.op
        return call(*tensors, mask, *options, backend, keep)

    def run(self, *args: Any) -> Outputs:
        """What the operator runs; arguments by its schema."""
        *tensors, mask, pooling, qk_norm, scale, eps, backend, keep = args
        options = Options(pooling, qk_norm, scale, eps)
        forward = getattr(implementation(backend), f"{self.name}_forward")
        with torch_state.autocast_off(tensors[0].device.type):
            return forward(*tensors, mask, options, keep)

    def run_backward(self, dout: Tensor, *args: Any) -> list[Tensor]:
        """What the backward operator runs; arguments by its schema."""
        *tensors, mask, pooling, qk_norm, scale, eps, backend, _ = args[:-5]
        *saved, needs_inputs, needs_weights = args[-5:]
        if dout.numel() == 0:
            return [torch.zeros_like(fake) for fake in self.fake_backward(dout, *args)]
        options = Options(pooling, qk_norm, scale, eps)
        backward = getattr(implementation(backend), f"{self.name}_backward")
        with torch_state.autocast_off(dout.device.type):
            grads = backward(
                dout, *tensors, mask, tuple(saved), options, needs_inputs, needs_weights
            )
        # An operator cannot return None in a list: an empty tensor stands for it.
        return [dout.new_empty(0) if g is None else g for g in grads]

    def fake(self, *args: Any) -> Outputs:
        """Shapes, dtypes and strides of the operator's outputs."""
        x, final_weight, backend, keep = args[0], args[-9], args[-2], args[-1]
        token_dim, width = final_weight.shape
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        shape, strides = output_like(x, token_dim)
        out = x.new_empty_strided(shape, strides)
        batch = x.shape[0]
        if backend == "cpu":
            return (
                out,
                x.new_empty(0 if keep == "nothing" else (batch, width), dtype=acc),
                x.new_empty(0 if keep == "nothing" else (batch, 3 * x.shape[1] + 1), dtype=acc),
                x.new_empty((2, batch, x.shape[1], width) if keep == "rows" else 0),
            )
        triton = backend == "triton"
        return (
            out,
            x.new_empty(batch, width, dtype=acc),
            x.new_empty(batch, 2, dtype=acc) if triton else x.new_empty(0),
            x.new_empty(token_dim, width) if triton else x.new_empty(0),
        )

    def fake_backward(self, dout: Tensor, *args: Any) -> list[Tensor]:
        """Shapes, dtypes and strides of the gradients: of the inputs' strides, or contiguous."""
        tensors, (needs_inputs, needs_weights) = args[:-12], args[-2:]
        inputs, weights = tensors[: self.n_inputs], tensors[self.n_inputs :]
        return [
            *(torch.empty_like(t) if needs_inputs else dout.new_empty(0) for t in inputs),
            *(
                dout.new_empty(0) if t is None or not needs_weights else t.new_empty(t.shape)
                for t in weights
            ),
        ]

    def gradients(self, ctx: Any, dout: Tensor) -> list[Tensor | None]:
        """Gradients of the tensors from what `_save` left in ctx; None where not needed."""
        *tensors, mask, G, statistics, folded = ctx.saved_tensors
        if torch.is_grad_enabled() or torch_state.in_batched_backward():
            # create_graph=True, or many gradients at once: these go through the definition.
            return self._definition_gradients(tensors, mask, ctx.options, ctx.needs, dout)
        needs_inputs = any(ctx.needs[: self.n_inputs])
        needs_weights = any(ctx.needs[self.n_inputs :])
        call = self.run_backward if torch_state.is_plain(dout, *tensors) else self.backward_op
        grads = call(
            dout, *tensors, mask, *ctx.options, ctx.backend, "", G, statistics, folded,
            needs_inputs, needs_weights,
        )  # fmt: skip
        return [g if need else None for g, need in zip(grads, ctx.needs, strict=True)]

    def _definition_gradients(
        self,
        tensors: list[Tensor | None],
        mask: Tensor | None,
        options: Options,
        needs: list[bool],
        dout: Tensor,
    ) -> list[Tensor | None]:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases: the tensors may be one (tied weights) or depend on each other (x on weights
            # of an earlier call), and each is to get its own share alone.
            tensors = [
                t.view_as(t) if need and t is not None else t
                for t, need in zip(tensors, needs, strict=True)
            ]
            wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
            *inputs, w_g, wp, bp, wf, bf = tensors
            x = inputs[0]
            assert w_g is not None
            assert x is not None
            if x.dim() == 4:
                inputs[0], dout = as_tokens(x), as_tokens(dout)
            out = self.definition(*inputs, w_g.flatten(), wp, bp, wf, bf, mask, options)
        grads = iter(
            torch.autograd.grad(
                out, wanted, dout, create_graph=create_graph, materialize_grads=True
            )
        )
        return [next(grads) if need else None for need in needs]

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        """For autograd under torch.compile; in eager mode see `_Attention`."""
        *tensors, mask, pooling, qk_norm, scale, eps, backend, _ = inputs
        options = Options(pooling, qk_norm, scale, eps)
        _save(ctx, tensors, mask, options, backend, output)

    def autograd_backward(self, ctx: Any, dout: Tensor, *_: Any) -> tuple[Any, ...]:
        return (*self.gradients(ctx, dout), *[None] * 7)

    def register_flops(self, flop_counter: ModuleType) -> None:
        """Tell PyTorch's FLOP counter how to count the operator and its backward."""
        register = flop_counter.register_flop_formula
        register(getattr(torch.ops.swiftkernels, self.name))(self.flops)
        register(getattr(torch.ops.swiftkernels, f"{self.name}_backward"))(self.backward_flops)

    def flops(self, *shapes: Any, **_: Any) -> int:
        """The GEMMs of the definition: query, key, proj and final."""
        token_dim, width = shapes[-9]
        projected = self.n_inputs == 1
        in_dims = shapes[1][1] if projected else width
        tokens = math.prod(shapes[0]) // in_dims
        return 2 * tokens * width * (2 * in_dims * projected + width + token_dim)

    def backward_flops(self, dout_shape: Any, *shapes: Any, **_: Any) -> int:
        """Twice the forward, as for any chain of GEMMs."""
        return 2 * self.flops(*shapes[:-5])


class _Attention(torch.autograd.Function):
    """Eager autograd. In ctx style: a `setup_context` costs 20 to 30 microseconds more a call."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: _Operator,
        mask: Tensor | None,
        options: Options,
        backend: str,
        keep: str,
        *tensors: Tensor | None,
    ) -> Tensor:
        outputs = operator.call(tensors, mask, options, backend, keep)
        ctx.operator = operator
        _save(ctx, list(tensors), mask, options, backend, outputs)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * (5 + len(ctx.needs))
        return (*[None] * 5, *ctx.operator.gradients(ctx, dout))


def _save(
    ctx: Any,
    tensors: list[Tensor | None],
    mask: Tensor | None,
    options: Options,
    backend: str,
    outputs: Outputs,
) -> None:
    """Keep the tensors, the mask, G, and what is no larger than a weight for the backward."""
    ctx.save_for_backward(*tensors, mask, *outputs[1:])
    ctx.options, ctx.backend = options, backend
    ctx.needs = [t is not None and t.requires_grad for t in tensors]
    ctx.set_materialize_grads(False)


_OUTPUT_LAYERS = (
    "Tensor w_g, Tensor proj_weight, Tensor? proj_bias, Tensor final_weight, Tensor? final_bias, "
    "Tensor? mask"
)
_OPTIONS = "str pooling, bool qk_norm, float scale, float eps, str backend, str keep"
_SAVED = (
    "Tensor global_query, Tensor statistics, Tensor folded, bool needs_inputs, bool needs_weights"
)

additive_self_attention = _Operator(
    "additive_self_attention",
    reference.additive_self_attention,
    "Tensor x",
    "Tensor query_weight, Tensor? query_bias, Tensor key_weight, Tensor? key_bias, ",
)
additive_attention = _Operator(
    "additive_attention", reference.additive_attention, "Tensor q, Tensor k", ""
)
