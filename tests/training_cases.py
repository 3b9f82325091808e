"""Small trainings; `python -m tests.training_cases` runs one in a process that may be killed."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import data
from swiftkernels import models
from swiftkernels.training import Recipe, train

RECIPE = Recipe(
    epochs=2,
    batch_size=16,
    accumulate=2,
    lr=5e-3,
    warmup_epochs=0.5,
    ema=0.9,
    drop_path=0.1,
    mixup=0.0,
    cutmix=0.0,
    repeats=2,
    log_every=3,
    save_every=2,
    workers=0,
    device="cpu",
)


class Garments:
    """Some images of each class of Fashion-MNIST, randomly shifted in training."""

    classes = tuple(range(10))

    def __init__(self, side: int, per_class: int, training: bool, kill_after: int = -1) -> None:
        split = data.load().train if training else data.load().test
        split = split.per_class(per_class)
        images = torch.tensor(split.images, dtype=torch.float32)[:, None] / 255 - 0.3
        self.images = F.interpolate(images, (side, side), mode="bilinear").expand(-1, 3, -1, -1)
        self.labels = split.labels.tolist()
        self.training = training
        self.left = kill_after

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        image = self.images[index]
        if self.training:
            image = image.roll(torch.randint(-2, 3, (2,)).tolist(), (1, 2))
        return image, self.labels[index]


def arguments(
    name: str, out: Path, kill_after: int = -1, **changes: Any
) -> tuple[Recipe, nn.Module, Garments, Garments]:
    """The arguments of `train` for "small" or "xs", which change those of `RECIPE`.

    The training kills its process when it loads image number `kill_after`.
    """
    torch.manual_seed(0)
    if name == "small":
        model: nn.Module = models.SwiftFormer(
            (8, 16), (1, 2), num_classes=10, drop_path_rate=0.1, distillation=False
        )
        side, per_class = 28, 10
    else:
        model = models.swiftformer_xs(num_classes=10, drop_path_rate=0.1, distillation=False)
        side, per_class = 64, 32
    recipe = replace(RECIPE, out=out, **changes)
    return recipe, model, Garments(side, per_class, True, kill_after), Garments(side, 4, False)


def run(name: str, out: Path, kill_after: int = -1, **changes: Any) -> list[dict[str, Any]]:
    """Train with these arguments."""
    return train(*arguments(name, out, kill_after, **changes))


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
