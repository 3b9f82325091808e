"""`pytest benchmarks`: what it prints."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.builds import ROOT


def test_there_is_one_ratio_for_each_layer(tmp_path):
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("sklearn")
    configuration = tmp_path / "empty.ini"
    configuration.write_text("[pytest]\n")
    command = (
        "benchmarks", "--benchmark-only", "-k", "XS-4-batch1-forward-additive", "-q",
        "-p", "no:cacheprovider", f"--rootdir={tmp_path}", "-c", str(configuration),
    )  # fmt: skip
    # Within a process of pytest-xdist the benchmark would not run.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "additive" in line]
    assert len(lines) == 1, done.stdout
    median, _, spread, ratio, rounds = lines[0].split()[2:]
    assert float(median) > 0
    assert float(spread) >= 0
    assert float(ratio) > 0
    assert int(rounds) >= 9
    assert (tmp_path / "results" / "attention.csv").is_file()
