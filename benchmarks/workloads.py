"""Inputs of the attentions in a SwiftFormer: tokens of real photographs, stage by stage.

The inputs are made from the two photographs in scikit-learn, by the convolutions that a SwiftFormer
has between its input and the attention of each stage. The weights are random, and the BatchNorms
have the statistics of the photographs. The network's blocks are skipped, so that the tokens keep
the correlations of a photograph, and unit scale.
"""

from __future__ import annotations

import functools

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from swiftkernels.ops.additive_attention.benchmark import (
    IMAGE_SIZE,
    SWIFTFORMER_WIDTHS,
    Stage,
)
from swiftkernels.ops.benchmark import Size


def size_tokens(
    size: Size, batch: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor | None:
    """The tokens of photographs with this size; None if no stage has it."""
    return stage_tokens(size.stage, batch, dtype, device) if size.stage else None


@functools.cache
def stage_tokens(
    stage: Stage,
    batch: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The tokens of `batch` photographs at a stage, [B, N, C], contiguous. Cached: do not modify.

    Example:
        >>> stage_tokens(Stage("XS", 3), 2).shape
        torch.Size([2, 49, 220])
    """
    with torch.no_grad():
        features = _layers(stage.model)[: stage.index + 1](photographs(batch))  # [B, C, H, W]
    return features.flatten(2).transpose(1, 2).to(device, dtype).contiguous()


@functools.cache
def photographs(batch: int) -> Tensor:
    """Normalised crops at fixed random positions, every second pair mirrored, [B, 3, 224, 224]."""
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images
    ]  # uint8 [3, 427, 640]
    crops = []
    for i in range(batch):
        image = images[i % len(images)]
        top, left = (
            int(torch.randint(size - IMAGE_SIZE + 1, (), generator=generator))
            for size in image.shape[1:]
        )
        crop = image[:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
        crops.append(crop.flip(2) if i // len(images) % 2 else crop)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (torch.stack(crops) / 255 - mean) / std


@functools.cache
def _layers(model: str) -> nn.Sequential:
    """One module per stage: the stem, then the convolutions that halve both sides."""
    widths = SWIFTFORMER_WIDTHS[model]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = nn.Sequential(
            *_halve(3, widths[0] // 2), nn.ReLU(), *_halve(widths[0] // 2, widths[0]), nn.ReLU()
        )
        layers = nn.Sequential(
            stem, *(nn.Sequential(*_halve(widths[i], widths[i + 1])) for i in range(3))
        )
    with torch.no_grad():
        layers.train()(photographs(8))
    return layers.eval()


def _halve(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    # With momentum 1, a pass in training mode sets the statistics to those of its batch.
    return (
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
        nn.BatchNorm2d(outputs, momentum=1.0),
    )
