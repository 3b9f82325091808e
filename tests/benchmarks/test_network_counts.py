"""Launches and bytes of whole networks on a GPU, as counted and as published."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import blocks, eager, plots, report
from benchmarks.gpu.inductor import Case, layer_and_input
from swiftkernels.testing.engines import OURS
from swiftkernels.utils.files import read_csv, write_csv

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def case(network: str, batch: int) -> Case:
    return Case(batch, blocks.IMAGE, 3, "float16", False, network)


def published() -> dict[tuple[str, str, int], dict[str, str]]:
    """The rows of whole networks by engine, network and batch."""
    return {
        (row["engine"], row["layer"], int(row["batch"])): row
        for row in read_csv(RESULTS / report.BLOCKS_CSV)
        if row["layer"] in blocks.NETWORKS
    }


@pytest.mark.parametrize("batch", blocks.BATCHES)
@pytest.mark.parametrize("network", blocks.NETWORKS)
def test_what_is_published(network: str, batch: int) -> None:
    """Fewer launches than torch.compile, and a third of the bytes, where weights do not outweigh.

    Networks with stages wider than 128 channels could do with fewer, which took longer on an H100.
    """
    rows = published()
    ours, compiled = (rows[engine, network, batch] for engine in (OURS, "inductor"))
    assert int(ours["launches"]) <= 0.4 * int(compiled["launches"])
    assert int(ours["minimum_bytes"]) <= int(ours["bytes"])
    if batch > 1:
        narrow = network == "swiftformer_xs"
        assert int(ours["bytes"]) <= (0.2 if narrow else 0.33) * int(compiled["bytes"])


def test_the_published_counts_are_those_of_the_code() -> None:
    row = published()[OURS, "swiftformer_xs", 8]
    assert blocks.count_ours(case("swiftformer_xs", 8)) == (
        int(row["launches"]), int(row["bytes"])
    )  # fmt: skip


def test_eager_networks_are_counted_in_operators_of_pytorch() -> None:
    """Of any batch: no backend of this library is chosen for large ones."""
    counts = [
        eager.count(*layer_and_input(case("swiftformer_xs", batch)), backward=False)
        for batch in (8, 64)
    ]
    for count in counts:
        assert not [o.name for o in count.operators if "::" in o.name]
    assert counts[0].launches == counts[1].launches


def test_the_picture_is_made_of_the_file(tmp_path: Path) -> None:
    rows = list(published().values())
    write_csv(tmp_path / report.BLOCKS_CSV, rows)
    assert plots.draw_networks(tmp_path).stat().st_size > 10_000
    figure = plots.networks(rows)
    caption = " ".join(figure.texts[-1].get_text().split())
    assert caption.startswith("Counted, not measured. float16")
    write_csv(tmp_path / report.BLOCKS_CSV, [{**rows[0], "layer": "mlp"}])
    with pytest.raises(ValueError, match="has no whole networks"):
        plots.draw_networks(tmp_path)
