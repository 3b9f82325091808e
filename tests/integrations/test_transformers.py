"""`register`: transformers builds its models with these kernels."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

from swiftkernels import register, warmup
from swiftkernels.integrations.transformers import ATTENTION
from swiftkernels.ops.additive_attention.layer import AttentionForward
from tests.integrations.test_accelerate import Extended, randn


def accelerated(model: nn.Module) -> list[AttentionForward]:
    return [m for m in model.modules() if isinstance(m, AttentionForward)]


def test_models_are_built_with_the_kernels_while_registered(transformers, tmp_path):
    config = transformers.SwiftFormerConfig(num_labels=3)
    plain = transformers.SwiftFormerForImageClassification(config).eval()
    plain.save_pretrained(tmp_path)
    build, auto = type(plain).from_pretrained, transformers.AutoModelForImageClassification
    x = randn(1, 3, 64, 64)
    with register(backend="reference") as done:
        model, fresh = build(tmp_path).eval(), auto.from_config(config)
        assert not accelerated(type(plain)(config))  # a constructor does not use the mapping
    assert str(done).endswith("with these kernels, pooling sum")
    assert not accelerated(build(tmp_path))
    assert len(accelerated(fresh)) == 4
    assert len(warmup(fresh)) == 4
    assert list(model.state_dict()) == list(plain.state_dict())
    for layer, theirs in zip(
        accelerated(model), plain.swiftformer.encoder.network[::2], strict=True
    ):
        assert isinstance(layer, type(theirs.blocks[-1].attn))
        assert (layer.pooling, layer.backend) == ("sum", "reference")
    with torch.no_grad():
        expected = plain(x).logits
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(accelerated(other)) == 4
            torch.testing.assert_close(other(x).logits, expected)


def test_undo_ends_only_its_own_registration(transformers):
    patching = pytest.importorskip("transformers.monkey_patching")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = register()
    assert torch.equal(torch.rand(1), expected)
    with pytest.raises(ValueError, match="is already in the patch mapping"):
        register()
    first.undo()
    assert ATTENTION not in patching.get_patch_mapping()
    with register():
        first.undo()
        assert ATTENTION in patching.get_patch_mapping()
        patching.unregister_patch_mapping([ATTENTION])


def test_changed_attention_of_transformers_raises(transformers, monkeypatch):
    modeling = transformers.models.swiftformer.modeling_swiftformer

    class Other(Extended):
        def __init__(self, config: object, dim: int) -> None:
            super().__init__(dim)

    monkeypatch.setattr(modeling, ATTENTION, Other)
    with pytest.raises(ValueError, match="cannot be replaced: it computes something else"):
        register()


def test_missing_transformers_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.monkey_patching", None)
    with pytest.raises(ImportError, match="register needs transformers 5 or newer"):
        register()
    with pytest.raises(ValueError, match="backend"):
        register(backend="gpu")
