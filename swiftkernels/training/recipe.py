"""The recipe of the paper (arXiv 2303.15446, section 4.1) and its code, as one set of options."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from swiftkernels.ops.additive_attention.reference import POOLINGS
from swiftkernels.training.losses import KINDS
from swiftkernels.utils import checks

MODELS = ("swiftformer_xs", "swiftformer_s", "swiftformer_l1", "swiftformer_l3")

LIGHTER: dict[str, dict[str, Any]] = {
    "swiftformer_xs": {"rand_augment": False, "mixup": 0.0, "cutmix": 0.0},
    "swiftformer_s": {"mixup": 0.0, "cutmix": 0.0},
}
"""What the official commands leave out for the small models."""


@dataclass(frozen=True)
class Recipe:
    """One training. The defaults are the published ones, but for the number of processes.

    `Recipe.of(model)` takes the augmentation that was published for that model. Every field is an
    option of the command, `--batch-size` for `batch_size`, with the help below.

    Raises:
        ValueError: an option out of its range.
    """

    data: Annotated[Path | None, "folder with train/CLASS/*.jpg and val/CLASS/*.jpg"] = None
    out: Annotated[Path, "folder for checkpoints, metrics.csv and loss.png"] = Path("training")
    model: Annotated[str, f"one of {', '.join(MODELS)}"] = "swiftformer_xs"
    pooling: Annotated[str | None, f"{', '.join(POOLINGS)}; else the weights', or l2"] = None
    weights: Annotated[Path | None, "checkpoint to start from, of any public SwiftFormer"] = None
    fresh_heads: Annotated[bool, "leave out its heads, for other classes"] = False
    image_size: Annotated[int, "pixels of a side in training"] = 224

    epochs: Annotated[int, "passes over the training images"] = 300
    batch_size: Annotated[int, "images of a process and forward; published: 2048 in all"] = 128
    accumulate: Annotated[int, "forwards and backwards of each process for one step"] = 1
    lr: Annotated[float, "highest learning rate; published for batches of 2048"] = 2e-3
    warmup_epochs: Annotated[float, "epochs until the highest learning rate"] = 5
    warmup_lr: Annotated[float, "learning rate of the first step"] = 1e-6
    min_lr: Annotated[float, "learning rate of the last step"] = 1e-5
    weight_decay: Annotated[float, "of matrices and kernels, not of biases and norms"] = 0.025
    clip: Annotated[float, "adaptive gradient clipping, in norms of the weights; 0: none"] = 0.01
    ema: Annotated[float, "decay of the averaged weights in each step; 0: no average"] = 0.99996
    drop_path: Annotated[float, "stochastic depth of the last block"] = 0.0

    label_smoothing: Annotated[float, "share of the label that is spread over all classes"] = 0.1
    rand_augment: Annotated[bool, "RandAugment (2 operations, strength 9), else colours"] = True
    mixup: Annotated[float, "alpha of mixup; 0: none"] = 0.8
    cutmix: Annotated[float, "alpha of CutMix; 0: none"] = 1.0
    erasing: Annotated[float, "probability of random erasing"] = 0.25
    repeats: Annotated[int, "repeated augmentation: copies of an image that follow each other"] = 3

    distillation: Annotated[str, f"{', '.join(KINDS)}; published: hard"] = "none"
    teacher: Annotated[str, "a classifier of torchvision's, with distillation"] = "regnet_y_16gf"
    teacher_weights: Annotated[str, "their name in torchvision, or a file of a state dict"] = (
        "DEFAULT"
    )
    alpha: Annotated[float, "the teacher's share of the loss"] = 0.5
    tau: Annotated[float, "temperature of soft distillation"] = 1.0

    device: Annotated[str, "cpu, cuda, xpu; auto: the first GPU or cpu"] = "auto"
    bfloat16: Annotated[bool, "autocast to bfloat16"] = False
    channels_last: Annotated[bool, "images and feature maps with the channels innermost"] = False
    grad_checkpointing: Annotated[bool, "compute blocks again in the backward: less memory"] = False
    workers: Annotated[int, "processes of each process that load images"] = 4
    seed: Annotated[int, "of weights, order, augmentation and dropping"] = 0
    log_every: Annotated[int, "steps between two rows of metrics.csv"] = 50
    save_every: Annotated[int, "steps between two checkpoints; one ends each epoch too"] = 1000
    resume: Annotated[bool, "go on where OUT/last.pth stands, if it is there"] = False

    def __post_init__(self) -> None:
        choices = (("model", MODELS), ("pooling", (None, *POOLINGS)), ("distillation", KINDS))
        for name, allowed in choices:
            checks.check_option(name, getattr(self, name), allowed)
        for name in ("image_size", "epochs", "batch_size", "accumulate", "repeats", "log_every",
                     "save_every"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1; got {value!r}.")
        for name in ("lr", "warmup_epochs", "warmup_lr", "min_lr", "weight_decay", "clip", "mixup",
                     "cutmix", "workers"):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}.")
        for name in ("ema", "drop_path", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1; got {getattr(self, name)}.")
        if not 0 <= self.erasing <= 1:
            raise ValueError(f"erasing must be a probability; got {self.erasing}.")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs must be less than epochs={self.epochs}; got {self.warmup_epochs}."
            )

    @classmethod
    def of(cls, model: str, **changes: Any) -> Recipe:
        """What was published for that model, with changes.

        Example:
            >>> Recipe.of("swiftformer_xs", epochs=100).mixup
            0.0
        """
        return cls(model=model, **{**LIGHTER.get(model, {}), **changes})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
