"""Image files of many formats, damaged: `predict` answers the good ones and skips the others."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("PIL")

from hypothesis import event, given
from hypothesis import strategies as st
from PIL import Image

from swiftkernels.models import save_checkpoint
from swiftkernels.tools import cli
from tests.fuzz.commands import check_printable, run
from tests.fuzz.test_checkpoints import MODEL

MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("L", "P", "RGB"),
    "BMP": ("1", "L", "RGB"),
    "TIFF": ("1", "L", "RGB", "RGBA", "CMYK", "F", "I", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("L", "RGB"),
    "TGA": ("L", "RGB", "RGBA"),
    "PCX": ("L", "RGB"),
}


@st.composite
def images(draw: Any) -> tuple[bytes, str]:
    """A file, perhaps damaged, and its format."""
    kind = draw(st.sampled_from(list(MODES)))
    mode = draw(st.sampled_from(MODES[kind]))
    size = draw(st.sampled_from([(1, 1), (3, 500), (700, 2), (40, 33), (16, 16)]))
    pixels = bytes(i * i * 37 // 5 % 256 for i in range(size[0] * size[1]))
    image = Image.frombytes("L", size, pixels).convert("I" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.new("I;16", size, draw(st.integers(0, 65535)))
    exif = Image.Exif()
    exif[0x0112] = draw(st.integers(0, 12))
    file = io.BytesIO()
    image.save(file, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
    data = file.getvalue()
    event(f"format: {kind}")
    for _ in range(draw(st.integers(0, 3))):
        damage = draw(st.sampled_from(["cut", "set", "set", "insert"]))
        event(f"damage: {damage}")
        if not data:
            break
        at = draw(st.integers(0, 60) | st.integers(0, 1 << 30)) % len(data)
        if damage == "cut":
            data = data[:at]
        elif damage == "set":
            new = draw(st.binary(min_size=1, max_size=4) | st.just(b"\xff" * 4))
            data = data[:at] + new + data[at + len(new) :]
        else:
            data = data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at:]
    return data, kind.lower()


@given(images())
def test_images(made):
    data, suffix = made
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(MODEL, folder / "w.pth")
        (folder / f"a.{suffix}").write_bytes(data)
        Image.new("RGB", (30, 40)).save(folder / "good.png")
        given = (folder / "w.pth", folder / f"a.{suffix}", folder / "good.png", "--device", "cpu")
        done = run(cli.main, ["predict", *map(str, given), "--size", "32"])
    check_printable(done.err)
    answered = done.out.count("%") // 3
    assert done.status == 2 - answered  # the good one is always answered
    assert len(done.err.strip().splitlines()) <= 1
    if done.status == 1:
        assert "a." in done.err
        event(f"skipped: {done.err.partition(': ')[2][:45]}")
