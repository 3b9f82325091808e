"""`python -m benchmarks.cpu`: options, files, and a small run. Nothing here judges a time."""

from __future__ import annotations

import csv
import sys

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from benchmarks import cpu, memory, plots
from swiftkernels.backends.cpu import library
from swiftkernels.ops.benchmark import Size
from swiftkernels.testing import harness, ratios
from swiftkernels.testing.engines import ENGINES, OURS
from tests.builds import ROOT

needs_kernels = pytest.mark.skipif(library.loaded() is None, reason="needs the CPU kernels")


def small(*engines: str) -> harness.Settings:
    return harness.Settings(engines, ((Size(9, 16, "small"), 2),), (torch.float32,), seconds=0.0)


@needs_kernels
def test_small_runs_append_to_the_file_and_draw_it(tmp_path, capsys):
    for _ in range(2):
        assert cpu.run(small(OURS, "eager"), tmp_path) == []
    rows = cpu.read_rows(tmp_path / plots.CPU_CSV)
    assert [row["engine"] for row in rows] == 2 * [OURS, "eager"]
    assert len({row["started"] for row in rows}) == 2
    assert (tmp_path / plots.CPU_SPEEDUPS).read_bytes().startswith(b"\x89PNG")
    assert "| eager  |      1 |" in capsys.readouterr().out


@needs_kernels
def test_other_columns_are_refused(tmp_path):
    (tmp_path / plots.CPU_CSV).write_text("tokens,width\n")
    with pytest.raises(ValueError, match="has other columns; remove it"):
        cpu.run(small(OURS), tmp_path)


def test_measured_results_stay_readable():
    rows = cpu.read_rows(ROOT / "docs" / "results" / "cpu.csv")
    assert len(ratios.speedups(rows)) > 100


def test_defaults_depend_on_dtype_and_direction():
    everything = cpu.parse([]).settings
    assert set(everything.engines) <= set(ENGINES)
    assert (Size(65536, 64, "long"), 1) in everything.inputs
    assert (Size(65536, 64, "long"), 32) not in everything.inputs
    quick = cpu.parse(["--quick", "--batch", "1", "--backward", "--threads", "1", "2"]).settings
    assert quick.engines == (OURS, "eager", "compile")
    assert (len(quick.inputs), quick.threads, quick.backward) == (3, (1, 2), (True,))
    assert cpu.parse(["--dtype", "bfloat16"]).settings.engines == (OURS, "eager")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "openvino", "--backward"], "openvino cannot be measured with float32 --b"),
        (["--engines", "compile", "--memory"], "compile cannot be measured with --memory"),
        (["--memory", "--backward"], "remove --backward"),
        (["--seconds", "0"], "expected seconds above 0"),
        (["--batch", "0"], "an integer of at least 1"),
        (["--out", __file__], "must be a folder"),
    ],
)
def test_bad_option_says_what_was_expected(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cpu.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_memory_is_measured_in_processes_of_their_own():
    row = memory.measure(memory.Case("eager", "float32", "forward", 1, 4096, 64, 1), repeats=1)
    assert row["x_bytes"] == 4 * 4096 * 64
    assert row["peak_bytes"] > row["x_bytes"]
    with (ROOT / "docs" / "results" / memory.CSV).open(newline="") as file:
        assert csv.DictReader(file).fieldnames == list(row)
