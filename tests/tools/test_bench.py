"""`swiftkernels bench`: it verifies before it times, and writes what it measured. Nothing here
judges a time."""

from __future__ import annotations

import csv
import itertools
import sys

import pytest
import torch

from swiftkernels.backends import devices
from swiftkernels.ops.additive_attention import eager
from swiftkernels.ops.additive_attention.layer import AdditiveAttention
from swiftkernels.ops.additive_attention.op import SELF_ATTENTION
from swiftkernels.tools import bench, cli

CPU = torch.device("cpu")
TINY = bench.Settings(sizes=((9, 16),), batches=(2,), dtypes=(torch.float32,), seconds=0.0)


@pytest.fixture
def tiny(monkeypatch):
    """One small problem in place of many; without a compiler, which takes long."""
    monkeypatch.setattr(bench, "settings_for", lambda device, quick: TINY)
    monkeypatch.setattr(bench, "COPY_BYTES", {"cpu": 1 << 12})
    build = bench.Problem.build

    def without_compiler(self: bench.Problem, engine: str):
        if engine == "compile":
            raise RuntimeError("no compiler\nand more")
        return build(self, engine)

    monkeypatch.setattr(bench.Problem, "build", without_compiler)


def read(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_engine_is_measured_and_reported(tiny, tmp_path, capsys):
    before = torch.get_num_threads()
    assert cli.main(["bench", "--device", "cpu", "--out", str(tmp_path / "new")]) == 0
    assert torch.get_num_threads() == before
    rows = read(tmp_path / "new" / bench.CSV)
    engines = (bench.OURS, "eager", "compile", *bench.COMPARED)
    assert [row["engine"] for row in rows] == [*engines, *engines]
    assert {row["direction"] for row in rows} == {"forward", "forward+backward"}
    for row in rows:
        timed = row["engine"] != "compile"
        assert bool(row["median_seconds"]) == timed
        assert row["note"] == ("" if timed else "absent: RuntimeError: no compiler")
        if timed:
            assert int(row["rounds"]) >= TINY.min_rounds
            assert 0 <= float(row["min_seconds"]) <= float(row["median_seconds"])
            assert float(row["error"]) < 1e-5
            assert (row["gradient_error"] == "") == (row["direction"] == "forward")
    assert rows[0]["backend"] == SELF_ATTENTION.choose_backend("auto", torch.zeros(2, 9, 16), 16)
    said = (tmp_path / "new" / bench.REPORT).read_text()
    assert devices.name(CPU) in said
    assert f"torch: {torch.__version__}" in said
    assert "a plain copy: " in said
    assert "| eager, as called | float32 | forward | 1 |" in said
    assert "compile, float32 forward, B=2, N=9, C=16: absent: RuntimeError" in said
    assert str(tmp_path / "new" / bench.CSV) in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(tiny, monkeypatch, tmp_path, capsys):
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
        if row["engine"] == bench.OURS:
            assert row["note"].startswith("wrong: relative error 0.00")
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
    forward, backward = (r for r in read(tmp_path / bench.CSV) if r["engine"] == bench.OURS)
    assert forward["note"] == ""
    assert backward["note"] == "failed: RuntimeError: out of registers"


def test_what_takes_too_long_is_left_out(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "SLOWEST_CALL", -1.0)
    assert bench.run("cpu", tmp_path) == 0
    assert all(row["note"].startswith("absent") for row in read(tmp_path / bench.CSV))


def test_an_interruption_keeps_what_was_measured(tiny, monkeypatch, tmp_path, capsys):
    compare = bench.compare
    calls = itertools.count()

    def interrupted(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return compare(*args)

    monkeypatch.setattr(bench, "compare", interrupted)
    assert bench.run("cpu", tmp_path) == 130
    assert {row["direction"] for row in read(tmp_path / bench.CSV)} == {"forward"}
    assert "float32 | forward |" in (tmp_path / bench.REPORT).read_text()
    assert "interrupted" in capsys.readouterr().err


def test_an_interruption_before_the_first_row_leaves_the_older_files(
    tiny, monkeypatch, tmp_path, capsys
):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "compare", interrupted)
    (tmp_path / bench.CSV).write_text("old")
    assert bench.run("cpu", tmp_path) == 130
    assert [path.name for path in tmp_path.iterdir()] == [bench.CSV]
    assert (tmp_path / bench.CSV).read_text() == "old"
    said = capsys.readouterr()
    assert "nothing written" in said.err
    assert "Written" not in said.out


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_ends_the_command_with_one_line(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "COPY_BYTES", {"cpu": 1 << 20})
    rows = [dict.fromkeys(bench.COLUMNS, "x" * 200)] * 3
    monkeypatch.setattr(bench, "compare", lambda *_: rows)
    assert cli.main(["bench", "--device", "cpu", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"error: [Errno 28] No space left on device: '{tmp_path / bench.CSV}'" in said
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_there_are_no_plots(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert bench.run("cpu", tmp_path) == 0
    assert not (tmp_path / bench.PLOT).exists()
    assert "pip install 'swiftkernels[bench]'" in capsys.readouterr().out


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
def test_wrong_arguments_are_told(capsys, arguments, said):
    assert cli.main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["eager", "mhsa"])
def test_the_exact_results_do_not_depend_on_how_items_are_grouped(monkeypatch, engine):
    whole = bench.Problem(5, 9, 16, torch.float32, True, CPU)
    single = bench.Problem(5, 9, 16, torch.float32, True, CPU)
    expected = whole.exact(engine)
    monkeypatch.setattr(bench, "EXACT_SCORES", 2 * 9**2)
    assert max(single.errors(single.exact(engine), expected)) < 1e-14
    assert [t.shape for t in expected] == [t.shape for t in whole.build(engine)()]


def test_bytes_that_must_move_count_each_tensor_once():
    module = AdditiveAttention(16, 16, 1)
    weights = 4 * sum(p.numel() for p in module.parameters())
    tokens = 4 * 2 * 9 * 16
    for backward in (False, True):
        problem = bench.Problem(2, 9, 16, torch.float32, backward, CPU)
        assert problem.least_bytes(module) == (weights + 2 * tokens) * (1 + backward)


def test_the_shapes_are_those_of_swiftformers():
    settings = bench.settings_for(torch.device("cuda", 0), quick=False)
    assert len(settings.sizes) == 14
    assert {(3136, 48), (784, 56), (196, 320), (49, 512)} <= set(settings.sizes)
    assert settings.batches == (1, 8, 64)
    assert len(settings.problems()) == 14 * 3 * 3 * 2
    quick = bench.settings_for(CPU, quick=True)
    assert set(quick.problems()) <= set(bench.settings_for(CPU, quick=False).problems())


def test_ratios_are_times_divided_by_ours_at_the_same_problem():
    row = {"dtype": "float32", "direction": "forward", "batch": 1, "width": 8}
    rows = [
        row | {"tokens": tokens, "engine": engine, "median_seconds": seconds}
        for tokens, engine, seconds in (
            (49, bench.OURS, 2.0),
            (49, "eager", 3.0),
            (7, "eager", 9.0),  # not beside ours
            (49, "compile", ""),
        )
    ]
    assert bench.ratios(rows, "median_seconds") == {("float32", "forward", "eager"): [1.5]}


class Recorder:
    """In place of torch.cuda: what was asked of the device, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def synchronize(self, device: object = None) -> None:
        self.log.append("wait")

    def Event(self, enable_timing: bool):  # noqa: N802
        recorder = self

        class Event:
            def record(self) -> None:
                recorder.log.append("event")

            def synchronize(self) -> None:
                recorder.log.append("wait for the event")

            def elapsed_time(self, end: object) -> float:
                return 5.0

        return Event()

    def zero_(self) -> None:
        self.log.append("flush")


@pytest.mark.parametrize("queued", [False, True])
def test_caches_are_flushed_before_the_clock_runs(monkeypatch, queued):
    recorder = Recorder()
    monkeypatch.setattr(torch, "get_device_module", lambda device: recorder)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: recorder)
    watch = bench.Stopwatch(torch.device("cuda", 0))
    assert watch(lambda: recorder.log.append("call"), queued=queued) == 5e-3
    idle = [] if queued else ["wait"]
    assert recorder.log == ["flush", *idle, "event", "call", "event", "wait for the event"]
