"""Atomic replacement of files, with full disks, errors and interruptions."""

from __future__ import annotations

import doctest
import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swiftkernels import AdditiveAttention, export
from swiftkernels.models import SwiftFormer, save_checkpoint
from swiftkernels.training import metrics
from swiftkernels.utils import files
from tests.builds import ROOT
from tests.conftest import DISK_BYTES
from tests.disks import file_system


def toy() -> SwiftFormer:
    return SwiftFormer((8, 16), (1, 1), num_classes=5)


def save_pth(path: Path) -> None:
    save_checkpoint(toy(), path)


def save_torch_export(path: Path) -> None:
    export.to_torch_export(AdditiveAttention(8, 8), path, (1, 9, 8), compare=False)


def save_torchscript(path: Path) -> None:
    export.to_torchscript(AdditiveAttention(8, 8), path, (1, 9, 8), compare=False)


def save_onnx(path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    export.to_onnx(AdditiveAttention(16, 16), path, (1, 9, 16), opset=17, compare=False)


def save_table(path: Path) -> None:
    metrics.write([{"step": step} for step in range(1000)], path)


def save_picture(path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    figure.subplots().plot(range(9))
    files.save_figure(figure, path)


WRITERS = (
    save_pth,
    save_torch_export,
    save_torchscript,
    save_onnx,
    save_table,
    save_picture,
)


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("save", WRITERS, ids=lambda save: save.__name__)
def test_full_disk_raises_one_line_and_keeps_the_old_file(save, tmp_path):
    path = tmp_path / "old"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left on device") as caught:
        save(path)
    assert caught.value.errno == errno.ENOSPC
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert entries(tmp_path) == ["old"]
    assert path.read_bytes() == b"old"


@pytest.mark.usefixtures("full_disk")
def test_full_disk_with_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "old.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=r"No space left on device: .*old\.safetensors"):
        save_checkpoint(toy(), path)
    assert entries(tmp_path) == ["old.safetensors"]
    assert path.read_bytes() == b"old"


def in_a_process(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )


REPLACE_TWO = """
import sys, torch
from pathlib import Path
from swiftkernels.models import SwiftFormer, save_checkpoint
folder = Path(sys.argv[1])
{before}
for name in ("mine.pth", "mine.safetensors"):
    try:
        save_checkpoint(SwiftFormer((64, 64), (1, 1), num_classes=5), folder / name)
    except OSError as error:
        print(error.errno, error.filename == str(folder / name))
"""


def assert_old_files_stay(before: str, error: int, folder: Path) -> None:
    names = ["mine.pth", "mine.safetensors"]
    for name in names:
        (folder / name).write_bytes(b"old")
    done = in_a_process(REPLACE_TWO.format(before=before), folder)
    assert done.stdout == f"{error} True\n" * 2, done.stderr
    assert entries(folder) == names
    assert all((folder / name).read_bytes() == b"old" for name in names)


def test_file_size_limit_of_the_system(tmp_path):
    pytest.importorskip("safetensors")
    pytest.importorskip("resource")
    limit = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({DISK_BYTES}, {DISK_BYTES}))"
    assert_old_files_stay(limit, errno.EFBIG, tmp_path)


def test_full_file_system(tmp_path):
    pytest.importorskip("safetensors")
    with file_system(tmp_path / "disk", "64k") as folder:
        assert_old_files_stay("", errno.ENOSPC, folder)


def test_new_files_have_the_default_mode(tmp_path):
    before = os.umask(0o027)
    try:
        save_checkpoint(toy(), tmp_path / "a.pth")
    finally:
        os.umask(before)
    assert (tmp_path / "a.pth").stat().st_mode & 0o777 == 0o640
    assert entries(tmp_path) == ["a.pth"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, RuntimeError])
def test_interruption_or_error_keeps_the_old_file(error, tmp_path):
    path = tmp_path / "last.pth"
    path.write_bytes(b"before")

    def write() -> None:
        with files.replacing(path) as file:
            file.write(b"half")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        write()
    assert entries(tmp_path) == ["last.pth"]
    assert path.read_bytes() == b"before"


def test_two_writers_use_different_temporary_files(tmp_path):
    path = tmp_path / "last.pth"
    with files.replacing(path) as first:
        first.write(b"first")
        with files.replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert entries(tmp_path) == ["last.pth"]


def test_symbolic_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    for text in ("new", "newer"):
        files.write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there" / "file").read_text() == text


def test_file_with_a_long_name_is_written(tmp_path):
    name = "ä" * 127
    files.write_text(tmp_path / name, "")
    assert entries(tmp_path) == [name]


SAVERS: tuple[Callable[[Any], object], ...] = (
    lambda path: save_checkpoint(toy(), path),
    lambda path: files.write_text(path, ""),
    lambda path: export.to_torch_export(toy(), path),
    lambda path: export.to_torchscript(toy(), path),
)


@pytest.mark.parametrize("save", SAVERS)
def test_wrong_paths_raise(save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, message in (
        ("", "must be the path of a file; it is empty"),
        (tmp_path, f"must be the path of a file; {tmp_path} is a folder"),
        (os.devnull, "is a device or a pipe"),
        (
            tmp_path / "none" / "a",
            r"must be in an existing folder; .*none is not\. Create it first",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            save(path)
    with pytest.raises(TypeError, match="path must be a path; got int"):
        save(3)
    assert not list(tmp_path.iterdir())
    assert Path(os.devnull).is_char_device()


def test_folder_replaces_another(tmp_path):
    path = tmp_path / "a.mlpackage"
    for text in ("new", "newer"):
        with files.replacing_folder(path) as folder:
            assert folder.suffix == ".mlpackage"
            folder.mkdir()
            (folder / text).touch()
        assert entries(path) == [text]

    def fail() -> None:
        with files.replacing_folder(path) as folder:
            folder.mkdir()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert entries(path) == ["newer"]
    assert entries(tmp_path) == ["a.mlpackage"]
    (tmp_path / "file").touch()
    for wrong, message in ((tmp_path / "file", "is a file"), ("", "it is empty")):
        with pytest.raises(ValueError, match=f"must be the path of a folder; .*{message}"):
            files.check_folder("path", wrong)


def test_rows_with_other_columns_write_no_file(tmp_path):
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        files.write_csv(tmp_path / "table.csv", [{"a": 1}, {"b": 2}])
    assert not list(tmp_path.iterdir())
    files.write_csv(tmp_path / "table.csv", [{"a": 1 / 3, "b": "x"}], digits=3)
    assert (tmp_path / "table.csv").read_text() == "a,b\n0.333,x\n"


def test_only_temporary_files_of_killed_processes_are_removed(tmp_path):
    with files.replacing(tmp_path / "last.pth"):
        (left,) = tmp_path.iterdir()
        name = left.name
    (tmp_path / name).touch()
    (tmp_path / ".own.tmp").touch()
    files.remove_leftovers(tmp_path)
    assert entries(tmp_path) == [".own.tmp", "last.pth"]


def test_examples_run():
    found = doctest.testmod(files, extraglobs={"tempfile": tempfile})
    assert found.attempted > 0
    assert found.failed == 0
