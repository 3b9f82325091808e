"""What changes a model or the process changes all of it, or nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from swiftkernels import accelerate, fuse_for_inference, register
from swiftkernels.fusion import find, fuse, search
from swiftkernels.integrations import accelerate as accelerating
from swiftkernels.integrations import probe
from swiftkernels.models import SwiftFormer, load_checkpoint, network
from tests.integrations.test_accelerate import Fork
from tests.models.test_checkpoints import state, trained
from tests.models.test_models import small

ERRORS = (KeyboardInterrupt, RuntimeError)


def snapshot(model: nn.Module) -> Any:
    """Classes, attributes, hooks, modes, and the identity and values of all tensors."""
    parts = {
        name: (
            type(part),
            part.training,
            {k: repr(v) for k, v in vars(part).items() if not isinstance(v, dict)},
            [len(v) for k, v in vars(part).items() if k.endswith("hooks")],
        )
        for name, part in model.named_modules()
    }
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return parts, {k: (id(t), t.requires_grad, t.tolist()) for k, t in tensors.items()}


def process() -> Any:
    """Settings of PyTorch that a function might leave changed."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_device(),
        torch.get_default_dtype(),
        torch.get_rng_state().tolist(),
        dict(nn.modules.module._global_forward_hooks),
        dict(nn.modules.module._global_forward_pre_hooks),
    )


def raise_at(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: type, call: int
) -> None:
    """Let a call of a function raise; the earlier calls and the later ones run."""
    function, calls = getattr(owner, name), []

    def raising(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise error("stop")
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, raising)


def assert_unchanged(model: nn.Module, act: Callable[[], Any], errors: Any) -> None:
    before = snapshot(model), process()
    with pytest.raises(errors):
        act()
    assert (snapshot(model), process()) == before


class Rigid(Fork):
    """Its instances get no other class."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise TypeError("class is fixed")
        super().__setattr__(name, value)


def test_accelerate_changes_all_layers_or_none():
    model = nn.Sequential(Fork(), nn.Sequential(Fork()), Rigid())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Rigid cannot .*The model is unchanged"):
        accelerate(model)
    assert snapshot(model) == before
    assert str(accelerate(model[:2])).startswith("2 of 2 additive attentions accelerated")


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (probe, "inspect_layer", 2),
        (accelerating, "accelerated_class", 2),
        (accelerating, "_with_base", 3),
    ],
)
def test_failing_accelerate_changes_nothing(owner, name, call, error, monkeypatch):
    model = nn.Sequential(Fork(), Fork(), Fork())
    raise_at(monkeypatch, owner, name, error, call)
    assert_unchanged(model, lambda: accelerate(model), error)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (fuse, "_clone", 1),
        (fuse, "_run_on_examples", 1),
        (find, "find", 1),
        (search, "_record", 1),
        (fuse, "_gives", 2),
        (fuse, "_fused", 1),
        (copy, "deepcopy", 2),
    ],
)
def test_failing_fuse_changes_nothing(owner, name, call, error, monkeypatch):
    model = trained()
    raise_at(monkeypatch, owner, name, error, call)
    assert_unchanged(model, lambda: fuse_for_inference(model), (error, ValueError))


@pytest.mark.parametrize("error", ERRORS)
def test_failing_register_changes_nothing(error, monkeypatch):
    patching = pytest.importorskip("transformers.monkey_patching")
    before = dict(patching.get_patch_mapping())
    for owner, name in ((probe, "inspect_layer"), (patching, "register_patch_mapping")):
        with monkeypatch.context() as patch:
            raise_at(patch, owner, name, error, 1)
            with pytest.raises(error):
                register()
        assert patching.get_patch_mapping() == before


@pytest.mark.parametrize("options", [{}, {"pooling": "sum"}, {"strict": False}])
def test_failing_load_changes_nothing(options):
    """The last tensor of the model cannot be written."""
    model = small()
    weights = state(trained())
    model.head_dist.bias = nn.Parameter(torch.zeros(1).expand(5), requires_grad=False)
    assert_unchanged(model, lambda: load_checkpoint(model, weights, **options), ValueError)
    poolings = iter(range(2))

    class Refusing(type(model.stages[1].blocks[2].attn)):  # type: ignore[misc]
        """The second attention accepts no pooling."""

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "pooling" and next(poolings) == 0:
                raise RuntimeError("stop")
            super().__setattr__(name, value)

    model = small()
    model.stages[1].blocks[2].attn.__class__ = Refusing
    assert_unchanged(model, lambda: load_checkpoint(model, weights, **options), ValueError)


@pytest.mark.parametrize("distillation", [True, False])
def test_heads_that_exceed_the_memory_change_nothing(distillation, monkeypatch):
    model = SwiftFormer((8, 16), (1, 1), num_classes=5, distillation=distillation)
    raise_at(monkeypatch, network, "initialise", RuntimeError, 2 if distillation else 1)
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        model.reset_classifier(7, "")
    assert snapshot(model) == before
    monkeypatch.undo()
    model.reset_classifier(7)
    assert model(torch.ones(2, 3, 32, 32)).shape == (2, 7)
