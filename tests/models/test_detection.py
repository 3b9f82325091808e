"""Mask R-CNN: losses, gradients, detections, and training on one batch."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swiftkernels.models.detection import mask_rcnn
from tests.models.test_segmentation import backbone, squares
from tests.vision import import_torchvision


@pytest.fixture
def torchvision() -> Iterator[ModuleType]:
    """torchvision without torch.compile, which RoIAlign uses if there are no compiled operators."""
    module = import_torchvision()
    with torch.compiler.set_stance("force_eager"):
        yield module


def detector(samples: int) -> Any:
    """`samples`: number of boxes of an image on which the heads are trained."""
    return mask_rcnn(
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
def test_training_reaches_the_backbone_and_evaluation_detects():
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
def test_training_fits_a_batch(torchvision):
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


def test_wrong_backbones_raise():
    for wrong in (backbone(features_only=False), nn.Linear(1, 1)):
        with pytest.raises(ValueError, match=f"features_only=True; got {type(wrong).__name__}"):
            mask_rcnn(wrong, 5)
