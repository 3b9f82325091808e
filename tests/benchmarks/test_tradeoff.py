"""The trade-off command: its data, its networks, and a small run from end to end."""

from __future__ import annotations

import csv
import gzip
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import data, plots, tradeoff
from benchmarks.data.make_fashion_mnist import make
from benchmarks.networks import MIXERS, Classifier

PNG = b"\x89PNG\r\n\x1a\n"


def settings(out: Path) -> tradeoff.Settings:
    """Two mixers, 40 images, one epoch, one seed."""
    return tradeoff.Settings(
        mixers=("additive_l2", "none"),
        seeds=1,
        epochs=1,
        out=out,
        per_class=4,
        sides=(4, 7),
        seconds=0.01,
    )


def test_subset_is_balanced_and_its_checksum_matches() -> None:
    dataset = data.load()
    assert np.bincount(dataset.train.labels).tolist() == [1000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [200] * 10
    assert dataset.train.images.shape == (10000, 28, 28)
    assert data.checksum(dataset) == data.SHA256
    assert data.SHA256 in data.SUBSET.with_name("README.md").read_text()


def test_no_test_image_is_a_training_image() -> None:
    dataset = data.load()
    seen = {image.tobytes() for image in dataset.train.images}
    assert not any(image.tobytes() in seen for image in dataset.test.images)


def test_subset_is_made_again_from_idx_files(tmp_path: Path) -> None:
    """Files with exactly the subset's images in them give the subset."""
    _write_idx_files(tmp_path, data.load())
    assert make(tmp_path, tmp_path / "subset.npz") == data.SHA256


def test_wrong_data_folder_says_what_was_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tradeoff.parse(["--data", str(tmp_path)])
    assert "train-images-idx3-ubyte.gz" in capsys.readouterr().err


def test_damaged_idx_file_is_named(tmp_path: Path) -> None:
    _write_idx_files(tmp_path, data.load())
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte"):
        data.load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--full"], "not allowed with"),
        (["--seeds", "0"], "an integer of at least 1"),
        (["--epochs", "two"], "an integer of at least 1"),
        (["--mixers", "mixup"], "additive_l2"),
        (["--device", "abacus"], "cpu, cuda"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--out", __file__], "must be a folder"),
    ],
)
def test_bad_option_says_what_was_expected(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tradeoff.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("mixer", MIXERS)
def test_networks_differ_only_in_the_mixer(mixer: str) -> None:
    shared = Classifier("none", seed=3).state_dict()
    weights = Classifier(mixer, seed=3).state_dict()
    for name, value in shared.items():
        assert torch.equal(weights[name], value), name
    assert all(".mixer." in name for name in weights.keys() - shared.keys())
    assert (weights.keys() > shared.keys()) == (mixer != "none")
    assert not torch.equal(Classifier(mixer, seed=4).stem[0].weight, shared["stem.0.weight"])


@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer != "none"])
def test_a_mixer_lets_tokens_meet(mixer: str) -> None:
    """Another token in the middle changes what becomes of the others; without a mixer it cannot."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 49, 48, generator=generator)
    moved = tokens.clone()
    moved[:, 24] = torch.randn(48, generator=generator)
    for name, differ in ((mixer, True), ("none", False)):
        blocks = Classifier(name).eval().blocks
        with torch.no_grad():
            change = (blocks(tokens) - blocks(moved)).abs().amax(-1)[0]
        assert (change[[*range(24), *range(25, 49)]].max() > 1e-6) == differ


def test_a_small_run_writes_tables_and_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plots need only the CSV files: a copy of these gives the same pictures."""
    tradeoff.run(settings(tmp_path))

    with (tmp_path / plots.TRADEOFF_CSV).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mixer"] for row in rows] == ["additive_l2", "none"]
    assert all(0 <= float(row["accuracy_mean"]) <= 1 for row in rows)
    assert all(float(row["batch1_ms"]) > 0 for row in rows)
    assert rows[0]["torch"] == torch.__version__
    with (tmp_path / plots.TOKENS_CSV).open(newline="") as file:
        assert [row["tokens"] for row in csv.DictReader(file)] == ["16", "49"]
    names = (plots.ACCURACY_LATENCY, plots.LATENCY_TOKENS)
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in names)
    assert "additive_l2" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*.tmp"))

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in (plots.TRADEOFF_CSV, plots.TOKENS_CSV):
        (elsewhere / name).write_bytes((tmp_path / name).read_bytes())
    for path in plots.draw(elsewhere):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_the_documentation_shows_a_full_run() -> None:
    with (Path(__file__).parents[2] / "docs/results" / plots.TRADEOFF_CSV).open() as file:
        rows = list(csv.DictReader(file))
    full = tradeoff.parse(["--full"])
    assert full.per_class is None
    assert {(int(row["seeds"]), int(row["epochs"])) for row in rows} == {(full.seeds, full.epochs)}
    assert {row["mixer"] for row in rows} <= set(full.mixers)


def test_each_extent_does_more_than_the_one_before() -> None:
    extents = list(tradeoff.EXTENTS.values())
    for less, more in pairwise(extents):
        assert (less.seeds, less.epochs, less.seconds) < (more.seeds, more.epochs, more.seconds)
        assert set(less.sides) < set(more.sides)
    assert tradeoff.parse([]).epochs == tradeoff.EXTENTS["default"].epochs


def test_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tradeoff\.csv is missing"):
        plots.draw(tmp_path)


def test_failed_run_leaves_the_old_csv_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / plots.TRADEOFF_CSV).write_text("old")
    monkeypatch.setattr(tradeoff, "time_mixers", fail)
    with pytest.raises(KeyboardInterrupt):
        tradeoff.run(settings(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [plots.TRADEOFF_CSV]
    assert (tmp_path / plots.TRADEOFF_CSV).read_text() == "old"


def test_accuracy_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    small = settings(tmp_path)
    alone = tradeoff.train_all(small, small.dataset())
    together = tradeoff.train_all(replace(small, workers=2), small.dataset())
    for one, other in zip(alone, together, strict=True):
        assert one.job == other.job
        assert all(np.array_equal(one.weights[name], other.weights[name]) for name in one.weights)


def _write_idx_files(folder: Path, dataset: data.Dataset) -> None:

    arrays = (*dataset.train, *dataset.test)
    for name, array in zip(data.IDX_FILES, arrays, strict=True):
        header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        (folder / name).write_bytes(gzip.compress(header + array.tobytes(), compresslevel=1))
