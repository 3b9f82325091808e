"""Fashion-MNIST: the subset in this folder, or the full set from its four files."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SUBSET = Path(__file__).with_name("fashion_mnist_12k.npz")
SHA256 = "d5b91c929ef64cdf3fac6a13820932f698037ef77030a9584f3d6499a1ccee00"
"""`checksum` of the subset's arrays, which does not depend on the compression."""

IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


class Split(NamedTuple):
    """Images and their classes."""

    images: NDArray[np.uint8]
    """[M, 28, 28]"""
    labels: NDArray[np.uint8]
    """[M], 0 to 9"""

    def per_class(self, count: int) -> Split:
        """The first `count` images of each class, in the order of the file."""
        chosen = [np.flatnonzero(self.labels == label)[:count] for label in range(10)]
        rows = np.sort(np.concatenate(chosen))
        return Split(self.images[rows], self.labels[rows])


class Dataset(NamedTuple):
    """Training and test images."""

    name: str
    train: Split
    test: Split


def load(folder: Path | None = None) -> Dataset:
    """The subset in the repository, or the full set from the four idx files in `folder`.

    Raises:
        ValueError: `folder` lacks one of the files, or a file is damaged.
    """
    return load_subset() if folder is None else load_full(folder)


def load_subset() -> Dataset:
    """1,000 training and 200 test images of each class."""
    try:
        with np.load(SUBSET, allow_pickle=False) as file:
            train = Split(file["train_images"], file["train_labels"])
            test = Split(file["test_images"], file["test_labels"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{SUBSET} cannot be read ({error}); restore it from the repository."
        ) from error
    dataset = Dataset("Fashion-MNIST, 12,000 images", train, test)
    if checksum(dataset) != SHA256:
        raise ValueError(f"{SUBSET} is damaged (wrong checksum); restore it from the repository.")
    return dataset


def load_full(folder: Path) -> Dataset:
    """The 60,000 training and 10,000 test images from the files that Zalando publishes."""
    missing = [name for name in IDX_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"the data folder must hold {', '.join(IDX_FILES)}; {folder} "
            f"{'lacks ' + ', '.join(missing) if folder.is_dir() else 'is not a folder'}. "
            "Give the folder with Fashion-MNIST's four files, on Debian and Ubuntu "
            "/usr/share/datasets/fashion-mnist from the package dataset-fashion-mnist."
        )
    train_images, train_labels, test_images, test_labels = (
        _read_idx(folder / name) for name in IDX_FILES
    )
    splits = (Split(train_images, train_labels), Split(test_images, test_labels))
    for images, labels in splits:
        if images.shape != (len(labels), 28, 28) or labels.ndim != 1:
            raise ValueError(
                f"{folder} must hold images [M, 28, 28] and labels [M]; "
                f"got {images.shape} and {labels.shape}."
            )
    return Dataset(f"Fashion-MNIST, {sum(len(s.labels) for s in splits):,} images", *splits)


def checksum(dataset: Dataset) -> str:
    """SHA-256 over the four arrays' bytes: training images and labels, test images and labels."""
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.test):
        digest.update(split.images.tobytes())
        digest.update(split.labels.tobytes())
    return digest.hexdigest()


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """An idx file: two zero bytes, type 8 (bytes), the number of axes, their sizes, the values."""
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} must be a gzip file: {error}.") from error
    axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    start = 4 + 4 * axes
    if axes == 0 or len(content) < start:
        raise ValueError(f"{path} must be a gzipped idx file of bytes; its header is another.")
    shape = struct.unpack(f">{axes}I", content[4:start])
    if len(content) - start != np.prod(shape):
        raise ValueError(f"{path} must hold {shape} bytes; it holds {len(content) - start}.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
