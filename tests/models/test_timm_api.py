"""The methods of timm's SwiftFormer, for our network and for timm's after `accelerate`.

Outputs and gradients are compared in float64 with those of timm's network for the same weights.
"""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swiftkernels import accelerate
from swiftkernels.models import SwiftFormer, swiftformer_xs
from swiftkernels.models.swiftformer import network
from swiftkernels.ops.additive_attention.layer import AttentionForward
from tests.models.test_models import images, randomise

WIDTHS = network.WIDTHS_AND_DEPTHS["xs"][0]
INDICES = (None, 2, [1, 0], (0, -1, 3))
"""Arguments of `forward_intermediates`, of every type."""

Kind = pytest.mark.parametrize("kind", ["ours", "accelerated"])


def theirs(timm: ModuleType, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"num_classes": 7, "dtype": torch.float64} | options
    return randomise(timm.create_model("swiftformer_xs", **options))


def make(timm: ModuleType, kind: str, **options: Any) -> Any:
    """Our network, or timm's after `accelerate`, with the weights of `theirs`."""
    model = theirs(timm, **options)
    if kind == "accelerated":
        accelerate(model)
        return model
    ours = swiftformer_xs(**{"num_classes": 7, "dtype": torch.float64} | options)
    ours.load_state_dict(model.state_dict())
    return ours


def batch(side: int = 64) -> Tensor:
    return images(2, 3, side, side, dtype=torch.float64)


def gradients(model: nn.Module, out: Any) -> dict[str, Tensor]:
    tensors = [out] if isinstance(out, Tensor) else list(out)
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = sum(t.square().sum() for t in tensors)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(found: Any, expected: Any) -> None:
    """Equal up to rounding: tensors, or lists, tuples and dicts of them."""
    if isinstance(expected, tuple):
        found, expected = tuple(found), tuple(expected)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@Kind
@pytest.mark.parametrize("training", [False, True])
def test_forward_and_backward(timm, kind, training):
    model, reference = make(timm, kind).train(training), theirs(timm).train(training)
    x = batch().requires_grad_()
    out, expected = model(x), reference(x)
    assert out.shape == (2, 7)
    assert_same(out, expected)
    grads = gradients(model, out)
    assert set(grads) == set(dict(reference.named_parameters()))
    assert_same(grads, gradients(reference, expected))
    assert_same(model.state_dict(), reference.state_dict())  # the running statistics


@Kind
def test_configuration_and_heads(timm, kind):
    model, x = make(timm, kind).eval(), batch(96)
    cfg = model.default_cfg
    assert cfg is model.pretrained_cfg
    assert cfg["crop_pct"] == 0.95
    for name in ("first_conv", "classifier"):
        for part in [cfg[name]] if isinstance(cfg[name], str) else cfg[name]:
            assert f"{part}.weight" in model.state_dict()
    with torch.no_grad():
        assert model.forward_features(x).shape == (2, 220, 3, 3)
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 220)
        model.reset_classifier(0)
        assert model(x).shape == (2, model.num_features)
        model.reset_classifier(0, "")
        assert model(x).shape == (2, 220, 3, 3)
        model.reset_classifier(11, "avg")
        assert model(x).shape == (2, 11)
        assert model.num_classes == 11
    assert [head.out_features for head in model.get_classifier()] == [11, 11]
    unpooled = make(timm, kind, num_classes=0, global_pool="").eval()
    with torch.no_grad():
        assert unpooled(x).shape == (2, 220, 3, 3)


def test_configuration_equals_timms(timm):
    ours, reference = swiftformer_xs(), timm.create_model("swiftformer_xs")
    for name, value in ours.pretrained_cfg.items():
        assert reference.pretrained_cfg[name] == value, name
    assert timm.data.resolve_model_data_config(ours) == timm.data.resolve_model_data_config(
        reference
    )
    for name in ("num_features", "head_hidden_size", "num_classes", "in_chans", "global_pool"):
        assert getattr(ours, name) == getattr(reference, name), name
    assert ours.feature_info == reference.feature_info
    assert ours.no_weight_decay() == reference.no_weight_decay()
    backbone = swiftformer_xs(features_only=True)
    assert "classifier" not in backbone.pretrained_cfg
    assert swiftformer_xs(distillation=False).pretrained_cfg["classifier"] == "head"
    assert "architecture" not in SwiftFormer((8,), (1,)).pretrained_cfg


def test_reset_heads_have_the_mode_and_dtype_of_the_network():
    model = swiftformer_xs(num_classes=3, dtype=torch.float64).eval()
    model.reset_classifier(5)
    for head in model.get_classifier():
        assert not head.training
        assert head.weight.dtype == torch.float64
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.2)
    single = swiftformer_xs(distillation=False)
    single.reset_classifier(5)
    assert single.get_classifier() is single.head
    assert "head_dist.weight" not in single.state_dict()
    for arguments, message in (((-1,), "num_classes"), ((5, "max"), "global_pool")):
        with pytest.raises(ValueError, match=message):
            single.reset_classifier(*arguments)


def test_heads_need_pooling():
    model = swiftformer_xs(global_pool="").eval()
    x = images(1, 3, 32, 32)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (1, 220, 1, 1)
    with pytest.raises(ValueError, match="global_pool must be 'avg' for logits"):
        model(x)


@Kind
def test_forward_intermediates(timm, kind):
    model, reference, x = make(timm, kind).eval(), theirs(timm).eval(), batch(32)
    with torch.no_grad():
        for indices, *flags in itertools.product(INDICES, *[(False, True)] * 3):
            names = ("norm", "stop_early", "intermediates_only")
            options = {"indices": indices, **dict(zip(names, flags, strict=True))}
            expected = reference.forward_intermediates(x, **options)
            assert_same(model.forward_intermediates(x, **options), expected)
        last, maps = model.forward_intermediates(x, norm=True)
        assert_same(model.forward_features(x), last)
        assert_same(maps[-1], last)
        assert_same(model.forward_head(last), model(x))
        assert [m.shape[1] for m in maps] == list(WIDTHS)


def test_wrong_arguments_of_forward_intermediates_raise():
    model, x = SwiftFormer((8, 16), (1, 1)), images(1, 3, 32, 32)
    for options, error, message in (
        ({"output_fmt": "NLC"}, ValueError, "output_fmt must be one of 'NCHW'; got 'NLC'"),
        ({"indices": 3}, ValueError, "indices must be from 1 to 2"),
        ({"indices": 0}, ValueError, "indices must be from 1 to 2"),
        ({"indices": [2]}, ValueError, r"indices must name stages from -2 to 1; got \(2,\)"),
        ({"indices": [-3]}, ValueError, "indices must name stages"),
        ({"indices": []}, ValueError, "indices must name stages"),
        ({"indices": [0.5]}, TypeError, "indices must be an int, a sequence"),
    ):
        with pytest.raises(error, match=message):
            model.forward_intermediates(x, **options)


def test_last_norm_is_updated_once_a_batch():
    model = SwiftFormer((8, 16), (1, 1))
    model.forward_intermediates(images(2, 3, 32, 32), norm=True)
    assert model.norm.num_batches_tracked == 1


@Kind
def test_prune_intermediate_layers(timm, kind):
    full, their_full, x = make(timm, kind).eval(), theirs(timm).eval(), batch(32)
    for indices, prune_norm, prune_head in itertools.product(
        (1, [1, -4]), (False, True), (False, True)
    ):
        model, reference = copy.deepcopy(full), copy.deepcopy(their_full)
        options = {"indices": indices, "prune_norm": prune_norm, "prune_head": prune_head}
        taken = model.prune_intermediate_layers(**options)
        assert taken == reference.prune_intermediate_layers(**options)
        assert model.num_features == model.head_hidden_size == reference.num_features
        assert model.num_classes == reference.num_classes
        assert list(model.state_dict()) == list(reference.state_dict())
        with torch.no_grad():
            last, maps = model.forward_intermediates(x, taken)
            expected = full.forward_intermediates(x, indices, intermediates_only=True)
            assert_same(maps, expected)
            assert_same(model.forward_head(last), reference(x))


def test_features_only_with_all_out_indices(timm):
    x, weights = batch(32), theirs(timm).state_dict()
    full = swiftformer_xs(features_only=True, dtype=torch.float64).eval()
    full.load_state_dict(weights, strict=False)
    randomise(full.feature_norms)
    with torch.no_grad():
        every = full(x)
        for out_indices in ((0,), (-1,), (-4, -2), (2, 1), 2, None):
            options = {"features_only": True, "dtype": torch.float64}
            reference = timm.create_model("swiftformer_xs", **options, out_indices=out_indices or 4)
            model = swiftformer_xs(**options, out_indices=out_indices).eval()
            model.load_state_dict(full.state_dict(), strict=False)
            maps = model(x)
            info, numbers = model.feature_info, reference.feature_info.out_indices
            assert info.out_indices == tuple(sorted(i % 4 for i in numbers))
            assert info.channels() == sorted(reference.feature_info.channels())
            assert info.reduction() == sorted(reference.feature_info.reduction())
            assert info.module_name() == sorted(reference.feature_info.module_name())
            assert [m.shape[1] for m in maps] == info.channels()
            assert [32 // m.shape[2] for m in maps] == info.reduction()
            assert_same(maps, [every[i] for i in info.out_indices])
            assert_same(model.forward_features(x), maps[-1])
            assert len(model.stages) == info.out_indices[-1] + 1
            assert model.num_features == info.channels()[-1]


def test_features_only_returns_the_maps_of_timm_after_norms(timm):
    options = {"features_only": True, "out_indices": (1, -1), "dtype": torch.float64}
    torch.manual_seed(0)
    reference, x = randomise(timm.create_model("swiftformer_xs", **options)), batch()
    names = {"stem_": "stem.", "stages_": "stages."}
    weights = {}
    for name, t in reference.state_dict().items():
        start = next(s for s in names if name.startswith(s))
        weights[names[start] + name.removeprefix(start)] = t
    model = swiftformer_xs(**options)
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert {name.split(".")[0] for name in missing.missing_keys} == {"feature_norms"}
    model.eval()
    accelerated = copy.deepcopy(reference).eval()
    accelerate(accelerated)
    with torch.no_grad():
        expected = reference.eval()(x)
        assert_same(accelerated(x), expected)
        maps = model.forward_intermediates(x, (1, -1), intermediates_only=True)
        assert_same(maps, expected)
        normed = [norm(m) for norm, m in zip(model.feature_norms.values(), maps, strict=True)]
        assert_same(model(x), normed)
        assert_same(model.forward_intermediates(x, (1, 3), norm=True)[1], normed)


def test_methods_for_heads_raise_without_heads():
    model = SwiftFormer((8, 16), (1, 1), features_only=True)
    assert model.num_classes == 0
    for call in (
        model.get_classifier,
        lambda: model.reset_classifier(3),
        lambda: model.prune_intermediate_layers(1),
        lambda: model.forward_head(torch.ones(1, 16, 2, 2)),
    ):
        with pytest.raises(ValueError, match="features_only=True has no heads"):
            call()
    with pytest.raises(ValueError, match="needs two heads"):
        model.set_distilled_training()


WRAPPERS = {
    "FeatureListNet": {"flatten_sequential": True},
    "FeatureDictNet": {"flatten_sequential": True},
    "FeatureHookNet": {"no_rewrite": True},
    "FeatureGetterNet": {},
    "FeatureGraphNet": {},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_feature_wrappers_of_timm_accept_our_network(timm, wrapper):
    modules = (
        importlib.import_module(f"timm.models.{name}") for name in ("_features", "_features_fx")
    )
    wrap, x = next(getattr(m, wrapper) for m in modules if hasattr(m, wrapper)), batch()
    found, expected = (
        wrap(model.eval(), out_indices=(1, -1), **WRAPPERS[wrapper])
        for model in (make(timm, "ours"), theirs(timm))
    )
    with torch.no_grad():
        assert_same(found(x), expected(x))
    assert found.feature_info.channels() == expected.feature_info.channels() == [56, 220]


def test_feature_info():
    stages = [
        {"num_chs": width, "reduction": 4 * 2**i, "module": f"stages.{i}"}
        for i, width in enumerate(WIDTHS)
    ]
    info = swiftformer_xs(features_only=True, out_indices=(-3, 3)).feature_info
    assert list(info) == info.info == stages
    assert info.channels() == [56, 220]
    assert info.channels([0, -1]) == [48, 220]
    assert info.reduction(2) == 16
    assert info.get_dicts() == [stages[1], stages[3]]
    assert info.get_dicts(["module"], 0) == {"module": "stages.0"}
    other = info.from_other(2)
    assert other.channels() == [112, 220]
    assert copy.deepcopy(other).out_indices == (2, 3)


@Kind
def test_distilled_training(timm, kind):
    model, reference, x = make(timm, kind).train(), theirs(timm).train(), batch()
    assert isinstance(model(x), Tensor)
    reference(x)
    for each in (model, reference):
        each.set_distilled_training(True)
    assert_same(model(x), reference(x))
    assert len(model(x)) == 2
    assert isinstance(model.eval()(x), Tensor)
    model.train().set_distilled_training(False)
    assert isinstance(model(x), Tensor)


@Kind
def test_grad_checkpointing(timm, kind):
    results = []
    for enable in (False, True):
        model, x = make(timm, kind).train(), batch()
        model.set_grad_checkpointing(enable)
        assert all(stage.grad_checkpointing == enable for stage in model.stages)
        out = model(x)
        results.append((out, gradients(model, out)))
        if kind == "ours":
            assert model.grad_checkpointing == enable
    assert_same(*results)


def names_of(groups: dict[int, list[str]]) -> Iterable[str]:
    return itertools.chain.from_iterable(groups.values())


def test_parameter_groups_equal_timms(timm):
    from timm.models import group_parameters
    from timm.optim import param_groups_layer_decay

    ours, reference = swiftformer_xs(), timm.create_model("swiftformer_xs")
    for coarse in (False, True):
        found = group_parameters(ours, ours.group_matcher(coarse))
        assert found == group_parameters(reference, reference.group_matcher(coarse))
        assert sorted(names_of(found)) == sorted(name for name, _ in ours.named_parameters())
        backbone = swiftformer_xs(features_only=True, out_indices=(0, 2))
        groups = group_parameters(backbone, backbone.group_matcher(coarse))
        assert set(names_of(groups)) == {name for name, _ in backbone.named_parameters()}
        # Every feature norm is in the group of the last block before it.
        assert {"feature_norms.0.weight", "stages.0.blocks.2.attn.w_g"} <= set(
            groups[1 if coarse else 3]
        )
        assert len(groups) == (4 if coarse else 13)
    decayed, expected = (
        param_groups_layer_decay(model, 0.05, layer_decay=0.75) for model in (ours, reference)
    )
    for a, b in zip(decayed, expected, strict=True):
        assert (a["lr_scale"], a["weight_decay"], len(a["params"])) == (
            b["lr_scale"],
            b["weight_decay"],
            len(b["params"]),
        )


VARIANTS = (
    {"use_layer_scale": False},
    {"act_layer": nn.SiLU},
    {"layer_scale_init_value": 0.3},
    {"in_chans": 1},
    {"proj_drop_rate": 0.2, "drop_rate": 0.3, "drop_path_rate": 0.1},
)


@Kind
@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: next(iter(options)))
def test_options_give_the_outputs_of_timm(timm, kind, options):
    model, reference = make(timm, kind, **options).eval(), theirs(timm, **options).eval()
    x = batch()[:, : options.get("in_chans", 3)]
    assert list(model.state_dict()) == list(reference.state_dict())
    with torch.no_grad():
        assert_same(model(x), reference(x))
    dropouts = [
        [m.p for m in each.modules() if isinstance(m, nn.Dropout)] for each in (model, reference)
    ]
    assert dropouts[0] == dropouts[1]
    if kind == "ours":
        blocks = [[b for s in each.stages for b in s.blocks] for each in (model, reference)]
        for ours, block in zip(*blocks, strict=True):
            assert ours.drop_path.rate == pytest.approx(getattr(block.drop_path, "drop_prob", 0.0))


def test_initial_layer_scales():
    model = swiftformer_xs(layer_scale_init_value=0.3)
    block = model.stages[0].blocks[-1]
    for scale in ("layer_scale_1", "layer_scale_2"):
        assert torch.all(getattr(block, scale).gamma == 0.3)
    assert torch.all(block.local_representation.layer_scale.gamma == 1)
    model = swiftformer_xs(use_layer_scale=False, drop_path_rate=0.2)
    assert not any("gamma" in name for name in model.state_dict())
    assert model(images(2, 3, 32, 32)).shape == (2, 1000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype):
    model = swiftformer_xs(num_classes=3, dtype=dtype).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        assert model(images(1, 3, 32, 32, dtype=dtype)).dtype == dtype
    model.reset_classifier(2)
    assert model.head.weight.dtype == dtype


def test_devices():
    for options in ({}, {"features_only": True}, {"use_layer_scale": False}):
        model = swiftformer_xs(device="meta", backend="reference", **options)
        assert all(t.is_meta for t in model.state_dict().values())


@Kind
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("convert", [torch.fx.symbolic_trace, torch.jit.script])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracing_and_scripting(timm, kind, convert, training):
    model, reference = make(timm, kind).train(training), theirs(timm).train(training)
    converted, x = convert(model), batch(32)
    out, expected = converted(x), reference(x)
    assert_same(out, expected)
    grads = gradients(reference, expected)
    assert_same(gradients(converted, out), grads)
    # The network is unchanged and shares its tensors with the converted one.
    assert_same(model.state_dict(), reference.state_dict())
    assert isinstance(model.stages[0].blocks[-1].attn, AttentionForward)
    assert_same(gradients(model.eval(), model(x)), gradients(reference.eval(), reference(x)))


OURS = (
    {},
    {"features_only": True},
    {"features_only": True, "out_indices": (0, -2)},
    {"distillation": False},
    {"num_classes": 0, "global_pool": ""},
    {"use_layer_scale": False, "act_layer": nn.SiLU},
)
"""Options of `SwiftFormer` that timm does not have, or combines in another way."""


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", OURS, ids=lambda options: "-".join(options) or "default")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_our_options_can_be_traced_and_scripted(options, training):
    torch.manual_seed(0)
    options = {"num_classes": 5, "dtype": torch.float64} | options
    model = randomise(SwiftFormer((8, 16, 24), (1, 2, 1), **options)).train(training)
    x = batch(32)
    for convert in (torch.fx.symbolic_trace, torch.jit.script):
        before = copy.deepcopy(model)
        assert_same(convert(model)(x), before(x))
        assert_same(model.state_dict(), before.state_dict())  # it shares the tensors of the network


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_drop_path_can_be_traced_and_scripted():
    drop, x = network.DropPath(0.25), torch.ones(20, 3, 2, 2)
    model = SwiftFormer((8, 16), (1, 2), num_classes=5, drop_path_rate=0.3)
    for convert in (torch.fx.symbolic_trace, torch.jit.script):
        converted = convert(drop)
        torch.manual_seed(0)
        found = converted(x)
        torch.manual_seed(0)
        assert torch.equal(found, drop(x))
        assert found.min() == 0
        # TorchScript may draw random numbers in another order and drop other images.
        assert convert(model)(images(2, 3, 32, 32)).isfinite().all()
