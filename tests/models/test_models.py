"""SwiftFormer: sizes of the paper, outputs of the public implementations, training, names."""

from __future__ import annotations

import copy
import doctest
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from swiftkernels import models
from swiftkernels.models import (
    SwiftFormer,
    attention_maps,
    convert_state_dict,
    detection,
    feature_info,
    recompute,
)
from swiftkernels.models import network as networks
from swiftkernels.models.family import SOURCES
from swiftkernels.models.swiftformer import checkpoints, network
from swiftkernels.models.swiftformer.checkpoints import guess_source
from swiftkernels.testing.tolerance import assert_as_good_as_eager

PUBLISHED = {
    "swiftformer_xs": (3_475_360, 0.60),
    "swiftformer_s": (6_092_128, 0.98),
    "swiftformer_l1": (12_057_920, 1.60),
    "swiftformer_l3": (28_494_736, 4.01),
}
"""Parameters with two heads, and 1e9 multiply-adds at 224 x 224, as published."""

SIZES = (
    pytest.param((224, 224), marks=pytest.mark.slow),
    pytest.param((384, 640), marks=pytest.mark.slow),
    (225, 257),
    (32, 32),
)


def small(**options: Any) -> SwiftFormer:
    torch.manual_seed(0)
    return SwiftFormer((16, 24), (2, 3), **{"num_classes": 5} | options)


def randomise(model: nn.Module) -> nn.Module:
    """Initial layer scales of 1e-5 and BatchNorm statistics would hide errors."""
    generator = torch.Generator().manual_seed(1)
    for name, t in model.state_dict().items():
        if ("layer_scale" in name or "norm" in name) and t.is_floating_point():
            t.uniform_(0.5, 1.5, generator=generator)
    return model


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_multiply_adds_are_those_of_the_paper(name):
    parameters, multiply_adds = PUBLISHED[name]
    with torch.device("meta"):
        model = getattr(models, name)(backend="reference").eval()
        x = torch.empty(1, 3, 224, 224)
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, abs=0.01)


def results(
    model: nn.Module, x: Tensor, dtype: torch.dtype, logits: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """The logits, and the gradients of the images and of all parameters, in that type."""
    model = copy.deepcopy(model).to(dtype).eval()
    x = x.to(dtype).requires_grad_()
    out = logits(model(x))
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(out.square().sum(), (x, *parameters))
    return {"logits": out.detach(), "images": grads[0], **dict(zip(names, grads[1:], strict=True))}


def assert_the_same_model(
    ours: nn.Module,
    theirs: nn.Module,
    size: tuple[int, int],
    logits: Callable[[Any], Tensor],
    source: str,
) -> None:
    """Logits and gradients: our error against float64 is at most twice theirs, and a few ulps."""
    x = images(2, 3, *size)
    exact = results(theirs, x, torch.float64, logits)
    eager = results(theirs, x, torch.float32, logits)
    mine = results(ours, x, torch.float32, lambda out: out)
    rest = [name for name in eager if name not in ("logits", "images")]
    names = convert_state_dict({name: eager[name] for name in rest}, source, "timm")
    for theirs_name, name in zip(rest, names, strict=True):
        exact[name], eager[name] = exact[theirs_name], eager[theirs_name]
    assert set(mine) == {"logits", "images", *names}
    for name, t in mine.items():
        # For a map of one token the weight is 1 or -1, and the exact gradient of w_g is zero.
        if exact[name].abs().max() < 1e-12:
            assert t.abs().max() < 1e-12, name
            continue
        # Gradients that nearly cancel have the rounding error of their much larger terms.
        assert_as_good_as_eager(t, eager[name], exact[name], ulps=64, name=name)


@pytest.mark.parametrize("size", SIZES)
def test_outputs_and_gradients_of_timm(timm, size):
    theirs = randomise(timm.create_model("swiftformer_xs"))
    ours = models.swiftformer_xs()
    ours.load_state_dict(theirs.state_dict())
    assert_the_same_model(ours, theirs, size, lambda out: out, "timm")


@pytest.mark.parametrize("size", SIZES)
def test_outputs_and_gradients_of_transformers(transformers, size):
    config = transformers.SwiftFormerConfig(num_labels=7)
    theirs = randomise(transformers.SwiftFormerForImageClassification(config))
    ours = models.swiftformer_xs(num_classes=7, pooling="sum")
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), "transformers", "timm"))
    assert_the_same_model(ours, theirs, size, lambda out: out.logits, "transformers")


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_models_have_the_shapes_of_timm(timm, name):
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), getattr(models, name)()
    assert {k: t.shape for k, t in ours.state_dict().items()} == {
        k: t.shape for k, t in theirs.state_dict().items()
    }


@pytest.mark.parametrize("target", SOURCES)
@pytest.mark.parametrize("source", SOURCES)
def test_conversions_of_names_are_inverses(source, target):
    state_dict = small().state_dict() | small(features_only=True).state_dict()
    there = convert_state_dict(convert_state_dict(state_dict, "timm", source), source, target)
    back = convert_state_dict(there, target, "timm")
    assert list(back) == list(state_dict)
    assert all(back[name] is t for name, t in state_dict.items())
    assert guess_source(there) == target


def test_official_names():
    named = convert_state_dict(small(features_only=True).state_dict(), "timm", "official")
    for name in (
        "patch_embed.0.weight",
        "network.0.1.attn.Proj.bias",
        "network.0.1.attn.w_g",
        "network.0.1.layer_scale_1",
        "network.1.proj.weight",
        "network.2.0.dwconv.weight",
        "network.2.0.layer_scale",
        "network.2.2.local_representation.layer_scale",
        "norm2.running_mean",
    ):
        assert name in named


def test_names_of_transformers_without_heads():
    headless = {"encoder.network.2.blocks.0.layer_scale": torch.ones(1)}
    assert list(convert_state_dict(headless, "transformers", "timm")) == [
        "stages.1.blocks.0.layer_scale.gamma"
    ]


def test_unknown_keys_raise():
    state_dict = {"network.0.0.dwconv.bias": torch.ones(1), "layer4.conv.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"source='official'; unknown: 'layer4\.conv\.weight'\."):
        convert_state_dict(state_dict, "official", "timm")
    with pytest.raises(ValueError, match="They look like source='timm'"):
        convert_state_dict(small().state_dict(), "transformers", "official")
    with pytest.raises(ValueError, match="target"):
        convert_state_dict({}, "timm", "keras")


def test_distilled_training_returns_both_heads_and_evaluation_their_mean():
    model, x = small(), images(4, 3, 40, 24)
    with torch.no_grad():
        assert model(x).shape == (4, 5)
        model.set_distilled_training()
        pair = model(x)
        assert isinstance(pair, networks.Logits)
        assert pair.head.shape == pair.head_dist.shape == (4, 5)
        model.eval()
        pooled = model.forward_features(x).mean((2, 3))
        mean = (model.head(pooled) + model.head_dist(pooled)) / 2
        torch.testing.assert_close(model(x), mean)
    single = small(distillation=False)
    assert not any(name.startswith("head_dist") for name in single.state_dict())
    assert single(x).shape == (4, 5)
    with pytest.raises(ValueError, match=r"needs two heads.* got distillation=False"):
        single.set_distilled_training()


def test_feature_maps_have_their_strides():
    model = small(features_only=True).eval()
    maps = model(images(2, 3, 48, 80))
    assert model.feature_strides == (4, 8)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 12, 20), (2, 24, 6, 10)]
    assert not hasattr(model, "head")


def test_without_classes_the_output_is_the_pooled_features():
    assert small(num_classes=0)(images(2, 3, 32, 32)).shape == (2, 24)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 70)])
def test_any_size_and_number_of_channels(size):
    model = small(in_chans=2).eval()
    assert model(images(2, 2, *size)).shape == (2, 5)


def test_channels_last_gives_the_same_outputs_in_channels_last():
    model, x = randomise(small()).eval(), images(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x), expected)
        for m in model.forward_intermediates(x, intermediates_only=True):
            assert m.is_contiguous(memory_format=torch.channels_last)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, x = randomise(small()), images(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model.grad_checkpointing = enable
        loss = model(x).square().sum()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_drop_path_grows_with_depth_and_keeps_the_mean():
    model = small(drop_path_rate=0.4)
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [block.drop_path.rate for block in blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    torch.manual_seed(0)
    drop = network.DropPath(0.25).train()
    out = drop(torch.ones(4000, 2, 1, 1))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert torch.equal(out[:, 0], out[:, 1])
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(drop.eval()(out), out)


def test_training_lowers_the_loss():
    model, x = small(drop_path_rate=0.1), images(8, 3, 32, 32)
    model.set_distilled_training()
    labels = torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(60):
        pair = model(x)
        loss = sum(nn.functional.cross_entropy(logits, labels) for logits in pair)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (8, 16)}, "widths and depths"),
        ({"depths": (0,)}, "depths"),
        ({"num_classes": -1}, "num_classes"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"drop_rate": -0.1}, "drop_rate"),
        ({"proj_drop_rate": 1.5}, "proj_drop_rate"),
        ({"use_layer_scale": 2}, "use_layer_scale"),
        ({"layer_scale_init_value": math.nan}, "layer_scale_init_value"),
        ({"global_pool": "max"}, "global_pool must be one of 'avg', ''; got 'max'"),
        ({"out_indices": (0,)}, "out_indices must be None without features_only=True"),
        ({"features_only": True, "out_indices": (1,)}, "out_indices must name stages from -1 to 0"),
        ({"features_only": True, "out_indices": 2}, "out_indices must be from 1 to 1"),
        ({"features_only": True, "out_indices": ()}, "out_indices must name stages"),
        ({"in_chans": 0}, "in_chans"),
        ({"pooling": "max"}, "pooling"),
    ],
)
def test_wrong_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        SwiftFormer(**{"widths": (8,), "depths": (1,)} | options)


def test_constructors_have_the_options_of_the_class():
    options = list(inspect.signature(SwiftFormer).parameters)
    for name in PUBLISHED:
        assert list(inspect.signature(getattr(models, name)).parameters) == options[2:]
    with pytest.raises(TypeError, match="num_clases"):
        models.swiftformer_xs(num_clases=3)


@pytest.mark.parametrize(
    "module",
    [network, networks, checkpoints, feature_info, recompute, detection, attention_maps],
)
def test_examples_run(module):
    found = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn})
    assert found.attempted > 0
    assert found.failed == 0
