"""`swiftkernels predict`: what a checkpoint sees in images, and where it looks."""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swiftkernels.backends import devices
from swiftkernels.models.attention_maps import token_weights
from swiftkernels.models.swiftformer.hub import class_names, from_pretrained
from swiftkernels.models.swiftformer.network import SwiftFormer
from swiftkernels.utils import checks
from swiftkernels.utils.extras import need
from swiftkernels.utils.files import save_figure
from swiftkernels.utils.images import CROP, DEVIATION, MEAN, load_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

INK = "#333333"
PANEL = 2.5
"""Width of a picture in a figure, in inches."""
LONGEST = 36
"""Characters of a title."""

IMAGENET_CLASSES = 1000
IMAGENET_LABELS = Path(__file__).with_name("imagenet_labels.txt")
TOP = 5
"""Classes that are named, unless another number is asked for."""
SMALLEST_CROP = 0.1
MOST_PIXELS = 4096**2
"""Of the model's input, for which SwiftFormer-L3 takes some GB of memory."""

ATTENTION = "Weights of the tokens in the global query, pooling "
UNITS = {
    "l2": ", in units of 1 / sqrt(N): if all weighed the same, each would be 1 or -1",
    "softmax": ", in units of 1 / N: if all weighed the same, each would be 1",
}
FEATURES = (
    "Feature maps: the first three principal components of each one's channels as red, green, blue."
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
    source: str | None = None,
    prefix: str = "",
    pooling: str | None = None,
    ema: bool = False,
    device: str | None = None,
) -> int:
    """Print the likeliest classes of every image, and draw what is asked for.

    Args as the options of the command. Returns 1 if an image could not be read, else 0.

    Raises:
        ValueError: a checkpoint, an option or a list of images that cannot be used.
        ImportError: pillow, or for pictures matplotlib, is not installed.
        OSError: `out` cannot be made.
    """
    if top is not None:
        checks.check_positive("--top", top)
    _check_size(size)
    if not SMALLEST_CROP <= crop <= 1:
        raise ValueError(
            f"--crop must be a share of the image's shorter side from {SMALLEST_CROP} to 1; got "
            f"{crop}."
        )
    need("PIL", "predict", "Reading images")  # at the start, not after the model
    if attention or features:
        need("matplotlib", "predict", "Drawing")
    paths = list(_image_files(images))
    if attention or features:
        _check_names(paths)
    where = devices.find(device)
    if attention or features:
        out.mkdir(parents=True, exist_ok=True)
    try:
        model, report, config = from_pretrained(
            checkpoint, source=source, prefix=prefix, ema=ema, pooling=pooling
        )
    except ValueError as error:
        raise ValueError(_as_options(str(error))) from error
    _check_fit(model, size, top)
    print(_as_options(str(report)), end="\n\n")
    _check_model(model, report.pooling, attention, features)
    model.to(where)
    names, named = _class_names(labels, config, model.num_classes)
    if model.num_classes:
        print(f"{named}\n")

    failed = 0
    for path in paths:
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                image = cropped(load_image(path), (size[0], size[-1]), crop)
        except Exception as error:  # every format has errors of its own
            reason = str(error) or type(error).__name__
            print(f"{path}: cannot be read as an image ({reason})\n", file=sys.stderr)
            failed = 1
            continue
        for warning in said[:1]:  # one of them is a line enough
            print(f"{path}: warning: {warning.message}", file=sys.stderr)
        pixels = to_tensor(image).unsqueeze(0).to(where)
        print(path)
        if model.num_classes:
            with torch.no_grad():
                shares = model(pixels)[0].softmax(0)
            for share, index in zip(*shares.topk(min(top or TOP, len(shares))), strict=True):
                print(f"  {share:6.1%}  {names[int(index)]}")
        if attention:
            weights = [a[0].cpu() for a in token_weights(model, pixels).values()]
            figure = attention_figure(image, path.name, weights, report.pooling)
            print(f"  {_saved(figure, out, path, 'attention')}")
        if features:
            with torch.no_grad():
                found = model.forward_intermediates(pixels, intermediates_only=True)
                maps = [m[0].cpu() for m in found]
            figure = features_figure(image, path.name, maps)
            print(f"  {_saved(figure, out, path, 'features')}")
        print()
    return failed


def _as_options(text: str) -> str:
    """What the library says of its arguments, in the words of the command: ema=True is --ema."""
    return re.sub(
        r"\b(ema|pooling|prefix|source)=(?:True|'([^' ]*)')",
        lambda m: " ".join(filter(None, (f"--{m[1]}", m[2]))),
        text,
    )


def cropped(image: Image, size: tuple[int, int] = (224, 224), crop: float = CROP) -> Image:
    """An image as in evaluation on ImageNet: resized (bicubic), then its centre.

    Args:
        image: any.
        size: height and width of the result.
        crop: its share of the shorter side. 0.875, resizing to 256 for 224, is the official code's;
            timm's configurations have 0.95.
    """
    from PIL.Image import Resampling

    height, width = size
    # The smaller factor that leaves both sides long enough; of a square, that of the shorter side.
    factor = max(int(height / crop) / image.height, int(width / crop) / image.width)
    sides = (image.width, width, factor), (image.height, height, factor)
    (left, right, *across), (upper, lower, *along) = (_window(*side) for side in sides)
    box = across[0], along[0], across[1], along[1]
    part = image.crop((left, upper, right, lower))
    return part.resize((width, height), Resampling.BICUBIC, box=box)


def _window(length: int, result: int, factor: float) -> tuple[int, int, float, float]:
    """The middle of one side of an image, of which `result` pixels are left when it is resized.

    Returns:
        In pixels of the image: start and end of all that the filter reads, as whole numbers; from
        this start on, start and end of the middle itself.
    """
    # Rounded down, as torchvision does, but for what floating point takes off a whole number.
    resized = int(length * factor + 1e-6)
    before = round((resized - result) / 2)
    scale = length / resized
    first, last = before * scale, min((before + result) * scale, length)
    margin = math.ceil(2 * max(scale, 1)) + 1  # a bicubic filter reaches two pixels far
    start, end = max(math.floor(first) - margin, 0), min(math.ceil(last) + margin, length)
    return start, end, first - start, last - start


def to_tensor(image: Image) -> Tensor:
    """[3, H, W] float32, ImageNet's mean taken off and divided by its deviations."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    planes = pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255
    mean, deviation = torch.tensor(MEAN), torch.tensor(DEVIATION)
    return ((planes - mean[:, None, None]) / deviation[:, None, None]).contiguous()


def attention_figure(image: Image, name: str, weights: Sequence[Tensor], pooling: str) -> Figure:
    """The image, and over it the token weights [H, W] of every stage, in units of equal weights."""
    unit = {"l2": math.sqrt, "softmax": float}.get(pooling, lambda n: 1.0)
    caption = f"{ATTENTION}{pooling}{UNITS.get(pooling, '')}."
    figure, panels = _figure(image, name, len(weights), caption, bars=True)
    for stage, (axes, a) in enumerate(zip(panels, weights, strict=True), 1):
        _overlay(figure, axes, image, a.float() * unit(a.numel()), signed=pooling != "softmax")
        _title(axes, f"stage {stage}: {a.shape[0]} x {a.shape[1]} tokens")
    return figure


def features_figure(image: Image, name: str, maps: Sequence[Tensor]) -> Figure:
    """The image and the feature maps [C, H, W] of the stages, their principal components as RGB."""
    figure, panels = _figure(image, name, len(maps), FEATURES)
    for stage, (axes, x) in enumerate(zip(panels, maps, strict=True), 1):
        axes.imshow(principal_colours(x).tolist(), interpolation="nearest", aspect="auto")
        channels, height, width = x.shape
        _title(axes, f"stage {stage}: {height} x {width}, {channels} channels")
    return figure


def principal_colours(x: Tensor) -> Tensor:
    """[C, H, W] -> [H, W, 3] from 0 to 1: what varies most over the map, as red, green, blue."""
    pixels = x.double().flatten(1).T  # [H W, C]
    pixels = pixels - pixels.mean(0)
    axes = torch.linalg.eigh(pixels.T @ pixels).eigenvectors.flip(1)[:, :3]
    # The sign of a component is arbitrary: its largest entry shall be positive.
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    colours = pixels @ (axes * largest.sign())
    low, high = torch.quantile(colours, torch.tensor([0.01, 0.99]).double(), dim=0)
    scaled = ((colours - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    missing = 3 - scaled.shape[1]  # of a map with fewer channels
    return torch.nn.functional.pad(scaled, (0, missing)).unflatten(0, x.shape[1:])


def _overlay(figure: Figure, axes: Axes, image: Image, values: Tensor, signed: bool) -> None:
    """Values [H, W] in colour over the grey image, with their scale below.

    Those with signs in two colours around zero, even where all of them have the same.
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
    # From a light grey to white, which leaves the dark to the colours.
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
    inch = image.width / image.height / PANEL  # in heights of the picture
    bar = axes.inset_axes((0.0, -0.18 * inch, 1.0, 0.08 * inch))
    figure.colorbar(ScalarMappable(scale, colours), cax=bar, orientation="horizontal")
    bar.tick_params(labelsize=8, color=INK, labelcolor=INK)
    bar.locator_params(nbins=5)
    for spine in bar.spines.values():
        spine.set_visible(False)


def _figure(
    image: Image, name: str, panels: int, caption: str, bars: bool = False
) -> tuple[Figure, list[Axes]]:
    """A row of pictures of the image's shape, the first the image, and room for scales below."""
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
    axes.set_title(text, fontsize=9.5, color=INK, pad=5)


def _saved(figure: Figure, out: Path, image: Path, kind: str) -> Path:
    path = out / f"{image.stem}_{kind}.png"
    save_figure(figure, path, dpi=160, facecolor="white")
    return path


def _check_size(size: Sequence[int]) -> None:
    """Raise unless the size can be computed; whether it fits the model, `_check_fit` tells."""
    if not 1 <= len(size) <= 2 or min(size) < 1:
        raise ValueError(
            f"--size must be a number of pixels, or height and width; got {_shown(size)}."
        )
    if size[0] * size[-1] > MOST_PIXELS:
        raise ValueError(
            f"--size must be at most {MOST_PIXELS:,} pixels in all, 4096 x 4096; got "
            f"{_shown(size)}. Larger inputs would take many GB of memory."
        )


def _check_fit(model: SwiftFormer, size: Sequence[int], top: int | None) -> None:
    stride = model.feature_strides[-1]
    if min(size) < stride:
        raise ValueError(
            f"--size must be at least {stride}, the stride of the model's last stage, which would "
            f"see nothing but padding otherwise; got {_shown(size)}."
        )
    if top is not None and top > model.num_classes:
        raise ValueError(
            f"--top must be at most the number of the model's classes, {model.num_classes}; got "
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
                f"images must have different names to be drawn; {other} and {path} would go into "
                "one file. Draw them one after the other, with another --out."
            )


def _check_model(model: SwiftFormer, pooling: str, attention: bool, features: bool) -> None:
    channels = model.state_dict()["stem.0.weight"].shape[1]
    if channels != 3:
        raise ValueError(
            f"checkpoint must be of a model for RGB images; its images have {channels} channels."
        )
    if attention and pooling == "sum":
        raise ValueError(
            "--attention shows nothing with pooling 'sum', where every token weighs 1. Leave it "
            "out, or name the pooling that the model was trained with: --pooling."
        )
    if not (model.num_classes or attention or features):
        raise ValueError("checkpoint has no heads: nothing to tell but --attention or --features.")


def _class_names(
    labels: Path | None, config: Mapping[str, Any], num_classes: int
) -> tuple[list[str], str]:
    """The names of the classes, and a sentence on where they are from."""
    if labels is not None:
        return _labels(labels, num_classes), f"The names of the classes are those of {labels}."
    own = class_names(config, num_classes)
    if own is not None:
        return own, "The names of the classes are those of config.json."
    if num_classes == IMAGENET_CLASSES:
        return imagenet_names(), (
            f"The names of the classes are ImageNet's: the model has {IMAGENET_CLASSES} and the "
            "checkpoint names none. For others: --labels FILE."
        )
    numbers = [f"class {i}" for i in range(num_classes)]
    return numbers, "The checkpoint does not name its classes. To name them: --labels FILE."


def imagenet_names() -> list[str]:
    """The names of ImageNet's 1000 classes, in the order of the ILSVRC."""
    text = IMAGENET_LABELS.read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


def _labels(path: Path, num_classes: int) -> list[str]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"--labels must be a file with a name in each line; {path} {what}.")
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--labels must be a text file in UTF-8; {path} is none ({error})."
        ) from error
    if len(names) != num_classes:
        raise ValueError(
            f"--labels must have a line for each of the {num_classes} classes; {path} has "
            f"{len(names)}."
        )
    return names


def _image_files(given: Sequence[Path]) -> Iterator[Path]:
    """The files, and those in folders that look like images."""
    from PIL import Image

    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for path in given:
        if not path.is_dir():
            yield path
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
        if not inside:
            raise ValueError(f"images must be files or folders with some; {path} has none.")
        yield from inside
