"""`FusedChain`: which code computes it, and when its program is renewed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels import fuse_for_inference
from swiftkernels.fusion import chain as chains
from swiftkernels.fusion.chain import FusedChain, Passed, Slot
from swiftkernels.fusion.steps import (
    Attention,
    ConvMlp,
    Convolution,
    Linear,
    Pool,
    Stem,
    Step,
)
from swiftkernels.ops.additive_attention.weights import Options, Weights
from swiftkernels.ops.conv_mlp.reference import ACTIVATIONS
from tests.fusion import networks

X = torch.randn(2, 3, 33, 41, generator=torch.Generator().manual_seed(0))


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator) / max(1, shape[-1]) ** 0.5


def conv_mlp(dim: int, kernel: int = 3, activation: str = "gelu", residual: bool = True) -> ConvMlp:
    return ConvMlp(
        randn(dim, 1, kernel, kernel) if kernel else None, randn(dim) if kernel else None,
        randn(2 * dim, dim), randn(2 * dim), randn(dim, 2 * dim), randn(dim), activation, residual,
    )  # fmt: skip


def attention(dim: int, scale: bool = True) -> Attention:
    weights = Weights(
        randn(2 * dim, dim), randn(2 * dim), randn(2 * dim, dim), None, randn(2 * dim, 1),
        randn(2 * dim, 2 * dim), randn(2 * dim), randn(dim, 2 * dim), randn(dim),
    )  # fmt: skip
    return Attention(weights, Options("l2", True, 0.5, 1e-12), randn(dim) if scale else None)


def whole() -> list[Step]:
    return [
        Stem(randn(4, 3, 3, 3), randn(4), randn(8, 4, 3, 3), randn(8)),
        conv_mlp(8), attention(8), conv_mlp(8, 0), Convolution(randn(6, 8, 3, 3), randn(6)),
        attention(6, scale=False), Pool(), Linear(randn(5, 6), randn(5)),
    ]  # fmt: skip


@pytest.fixture
def runs(monkeypatch) -> list[Slot]:
    """A stand-in for the compiled program; the slots that it was called with."""
    used: list[Slot] = []

    def run(steps: tuple[Step, ...], x: Tensor, slot: Slot) -> Tensor:
        used.append(slot)
        if slot.program is None:
            slot.program = steps
        for step in slot.program:
            x = step.plain(x)
        return x

    monkeypatch.setattr(chains, "_program", lambda _: run)
    monkeypatch.setattr(chains.library, "why_not", lambda: "")
    return used


def test_steps_are_what_their_definitions_say():
    x = randn(2, 6, 7, 9)
    step = conv_mlp(6, 5, "relu", residual=False)
    branch = F.conv2d(x, step.depthwise_weight, step.depthwise_bias, padding=2, groups=6)
    hidden = torch.einsum("hc,bcyx->bhyx", step.weight1, branch) + step.bias1.view(-1, 1, 1)
    expected = torch.einsum("ch,bhyx->bcyx", step.weight2, hidden.relu())
    expected += step.bias2.view(-1, 1, 1)
    torch.testing.assert_close(step.plain(x), expected)
    pooled = Linear(randn(5, 6), randn(5))
    out = pooled.plain(Pool().plain(x))
    assert out.shape == (2, 5, 1, 1)
    expected = x.mean((2, 3)) @ pooled.weight.T + pooled.bias
    torch.testing.assert_close(out.flatten(1), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_kernels(activation):
    for kernel in (0, 3, 5, 7):
        x = randn(1, 4, 5, 3)
        step = conv_mlp(4, kernel, activation)
        inner = conv_mlp(4, kernel, activation, residual=False)
        torch.testing.assert_close(step.plain(x), x + inner.plain(x))


def test_chains_compute_their_steps_in_order():
    steps, x = whole(), X
    for step in steps:
        x = step.plain(x)
    fused = FusedChain(steps)
    assert torch.equal(fused.plain(X), x)
    torch.testing.assert_close(fused(X), x)
    assert [type(step) for step in fused.steps] == [type(step) for step in steps]
    assert fused.steps is fused.steps
    keys = list(fused.state_dict())
    assert keys[:2] == ["stem0_weight1", "stem0_bias1"]
    assert "attention2_residual_scale" in keys
    assert "attention2_key_bias" not in keys


def test_program_runs_on_cpus_only_where_nothing_listens(runs):
    fused = FusedChain(whole())
    expected = fused.plain(X)
    assert torch.equal(fused(X), expected)
    assert runs == [fused.slot]
    with chains.plain_chains():
        fused(X)
    fused(X.clone().requires_grad_()).sum().backward()
    fused.double()(X.double())
    fused.float().to("meta")(X.to("meta"))
    fused = FusedChain(whole())
    fused(X[:0])
    torch.func.vmap(fused)(X[None])
    torch.jit.trace(fused, X, check_trace=False)
    torch.fx.symbolic_trace(fused)
    exported = torch.export.export(fused, (X,)).module()
    torch.testing.assert_close(exported(X), expected)
    assert len(runs) == 1
    with torch.no_grad():
        fused(X.clone().requires_grad_())
    fused.bfloat16()(X.bfloat16())
    assert len(runs) == 3


def test_compiled_chains_are_plain(runs, fresh_compiler):
    fused = FusedChain(whole())
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), fused.plain(X))
    assert runs == []


def change_by_loading(fused: FusedChain, other: FusedChain) -> None:
    fused.load_state_dict(other.state_dict())


def change_in_place(fused: FusedChain, other: FusedChain) -> None:
    for name, buffer in fused.named_buffers():
        buffer.copy_(other.get_buffer(name))


def change_by_registering(fused: FusedChain, other: FusedChain) -> None:
    for name, buffer in other.named_buffers():
        fused.register_buffer(name, buffer)


def change_by_assigning(fused: FusedChain, other: FusedChain) -> None:
    fused.load_state_dict(other.state_dict(), assign=True)


def change_attributes(fused: FusedChain, other: FusedChain) -> None:
    for name, t in other.named_buffers():
        setattr(fused, name, t)


@pytest.mark.parametrize(
    "change",
    [
        change_by_loading,
        change_by_assigning,
        change_attributes,
        change_in_place,
        change_by_registering,
    ],
)
def test_new_values_renew_the_program(runs, change):
    fused = FusedChain(whole())
    other = FusedChain([step.with_tensors({n: None if t is None else 2 * t for n, t in
                        step.tensors().items()}) for step in whole()])  # fmt: skip
    fused(X)
    before = fused.slot
    change(fused, other)
    assert torch.equal(fused(X), other.plain(X))
    assert fused.slot is not before


def test_moves_and_copies_have_programs_of_their_own(runs):
    fused = FusedChain(whole())
    fused(X)
    slot = fused.slot
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), copy.copy(fused)):
        assert other.slot is not slot
        assert other.slot.program is None
        assert torch.equal(other(X), fused(X))
    assert fused.slot is slot
    fused.to(torch.float64)
    assert fused.steps[0].weight1.dtype == torch.float64
    assert fused.slot is not slot


def test_wrong_maps_and_empty_chains_are_refused(runs):
    fused = FusedChain(whole())
    for x in (X[0], X[:, :2]):
        with pytest.raises(ValueError, match=r"x must have shape \[B, 3, H, W\]; got"):
            fused(x)
    for steps in ([], [Pool()]):
        with pytest.raises(ValueError, match="at least one step with weights"):
            FusedChain(steps)


def test_passed_modules_return_their_input():
    passed = Passed("stem")
    assert passed(X) is X
    assert repr(passed) == "Passed(computed by stem)"


def listening(fused: nn.Module) -> dict[str, Any]:
    """What the exporters make of a fused network."""
    with torch.no_grad():
        return {
            "torch.export": torch.export.export(fused, (X,)).module(),
            "TorchScript": torch.jit.trace(fused, X, check_trace=False),
            "torch.fx": torch.fx.symbolic_trace(fused),
        }


def test_exported_networks_hold_plain_operators(runs):
    fused = fuse_for_inference(networks.ours())
    expected = fused.plain(X)
    assert runs == []
    program = torch.export.export(fused, (X,))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names
    assert all(name.startswith("aten.") for name in names)
    for name, exported in listening(fused).items():
        torch.testing.assert_close(exported(X), expected, msg=name)
    assert runs == []
    fused(X)
    assert len(runs) == 1
