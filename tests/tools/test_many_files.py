"""`predict` over many good and broken files, in one process: answers, lines and memory."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swiftkernels.models import save_checkpoint
from tests.builds import ROOT
from tests.models.test_checkpoints import trained

PIL = pytest.importorskip("PIL.Image")
if not Path("/proc/self/status").exists():
    pytest.skip("measures memory on Linux only", allow_module_level=True)

MOST_MEMORY = 800 << 20
"""More than PyTorch takes when it is imported: 0.2 GiB for its build for CPUs, 0.6 with CUDA."""
PIXELS = 110_000_000
"""Of the largest good image: such as those of telephones."""

PREDICT = """
import contextlib, io, json, sys
from benchmarks import resident
from swiftkernels.tools import cli
import torch
imported = resident.status("VmRSS")
found = []
for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["predict", *arguments, "--size", "32", "--device", "cpu"])
    found.append((status, out.getvalue(), err.getvalue()))
print(json.dumps([found, resident.status("VmHWM") - imported]))
"""


def write_images(folder: Path, count: int) -> tuple[list[Path], list[Path]]:
    """Half of them good, in several formats and sizes; the others damaged, empty, or too large."""
    good, bad = [], []
    modes = ("RGB", "L", "P", "RGBA", "CMYK", "1")
    for i in range(count // 2 - 1):
        mode, kind = modes[i % 6], ("png", "jpeg", "tiff")[i // 6 % 3]
        mode = "RGB" if kind == "jpeg" and mode in ("P", "RGBA", "1") else mode
        mode = "RGB" if kind == "png" and mode == "CMYK" else mode
        size = ((64, 48), (1, 900), (3000, 2), (700, 500))[i % 4]
        pixels = PIL.linear_gradient("L").resize(size).convert(mode)
        good.append(folder / f"good{i}.{kind}")
        pixels.save(good[-1])
    good.append(folder / "large.png")
    side = int(PIXELS**0.5)
    PIL.new("RGB", (side, side), (90, 30, 200)).save(good[-1], compress_level=1)
    whole = good[0].read_bytes()
    damage = (
        lambda i: whole[: 8 + i],
        lambda i: b"",
        lambda i: whole[:16] + b"\xff\xff" + whole[18:],  # 4 billion pixels wide
        lambda i: b"no image " * i,
        lambda i: whole[:20] + bytes([1 + i % 255]) * 40 + whole[60:],
        lambda i: pickle.dumps({"a": i}),
    )
    for i in range(count - len(good)):
        bad.append(folder / f"bad{i}.png")
        bad[-1].write_bytes(damage[i % len(damage)](i))
    return good, bad


def write_checkpoints(folder: Path, count: int) -> list[Path]:
    """Damaged ones, and such that name much more memory than they have."""
    whole = (folder / "good.pth").read_bytes()
    huge = {f"stages.0.blocks.{i}.linear.fc1.weight": torch.ones(1, 1) for i in range(40)}
    contents = (
        lambda i: torch.ones(()).expand(1 << 20, 1 << 20),
        lambda i: torch.empty(1 << 20, 1 << 20, device="meta"),
        lambda i: torch.ones(1, 1 << 22),
    )
    paths = []
    for i in range(count):
        paths.append(folder / f"bad{i}.pth")
        if i % 4 == 3:
            paths[-1].write_bytes(whole[: 40 + len(whole) * i // (count + 1)])
        else:
            name = "stages.0.blocks.0.linear.fc1.weight"
            torch.save({**trained().state_dict(), **huge, name: contents[i % 4](i)}, paths[-1])
    return paths


@pytest.mark.parametrize(
    ("images", "checkpoints"), [(24, 4), pytest.param(200, 40, marks=pytest.mark.slow)]
)
def test_good_files_are_answered_and_others_get_a_line(images, checkpoints, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    good, bad = write_images(folder, images)
    save_checkpoint(trained(), tmp_path / "good.pth")
    broken = write_checkpoints(tmp_path, checkpoints)
    runs = [[tmp_path / "good.pth", folder], *([path, good[0]] for path in broken)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PREDICT],
        input=json.dumps([list(map(str, run)) for run in runs]),
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ((status, out, err), *others), peak = json.loads(done.stdout)
    assert status == 1
    answers = out.split("\n\n")
    assert {a.splitlines()[0] for a in answers if "class " in a} == set(map(str, good))
    lines = [line for line in err.splitlines() if line and ": warning: " not in line]
    assert sorted(line.partition(": ")[0] for line in lines) == sorted(map(str, bad))
    for path, (status, out, err) in zip(broken, others, strict=True):
        assert (status, out) == (2, "")
        assert str(path) in err
    assert peak < MOST_MEMORY, f"{peak:,}"
