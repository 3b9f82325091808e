"""Semantic FPN: shapes, gradients, and training on one batch."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swiftkernels.models import SwiftFormer, segmentation
from tests.vision import import_torchvision


def backbone(**options: Any) -> SwiftFormer:
    torch.manual_seed(0)
    return SwiftFormer((8, 16, 24, 32), (1, 1, 1, 1), **{"features_only": True} | options)


def squares(count: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise with a bright square, the masks of the squares, and their boxes x0, y0, x1, y1."""
    generator = torch.Generator().manual_seed(1)
    images = 0.2 * torch.rand(count, 3, side, side, generator=generator)
    inside = torch.zeros(count, side, side, dtype=torch.long)
    boxes = torch.empty(count, 4)
    for i in range(count):
        x, y = (int(n) for n in torch.randint(0, side // 2, (2,), generator=generator))
        inside[i, y : y + side // 2, x : x + side // 2] = 1
        boxes[i] = torch.tensor([x, y, x + side // 2, y + side // 2])
    return images + 0.7 * inside[:, None], inside, boxes


@pytest.mark.parametrize("size", [(64, 64), (33, 70), (97, 50)])
def test_logits_have_the_size_of_the_images(size):
    model = segmentation.SemanticFPN(backbone(), 7, channels=32, width=32).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, *size)).shape == (2, 7, *size)


def test_every_parameter_has_a_gradient():
    model = segmentation.SemanticFPN(backbone(), 3, channels=32, width=32)
    model(torch.randn(2, 3, 65, 97)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_semantic_branch_has_a_convolution_before_each_upsampling():
    head = segmentation.SemanticHead(4, 64, 5, width=32)
    assert [len(steps) for steps in head.levels] == [1, 1, 2, 3]
    sizes: list[tuple[int, ...]] = []
    for steps in head.levels:
        for step in steps:
            step.register_forward_hook(lambda _module, _x, out: sizes.append(tuple(out.shape[-2:])))
    # Odd sizes, rounded up: 13 x 10, 7 x 5, 4 x 3, 2 x 2.
    maps = [torch.randn(1, 64, *size) for size in ((13, 10), (7, 5), (4, 3), (2, 2))]
    assert head(maps).shape == (1, 5, 13, 10)
    assert sizes == [(13, 10), (7, 5), (4, 3), (7, 5), (2, 2), (4, 3), (7, 5)]


def test_pyramid_gives_the_outputs_of_torchvision():
    torchvision = import_torchvision()
    ours = segmentation.FeaturePyramid((8, 16, 24), 12)
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


def test_training_fits_a_batch():
    images, labels, _ = squares(4, 48)
    model = segmentation.SemanticFPN(backbone(), 2, channels=32, width=32, drop_rate=0.0)
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


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="features_only=True; got SwiftFormer"):
        segmentation.SemanticFPN(backbone(features_only=False), 5)
    with pytest.raises(ValueError, match="width must be a multiple of 32; got 100"):
        segmentation.SemanticFPN(backbone(), 5, width=100)


def test_examples_run():
    found = doctest.testmod(segmentation, extraglobs={"torch": torch})
    assert found.attempted > 0
    assert found.failed == 0
