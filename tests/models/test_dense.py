"""Segmentation and detection on the feature maps: shapes, gradients, and one batch learnt."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swiftkernels.models import SwiftFormer, dense
from tests.vision import import_torchvision


def backbone(**options: Any) -> SwiftFormer:
    torch.manual_seed(0)
    return SwiftFormer((8, 16, 24, 32), (1, 1, 1, 1), **{"features_only": True} | options)


def squares(count: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images with a bright square on noise, the squares' pixels, and their boxes x0, y0, x1, y1."""
    generator = torch.Generator().manual_seed(1)
    images = 0.2 * torch.rand(count, 3, side, side, generator=generator)
    inside = torch.zeros(count, side, side, dtype=torch.long)
    boxes = torch.empty(count, 4)
    for i in range(count):
        x, y = (int(n) for n in torch.randint(0, side // 2, (2,), generator=generator))
        inside[i, y : y + side // 2, x : x + side // 2] = 1
        boxes[i] = torch.tensor([x, y, x + side // 2, y + side // 2])
    return images + 0.7 * inside[:, None], inside, boxes


@pytest.fixture
def torchvision() -> Iterator[ModuleType]:
    """Without its compiled operators, its RoIAlign would compile itself by torch.compile."""
    module = import_torchvision()
    with torch.compiler.set_stance("force_eager"):
        yield module


@pytest.mark.parametrize("size", [(64, 64), (33, 70), (97, 50)])
def test_segmentation_has_the_size_of_the_images(size):
    model = dense.SemanticFPN(backbone(), 7, channels=32, width=32).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, *size)).shape == (2, 7, *size)


def test_every_parameter_gets_a_gradient():
    model = dense.SemanticFPN(backbone(), 3, channels=32, width=32)
    model(torch.randn(2, 3, 65, 97)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_branch_has_a_convolution_before_each_step_of_two():
    head = dense.SemanticHead(4, 64, 5, width=32)
    assert [len(steps) for steps in head.levels] == [1, 1, 2, 3]
    sizes: list[tuple[int, ...]] = []
    for steps in head.levels:
        for step in steps:
            step.register_forward_hook(lambda _module, _x, out: sizes.append(tuple(out.shape[-2:])))
    # Odd maps: half of 13 x 10 is 7 x 5, of that 4 x 3, of that 2 x 2.
    maps = [torch.randn(1, 64, *size) for size in ((13, 10), (7, 5), (4, 3), (2, 2))]
    assert head(maps).shape == (1, 5, 13, 10)
    assert sizes == [(13, 10), (7, 5), (4, 3), (7, 5), (2, 2), (4, 3), (7, 5)]


def test_the_pyramid_is_that_of_torchvision(torchvision):
    ours = dense.FeaturePyramid((8, 16, 24), 12)
    theirs = torchvision.ops.FeaturePyramidNetwork([8, 16, 24], 12)
    names = {"lateral": "inner_blocks", "smooth": "layer_blocks"}
    theirs.load_state_dict(
        {
            f"{names[part]}.{i}.0.{kind}": t
            for name, t in ours.state_dict().items()
            for part, i, kind in [name.split(".")]
        }
    )
    maps = [torch.randn(2, c, *size) for c, size in ((8, (9, 14)), (16, (5, 7)), (24, (3, 4)))]
    expected = theirs({str(i): x for i, x in enumerate(maps)})
    for found, x in zip(ours(maps), expected.values(), strict=True):
        torch.testing.assert_close(found, x)


def test_segmentation_learns_a_batch():
    images, labels, _ = squares(4, 48)
    model = dense.SemanticFPN(backbone(), 2, channels=32, width=32, drop_rate=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = model(images).argmax(1)
    overlap = ((found == 1) & (labels == 1)).sum() / ((found == 1) | (labels == 1)).sum()
    assert overlap > 0.9
    assert loss < 0.15


def test_a_classifier_is_no_backbone():
    with pytest.raises(ValueError, match="features_only=True; got SwiftFormer"):
        dense.SemanticFPN(backbone(features_only=False), 5)
    with pytest.raises(ValueError, match="features_only=True; got Linear"):
        dense.mask_rcnn(nn.Linear(1, 1), 5)
    with pytest.raises(ValueError, match="width must be a multiple of 32; got 100"):
        dense.SemanticFPN(backbone(), 5, width=100)


def detector(samples: int) -> Any:
    """`samples`: boxes of an image that the heads are trained on."""
    return dense.mask_rcnn(
        backbone(), 2, channels=32, min_size=64, max_size=64,
        rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=20,
        rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=20, box_batch_size_per_image=samples,
    )  # fmt: skip


def targets(inside: Tensor, boxes: Tensor) -> list[dict[str, Tensor]]:
    return [
        {"boxes": box[None], "labels": torch.tensor([1]), "masks": mask[None].byte()}
        for mask, box in zip(inside, boxes, strict=True)
    ]


@pytest.mark.usefixtures("torchvision")
def test_mask_rcnn_trains_the_backbone_and_detects():
    images, inside, boxes = squares(2, 64)
    model = detector(4).train()
    losses = model(list(images), targets(inside, boxes))
    assert set(losses) == {
        "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg",
    }  # fmt: skip
    sum(losses.values()).backward()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None, name
    assert {name.split(".")[0] for name, _ in model.backbone.named_children()} == {"body", "fpn"}
    with torch.no_grad():
        found = model.eval()([images[0], images[1][:, :40, :50]])
    for detections, size in zip(found, ((64, 64), (40, 50)), strict=True):
        assert detections["masks"].shape == (len(detections["boxes"]), 1, *size)


@pytest.mark.slow
def test_mask_rcnn_learns_a_batch(torchvision):
    images, inside, boxes = squares(2, 64)
    model = detector(16).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    torch.manual_seed(0)
    for _ in range(60):
        loss = sum(model(list(images), targets(inside, boxes)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(list(images))
    for detections, mask, box in zip(found, inside, boxes, strict=True):
        assert torchvision.ops.box_iou(detections["boxes"][:1], box[None]) > 0.5
        best = detections["masks"][0, 0] > 0.5
        overlap = (best & (mask == 1)).sum() / (best | (mask == 1)).sum()
        assert overlap > 0.5


def test_examples_run():
    found = doctest.testmod(dense, extraglobs={"torch": torch})
    assert found.attempted > 0
    assert found.failed == 0
