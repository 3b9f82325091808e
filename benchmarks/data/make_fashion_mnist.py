"""Makes fashion_mnist_12k.npz: the first 1,000 training and 200 test images of each class.

Usage, with the folder of the four idx files:

    python -m benchmarks.data.make_fashion_mnist /usr/share/datasets/fashion-mnist
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from benchmarks.data import SUBSET, Dataset, checksum, load_full
from swiftkernels.utils import command
from swiftkernels.utils.files import replacing

TRAIN_PER_CLASS = 1000
TEST_PER_CLASS = 200


def make(folder: Path, output: Path) -> str:
    """Write the subset of the full set in `folder`; returns its checksum."""
    full = load_full(folder)
    subset = Dataset("", full.train.per_class(TRAIN_PER_CLASS), full.test.per_class(TEST_PER_CLASS))
    with replacing(output, "output") as file:
        np.savez_compressed(
            file,
            train_images=subset.train.images,
            train_labels=subset.train.labels,
            test_images=subset.test.images,
            test_labels=subset.test.labels,
        )
    return checksum(subset)


def _main() -> None:
    parser = command.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder with Fashion-MNIST's four idx files")
    parser.add_argument("--output", type=Path, default=SUBSET, help="file to write (%(default)s)")
    given = parser.parse_args()
    print(f"{given.output}: sha256 of the arrays {make(given.folder, given.output)}")


if __name__ == "__main__":
    sys.exit(command.run(_main))
