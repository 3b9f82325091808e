"""The benchmark of whole networks."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import whole_networks


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(whole_networks, "SIDE", 64)


@pytest.mark.usefixtures("timm", "small")
def test_both_models_are_timed_in_both_directions(tmp_path: Path) -> None:
    sizes = ["--networks", "xs", "--batches", "2", "--seconds", "0.01", "--out", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        assert whole_networks.main(sizes) == 0
    finally:
        torch.set_num_threads(threads)
    with (tmp_path / whole_networks.CSV).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["direction"], row["engine"]) for row in rows] == [
        (direction, engine)
        for direction in whole_networks.DIRECTIONS
        for engine in ("timm", "accelerated")
    ]
    assert all(float(row["median_seconds"]) > 0 for row in rows)


@pytest.mark.usefixtures("timm", "small")
def test_other_outputs_are_not_timed(monkeypatch) -> None:
    def wrong_pair(name: str) -> dict[str, nn.Module]:
        models = pair(name)
        nn.init.zeros_(models["accelerated"].stem[0].weight)  # type: ignore[index, union-attr]
        return models

    pair = whole_networks.pair
    monkeypatch.setattr(whole_networks, "pair", wrong_pair)
    with pytest.raises(RuntimeError, match="swiftformer_xs: the outputs differ"):
        whole_networks.measure("xs", 1, "forward", 0.01)
