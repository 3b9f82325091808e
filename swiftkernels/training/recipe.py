"""The options of the recipe, from the paper (arXiv 2303.15446, section 4.1) and its code."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args

from swiftkernels.models.family import constructors, families
from swiftkernels.ops.types import Pooling
from swiftkernels.training.losses import Distillation
from swiftkernels.utils import checks

MODELS = tuple(constructors())

PUBLISHED = {name: options for family in families() for name, options in family.recipes.items()}
"""Model -> published options that differ from the defaults of `Recipe`."""


@dataclass(frozen=True)
class Recipe:
    """The options of a training. Defaults are the published values, except for the batch size.

    `Recipe.of(model)` has the options that were published for this model. Every field is an option
    of the command (`--batch-size` for `batch_size`), with the help text below.

    Raises:
        ValueError: an option outside its range.
    """

    data: Annotated[Path | None, "folder with train/CLASS/*.jpg and val/CLASS/*.jpg"] = None
    out: Annotated[Path, "folder for checkpoints, metrics.csv and loss.png"] = Path("training")
    model: Annotated[str, f"one of {', '.join(MODELS)}"] = "swiftformer_xs"
    pooling: Annotated[Pooling | None, "pooling; none: that of the weights, else l2"] = None
    weights: Annotated[Path | None, "checkpoint to start from, of any public SwiftFormer"] = None
    fresh_heads: Annotated[bool, "do not load its heads, for other classes"] = False
    image_size: Annotated[int, "height and width of the images in pixels"] = 224

    epochs: Annotated[int, "passes over the training images"] = 300
    batch_size: Annotated[int, "images per process and forward; published: 2048 in total"] = 128
    accumulate: Annotated[int, "forward and backward passes per process and step"] = 1
    lr: Annotated[float, "highest learning rate; published for 2048 images a step"] = 2e-3
    warmup_epochs: Annotated[float, "epochs until the highest learning rate"] = 5
    warmup_lr: Annotated[float, "learning rate of the first step"] = 1e-6
    min_lr: Annotated[float, "learning rate of the last step"] = 1e-5
    weight_decay: Annotated[float, "weight decay, except of biases and norms"] = 0.025
    clip: Annotated[float, "adaptive gradient clipping: largest ratio of norms; 0: none"] = 0.01
    ema: Annotated[float, "decay of the moving average of the weights; 0: none"] = 0.99996
    drop_path: Annotated[float, "stochastic depth of the last block"] = 0.0

    label_smoothing: Annotated[float, "share of the label that all classes get"] = 0.1
    rand_augment: Annotated[bool, "RandAugment (2 operations, strength 9), else colour jitter"] = (
        True
    )
    mixup: Annotated[float, "alpha of mixup; 0: none"] = 0.8
    cutmix: Annotated[float, "alpha of CutMix; 0: none"] = 1.0
    erasing: Annotated[float, "probability of random erasing"] = 0.25
    repeats: Annotated[int, "repeated augmentation: draws of each image in succession"] = 3

    distillation: Annotated[Distillation, "distillation; published: hard"] = "none"
    teacher: Annotated[str, "a classifier of torchvision, for distillation"] = "regnet_y_16gf"
    teacher_weights: Annotated[str, "name of its weights in torchvision, or a state dict file"] = (
        "DEFAULT"
    )
    alpha: Annotated[float, "weight of the teacher in the loss"] = 0.5
    tau: Annotated[float, "temperature of soft distillation"] = 1.0

    device: Annotated[str, "cpu, cuda, xpu; auto: the first GPU or cpu"] = "auto"
    bfloat16: Annotated[bool, "autocast to bfloat16"] = False
    channels_last: Annotated[bool, "channels_last memory format"] = False
    grad_checkpointing: Annotated[bool, "recompute blocks in the backward: less memory"] = False
    workers: Annotated[int, "loading processes per process"] = 4
    seed: Annotated[int, "seed of weights, order, augmentation and dropout"] = 0
    log_every: Annotated[int, "steps between rows of metrics.csv"] = 50
    save_every: Annotated[int, "steps between checkpoints; each epoch also ends with one"] = 1000
    resume: Annotated[bool, "continue from OUT/last.pth, if it exists"] = False

    def __post_init__(self) -> None:
        choices = (
            ("model", MODELS),
            ("pooling", (None, *get_args(Pooling))),
            ("distillation", get_args(Distillation)),
        )
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
        """The published options of a model, with changes.

        Example:
            >>> Recipe.of("swiftformer_xs", epochs=100).mixup
            0.0
        """
        return cls(model=model, **{**PUBLISHED.get(model, {}), **changes})

    def as_dict(self) -> dict[str, Any]:
        """The options as plain values, for a checkpoint."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
