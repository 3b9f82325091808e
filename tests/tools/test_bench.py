"""`swiftkernels bench`: what it writes, and when it fails. Nothing here judges a time."""

from __future__ import annotations

import csv
import itertools
import sys
from dataclasses import replace

import pytest
import torch

from swiftkernels.backends import devices
from swiftkernels.ops.additive_attention import eager
from swiftkernels.ops.additive_attention.op import SELF_ATTENTION
from swiftkernels.ops.benchmark import Size
from swiftkernels.testing import engines, harness, timing
from swiftkernels.tools import bench, cli

CPU = torch.device("cpu")
TINY = harness.Settings(
    bench.NAMES, ((Size(9, 16), 2),), (torch.float32,), backward=(False, True), seconds=0.0
)


def no_compiler(*args):
    raise RuntimeError("no compiler\nand more")


@pytest.fixture
def tiny(monkeypatch):
    """One small problem instead of many; without a compiler, which takes long."""
    monkeypatch.setattr(bench, "settings_for", lambda *_: TINY)
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 1 << 12)
    uncompiled = replace(engines.ENGINES["compile"], build=no_compiler)
    monkeypatch.setitem(engines.ENGINES, "compile", uncompiled)


def read(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_engine_is_measured_and_reported(tiny, tmp_path, capsys):
    before = torch.get_num_threads()
    assert cli.main(["bench", "--device", "cpu", "--out", str(tmp_path / "new")]) == 0
    assert torch.get_num_threads() == before
    rows = read(tmp_path / "new" / bench.CSV)
    assert [row["engine"] for row in rows] == [*bench.NAMES, *bench.NAMES]
    assert {row["direction"] for row in rows} == {"forward", "forward+backward"}
    for row in rows:
        timed = row["engine"] != "compile"
        assert bool(row["median_seconds"]) == timed
        assert row["note"] == ("" if timed else "absent: RuntimeError: no compiler")
        if timed:
            assert int(row["rounds"]) >= 9
            assert 0 <= float(row["min_seconds"]) <= float(row["median_seconds"])
            assert float(row["error"]) < 1e-5
            assert (row["gradient_error"] == "") == (row["direction"] == "forward")
    assert rows[0]["backend"] == SELF_ATTENTION.choose_backend("auto", torch.zeros(2, 9, 16), 16)
    said = (tmp_path / "new" / bench.REPORT).read_text()
    assert devices.name(CPU) in said
    assert f"torch: {torch.__version__}" in said
    assert "a plain copy: " in said
    assert "1 thread, float32, forward, as called: time of the engine / time of" in said
    assert "compile, float32 forward, N=9, C=16, batch 2, 1 thread(s): absent: RuntimeError" in said
    assert str(tmp_path / "new" / bench.CSV) in capsys.readouterr().out


def test_a_wrong_engine_is_not_timed_and_fails_the_command(tiny, monkeypatch, tmp_path, capsys):
    forward = eager.forward
    monkeypatch.setattr(
        eager,
        "forward",
        lambda *args: (forward(*args)[0] * 1.001, *forward(*args)[1:]),
    )
    monkeypatch.setattr(SELF_ATTENTION, "_automatic_backend", lambda *args: "aten")
    assert bench.run("cpu", tmp_path) == 1
    rows = read(tmp_path / bench.CSV)
    for row in rows:
        if row["engine"] == engines.OURS:
            assert row["note"].startswith("wrong: relative error of the output 0.00")
            assert row["median_seconds"] == ""
        elif row["engine"] != "compile":
            assert row["median_seconds"]
    assert "wrong: relative error" in (tmp_path / bench.REPORT).read_text()
    assert "wrong: relative error" in capsys.readouterr().out


def test_an_operator_that_raises_fails_the_command(tiny, monkeypatch, tmp_path):
    def broken(*args):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(SELF_ATTENTION, "_automatic_backend", lambda *args: "aten")
    monkeypatch.setattr(eager, "backward", broken)
    assert bench.run("cpu", tmp_path) == 1
    forward, backward = (r for r in read(tmp_path / bench.CSV) if r["engine"] == engines.OURS)
    assert forward["note"] == ""
    assert backward["note"] == "failed: RuntimeError: out of registers"


def test_an_interruption_keeps_what_was_measured(tiny, monkeypatch, tmp_path, capsys):
    compare = harness.compare
    calls = itertools.count()

    def interrupted(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return compare(*args)

    monkeypatch.setattr(harness, "compare", interrupted)
    assert bench.run("cpu", tmp_path) == 130
    assert {row["direction"] for row in read(tmp_path / bench.CSV)} == {"forward"}
    assert "float32, forward, as called" in (tmp_path / bench.REPORT).read_text()
    assert "interrupted" in capsys.readouterr().err


def test_an_interruption_before_the_first_row_leaves_the_older_files(
    tiny, monkeypatch, tmp_path, capsys
):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "compare", interrupted)
    (tmp_path / bench.CSV).write_text("old")
    assert bench.run("cpu", tmp_path) == 130
    assert [path.name for path in tmp_path.iterdir()] == [bench.CSV]
    assert (tmp_path / bench.CSV).read_text() == "old"
    said = capsys.readouterr()
    assert "nothing written" in said.err
    assert "Written" not in said.out


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_ends_the_command_with_one_line(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 1 << 20)
    row = dict.fromkeys(bench.COLUMNS, "x" * 200) | {"gigabytes_per_second": ""}
    monkeypatch.setattr(harness, "compare", lambda *_: [row] * 3)
    assert cli.main(["bench", "--device", "cpu", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"error: [Errno 28] No space left on device: '{tmp_path / bench.CSV}'" in said
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_there_are_no_plots(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert bench.run("cpu", tmp_path) == 0
    assert not (tmp_path / bench.PLOT).exists()
    assert "pip install '.[bench]'" in capsys.readouterr().out


def test_plots_are_drawn(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    assert bench.run("cpu", tmp_path) == 0
    assert (tmp_path / bench.PLOT).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cuda:99"], "device must be one of"),
        (["--device", "cpu", "--threads", "0"], "--threads must be at least 1"),
        (["--device", "cpu", "--out", __file__], "--out must be a folder"),
    ],
)
def test_wrong_arguments_are_reported(capsys, arguments, said):
    assert cli.main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_shapes_are_those_of_swiftformers():
    settings = bench.settings_for(torch.device("cuda", 0), quick=False)
    assert {batch for _, batch in settings.inputs} == {1, 8, 64}
    assert len(settings.problems()) == 14 * 3 * 3 * 2
    quick = bench.settings_for(CPU, quick=True)
    assert set(quick.problems()) <= set(bench.settings_for(CPU, quick=False).problems())
