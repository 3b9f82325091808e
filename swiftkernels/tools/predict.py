"""`swiftkernels predict`: classes of images, token weights and feature maps."""

from __future__ import annotations

import errno
import math
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swiftkernels.backends import devices
from swiftkernels.models.attention_maps import token_weights
from swiftkernels.models.family import Source
from swiftkernels.models.hub import from_pretrained
from swiftkernels.models.network import Network
from swiftkernels.ops.types import Pooling
from swiftkernels.utils import checks
from swiftkernels.utils.extras import need
from swiftkernels.utils.files import make_folder, save_figure
from swiftkernels.utils.images import CROP, DEVIATION, MEAN, load_image
from swiftkernels.utils.text import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

INK = "#333333"
PANEL = 2.5
"""Width of a panel of a figure, in inches."""
LONGEST = 36
"""Characters of the longest title."""

IMAGENET_CLASSES = 1000
IMAGENET_LABELS = Path(__file__).with_name("imagenet_labels.txt")
TOP = 5
"""Default number of classes to print."""
SMALLEST_CROP = 0.1
MOST_PIXELS = 4096**2
"""Largest input of the model; SwiftFormer-L3 needs several GB of memory for it."""

MOST_COPIED = 4096**2
"""Pixels of an image up to which the part that is resized is copied first."""

ATTENTION = "Weights of the tokens in the global query, pooling "
UNITS = {
    "l2": ", in units of 1 / sqrt(N): equal weights would all be 1 or -1",
    "softmax": ", in units of 1 / N: equal weights would all be 1",
}
FEATURES = (
    "Feature maps: the first three principal components of the channels as red, green and blue."
)


def run(
    checkpoint: str,
    images: Sequence[Path],
    *,
    labels: Path | None = None,
    top: int | None = None,
    size: Sequence[int] = (224,),
    crop: float = CROP,
    attention: bool = False,
    features: bool = False,
    out: Path = Path("results"),
    source: Source | None = None,
    prefix: str = "",
    pooling: Pooling | None = None,
    ema: bool = False,
    device: str | None = None,
) -> int:
    """Print the most likely classes of every image, and draw the requested pictures.

    The arguments are the options of the command. Returns 1 if an image could not be read, else 0.

    Raises:
        ValueError: a checkpoint, an option or a list of images that cannot be used.
        ImportError: pillow, or for pictures matplotlib, is not installed.
        OSError: `out` cannot be created.
    """
    if top is not None:
        checks.check_positive("--top", top)
    _check_size(size)
    if not SMALLEST_CROP <= crop <= 1:
        raise ValueError(
            f"--crop must be a share of the shorter side, from {SMALLEST_CROP} to 1; got {crop}."
        )
    need("PIL", "predict", "Reading images")  # fail before the model is loaded
    if attention or features:
        need("matplotlib", "predict", "Drawing")
    paths = list(_image_files(images))
    if attention or features:
        _check_names(paths)
    target = devices.find(device)
    if attention or features:
        make_folder("--out", out)
    try:
        model = from_pretrained(checkpoint, source=source, prefix=prefix, ema=ema, pooling=pooling)
    except ValueError as error:
        raise ValueError(_as_options(str(error))) from error
    report = model.pretrained.report
    _check_options(model, size, top)
    print(_as_options(str(report)), end="\n\n")
    _check_model(model, report.pooling, attention, features)
    model.to(target)
    names, origin = _class_names(labels, model.pretrained.class_names, model.num_classes)
    if model.num_classes:
        print(f"{origin}\n")

    failed = 0
    for path in paths:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                image = cropped(load_image(path), (size[0], size[-1]), crop)
        except Exception as error:  # every format raises its own errors
            _skip(path, f"cannot be read as an image ({shown(error) or type(error).__name__})")
            failed = 1
            continue
        for warning in caught[:1]:
            print(f"{shown(path)}: warning: {shown(warning.message)}", file=sys.stderr)
        pixels = to_tensor(image).unsqueeze(0).to(target)
        print(shown(path))
        if model.num_classes:
            with torch.no_grad():
                p = model(pixels)[0].softmax(0)
            if not p.isfinite().all():
                _skip(path, "the output of the model is NaN or infinite")
                failed = 1
                continue
            for probability, index in zip(*p.topk(min(top or TOP, len(p))), strict=True):
                print(f"  {probability:6.1%}  {shown(names[int(index)])}")
        try:
            if attention:
                weights = [a[0].cpu() for a in token_weights(model, pixels).values()]
                figure = attention_figure(image, path.name, weights, report.pooling)
                print(f"  {shown(_saved(figure, out, path, 'attention'))}")
            if features:
                with torch.no_grad():
                    found = model.forward_intermediates(pixels, intermediates_only=True)
                    maps = [m[0].cpu() for m in found]
                figure = features_figure(image, path.name, maps)
                print(f"  {shown(_saved(figure, out, path, 'features'))}")
        except (OSError, ValueError, torch.linalg.LinAlgError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
                raise  # it would be the same for all images
            _skip(path, f"cannot be drawn ({shown(error)})")
            failed = 1
        print()
    return failed


def _skip(path: Path, reason: str) -> None:
    print(f"{shown(path)}: {reason}\n", file=sys.stderr)


def _as_options(text: str) -> str:
    """A message with options of the command instead of arguments: ema=True becomes --ema."""
    return re.sub(
        r"\b(ema|pooling|prefix|source)=(?:True|'([^' ]*)')",
        lambda m: " ".join(filter(None, (f"--{m[1]}", m[2]))),
        text,
    )


def cropped(image: Image, size: tuple[int, int] = (224, 224), crop: float = CROP) -> Image:
    """Preprocess an image as in evaluation on ImageNet: resize (bicubic), crop the centre.

    Args:
        image: any image.
        size: height and width of the result.
        crop: share of the shorter side that is cropped: 0.875 in the official code, which resizes
            to 256 and crops 224; 0.95 in the configurations of timm.
    """
    from PIL.Image import Resampling

    height, width = size
    # The smallest factor with which both sides are long enough.
    factor = max(int(height / crop) / image.height, int(width / crop) / image.width)
    sides = (image.width, width, factor), (image.height, height, factor)
    (left, right, x, x_end), (upper, lower, y, y_end) = (_window(*side) for side in sides)
    box = x, y, x_end, y_end
    if (right - left) * (lower - upper) > MOST_COPIED:
        box = left + x, upper + y, left + x_end, upper + y_end
    else:  # Pillow rounds the numbers of a box to float32
        image = image.crop((left, upper, right, lower))
    return image.resize((width, height), Resampling.BICUBIC, box=box)


def _window(length: int, result: int, factor: float) -> tuple[int, int, float, float]:
    """The part of one side of an image that becomes `result` pixels after resizing by `factor`.

    Only this part and the margin that the filter reads are resized, not the image.

    Returns:
        In pixels of the image: start and end of the part with margins, as integers; start and end
        of the part without margins, relative to that start.
    """
    # Rounded down as in torchvision; 1e-6 corrects products just below an integer.
    resized = int(length * factor + 1e-6)
    before = round((resized - result) / 2)
    scale = length / resized
    first, last = before * scale, min((before + result) * scale, length)
    margin = math.ceil(2 * max(scale, 1)) + 1  # a bicubic filter reads two pixels on each side
    start, end = max(math.floor(first) - margin, 0), min(math.ceil(last) + margin, length)
    return start, end, first - start, last - start


def to_tensor(image: Image) -> Tensor:
    """The image as a tensor [3, H, W], float32, normalised with mean and deviation of ImageNet."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    planes = pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255
    mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
    return ((planes - mean[:, None, None]) / deviation[:, None, None]).contiguous()


def attention_figure(image: Image, name: str, weights: Sequence[Tensor], pooling: str) -> Figure:
    """The image, and the token weights [H, W] of every stage over it, in units of equal weights."""
    unit = {"l2": math.sqrt, "softmax": float}.get(pooling, lambda n: 1.0)
    caption = f"{ATTENTION}{pooling}{UNITS.get(pooling, '')}."
    figure, panels = _figure(image, name, len(weights), caption, bars=True)
    for stage, (axes, a) in enumerate(zip(panels, weights, strict=True), 1):
        _overlay(figure, axes, image, a.float() * unit(a.numel()), signed=pooling != "softmax")
        _title(axes, f"stage {stage}: {a.shape[0]} x {a.shape[1]} tokens")
    return figure


def features_figure(image: Image, name: str, maps: Sequence[Tensor]) -> Figure:
    """The image, and principal components of the feature maps [C, H, W] of the stages as RGB."""
    figure, panels = _figure(image, name, len(maps), FEATURES)
    for stage, (axes, x) in enumerate(zip(panels, maps, strict=True), 1):
        axes.imshow(principal_colours(x).tolist(), interpolation="nearest", aspect="auto")
        channels, height, width = x.shape
        _title(axes, f"stage {stage}: {height} x {width}, {channels} channels")
    return figure


def principal_colours(x: Tensor) -> Tensor:
    """Principal components of [C, H, W] over the pixels, as colours [H, W, 3] from 0 to 1."""
    pixels = x.double().flatten(1).T  # [H W, C]
    pixels = pixels - pixels.mean(0)
    axes = torch.linalg.eigh(pixels.T @ pixels).eigenvectors.flip(1)[:, :3]
    # The sign of a component is arbitrary: make its largest entry positive.
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    colours = pixels @ (axes * largest.sign())
    low, high = torch.quantile(colours, torch.tensor([0.01, 0.99]).double(), dim=0)
    scaled = ((colours - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    missing = 3 - scaled.shape[1]  # if the map has fewer than three channels
    return torch.nn.functional.pad(scaled, (0, missing)).unflatten(0, x.shape[1:])


def _overlay(figure: Figure, axes: Axes, image: Image, values: Tensor, signed: bool) -> None:
    """Draw values [H, W] in colour over the grey image, with a colour bar below.

    Signed values have two colours around zero, even if all have the same sign.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if signed:
        high = values.abs().max().clamp_min(1e-12).item()
        low = -high
        colours, opacity = "RdBu_r", 0.15 + 0.75 * values.abs() / high
    else:
        low, high = values.min().item(), values.max().item()
        colours, opacity = "inferno", torch.full_like(values, 0.75)
    extent = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
    # A light range of greys, so that dark pixels do not hide the colours.
    axes.imshow(image.convert("L"), cmap="gray", vmin=-300, vmax=255, aspect="auto")
    scale = Normalize(low, high)
    axes.imshow(
        values.tolist(),
        cmap=colours,
        norm=scale,
        alpha=opacity.tolist(),
        extent=extent,
        interpolation="nearest",
        aspect="auto",
    )
    inch = image.width / image.height / PANEL  # as a share of the height of the panel
    bar = axes.inset_axes((0.0, -0.18 * inch, 1.0, 0.08 * inch))
    figure.colorbar(ScalarMappable(scale, colours), cax=bar, orientation="horizontal")
    bar.tick_params(labelsize=8, color=INK, labelcolor=INK)
    bar.locator_params(nbins=5)
    for spine in bar.spines.values():
        spine.set_visible(False)


def _figure(
    image: Image, name: str, panels: int, caption: str, bars: bool = False
) -> tuple[Figure, list[Axes]]:
    """A row of panels with the shape of the image, the first with the image, and space for bars."""
    from matplotlib.figure import Figure

    gap, above, below = 0.12, 0.3, 0.75 if bars else 0.4
    tall = PANEL * image.height / image.width
    width, height = gap + (PANEL + gap) * (panels + 1), above + tall + below
    figure = Figure(figsize=(width, height))
    axes = []
    for i in range(panels + 1):
        left = gap + (PANEL + gap) * i
        area = (left / width, below / height, PANEL / width, tall / height)
        axes.append(figure.add_axes(area))
        axes[-1].set_axis_off()
    axes[0].imshow(image, aspect="auto")
    _title(axes[0], name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}...")
    figure.text(gap / width, 0.13 / height, caption, fontsize=9, color=INK)
    return figure, axes[1:]


def _title(axes: Axes, text: str) -> None:
    axes.set_title(shown(text), fontsize=9.5, color=INK, pad=5, parse_math=False)


def _saved(figure: Figure, out: Path, image: Path, kind: str) -> Path:
    path = out / f"{image.stem}_{kind}.png"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that the font lacks
        save_figure(figure, path, dpi=160, facecolor="white")
    return path


def _check_size(size: Sequence[int]) -> None:
    """Raise unless the size is valid; `_check_options` compares it with the model."""
    if not 1 <= len(size) <= 2 or min(size) < 1:
        raise ValueError(
            f"--size must be a number of pixels, or height and width; got {_shown(size)}."
        )
    if size[0] * size[-1] > MOST_PIXELS:
        raise ValueError(
            f"--size must be at most {MOST_PIXELS:,} pixels in total, 4096 x 4096; got "
            f"{_shown(size)}. Larger inputs would need many GB of memory."
        )


def _check_options(model: Network, size: Sequence[int], top: int | None) -> None:
    stride = model.feature_strides[-1]
    if min(size) < stride:
        raise ValueError(
            f"--size must be at least {stride}, the stride of the last stage of the model; got "
            f"{_shown(size)}. That stage would see only padding."
        )
    if top is not None and top > model.num_classes:
        raise ValueError(
            f"--top must be at most {model.num_classes}, the number of classes of the model; got "
            f"{top}."
        )


def _shown(size: Sequence[int]) -> str:
    return " ".join(map(str, size))


def _check_names(paths: Sequence[Path]) -> None:
    first: dict[str, Path] = {}
    for path in paths:
        other = first.setdefault(path.stem, path)
        if other != path:
            raise ValueError(
                f"images must have different names for drawing; {shown(other)} and {shown(path)} "
                "would be written to the same file. Draw them in separate runs, with different "
                "--out."
            )


def _check_model(model: Network, pooling: str, attention: bool, features: bool) -> None:
    if model.in_chans != 3:
        raise ValueError(
            f"checkpoint must be from a model for RGB images; it needs {model.in_chans} channels."
        )
    if attention and pooling == "sum":
        raise ValueError(
            "--attention needs another pooling than 'sum', where the weight of every token is 1. "
            "Leave out --attention, or pass the pooling that the model was trained with: --pooling."
        )
    if not (model.num_classes or attention or features):
        raise ValueError(
            "checkpoint must have heads, to predict classes; it has none. Pass --attention or "
            "--features to draw pictures only."
        )


def _class_names(
    labels: Path | None, configured: list[str] | None, num_classes: int
) -> tuple[list[str], str]:
    """The names of the classes, and a sentence on their origin."""
    if labels is not None:
        return _labels(labels, num_classes), f"Class names: from {shown(labels)}."
    if configured is not None:
        return configured, "Class names: from config.json."
    if num_classes == IMAGENET_CLASSES:
        return imagenet_names(), (
            f"Class names: ImageNet, because the model has {IMAGENET_CLASSES} classes and the "
            "checkpoint has no names. For other names: --labels FILE."
        )
    numbers = [f"class {i}" for i in range(num_classes)]
    return numbers, "Class names: none in the checkpoint. To set them: --labels FILE."


def imagenet_names() -> list[str]:
    """The names of the 1000 classes of ImageNet, in the order of the ILSVRC."""
    text = IMAGENET_LABELS.read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


def _labels(path: Path, num_classes: int) -> list[str]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"--labels must be a file with one name a line; {shown(path)} {what}.")
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--labels must be a text file in UTF-8; {shown(path)} is not ({error}). Convert it."
        ) from error
    if len(names) != num_classes:
        raise ValueError(
            f"--labels must have one line for each of the {num_classes} classes; {shown(path)} has "
            f"{len(names)}."
        )
    return names


def _image_files(given: Sequence[Path]) -> Iterator[Path]:
    """The files, and the files in folders with a suffix of an image format."""
    from PIL import Image

    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for path in given:
        if not path.is_dir():
            yield path
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
        if not inside:
            raise ValueError(
                f"images must be image files or folders of them; {shown(path)} has none."
            )
        yield from inside
