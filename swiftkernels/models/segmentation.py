"""Semantic segmentation on the feature maps of a backbone: Semantic FPN.

The backbone is a network built with `features_only=True`. Its feature maps [B, C_i, H_i, W_i] have
the strides 4, 8, 16 and 32, finest first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.models.network import Network, check_backbone

GROUPS = 32
"""Groups of the group norms in the head, as in their paper (arXiv 1803.08494)."""


class FeaturePyramid(nn.Module):
    """Feature pyramid network (arXiv 1612.03144): adds to each map the coarser ones, upsampled.

    Args:
        in_channels: channels of the feature maps, finest first.
        channels: channels of all maps of the pyramid.
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

    Each map is upsampled to the size of the finest in steps of two, with a convolution before each
    step. The sum of the maps is classified pixel by pixel.

    Args:
        levels: number of maps of the pyramid.
        channels: channels of the pyramid.
        num_classes: classes of a pixel.
        width: channels between pyramid and classifier, a multiple of 32.
        drop_rate: dropout of channels before the classifier.
    """

    def __init__(
        self, levels: int, channels: int, num_classes: int, width: int = 128, drop_rate: float = 0.1
    ) -> None:
        super().__init__()
        if width < 1 or width % GROUPS:
            raise ValueError(
                f"width must be a multiple of {GROUPS}; got {width}. Each group norm has {GROUPS} "
                "groups."
            )
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
        """Maps of the pyramid, finest first -> logits [B, num_classes, H_0, W_0]."""
        # Target sizes are those of the maps: a factor of two is wrong for odd heights and widths.
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
        backbone: a network with `features_only=True`.
        num_classes: classes of a pixel.
        channels: channels of the pyramid.
        width: channels of the semantic branch, a multiple of 32.
        drop_rate: dropout of channels before the classifier.

    Shapes:
        images [B, in_chans, H, W], any height and width -> logits [B, num_classes, H, W].

    Example:
        >>> from swiftkernels.models import swiftformer_xs
        >>> model = SemanticFPN(swiftformer_xs(features_only=True), num_classes=150).eval()
        >>> model(torch.randn(1, 3, 65, 97)).shape
        torch.Size([1, 150, 65, 97])
    """

    def __init__(
        self,
        backbone: Network,
        num_classes: int,
        channels: int = 256,
        width: int = 128,
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__()
        check_backbone(backbone)
        self.backbone = backbone
        self.pyramid = FeaturePyramid(backbone.feature_channels, channels)
        levels = len(backbone.feature_channels)
        self.head = SemanticHead(levels, channels, num_classes, width, drop_rate)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head(self.pyramid(self.backbone(images)))
        return F.interpolate(logits, images.shape[-2:], mode="bilinear")
