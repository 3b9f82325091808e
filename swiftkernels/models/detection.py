"""Object detection on the feature maps of a backbone: Mask R-CNN of torchvision.

The backbone is a network built with `features_only=True`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from swiftkernels.models.network import Network, check_backbone
from swiftkernels.utils.extras import need


class NamedMaps(nn.Module):
    """The feature maps of a backbone as a dict "0", "1", ..., as torchvision's detectors expect."""

    def __init__(self, backbone: Network) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {str(i): x for i, x in enumerate(self.backbone(images))}


def mask_rcnn(backbone: Network, num_classes: int, channels: int = 256, **options: Any) -> Any:
    """torchvision's Mask R-CNN (arXiv 1703.06870) on a backbone.

    Args:
        backbone: a network with `features_only=True` and four stages.
        num_classes: number of classes, including the background, class 0.
        channels: channels of the feature pyramid.
        options: of `torchvision.models.detection.MaskRCNN`.

    Returns:
        A `MaskRCNN`. In training mode: images and targets -> losses; else images -> detections.

    Raises:
        ValueError: a backbone without feature maps.
        ImportError: torchvision is not installed.

    Example:
        >>> from swiftkernels.models import swiftformer_xs
        >>> backbone = swiftformer_xs(features_only=True)
        >>> model = mask_rcnn(backbone, num_classes=91)  # doctest: +SKIP
    """
    check_backbone(backbone)
    detection = need("torchvision.models.detection", "train", "mask_rcnn")
    # BackboneWithFPN would read the feature maps from outputs of child modules, but here they pass
    # a BatchNorm first. So its body, built for no outputs, is replaced.
    make = detection.backbone_utils.BackboneWithFPN
    pyramid = make(backbone, {}, list(backbone.feature_channels), channels)
    pyramid.body = NamedMaps(backbone)
    return detection.MaskRCNN(pyramid, num_classes, **options)
