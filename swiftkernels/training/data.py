"""Images in folders, their augmentation, and a reproducible order.

Nothing here has a state: order and augmentation follow from the seed, the epoch and the position in
the epoch. So they depend neither on the number of loading processes nor on interruptions.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from swiftkernels.models.checkpoint_io import check_finite, read_file
from swiftkernels.models.family import listed
from swiftkernels.training.recipe import Recipe
from swiftkernels.utils import checks
from swiftkernels.utils.extras import need
from swiftkernels.utils.images import CROP, DEVIATION, MEAN, load_image
from swiftkernels.utils.text import shown


class Draw(NamedTuple):
    """An image at a position of a training."""

    epoch: int
    position: int
    """Position in the epoch."""
    image: int
    """Index of the image in the dataset."""


def derived_seed(*numbers: int) -> int:
    """A seed from several numbers, different for different numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


class SeededDataset(Dataset[Any]):
    """A dataset that is indexed by `Draw` and seeds its random transforms with epoch and position.

    The transforms must use the default generator of torch, as those of torchvision do.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, draw: Draw) -> Any:
        with _seeded(derived_seed(self.seed, draw.epoch, draw.position)):
            return self.dataset[draw.image]


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # Not torch.manual_seed: it also queues the seed for GPUs, with a stack trace each time.
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


class ShuffledDraws(Sampler[Draw]):
    """The shuffled images of one process in an epoch.

    With `repeats`, each image is drawn that many times in succession, by different processes if
    there are several, and an epoch has fewer different images (repeated augmentation, arXiv
    1901.09335).

    Attributes:
        epoch: the epoch.
        start: number of draws of this process to skip, to continue in the middle of an epoch.
    """

    def __init__(
        self, dataset: Sized, seed: int, repeats: int = 1, rank: int = 0, processes: int = 1
    ) -> None:
        self.images = len(dataset)
        self.seed = seed
        self.repeats = repeats
        self.rank = rank
        self.processes = processes
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.images // self.processes - self.start

    def __iter__(self) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator).repeat_interleave(self.repeats)
        last = self.images // self.processes * self.processes
        first = self.rank + self.start * self.processes
        for position in range(first, last, self.processes):
            yield Draw(self.epoch, position, int(order[position]))


def image_folders(recipe: Recipe) -> tuple[Any, Any]:
    """Training and validation images of the folder `recipe.data`, with their transforms.

    Raises:
        ValueError: a folder is missing or has no images, or the two have different classes.
    """
    train = _folder(recipe, "train", training_transform(recipe))
    val = validation_folder(recipe)
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(
            f"data must have the same classes in train/ and val/; got {listed(differing)} "
            "in only one of them. Rename or remove these folders."
        )
    return train, val


def validation_folder(recipe: Recipe) -> Any:
    """The validation images, without the training images.

    Raises:
        ValueError: the folder is missing or has no images.
    """
    return _folder(recipe, "val", evaluation_transform(recipe.image_size))


def _folder(recipe: Recipe, part: str, transform: Callable[[Any], Tensor]) -> Any:
    datasets = import_torchvision().datasets
    if recipe.data is None or not (recipe.data / part).is_dir():
        found = "none" if recipe.data is None else f"{shown(recipe.data)}, which has no {part}/"
        raise ValueError(
            f"data must be a folder that holds train/ and val/; got {found}. Put the images into "
            f"{part}/CLASS/."
        )
    try:
        return datasets.ImageFolder(str(recipe.data / part), transform, loader=_load_named)
    except FileNotFoundError as error:
        raise ValueError(
            "data must have images in a folder for each class; in "
            f"{shown(recipe.data / part)}: {shown(error)}"
        ) from error


def _load_named(path: str) -> Any:
    """The image of a file; errors name the file."""
    try:
        return load_image(path)
    except ImportError:
        raise
    except Exception as error:  # every format raises its own errors
        reason = shown(str(error) or type(error).__name__)
        raise ValueError(
            f"{shown(path)} cannot be read as an image ({reason}). Replace or remove it."
        ) from error


def training_transform(recipe: Recipe) -> Callable[[Any], Tensor]:
    """Random crop and flip, RandAugment or colour jitter, random erasing."""
    v2 = import_torchvision().transforms.v2
    bicubic = v2.InterpolationMode.BICUBIC
    grey = [int(255 * channel) for channel in MEAN]
    steps = [
        v2.RandomResizedCrop(recipe.image_size, interpolation=bicubic),
        v2.RandomHorizontalFlip(),
        v2.RandAugment(interpolation=bicubic, fill=grey)
        if recipe.rand_augment
        else v2.ColorJitter(0.4, 0.4, 0.4),
        *_to_tensor(v2),
    ]
    if recipe.erasing:
        steps.append(v2.RandomErasing(recipe.erasing, value="random"))
    return v2.Compose(steps)


def evaluation_transform(image_size: int) -> Callable[[Any], Tensor]:
    """Resize the shorter side to image_size / 0.875 (bicubic), crop the centre."""
    v2 = import_torchvision().transforms.v2
    resize = v2.Resize(int(image_size / CROP), interpolation=v2.InterpolationMode.BICUBIC)
    return v2.Compose([resize, v2.CenterCrop(image_size), *_to_tensor(v2)])


def _to_tensor(v2: Any) -> list[Any]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, DEVIATION)]


def mixing(recipe: Recipe, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mixup or CutMix of a batch; each for half of the batches if both are used."""
    mixes = []
    if recipe.mixup or recipe.cutmix:
        v2 = import_torchvision().transforms.v2
        if recipe.mixup:
            mixes.append(v2.MixUp(alpha=recipe.mixup, num_classes=classes))
        if recipe.cutmix:
            mixes.append(v2.CutMix(alpha=recipe.cutmix, num_classes=classes))
    if not mixes:
        return lambda images, labels: (images, labels)
    return v2.RandomChoice(mixes)


def teacher_of(recipe: Recipe, classes: int) -> torch.nn.Module | None:
    """The teacher of the recipe, a classifier of torchvision with its weights; None without one.

    Raises:
        ValueError: an unknown classifier or unknown weights, or weights for other classes.
    """
    if recipe.distillation == "none":
        return None
    models = import_torchvision().models
    checks.check_option("teacher", recipe.teacher, tuple(models.list_models(module=models)))
    path = Path(recipe.teacher_weights)
    if path.is_file():
        teacher = models.get_model(recipe.teacher, weights=None, num_classes=classes)
        weights = read_file(path, "teacher_weights")
        if not isinstance(weights, dict):
            raise ValueError(
                f"teacher_weights must be a state dict; {shown(path)} holds a "
                f"{type(weights).__name__}."
            )
        try:
            teacher.load_state_dict(weights)
        except (RuntimeError, AttributeError, TypeError) as error:
            reason = shown(" ".join(str(error).split()))
            raise ValueError(
                f"teacher_weights must be a state dict of {recipe.teacher} with {classes} classes; "
                f"{shown(path)} is not: {reason}"
            ) from error
        check_finite(weights, shown(path))
    else:
        known = models.get_model_weights(recipe.teacher)
        checks.check_option("teacher_weights", recipe.teacher_weights, tuple(known.__members__))
        weights = known[recipe.teacher_weights]
        found = len(weights.meta["categories"])
        if found != classes:
            raise ValueError(
                f"teacher must have the {classes} classes of the data; {recipe.teacher} with the "
                f"weights {recipe.teacher_weights} has {found}. Pass a file with your own weights "
                "as teacher_weights."
            )
        teacher = models.get_model(recipe.teacher, weights=weights)
    return teacher.eval()


def import_torchvision() -> Any:
    """torchvision and its transforms, or an ImportError that says what to install."""
    try:
        need("torchvision.transforms.v2", "train", "Training on images")
        return need("torchvision", "train", "Training on images")
    except RuntimeError as error:  # its compiled operators do not load
        raise ImportError(
            f"torchvision was not built for torch {torch.__version__} ({error}). Install both from "
            "the same index: https://pytorch.org/get-started/locally."
        ) from error
