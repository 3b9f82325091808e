"""Every backend of every operator in PyTorch's subsystems."""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from swiftkernels.ops.operator import Call
from tests.contract.cases import (
    INTERPRETED,
    Implementation,
    assert_close,
    cast,
    definition,
    draw,
    gradients,
    ids,
    implementations,
    names,
    public,
    random_dout,
    with_tensors,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # inside torch itself
]

SMALL = (3, 6, 8, 16)

every_implementation = pytest.mark.parametrize("implementation", implementations(), ids=ids)


def arguments(implementation: Implementation, *args: Any, **kwargs: Any) -> Call:
    call = draw(implementation, *args, **{"size": SMALL} | kwargs)
    assert call is not None
    return call


def variants_of_different_shape(implementation: Implementation) -> list[str]:
    """One of each number of axes, with and without mask."""
    found: dict[object, str] = {}
    for variant in ("", *implementation.operator.variants):
        call = draw(implementation, None, SMALL, variant)
        if call is not None:
            found.setdefault((call.inputs[0].dim(), call.mask is None), variant)
    return list(found.values())


def shapes() -> list[Any]:
    return [(i, variant) for i in implementations() for variant in variants_of_different_shape(i)]


every_shape = pytest.mark.parametrize(("implementation", "variant"), shapes(), ids=ids)


# torch.library.


@every_shape
@pytest.mark.parametrize(
    "keep", ["statistics"] if INTERPRETED else ["nothing", "statistics", "rows"]
)
def test_opcheck(implementation: Implementation, variant: str, keep: str) -> None:
    """Schema, fake, autograd and compilation with dynamic shapes, of the operator and its backward.

    The input is not contiguous where nothing is kept.
    """
    operator, dtype = implementation.operator, torch.float32
    call = arguments(implementation, dtype, variant=variant)._replace(keep=keep)
    if keep == "nothing":
        call = call._replace(inputs=tuple(t.mT.contiguous().mT for t in call.inputs))
        torch.library.opcheck(operator.op, operator._flat(call))
        return
    out, *saved = operator.op(*operator._flat(call))
    if keep == "rows" and sum(t.numel() for t in saved) == statistics(call, implementation):
        return  # a backend without a choice
    backward = (torch.randn_like(out), *operator._flat(call), saved)
    torch.library.opcheck(operator.backward_op, (*backward, True, True))
    for needs in [(True, False), (False, True)]:
        torch.library.opcheck(
            operator.backward_op, (*backward, *needs), test_utils="test_faketensor"
        )
    for t in call.tensors():
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(operator.op, operator._flat(call))


def statistics(call: Call, implementation: Implementation) -> int:
    """Numbers that a forward saves if it is asked for few."""
    saved = implementation.kernels.saved_like(call.inputs, call.weights, "statistics")
    return sum(t.numel() for t in saved)


@every_shape
@pytest.mark.parametrize("fake", [True, False])
def test_fake_and_meta_tensors(implementation: Implementation, variant: str, fake: bool) -> None:
    """Get the shapes, strides and types of real ones, also of empty ones."""
    operator = implementation.operator
    for size in (SMALL, (0, *SMALL[1:])):
        call = arguments(implementation, torch.float32, size=size, variant=variant)
        real = operator(call)
        mode = FakeTensorMode()
        empty = cast(call, torch.device("meta"))
        if fake:
            empty = with_tensors(
                call, [None if t is None else mode.from_tensor(t) for t in call.tensors()]
            )
            empty = empty._replace(mask=None if call.mask is None else mode.from_tensor(call.mask))
        out = operator(empty)
        assert (out.shape, out.stride(), out.dtype) == (real.shape, real.stride(), real.dtype)


# torch.compile and torch.export.


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("implementation", "variant", "compiler"),
    [
        *((*shape, "aot_eager") for shape in shapes()),
        *((implementation, "", "inductor") for implementation in implementations()),
    ],
    ids=ids,
)
def test_compile_in_one_graph(implementation: Implementation, variant: str, compiler: str) -> None:
    operator = implementation.operator
    compiled = torch.compile(operator, fullgraph=True, backend=compiler)
    call = arguments(implementation, variant=variant)
    expected = gradients(operator, operator, call)
    for name, t in gradients(compiled, operator, call).items():
        assert_close(t, expected[name])
    assert compiled(call).stride() == operator(call).stride()


@pytest.mark.usefixtures("fresh_compiler")
@every_implementation
@pytest.mark.parametrize("training", [True, False])
def test_one_dynamic_graph(implementation: Implementation, training: bool) -> None:
    """For all sizes; it holds the operator, not the definition, which would be right as well."""
    operator, graphs = implementation.operator, []

    def counting(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    run = public(operator)
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counting)
    # Images have other sides than each other and the batch: equal sizes are one for torch.compile.
    for size in ((2, 20, 8, 16), (3, 42, 8, 16), (5, 54, 8, 16)):
        call = arguments(implementation, size=size)
        if training:
            expected = gradients(run, operator, call)
            for name, t in gradients(compiled, operator, call).items():
                assert_close(t, expected[name])
        else:
            with torch.no_grad():
                assert_close(compiled(call), run(call))
    assert len(graphs) == 1
    assert graphs[0].count(f"swiftkernels.{operator.name}.default") == 1


@pytest.mark.usefixtures("fresh_compiler")
@every_implementation
@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_hold_plain_operators(
    implementation: Implementation, strict: bool
) -> None:
    """They run where this library is not."""
    operator, call = implementation.operator, arguments(implementation)._replace(backend="auto")
    run = public(operator)

    class Model(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return run(with_tensors(call, list(tensors)))

    program = torch.export.export(Model(), call.tensors(), strict=strict)
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    targets.discard(getitem)
    assert targets
    assert all(str(target).startswith("aten.") for target in targets), targets
    assert_close(program.module()(*call.tensors()), definition(operator)(call))


# torch.func and forward-mode AD, which differentiate the definition.


def function_of_tensors(run: Callable[[Call], Tensor], call: Call) -> Callable[..., Tensor]:
    return lambda *tensors: run(with_tensors(call, list(tensors)))


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, t: torch.func.grad(
        lambda *a: f(*a).square().sum(), argnums=tuple(range(len(t)))
    )(*t),
    "vmap over weights": lambda f, t: torch.vmap(lambda c: f(*t[:-2], t[-2] * c, t[-1]))(
        torch.tensor([0.5, 1, 2], dtype=t[0].dtype, device=t[0].device)
    ),
    "vmap over batch elements": lambda f, t: torch.vmap(
        lambda x: f(x.unsqueeze(0), *(u[:1] if u.dim() == 3 else u for u in t[1:]))
    )(t[0]),
    "gradients per batch element": lambda f, t: torch.vmap(
        torch.func.grad(
            lambda w, x: f(x[None], *(u[:1] if u.dim() == 3 else u for u in t[1:-1]), w).sum()
        ),
        in_dims=(None, 0),
    )(t[-1], t[0]),
    "jvp": lambda f, t: torch.func.jvp(f, t, tuple(u.cos() for u in t)),
    "hessian": lambda f, t: torch.func.hessian(lambda b: f(*t[:-1], b).square().sum())(t[-1]),
}


def flattened(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


@every_implementation
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("auto", [False, True])
def test_transforms(implementation: Implementation, transform: str, auto: bool) -> None:
    operator, call = implementation.operator, arguments(implementation)
    if auto:
        call = call._replace(backend="auto")
    apply, tensors = TRANSFORMS[transform], call.tensors()
    exact = apply(function_of_tensors(definition(operator), call), tensors)
    found = apply(function_of_tensors(public(operator), call), tensors)
    for ours, expected in zip(flattened(found), flattened(exact), strict=True):
        assert_close(ours, expected)


@pytest.mark.usefixtures("fresh_compiler")
@every_implementation
@pytest.mark.parametrize("transform", ["grad", "vmap over batch elements", "jvp"])
def test_compiled_transforms(implementation: Implementation, transform: str) -> None:
    """The operator has no such rules: jvp through it would be zero, without an error."""
    operator, call = implementation.operator, arguments(implementation)
    apply, tensors = TRANSFORMS[transform], call.tensors()
    ours = function_of_tensors(public(operator), call)
    compiled = torch.compile(lambda: apply(ours, tensors), fullgraph=True, backend="aot_eager")
    exact = apply(function_of_tensors(definition(operator), call), tensors)
    for found, expected in zip(flattened(compiled()), flattened(exact), strict=True):
        assert_close(found, expected)


@every_implementation
def test_forward_mode(implementation: Implementation) -> None:
    operator, call = implementation.operator, arguments(implementation)
    tensors = call.tensors()
    exact = torch.func.jvp(
        function_of_tensors(definition(operator), call), tensors, tuple(t.cos() for t in tensors)
    )[1]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.cos()) for t in tensors]
        out = public(operator)(with_tensors(call, duals))
        assert_close(forward_ad.unpack_dual(out).tangent, exact)


# Autocast, checkpointing, subclasses.


@every_implementation
def test_autocast(implementation: Implementation) -> None:
    """Computes in the type of autocast, as a call with tensors of that type does."""
    operator, device = implementation.operator, implementation.device.type
    call, run = arguments(implementation, torch.float32), public(operator)
    with torch.autocast(device, torch.bfloat16):
        ours = gradients(run, operator, call)
        with torch.autocast(device, enabled=False):
            assert torch.equal(run(call), public(operator)(call))
            assert run(call).dtype == torch.float32
        half = run(cast(call, torch.float16))
    assert half.dtype == ours["output"].dtype == torch.bfloat16
    expected = gradients(run, operator, cast(call, torch.bfloat16))
    for name, t in ours.items():
        assert t.dtype == (torch.bfloat16 if name == "output" else torch.float32), name
        assert torch.equal(t, expected[name].to(t.dtype)), name


@pytest.mark.usefixtures("fresh_compiler")
@every_implementation
def test_compiled_autocast(implementation: Implementation) -> None:
    operator, device = implementation.operator, implementation.device.type
    call, run = arguments(implementation, torch.float32), public(operator)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, torch.bfloat16):
        ours, expected = (gradients(f, operator, call) for f in (compiled, run))
    for name, t in ours.items():
        assert t.dtype == expected[name].dtype, name
        assert torch.equal(t, expected[name]), name


@every_implementation
def test_autocast_keeps_float64(implementation: Implementation) -> None:
    """Under every backend that takes it."""
    if not implementation.takes(torch.float64):
        return
    call, run = arguments(implementation, torch.float64), public(implementation.operator)
    expected = run(call)
    with torch.autocast(implementation.device.type, torch.bfloat16):
        assert torch.equal(run(call), expected)


@every_shape
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(
    implementation: Implementation,
    variant: str,
    reentrant: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs the forward once more, and gives the same gradients."""
    operator, calls = implementation.operator, []
    forward = implementation.kernels.forward
    monkeypatch.setattr(
        implementation.kernels, "forward", lambda *a: calls.append(1) or forward(*a)
    )
    call = arguments(implementation, variant=variant)
    expected = gradients(operator, operator, call)
    assert len(calls) == 1

    def checkpointed(call: Call) -> Tensor:
        run = function_of_tensors(operator, call)
        return checkpoint(run, *call.tensors(), use_reentrant=reentrant)

    # torch.autograd.grad does not go through a reentrant checkpoint; .backward() does.
    leaves = [None if t is None else t.detach().requires_grad_() for t in call.tensors()]
    out = checkpointed(with_tensors(call, leaves))
    out.backward(random_dout(operator, call))
    assert len(calls) == 3
    assert torch.equal(out, expected["output"])
    for name, leaf in zip(names(operator), leaves, strict=True):
        if leaf is not None:
            assert torch.equal(leaf.grad, expected[name]), name


@every_implementation
def test_selective_checkpointing_keeps_the_operator(
    implementation: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, calls = implementation.operator, []
    forward = implementation.kernels.forward
    monkeypatch.setattr(
        implementation.kernels, "forward", lambda *a: calls.append(1) or forward(*a)
    )
    keep = [getattr(torch.ops.swiftkernels, operator.name).default]
    contexts = functools.partial(create_selective_checkpoint_contexts, keep)

    def between(call: Call) -> Tensor:
        return operator(call._replace(inputs=tuple(t.sin() for t in call.inputs))).cos()

    def checkpointed(call: Call) -> Tensor:
        run = function_of_tensors(between, call)
        return checkpoint(run, *call.tensors(), use_reentrant=False, context_fn=contexts)

    call = arguments(implementation)
    expected = gradients(between, operator, call)
    calls.clear()
    for name, t in gradients(checkpointed, operator, call).items():
        assert torch.equal(t, expected[name]), name
    assert len(calls) == 1


@every_implementation
def test_tensor_subclasses(implementation: Implementation) -> None:
    operator, call = implementation.operator, arguments(implementation)
    other = arguments(implementation, seed=1)
    pairs = [TwoTensor(a, b) for a, b in zip(call.tensors(), other.tensors(), strict=True)]
    leaves = [t.clone().requires_grad_() for t in pairs]
    out = public(operator)(with_tensors(call, leaves))
    assert type(out) is TwoTensor
    found = torch.autograd.grad(out.sum(), leaves)
    for attribute, each in (("a", call), ("b", other)):
        ones = torch.ones_like(getattr(out, attribute))
        exact = gradients(operator, operator, each, ones)
        assert_close(getattr(out, attribute).detach(), exact["output"])
        for name, t in zip(names(operator), found, strict=True):
            assert type(t) is TwoTensor
            assert_close(getattr(t, attribute), exact[name])
