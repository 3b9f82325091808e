"""The benchmark of published networks. Nothing here judges a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from benchmarks import plots, timm_networks
from benchmarks import published_networks as published
from swiftkernels.testing import engines
from swiftkernels.testing.engines import OURS
from swiftkernels.testing.networks import Problem
from swiftkernels.testing.tolerance import relative_error
from swiftkernels.utils.files import read_csv

SMALL = ["--engines", "timm", OURS, "--batches", "1", "--sides", "64", "--seconds", "0"]
NAMES = ["swiftformer_xs", "mobilenetv2_100"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(out: Path, *options: str) -> list[tuple[str, str, str]]:
    """Network, engine and form of the rows that the file has after a small run."""
    assert published.main([*SMALL, *options, "--out", str(out)]) == 0
    return measured(out)


def measured(out: Path) -> list[tuple[str, str, str]]:
    return [(r["network"], r["engine"], r["form"]) for r in read_csv(out / published.CSV)]


@pytest.mark.usefixtures("timm")
def test_a_small_run_writes_table_and_picture(tmp_path: Path, capsys) -> None:
    found = run(tmp_path, "--networks", *NAMES)
    assert found[:3] == [
        ("swiftformer_xs", "timm", "as is"),
        ("swiftformer_xs", "timm", "folded"),
        ("swiftformer_xs", OURS, "as is"),
    ]
    assert {("mobilenetv2_100", "timm", form) for form in published.FORMS} <= set(found)
    rows = read_csv(tmp_path / published.CSV)
    assert all(float(row["wall_min_seconds"]) > 0 for row in rows)
    assert all(float(row["error"]) < timm_networks.TOLERANCE for row in rows)
    picture = tmp_path / "published_networks_64pixels.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "SwiftFormer-XS" in capsys.readouterr().out
    before = picture.read_bytes()
    assert published.main(["--report", "--out", str(tmp_path)]) == 0
    assert picture.read_bytes() == before


@pytest.mark.usefixtures("timm")
def test_an_interrupted_run_keeps_its_rows_and_goes_on(tmp_path: Path, monkeypatch) -> None:
    measure = published.measure

    def interrupted(problem: Problem, *others: Any) -> Any:
        if problem.network == NAMES[1]:
            raise KeyboardInterrupt
        return measure(problem, *others)

    monkeypatch.setattr(published, "measure", interrupted)
    options = [*SMALL, "--networks", *NAMES, "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt, match="add --resume"):
        published.main(options)
    kept = measured(tmp_path)
    assert {network for network, *_ in kept} == {NAMES[0]}

    monkeypatch.setattr(published, "measure", measure)
    found = run(tmp_path, "--networks", *NAMES, "--resume")
    assert found[: len(kept)] == kept
    assert {network for network, *_ in found[len(kept) :]} == {NAMES[1]}


@pytest.mark.usefixtures("timm")
def test_engines_that_fail_are_named(tmp_path: Path, monkeypatch, capsys) -> None:
    def fail(network: timm_networks.Network, engine: str) -> Any:
        raise RuntimeError(f"no {engine}")

    monkeypatch.setattr(timm_networks, "build", fail)
    options = [*SMALL, "--networks", NAMES[0], "--out", str(tmp_path)]
    assert published.main(options) == 1
    assert "timm, folded: RuntimeError: no timm" in capsys.readouterr().out
    assert measured(tmp_path) == [(NAMES[0], OURS, "as is")]


def row(network: str, engine: str, form: str, seconds: float, side: int = 224) -> dict[str, Any]:
    return {
        "network": network, "engine": engine, "form": form, "direction": "forward", "batch": 1,
        "side": side, "threads": 1, "clock": "process time", "process_median_seconds": seconds,
    }  # fmt: skip


def test_after_the_first_size_only_the_faster_form_is_measured() -> None:
    before = [row("resnet50", "timm", "as is", 0.2), row("resnet50", "timm", "folded", 0.1)]
    later = Problem("resnet50", "forward", 16, 224, 1)
    assert published.wanted(later, ["timm"], before, first=False) == [("timm", "folded")]
    assert published.wanted(later, ["timm"], [], first=True) == [
        ("timm", "as is"),
        ("timm", "folded"),
    ]


def test_rows_are_in_one_order_whatever_came_first() -> None:
    rows = [row("resnet50", "timm", "as is", 0.2, side) for side in (512, 224)]
    rows.append(row("swiftformer_xs", "timm", "as is", 0.2))
    order = [(r["network"], r["side"]) for r in sorted(rows, key=published._place)]
    assert order == [("swiftformer_xs", 224), ("resnet50", 224), ("resnet50", 512)]


def test_slow_engines_are_measured_at_the_first_size_of_swiftformers() -> None:
    problem = Problem("swiftformer_s", "forward", 1, 224, 1)
    slow = list(published.SLOW_TO_BUILD)
    found = published.wanted(problem, slow, [], first=True)
    assert found == [(engine, "as is") for engine in slow]
    assert not published.wanted(problem, slow, [], first=False)
    other = problem._replace(network="resnet50")
    assert not published.wanted(other, slow, [], first=True)


def test_sizes_that_take_too_long_are_left_out() -> None:
    rows = [row("resnet50", "timm", "as is", 0.9), row("resnet50", "openvino", "as is", 0.06)]
    problem = Problem("resnet50", "forward", 16, 224, 1)
    assert published.expected_seconds(problem, rows) == pytest.approx(0.96)
    assert not published.why_skipped(problem, rows)
    assert "could take 5.0 s" in published.why_skipped(problem._replace(side=512), rows)
    fixed = problem._replace(network="efficientformer_l1", side=512)
    assert "only images of 224 x 224" in published.why_skipped(fixed, rows)


def test_accuracies_have_sources(timm) -> None:
    models = set(timm.list_models())
    assert published.PUBLISHED
    for name, entry in published.PUBLISHED.items():
        assert name in models
        assert 70 < float(entry["top1"]) < 85
        assert re.fullmatch(r"\d{4}\.\d{5}", entry["arxiv"])
        assert entry["paper"]
        assert entry["where"]
    assert {*published.QUICK, *published.SHORT} <= published.PUBLISHED.keys()


class ConvNormAct(nn.Module):
    """A convolution, and a BatchNorm that holds an activation, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.norm.act = nn.ReLU()
        self.first = nn.BatchNorm2d(3)
        with torch.no_grad():
            for part in (self.norm, self.first):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm.act(self.norm(self.conv(self.first(x))))


@pytest.mark.usefixtures("timm")
def test_folding_changes_no_output() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model = ConvNormAct().double().eval()
    folded = timm_networks.folded(model, images)
    assert folded is not None
    norms = [name for name, part in folded.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms == ["first"]  # nothing is in front of it
    with torch.no_grad():
        x = folded.first(images)
        assert relative_error(folded.norm(folded.conv(x)), model(images)) < 1e-12
    assert timm_networks.folded(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), images.float()) is None


@pytest.mark.usefixtures("timm")
def test_a_convolution_that_something_else_reads_stays() -> None:
    class Branches(ConvNormAct):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(self.first(x))
            return x + self.norm.act(self.norm(x))

    images = torch.randn(1, 3, 8, 8)
    assert timm_networks.folded(Branches().eval(), images) is None


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("name", ["fastvit_t8", "repvit_m0_9", "mobilenetv3_large_100"])
def test_folded_networks_of_timm_have_no_norms(name: str) -> None:
    network = timm_networks.Network(name, 3, 64)
    folded = timm_networks.folded(network.model, network.images)
    assert folded is not None
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    assert network.error(timm_networks.call_of(folded, network.images)) < timm_networks.TOLERANCE


@pytest.mark.usefixtures("timm")
def test_networks_hide_no_error() -> None:
    """Neither zero nor tiny scales of residual branches, in which timm starts them."""
    for name in ("resnet50", "efficientformer_l1", "swiftformer_xs"):
        state = timm_networks.make_model(name).state_dict()
        tiny = [
            k for k, t in state.items() if k.endswith(("weight", "gamma")) and t.abs().max() < 1e-3
        ]
        assert not tiny


@pytest.mark.parametrize("runtime", ["litert", "ncnn"])
@pytest.mark.usefixtures("timm")
def test_runtimes_for_phones_compute_a_swiftformer(runtime: str) -> None:
    if missing := engines.missing(engines.RUNTIMES[runtime]):
        pytest.skip(f"needs {' and '.join(missing)}")
    network = timm_networks.Network("swiftformer_xs", 1, 64)
    call = timm_networks.build(network, runtime)
    call()
    assert network.error(call) < timm_networks.TOLERANCE


def test_ncnn_refuses_batches() -> None:
    with pytest.raises(ValueError, match="x must be one batch element"):
        engines.ncnn_call(nn.Identity(), torch.zeros(2, 3, 8, 8))


def test_pictures_of_other_settings_have_other_names(tmp_path: Path) -> None:
    assert plots._name(plots.PUBLISHED, "", plots._threads_name("1")) == "published_networks.png"
    other = plots._name(plots.PUBLISHED, "512pixels", plots._threads_name("2"))
    assert other == "published_networks_512pixels_2threads.png"
