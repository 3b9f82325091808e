"""Reading of images, and the constants of preprocessing for ImageNet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftkernels.utils.extras import need

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION = 0x0112
"""The EXIF tag with the rotation of the camera."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of the channels of ImageNet, for pixels from 0 to 1."""

MOST_BYTES = 512 << 20
"""Memory for one image of a file while it is read: 128 megapixels, or 64 that are converted."""

CROP = 224 / 256
"""Share of the shorter side that evaluation crops: 224 pixels after resizing to 256."""


def load_image(path: str | Path) -> Image:
    """Read an RGB image, rotated as the camera recorded; of 16 bits the upper 8 are used.

    Raises:
        OSError: the file is missing, or not an image.
        ValueError: pixels of unknown range, such as those of a float TIFF, or so many that they
            need more than `MOST_BYTES` of memory.
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
        turned = file.getexif().get(ORIENTATION, 1) != 1
        pixel_bytes = _bytes(file.mode) * (1 + turned) + (0 if file.mode == "RGB" else 4)
        needed = file.width * file.height * pixel_bytes
        if needed > MOST_BYTES:
            raise ValueError(
                f"{file.width} x {file.height} pixels would need {needed >> 20} MB of memory, more "
                f"than {MOST_BYTES >> 20}; reduce it first"
            )
        ImageOps.exif_transpose(file, in_place=True)
        image: Any = file
        if wide:
            image = image.point(lambda value: value * (1 / 256)).convert("L")
        if image.mode == "RGB":  # converted, it would be copied
            image.load()
            return image
        return image.convert("RGB")


def _bytes(mode: str) -> int:
    """Bytes of a pixel in the memory of Pillow."""
    if mode in ("1", "L", "P"):
        return 1
    return 2 if mode.startswith("I;16") else 4
