"""Dense prediction on the four feature maps: Semantic FPN, and Mask R-CNN of torchvision.

The backbone is a SwiftFormer made with `features_only=True`, whose maps [B, C_i, H_i, W_i] have the
strides 4, 8, 16 and 32, finest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.models.swiftformer.network import SwiftFormer
from swiftkernels.utils.extras import need

GROUPS = 32
"""Of the head's group norms, as in the paper that they are from (arXiv 1803.08494)."""


class FeaturePyramid(nn.Module):
    """Feature pyramid network (arXiv 1612.03144): maps of one width, each with what is above it.

    Args:
        in_channels: of the maps, finest first.
        channels: of every map of the pyramid.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.smooth = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, C_i, H_i, W_i] -> [B, channels, H_i, W_i]."""
        merged = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in reversed(range(len(merged) - 1)):
            merged[i] = merged[i] + F.interpolate(merged[i + 1], merged[i].shape[-2:])
        return [smooth(x) for smooth, x in zip(self.smooth, merged, strict=True)]


class SemanticHead(nn.Module):
    """The semantic branch of Panoptic FPN (arXiv 1901.02446, section 3.1 and figure 3).

    Every map comes to the finest one's size in steps of two, a convolution before each; their sum
    is classified pixel by pixel.

    Args:
        levels: maps of the pyramid.
        channels: of the pyramid.
        num_classes: of a pixel.
        width: channels in between, a multiple of 32.
        drop_rate: of whole channels before the classifier.
    """

    def __init__(
        self, levels: int, channels: int, num_classes: int, width: int = 128, drop_rate: float = 0.1
    ) -> None:
        super().__init__()
        if width < 1 or width % GROUPS:
            raise ValueError(f"width must be a multiple of {GROUPS}; got {width}.")
        self.levels = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(width if i else channels, width, 3, padding=1, bias=False),
                    nn.GroupNorm(GROUPS, width),
                    nn.ReLU(),
                )
                for i in range(max(1, level))
            )
            for level in range(levels)
        )
        self.drop = nn.Dropout2d(drop_rate)
        self.predict = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The pyramid's maps, finest first -> logits [B, num_classes, H_0, W_0]."""
        # Sizes of the maps, not factors of two: odd heights and widths were rounded up.
        sizes = [x.shape[-2:] for x in maps]
        found = []
        for level, (steps, x) in enumerate(zip(self.levels, maps, strict=True)):
            for i in range(max(1, level)):
                x = steps[i](x)  # type: ignore[index]
                if level:
                    x = F.interpolate(x, sizes[level - 1 - i], mode="bilinear")
            found.append(x)
        return self.predict(self.drop(sum(found[1:], found[0])))


class SemanticFPN(nn.Module):
    """Semantic segmentation: backbone, feature pyramid, semantic branch.

    Args:
        backbone: a SwiftFormer with `features_only=True`.
        num_classes: of a pixel.
        channels: of the pyramid.
        width: of the semantic branch, a multiple of 32.
        drop_rate: of its channels before the classifier.

    Shapes:
        images [B, in_chans, H, W] of any height and width -> logits [B, num_classes, H, W].

    Example:
        >>> from swiftkernels.models import swiftformer_xs
        >>> model = SemanticFPN(swiftformer_xs(features_only=True), num_classes=150).eval()
        >>> model(torch.randn(1, 3, 65, 97)).shape
        torch.Size([1, 150, 65, 97])
    """

    def __init__(
        self,
        backbone: SwiftFormer,
        num_classes: int,
        channels: int = 256,
        width: int = 128,
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        _check_backbone(backbone)
        self.backbone = backbone
        self.pyramid = FeaturePyramid(backbone.feature_channels, channels)
        levels = len(backbone.feature_channels)
        self.head = SemanticHead(levels, channels, num_classes, width, drop_rate)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head(self.pyramid(self.backbone(images)))
        return F.interpolate(logits, images.shape[-2:], mode="bilinear")


class NamedMaps(nn.Module):
    """The backbone's maps as a dict "0", "1", ..., as torchvision's detectors want them."""

    def __init__(self, backbone: SwiftFormer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {str(i): x for i, x in enumerate(self.backbone(images))}


def mask_rcnn(backbone: SwiftFormer, num_classes: int, channels: int = 256, **options: Any) -> Any:
    """torchvision's Mask R-CNN (arXiv 1703.06870) on a SwiftFormer.

    Args:
        backbone: a SwiftFormer with `features_only=True` and four stages.
        num_classes: with the background, which is class 0.
        channels: of the pyramid.
        options: of `torchvision.models.detection.MaskRCNN`.

    Returns:
        A `MaskRCNN`: in training, images and targets -> losses; else images -> detections.

    Raises:
        ImportError: torchvision is not installed.
    """
    _check_backbone(backbone)
    detection = need("torchvision.models.detection", "train", "mask_rcnn")
    # Its own body takes maps from the outputs of children, and ours are normed on the side.
    make = detection.backbone_utils.BackboneWithFPN
    pyramid = make(backbone, {}, list(backbone.feature_channels), channels)
    pyramid.body = NamedMaps(backbone)
    return detection.MaskRCNN(pyramid, num_classes, **options)


def _check_backbone(backbone: SwiftFormer) -> None:
    if getattr(backbone, "feature_norms", None) is None:
        raise ValueError(
            f"backbone must be a SwiftFormer made with features_only=True; got "
            f"{type(backbone).__name__} without feature maps."
        )
