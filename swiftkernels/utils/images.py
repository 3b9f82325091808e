"""Images as the networks get them: read from files, and the constants of ImageNet's evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftkernels.utils.extras import need

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's channels, for pixels from 0 to 1."""

CROP = 224 / 256
"""Evaluation takes this share of the shorter side: resize to 256, crop to 224."""


def load_image(path: str | Path) -> Image:
    """The RGB image in a file, turned as the camera recorded; of 16 bits the upper 8.

    Raises:
        OSError: no file, or no image.
        ValueError: pixels of another range, such as those of a float TIFF.
        ImportError: pillow is not installed.
    """
    need("PIL", "predict", "Reading images")
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        # Pillow's own conversion of these cuts off at 255. It reads PNGs of 16 bits as either.
        wide = file.mode.startswith("I;16") or (file.mode == "I" and file.format == "PNG")
        if file.mode in ("I", "F") and not wide:
            raise ValueError(
                f"{path} must have pixels of 8 or 16 bits; they are of mode {file.mode}, whose "
                "range is not known. Save it with 8 bits."
            )
        ImageOps.exif_transpose(file, in_place=True)
        image: Any = file
        if wide:
            image = image.point(lambda value: value * (1 / 256)).convert("L")
        return image.convert("RGB")
