"""Writes the bundled images to folders train/CLASS/*.png and val/CLASS/*.png.

`python -m benchmarks.data.write_folders FOLDER` makes data to try `python -m swiftkernels.training`
with.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from benchmarks.data import load
from swiftkernels.utils import command
from swiftkernels.utils.progress import track


def write_folders(folder: Path, per_class: int, side: int) -> None:
    """Write `per_class` images of each class for training and a quarter of it for validation."""
    dataset = load()
    for part, split, count in (
        ("train", dataset.train, per_class),
        ("val", dataset.test, max(1, per_class // 4)),
    ):
        split = split.per_class(count)
        pairs = zip(split.images, split.labels, strict=True)
        for i, (pixels, label) in enumerate(track(list(pairs), "images", part)):
            path = folder / part / str(label) / f"{i:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(path)


def _main() -> None:
    parser = command.Parser(prog="python -m benchmarks.data.write_folders")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--per-class", type=int, default=100, help="training images, at most 1000 (%(default)s)"
    )
    parser.add_argument("--side", type=int, default=64, help="pixels (%(default)s)")
    given = parser.parse_args()
    write_folders(given.folder, given.per_class, given.side)


if __name__ == "__main__":
    sys.exit(command.run(_main))
