"""The benchmark of whole networks. Nothing here judges a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from benchmarks import network_blocks, plots, timm_networks, whole_networks
from swiftkernels.backends.cpu import library
from swiftkernels.fusion.chain import FusedChain
from swiftkernels.ops.additive_attention.cpu.packing import FOLDED, PLAIN, TRIANGULAR
from swiftkernels.testing import costs, engines
from swiftkernels.testing.engines import OURS
from swiftkernels.utils.files import read_csv
from tests.fusion import test_chain as chains

needs_kernels = pytest.mark.skipif(library.loaded() is None, reason="needs the CPU kernels")

SMALL = ["--networks", "xs", "--side", "64", "--seconds", "0"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_kernels
@pytest.mark.usefixtures("timm")
def test_a_small_run_writes_tables_and_picture(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(whole_networks, "_measure_memory", lambda row: 7)
    chosen = ["timm", "channels_last", "accelerated", OURS]
    options = ["--engines", *chosen, "--batches", "1", "2", "--training-batches", "4"]
    options += ["--out", str(tmp_path)]
    assert whole_networks.main([*SMALL, *options]) == 0
    rows = read_csv(tmp_path / whole_networks.CSV)
    assert [(row["direction"], row["batch"], row["engine"]) for row in rows] == [
        *(("forward", batch, engine) for batch in "12" for engine in chosen),
        *(("training step", "4", engine) for engine in chosen if engine != OURS),
    ]
    assert all(float(row["wall_min_seconds"]) > 0 for row in rows)
    remembered = [row for row in rows if row["peak_bytes"]]
    assert [row["engine"] for row in remembered] == list(whole_networks.REMEMBERED)
    assert {(row["direction"], row["batch"]) for row in remembered} == {("forward", "2")}
    blocks = read_csv(tmp_path / network_blocks.CSV)
    assert [int(row["count"]) for row in blocks[-2:]] == [1, 30]  # the head, and the sum
    assert (tmp_path / plots.NETWORKS).read_bytes().startswith(b"\x89PNG")
    assert whole_networks.main(["--report", "--out", str(tmp_path)]) == 0


@pytest.mark.usefixtures("timm")
def test_wrong_engines_are_named_and_the_others_timed(tmp_path: Path, monkeypatch, capsys) -> None:
    def wrong(model: nn.Module) -> nn.Module:
        return nn.Sequential(model, nn.ReLU())

    monkeypatch.setitem(whole_networks.MODULES, "accelerated", wrong)
    options = ["--engines", "timm", "accelerated", "--batches", "1", "--directions", "forward"]
    assert whole_networks.main([*SMALL, *options, "--profile", "--out", str(tmp_path)]) == 1
    assert "forward: accelerated: RuntimeError: its output has" in capsys.readouterr().out
    assert [row["engine"] for row in read_csv(tmp_path / whole_networks.CSV)] == ["timm"]


def test_missing_engines_are_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr(engines, "missing", list)
    assert timm_networks.installed(["timm", "openvino", OURS]) == ["timm", OURS]
    assert "Without openvino. To add it: pip install onnx" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.usefixtures("timm")
def test_the_process_of_one_engine_prints_its_memory(capsys) -> None:
    assert whole_networks.main([*SMALL, "--batches", "2", "--memory-of", "timm"]) == 0
    assert int(capsys.readouterr().out) >= 0


def test_operations_of_blocks_are_those_of_the_definition() -> None:
    steps = [step for step in chains.whole() if step.kind != "attention"]
    blocks = list(network_blocks.blocks_of(steps, (), 37, 50))
    counted = costs.flops(lambda: FusedChain(steps).plain(torch.randn(1, 3, 37, 50)))
    assert sum(block.flops for block in blocks) == counted


def test_operations_of_attention_are_those_of_its_form() -> None:
    step = chains.attention(8)
    forms = (PLAIN, TRIANGULAR, FOLDED)
    blocks = network_blocks.blocks_of([step] * 3, forms, 4, 8)
    products = [block.flops / (2 * 32 * 8**2) for block in blocks]
    assert products == [4, 3.5, 3.25]


@needs_kernels
def test_the_loop_in_registers_counts_its_operations() -> None:
    assert network_blocks.peak_flops() > 0
