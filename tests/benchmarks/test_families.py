"""The benchmark of families. Nothing here judges a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import families
from swiftkernels.utils.files import read_csv
from tests.fusion import test_forms as forms


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(families, "SIDE", 64)
    monkeypatch.setattr(families, "FAMILIES", {"One": ("one",), "None": ("none",)})
    yield
    torch.set_num_threads(before)


class Network(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, forms.DIM, 3, 2), nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.stem(x))


@pytest.mark.usefixtures("timm")
def test_rows_say_what_was_fused_and_keep_those_of_others(tmp_path: Path, monkeypatch) -> None:
    models = {
        "one": lambda: forms.prepared(lambda: Network(forms.Residual(forms.mlp()))),
        "none": lambda: Network(nn.Tanh()).eval(),
    }
    monkeypatch.setattr(families, "make_model", lambda name: models[name]())
    options = ["--seconds", "0", "--out", str(tmp_path)]
    assert families.main([*options, "--families", "None"]) == 0
    assert families.main([*options, "--families", "One"]) == 0
    one, none = read_csv(tmp_path / families.CSV)
    assert (one["blocks_found"], one["blocks_fused"], one["chains"]) == ("1", "1", "1")
    assert "1 conv_mlp" in one["steps"]
    assert 0 < float(one["fused_error"]) < 1e-5
    assert (one["merged_median_seconds"], float(one["ratio"]) > 0) == ("", True)
    assert (none["blocks_fused"], none["fused_median_seconds"]) == ("0", "")
    assert none["reason"].startswith("model must hold blocks")


@pytest.mark.usefixtures("timm")
def test_wrong_outputs_are_not_timed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(
        families, "make_model", lambda name: forms.prepared(lambda: Network(forms.mlp()))
    )
    fuse = families.swiftkernels.fuse_for_inference

    def wrong(model: nn.Module) -> nn.Module:
        fused = fuse(model)
        fused.forward = lambda x: 1.01 * type(fused).forward(fused, x)
        return fused

    monkeypatch.setattr(families.swiftkernels, "fuse_for_inference", wrong)
    arguments = ["--families", "One", "--seconds", "0", "--out", str(tmp_path)]
    assert families.main(arguments) == 1
    assert not (tmp_path / families.CSV).exists()
