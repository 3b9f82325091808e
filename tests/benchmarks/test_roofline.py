"""Lower bounds that say so, grid fill, datasheets with sources, and what was published of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("matplotlib")

from benchmarks.gpu import plots, report, roofline
from benchmarks.gpu.roofline import Gpu, gpus, grid_fill, lower_bound
from swiftkernels.testing.engines import OURS
from swiftkernels.utils.files import read_csv
from tests.builds import ROOT

RESULTS = ROOT / "docs" / "results"

GPU = Gpu(
    "X1", "sm_00", 1e9, 4e9, 1e9, multiprocessors=10, cache_bytes=1000,
    shared_memory_bytes=100 << 10, registers=1 << 16, threads=2048,
)  # fmt: skip

ROW = {
    "engine": OURS,
    "dtype": "float16",
    "direction": "forward",
    "batch": "2",
    "tokens": "5",
    "width": "8",
    "launches": "2",
    "matmuls": "0",
    "bytes": "2000",
    "requested_bytes": "3000",
    "flops": "4000",
    "minimum_bytes": "1500",
    "two_pass_bytes": "1800",
    "counted_batches": "2",
    "torch": "2.13",
    "triton": "3.7",
}

LAUNCH = {
    "dtype": "float16",
    "batch": "1",
    "tokens": "5",
    "width": "8",
    "direction": "forward",
    "kernel": "_a_kernel",
    "programs": "4",
}


def test_the_bound_is_the_larger_of_bytes_and_operations():
    bound = lower_bound(ROW, GPU)
    assert bound["lower_bound_seconds"] == bound["memory_seconds"] == 2e-6
    assert (bound["bound_by"], bound["fits_in_cache"]) == ("bytes", False)
    bound = lower_bound({**ROW, "flops": "40000", "minimum_bytes": "900"}, GPU)
    assert bound["lower_bound_seconds"] == bound["compute_seconds"] == 1e-5
    assert (bound["bound_by"], bound["fits_in_cache"]) == ("operations", True)


def test_unknown_operations_bound_nothing():
    bound = lower_bound({**ROW, "flops": ""}, GPU)
    assert bound["compute_seconds"] == ""
    assert bound["lower_bound_seconds"] == 2e-6


def test_each_type_has_its_own_peak():
    assert lower_bound({**ROW, "dtype": "float32"}, GPU)["compute_seconds"] == 4e-6
    with pytest.raises(ValueError, match=r"dtype must be 'float16' or 'float32'; got 'int8'"):
        GPU.flops("int8")


def test_grid_fill_names_the_idle_multiprocessors():
    fill = grid_fill(LAUNCH, GPU)
    assert (fill["programs"], fill["idle_multiprocessors"]) == (4, 6)
    assert fill["programs_per_multiprocessor"] == 0.4
    crowded = grid_fill({**LAUNCH, "programs": "60"}, GPU, resident=3)
    assert (crowded["idle_multiprocessors"], crowded["waves"]) == (0, 2)


@pytest.mark.parametrize(
    ("facts", "programs"),
    [
        ({"warps": 4, "registers": 33, "shared": 0}, 12),  # 65,536 / (40 x 128)
        ({"warps": 4, "registers": 16, "shared": 24 << 10}, 4),  # 100 / (24 + 1)
        ({"warps": 8, "registers": 16, "shared": 0}, 8),  # 2048 / 256
    ],
)
def test_programs_fit_by_registers_shared_memory_and_threads(facts, programs):
    assert roofline.resident_programs(facts, GPU) == programs


def test_compiled_kernels_give_how_many_programs_fit(drawn):
    facts = {"warps": 4, "registers": 64, "shared": 0}
    kernels = {"a sm_80 fp16 8": facts, "a sm_90 fp16 8": {"error": "none"}}
    (drawn / roofline.KERNELS_JSON).write_text(json.dumps(kernels))
    roofline.run(drawn)
    fills = {row["gpu"]: row for row in read_csv(drawn / roofline.GRID_FILL_CSV)}
    assert fills["A100"]["resident_per_multiprocessor"] == "8"
    assert fills["H100"]["resident_per_multiprocessor"] == fills["H100"]["waves"] == ""


def test_datasheets_give_their_sources():
    sheets = json.loads(roofline.DATASHEETS.read_text())["gpus"]
    assert [sheet["name"] for sheet in sheets] == ["A100", "L4", "H100", "MI300X"]
    for sheet in sheets:
        assert sheet["source"]["title"]
        assert sheet["source"]["url"].startswith("https://")
        assert sheet["source"]["date"]
        assert sheet["checked_against"]
        # float16 runs on tensor cores, faster than float32 by twice at least.
        assert sheet["float16_flops"] > 2 * sheet["float32_flops"]
    assert len(gpus()) == 4


def test_what_was_not_counted_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"python -m benchmarks\.gpu\.traffic"):
        roofline.run(tmp_path)


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """A folder with all results of two small counts."""
    folder = tmp_path / "results"
    folder.mkdir()
    rows = [
        {**ROW, "engine": engine, "direction": direction}
        for engine in (OURS, "eager", "inductor")
        for direction in ("forward", "forward+backward")
    ]
    for name, content in (("gpu_traffic.csv", rows), ("gpu_launches.csv", [LAUNCH])):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, content[0].keys())
            writer.writeheader()
            writer.writerows(content)
    roofline.run(folder)
    return folder


def test_every_place_says_that_bounds_are_no_times(drawn):
    """File names, title, caption and page; and no ratio of bounds is called a speed-up."""
    bounds = read_csv(drawn / roofline.LOWER_BOUNDS_CSV)
    assert len(bounds) == 4 * 6
    figure = plots.lower_bounds(bounds)
    title, caption = (text.get_text() for text in figure.texts)
    assert title.startswith("Lower bounds, not times")
    assert caption.startswith("Lower bound, not a time")
    assert "no speed-ups" in " ".join(caption.split())
    assert all("lower bound" in axes.get_ylabel() for axes in figure.axes[:: len(gpus())])
    assert all("lower_bound" in path.name for path in plots.draw_lower_bounds(drawn)[:1])
    page = report.write(drawn).read_text()
    assert "## Lower bounds, not times" in page
    assert "no ratio of two bounds is a speed-up" in " ".join(page.replace("*", "").split())


def test_the_pictures_and_the_page_are_made_of_the_files(drawn):
    for path in (plots.draw_traffic(drawn), *plots.draw_lower_bounds(drawn)):
        assert path.stat().st_size > 10_000
    page = report.write(drawn)
    assert page.parent == drawn.parent
    # Distinct and requested bytes, in MB.
    assert "2: 0.002 (0.003)" in page.read_text()


# What is published.


def published() -> list[dict[str, str]]:
    return read_csv(RESULTS / "gpu_traffic.csv")


def of(engine: str, direction: str) -> dict[tuple[str, ...], dict[str, str]]:
    """Rows by type and shape."""
    return {
        tuple(row[n] for n in ("dtype", "batch", "tokens", "width")): row
        for row in published()
        if (row["engine"], row["direction"]) == (engine, direction)
    }


def test_a_published_forward_is_two_launches_and_two_passes():
    """Above E = 128 there are products before and after; below 12 E tokens weights count."""
    rows = [row for row in of(OURS, "forward").values() if int(row["width"]) <= 128]
    assert rows
    for row in rows:
        assert int(row["launches"]) <= 2
        if int(row["batch"]) * int(row["tokens"]) >= 12 * int(row["width"]):
            assert int(row["bytes"]) <= 1.15 * int(row["two_pass_bytes"]), row


def test_a_published_backward_is_six_launches_and_products():
    rows = [row for row in of(OURS, "forward+backward").values() if int(row["width"]) <= 64]
    assert rows
    for row in rows:
        assert int(row["launches"]) - int(row["matmuls"]) <= 6, row


def test_a_published_backward_moves_no_more_than_inductors():
    """And half of it from batch 8 on, where the kernels multiply by the weights themselves."""
    inductor = of("inductor", "forward+backward")
    rows = of(OURS, "forward+backward")
    assert len(rows) >= 2 * 3 * 14
    for case, row in rows.items():
        few = int(row["batch"]) >= 8 and int(row["width"]) <= 128
        assert int(row["bytes"]) <= (0.5 if few else 1) * int(inductor[case]["bytes"]), row
