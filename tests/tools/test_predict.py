"""`swiftkernels predict`, and the token weights that it draws."""

from __future__ import annotations

import copy
import doctest
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels import accelerate
from swiftkernels.models import attention_maps, save_checkpoint, token_weights
from swiftkernels.ops.additive_attention import reference
from swiftkernels.ops.additive_attention.layer import AttentionForward
from swiftkernels.ops.additive_attention.weights import Options
from swiftkernels.testing.cases import POOLINGS
from swiftkernels.testing.tolerance import assert_exact
from swiftkernels.tools import cli, predict
from tests.integrations.test_accelerate import Fork, OnImages, randn
from tests.models.test_checkpoints import trained
from tests.models.test_models import images

PIL = pytest.importorskip("PIL.Image")
ImageFilter = pytest.importorskip("PIL.ImageFilter")


def expected_weights(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """[B, N] from the definition, for the input of every attention."""
    found = {}

    def record(name: str):
        def hook(layer: AttentionForward, args: tuple[Tensor, ...]) -> None:
            tokens = args[0].flatten(2).transpose(1, 2) if args[0].dim() > 3 else args[0]
            q = layer.to_query(tokens)
            q = F.normalize(q, dim=-1) if layer.qk_norm else q
            options = Options(layer.pooling, layer.qk_norm, layer.scale_factor, layer.eps)
            found[name] = reference.global_query(q, layer.w_g[:, 0], None, options)[0].detach()

        return hook

    model = copy.deepcopy(model).eval()
    for name, layer in model.named_modules():
        if isinstance(layer, AttentionForward):
            layer.register_forward_pre_hook(record(name))
    model(x)
    return found


@pytest.mark.parametrize("pooling", POOLINGS)
def test_token_weights_equal_the_definition(pooling):
    model, x = trained(pooling=pooling).double(), images(2, 3, 40, 56).double()
    found = token_weights(model, x)
    assert [a.shape for a in found.values()] == [(2, 10, 14), (2, 5, 7)]
    assert not any(a.requires_grad for a in found.values())
    assert_exact({k: a.flatten(1) for k, a in found.items()}, expected_weights(model, x))


@pytest.mark.parametrize(
    ("layer", "shape", "spatial"), [(Fork, (2, 9, 12), (9,)), (OnImages, (2, 12, 3, 4), (3, 4))]
)
@pytest.mark.parametrize("norms", [True, False])
def test_token_weights_of_accelerated_models(layer, shape, spatial, norms):
    model, x = nn.Sequential(layer(norms=norms).double()), randn(*shape).double()
    with pytest.raises(ValueError, match=r"Sequential holds none.*accelerate\(model\) first"):
        token_weights(model, x)
    accelerate(model)
    found = token_weights(model, x)
    assert found["0"].shape == (2, *spatial)
    assert_exact({k: a.flatten(1) for k, a in found.items()}, expected_weights(model, x))


def test_token_weights_leave_the_model_unchanged():
    model, x = trained(drop_path_rate=0.3).train(), images(2, 3, 32, 32)
    model.stem.eval()
    modes = [m.training for m in model.modules()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    token_weights(model, x)
    with pytest.raises(RuntimeError):
        token_weights(model, x[:, :1])
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def picture(height: int, width: int) -> PIL.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(5))
    return PIL.frombytes("RGB", (width, height), pixels.byte().numpy().tobytes())


@pytest.mark.parametrize(
    ("shape", "size", "crop", "resized", "corner"),
    [
        # As published: the shorter side to 256, the longer rounded down, then the centre.
        ((427, 640), (224, 224), 0.875, (256, 383), (16, 80)),
        ((640, 427), (224, 224), 0.875, (383, 256), (80, 16)),
        ((300, 300), (224, 224), 0.95, (235, 235), (6, 6)),
        ((50, 40), (224, 224), 1.0, (280, 224), (28, 0)),
        ((427, 640), (240, 320), 1.0, (240, 359), (0, 20)),
        ((427, 640), (64, 320), 1.0, (213, 320), (74, 0)),
    ],
)
def test_images_are_cropped_as_in_evaluation(shape, size, crop, resized, corner):
    image = picture(*shape).filter(ImageFilter.GaussianBlur(3))
    (height, width), (top, left) = resized, corner
    expected = image.resize((width, height), PIL.Resampling.BICUBIC)
    expected = expected.crop((left, top, left + size[1], top + size[0]))
    # Pillow rounds between the passes over rows and columns, whose order differs.
    assert distance(predict.cropped(image, size, crop), expected) <= 2


def distance(a: PIL.Image, b: PIL.Image) -> int:
    """The largest difference of the pixels of two images."""
    assert a.size == b.size
    pixels = (torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).int() for i in (a, b))
    return int(torch.sub(*pixels).abs().max())


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("length", "other"), [(12000, 1), (30000, 1), (9000, 20), (1, 1)])
def test_long_images_are_cropped_before_resizing(length, other, turned, monkeypatch):
    resize, sizes = PIL.Image.resize, []

    def watched(image: PIL.Image, *args: object, **options: object) -> PIL.Image:
        sizes.append(image.size)
        return resize(image, *args, **options)

    slope = [200 * i // length for i in range(length)]
    image = PIL.new("L", (length, 1))
    image.putdata(slope)
    image = image.resize((length, other)).convert("RGB")
    image = image.transpose(PIL.Transpose.ROTATE_270) if turned else image
    monkeypatch.setattr(PIL.Image, "resize", watched)
    found = predict.cropped(image)
    assert found.size == (224, 224)
    assert all(width * height <= 224 * 224 for width, height in sizes)
    assert abs(found.getpixel((112, 112))[0] - slope[length // 2]) <= 1


def test_pixels_are_normalised_for_imagenet():
    image = PIL.new("RGB", (5, 3), (0, 255, 51))
    image.putpixel((4, 1), (255, 0, 0))
    pixels = predict.to_tensor(image)
    assert pixels.shape == (3, 3, 5)
    assert pixels.is_contiguous()
    expected = [(0 - 0.485) / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    assert pixels[:, 0, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert pixels[0, 1, 4].item() == pytest.approx((1 - 0.485) / 0.229)


def test_photographs_are_rotated_as_the_camera_recorded(tmp_path):
    image = PIL.new("L", (30, 20))
    exif = PIL.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "turned.jpg", exif=exif)
    turned = predict.load_image(tmp_path / "turned.jpg")
    assert (turned.mode, turned.size) == ("RGB", (20, 30))


def test_16_bit_images_are_converted_to_8_bits(tmp_path):
    """Pillow's own conversion would clip them to white."""
    eight = picture(9, 12).convert("L")
    values = [256 * value + 255 for value in eight.tobytes()]
    wide = PIL.new("I;16", eight.size)
    wide.putdata(values)
    for name in ("wide.png", "wide.tif"):
        wide.save(tmp_path / name)
        assert predict.load_image(tmp_path / name).tobytes() == eight.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_of_unknown_range_raise(mode, tmp_path):
    PIL.new(mode, (9, 12)).save(tmp_path / "image.tif")
    with pytest.raises(ValueError, match=f"it has mode {mode}"):
        predict.load_image(tmp_path / "image.tif")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two images and a text file."""
    (tmp_path / "images").mkdir()
    for name, shape in (("b.png", (40, 60)), ("a.png", (80, 64))):
        picture(*shape).save(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").touch()
    return tmp_path / "images"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(trained(), tmp_path / "small.pth")
    return tmp_path / "small.pth"


def run(*arguments: object) -> int:
    return cli.main(["predict", *map(str, arguments), "--device", "cpu"])


def test_most_likely_classes_are_printed(folder, checkpoint, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nhen\ncow\nbee\n")
    given = ("--size", 32, 48, "--crop", 0.9, "--top", 3, "--labels", names)
    assert run(checkpoint, folder, *given) == 0
    out = capsys.readouterr().out
    assert "pooling: l2, as recorded in the file" in out
    assert out.index("a.png") < out.index("b.png")
    model = trained()
    for name in ("a.png", "b.png"):
        image = predict.cropped(predict.load_image(folder / name), (32, 48), 0.9)
        with torch.no_grad():
            shares = model(predict.to_tensor(image)[None])[0].softmax(0)
        lines = out.split(f"{name}\n")[1].splitlines()[:4]
        order = shares.argsort(descending=True)[:3].tolist()
        assert [line.split() for line in lines[:3]] == [
            [f"{shares[i]:.1%}", ("cat", "dog", "hen", "cow", "bee")[i]] for i in order
        ]
        assert not lines[3].strip()


def test_class_names_come_from_config_json(folder, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    config = {"model_type": "swiftformer", "id2label": {str(i): f"kind {i}" for i in range(5)}}
    (theirs / "config.json").write_text(json.dumps(config))
    save_checkpoint(trained(pooling="sum"), theirs / "pytorch_model.bin", "transformers")
    assert run(theirs, folder / "a.png", "--size", 32) == 0
    out = capsys.readouterr().out
    assert "Class names: from config.json" in out
    assert sorted(line.split("kind ")[1] for line in out.splitlines() if "kind" in line) == list(
        "01234"
    )
    assert "pooling: sum, as in transformers" in out


def test_pictures_are_drawn(folder, checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "out"
    given = ("--size", 40, 32, "--attention", "--features", "--out", out)
    assert run(checkpoint, folder / "a.png", *given) == 0
    drawn = sorted(path.name for path in out.iterdir())
    assert drawn == ["a_attention.png", "a_features.png"]
    printed = capsys.readouterr().out
    for name in drawn:
        assert str(out / name) in printed
        # Three panels, each with many colours.
        with PIL.open(out / name) as image:
            assert image.width > 1.5 * image.height
            for third in range(3):
                left = third * image.width // 3
                part = image.crop((left, 0, left + image.width // 3, image.height))
                assert len(part.convert("RGB").getcolors(1 << 24)) > 100


def test_weights_are_drawn_in_units_of_equal_weights():
    pytest.importorskip("matplotlib")
    image = picture(32, 48)
    equal = torch.full((2, 3), 6**-0.5)
    mixed = torch.tensor([[-0.5, 0.0, 0.5, 0.5]])
    figure = predict.attention_figure(image, "x.png", [equal, mixed], "l2")
    shown, first, second = figure.axes[:3]
    assert shown.get_title() == "x.png"
    assert first.get_title() == "stage 1: 2 x 3 tokens"
    assert first.images[1].get_array().data == pytest.approx(1)
    assert second.images[1].get_array().data.tolist() == [[-1, 0, 1, 1]]
    assert (second.images[1].norm.vmin, second.images[1].norm.vmax) == (-1, 1)
    assert (first.images[1].norm.vmin, first.images[1].norm.vmax) == pytest.approx((-1, 1))
    opacity = second.images[1].get_alpha()
    assert opacity[0][1] < opacity[0][0] == opacity[0][2]
    figure = predict.attention_figure(image, "x.png", [torch.tensor([[0.1, 0.9]])], "softmax")
    assert figure.axes[1].images[1].get_array().data == pytest.approx(
        torch.tensor([[0.2, 1.8]]).numpy()
    )
    scale = figure.axes[1].images[1].norm
    assert (scale.vmin, scale.vmax) == pytest.approx((0.2, 1.8))  # not centred at zero
    assert "units of 1 / N" in figure.texts[0].get_text()


def test_colours_are_principal_components():
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(3, 8, 9, generator=generator) * torch.tensor([9.0, 3.0, 1.0])[:, None, None]
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=generator)).Q[:, :3]
    colours = predict.principal_colours((rotation @ parts.flatten(1)).unflatten(1, (8, 9)))
    assert colours.shape == (8, 9, 3)
    assert 0 <= colours.min() <= colours.max() <= 1
    for i in range(3):
        pair = torch.stack([colours[..., i].flatten().float(), parts[i].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.95
    assert predict.principal_colours(torch.ones(2, 3, 4)).shape == (3, 4, 3)


def test_unreadable_images_are_skipped(folder, checkpoint, capsys):
    broken = folder / "broken.png"
    broken.write_bytes(b"no image")
    assert run(checkpoint, broken, folder / "a.png", "--size", 32) == 1
    captured = capsys.readouterr()
    assert f"{broken}: cannot be read as an image" in captured.err
    assert "class " in captured.out.split("a.png")[1]


NAMES = ("$x_{y$.png", "esc\x1b[31m.png", "new\nline.png", "\udcff.png", "größe.png")


def test_any_file_name_is_printed_and_drawn(folder, checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name in NAMES:
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    (folder / "broken\x1b[2J.png").write_bytes(b"no image")
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\x1b[31m\ndog\nhen\ncow\nbee\n")
    out = tmp_path / "out"
    given = ("--size", 32, "--attention", "--features", "--labels", labels, "--out", out)
    assert run(checkpoint, folder, *given) == 1
    captured = capsys.readouterr()
    for line in (captured.out + captured.err).splitlines():
        assert line.isprintable()
    for name in ("$x_{y$.png", "esc\\x1b[31m.png", "new\\nline.png", "\\udcff.png", "größe.png"):
        assert f"{folder}/{name}\n" in captured.out
    assert "cat\\x1b[31m\n" in captured.out
    assert len(captured.err.splitlines()) == 2  # the broken image, and an empty line
    drawn = {path.name for path in out.iterdir()}
    assert drawn >= {
        f"{Path(n).stem}_{kind}.png" for n in NAMES for kind in ("attention", "features")
    }


def test_one_image_that_cannot_be_drawn_does_not_stop_the_others(
    folder, checkpoint, tmp_path, capsys
):
    pytest.importorskip("matplotlib")
    long = folder / f"{250 * 'a'}.png"
    (folder / "b.png").rename(long)
    out = tmp_path / "out"
    assert run(checkpoint, long, folder / "a.png", "--size", 32, "--features", "--out", out) == 1
    captured = capsys.readouterr()
    assert "cannot be drawn ([Errno 36] File name too long" in captured.err
    assert captured.out.count("class ") == 10
    assert [path.name for path in out.iterdir()] == ["a_features.png"]


def test_outputs_that_are_not_finite_are_reported(folder, tmp_path, capsys):
    model = trained()
    with torch.no_grad():
        for head in (model.head, model.head_dist):
            head.weight.fill_(3e38)
    save_checkpoint(model, tmp_path / "huge.pth")
    assert run(tmp_path / "huge.pth", folder, "--size", 32) == 1
    captured = capsys.readouterr()
    assert captured.err.count("the output of the model is NaN or infinite") == 2
    assert "nan%" not in captured.out


def test_images_that_need_too_much_memory_are_reported(folder, checkpoint, monkeypatch, capsys):
    PIL.open(folder / "b.png").convert("RGBA").save(folder / "rgba.png")
    monkeypatch.setattr("swiftkernels.utils.images.MOST_BYTES", 4 * 64 * 80)
    assert run(checkpoint, folder / "a.png", folder / "b.png", "--size", 32) == 0
    monkeypatch.setattr("swiftkernels.utils.images.MOST_BYTES", 4 * 40 * 60)
    assert run(checkpoint, folder, "--size", 32) == 1
    err = capsys.readouterr().err
    assert len(err.split()) > 0
    assert "a.png: cannot be read as an image (64 x 80 pixels would need 0 MB of memory" in err
    assert "rgba.png: cannot be read as an image (60 x 40 pixels" in err
    assert "b.png:" not in err.replace("rgba.png", "")


def test_too_large_images_are_reported_in_one_line_each(folder, checkpoint, monkeypatch, capsys):
    given = (checkpoint, folder / "b.png", folder / "a.png", "--size", 32)  # 2400, 5120 pixels
    monkeypatch.setattr(PIL, "MAX_IMAGE_PIXELS", 2500)
    assert run(*given) == 1
    captured = capsys.readouterr()
    assert captured.out.count("class ") == 5
    (line,) = (line for line in captured.err.splitlines() if line)
    assert line.startswith(f"{folder / 'a.png'}: cannot be read as an image (Image size (5120 pix")
    monkeypatch.setattr(PIL, "MAX_IMAGE_PIXELS", 4000)
    assert run(*given) == 0
    captured = capsys.readouterr()
    assert captured.out.count("class ") == 10
    (line,) = captured.err.splitlines()
    assert line.startswith(
        f"{folder / 'a.png'}: warning: Image size (5120 pixels) exceeds limit of 4000"
    )


def test_images_that_exceed_the_memory_are_reported(folder, checkpoint, monkeypatch, capsys):
    def out_of_memory(path: Path) -> None:
        raise MemoryError

    monkeypatch.setattr(predict, "load_image", out_of_memory)
    assert run(checkpoint, folder / "a.png") == 1
    assert "a.png: cannot be read as an image (MemoryError)" in capsys.readouterr().err


def test_models_of_1000_classes_have_the_names_of_imagenet(folder, tmp_path, capsys):
    model = trained(num_classes=1000)
    with torch.no_grad():
        for head in (model.head, model.head_dist):
            head.weight.zero_()
            head.bias.zero_()
            head.bias[856] = 9.0
    save_checkpoint(model, tmp_path / "weights.pth")
    given = (tmp_path / "weights.pth", folder, "--size", 32, "--top", 1)
    assert run(*given) == 0
    out = capsys.readouterr().out
    assert out.count("Class names: ImageNet") == 1
    assert out.count("  thresher\n") == 2
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"kind {i}\n" for i in range(1000)))
    for option in ("--labels", "--classes"):  # the second is the older name
        assert run(*given, option, labels) == 0
        out = capsys.readouterr().out
        assert "ImageNet" not in out
        assert out.count("  kind 856\n") == 2


def test_imagenet_has_1000_names():
    names = predict.imagenet_names()
    assert len(names) == len(set(names)) == 1000
    assert (names[0], names[134], names[517], names[999]) == (
        "tench", "crane bird", "crane", "toilet tissue"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", 0), "--size must be a number of pixels"),
        (("--size", 1, 2, 3), "--size must be a number of pixels"),
        (("--size", -5), "--size must be a number of pixels, or height and width; got -5"),
        (("--size", 999999999), "--size must be at most 16,777,216 pixels"),
        (("--size", 4096, 4097), "--size must be at most 16,777,216 pixels"),
        (("--size", 7), "--size must be at least 8, the stride of the last stage of the model"),
        (("--size", 64, 7), "--size must be at least 8, the stride of the last stage of the model"),
        (("--crop", 0), "--crop must be"),
        (("--crop", "nan"), "--crop must be"),
        (("--crop", 1e-3), "--crop must be a share of the shorter side, from 0.1 to 1"),
        (("--crop", 1.01), "--crop must be"),
        (("--top", 0), "--top must be at least 1"),
        (("--top", 2000), "--top must be at most 5, the number of classes of the model; got 2000"),
        (("--labels", "none.txt"), "--labels must be a file"),
        (("--labels", "."), ". is a folder"),
        (("--labels", "__file__"), "one line for each of the 5 classes"),
        (("--attention", "--pooling", "sum"), "the weight of every token is 1"),
        (("--source", "official"), "They look like --source timm"),
        (("--ema",), "model_ema"),
    ],
)
def test_wrong_options_print_one_line(arguments, message, folder, checkpoint, capsys):
    if "--attention" in arguments:
        pytest.importorskip("matplotlib")
    arguments = [__file__ if a == "__file__" else a for a in arguments]
    assert run(checkpoint, folder / "a.png", *arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_errors_name_options_of_the_command(folder, tmp_path, capsys):
    weights = {f"backbone.{name}": t for name, t in trained().state_dict().items()}
    path = tmp_path / "detector.pth"
    given = (path, folder / "a.png", "--size", 32)
    for content, message, more in (
        (None, f"checkpoint must be a file, a folder, or a repository .*; {path} does not", ()),
        (
            {"model": weights, "model_ema": {}},
            "If they are part of a larger model, pass the start of their names, as --prefix back",
            (),
        ),
        (weights, "To list unknown names, pass --source official", ()),
        (weights, "it holds only weights. Leave out --ema to", ("--ema",)),
        ({"model_ema": weights}, r"'model_ema': pass --ema to load it\.", ()),
        (weights, "prefix must be the start of names", ("--prefix", "neck.")),
    ):
        if content is not None:
            torch.save(content, path)
        assert run(*given, *more) == 2
        err = capsys.readouterr().err
        assert re.search(message, err), err
        assert "=" not in err
        assert "where" not in err
    assert run(*given, "--prefix", "backbone.") == 0
    assert "class " in capsys.readouterr().out


def test_unsuitable_models_and_folders_raise(folder, checkpoint, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(checkpoint, empty) == 2
    assert "has none" in capsys.readouterr().err
    for options, message in (
        ({"in_chans": 1}, "1 channels"),
        ({"num_classes": 0}, "must have heads"),
    ):
        save_checkpoint(trained(**options), tmp_path / "other.pth")
        assert run(tmp_path / "other.pth", folder) == 2
        assert message in capsys.readouterr().err
    picture(9, 9).save(empty / "a.jpg")
    pytest.importorskip("matplotlib")
    assert run(checkpoint, folder, empty, "--features") == 2
    assert "written to the same file" in capsys.readouterr().err


def test_folder_that_cannot_be_created_raises(folder, checkpoint, capsys):
    pytest.importorskip("matplotlib")
    for out in (folder / "a.png", folder / "a.png" / "new" / "out"):
        assert run(checkpoint, folder / "a.png", "--features", "--out", out) == 2
        err = capsys.readouterr().err
        assert err == (
            f"error: --out must be a folder; {folder / 'a.png'} is a file. Choose another path.\n"
        )


def test_missing_packages_are_reported_with_their_extra(folder, checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(checkpoint, folder, "--features") == 2
    assert "pip install '.[predict]'" in capsys.readouterr().err


def test_examples_run():
    from swiftkernels.models import SwiftFormer

    found = doctest.testmod(attention_maps, extraglobs={"SwiftFormer": SwiftFormer})
    assert found.attempted > 0
    assert found.failed == 0
