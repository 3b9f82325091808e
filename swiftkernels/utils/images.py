"""Reading of images, and the constants of preprocessing for ImageNet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftkernels.utils.extras import need

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the channels of ImageNet, for pixels from 0 to 1."""

CROP = 224 / 256
"""Share of the shorter side that evaluation crops: 224 pixels after resizing to 256."""


def load_image(path: str | Path) -> Image:
    """Read an RGB image, rotated as the camera recorded; of 16 bits the upper 8 are used.

    Raises:
        OSError: the file is missing, or not an image.
        ValueError: pixels of unknown range, such as those of a float TIFF.
        ImportError: pillow is not installed.
    """
    need("PIL", "predict", "Reading images")
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        # 16-bit PNGs have one of these modes; Pillow's own conversion would clip them at 255.
        wide = file.mode.startswith("I;16") or (file.mode == "I" and file.format == "PNG")
        if file.mode in ("I", "F") and not wide:
            raise ValueError(
                f"{path} must have pixels of 8 or 16 bits; it has mode {file.mode}, with an "
                "unknown range. Save it with 8 bits."
            )
        ImageOps.exif_transpose(file, in_place=True)
        image: Any = file
        if wide:
            image = image.point(lambda value: value * (1 / 256)).convert("L")
        return image.convert("RGB")
