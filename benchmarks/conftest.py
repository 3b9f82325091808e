"""Options of the benchmarks, and the table of their results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swiftkernels.testing.timing import clock
from swiftkernels.utils.files import write_csv

ROWS = pytest.StashKey[list[dict[str, Any]]]()
"""The rows of results/attention.csv, one for each measured layer."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("swiftkernels benchmarks")
    group.addoption("--device", default="cpu", help="where to run: cpu (default) or cuda")
    group.addoption(
        "--dtype",
        default="float32",
        choices=("float64", "float32", "float16", "bfloat16"),
        help="type of tokens and weights (default: %(default)s)",
    )
    group.addoption("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    group.addoption(
        "--all-shapes",
        action="store_true",
        help="every stage of XS, S, L1 and L3, and torch.compile everywhere: slow",
    )


def pytest_configure(config: pytest.Config) -> None:
    if torch.device(config.getoption("--device")).type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a CUDA device; torch finds none.")
    torch.set_num_threads(config.getoption("--threads"))
    # MDTA's convolutions would round float32 operands to TF32.
    torch.backends.cudnn.allow_tf32 = False
    config.stash[ROWS] = []
    # pytest-benchmark's table shows other ratios: to the fastest layer, of times not taken in turn.
    config.option.benchmark_quiet = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    timer = clock(config.getoption("--device"))
    for item in items:
        if "benchmark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=timer, disable_gc=True))


@pytest.fixture
def rows(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    """The rows that become results/attention.csv."""
    return pytestconfig.stash[ROWS]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    path = config.rootpath / "results" / "attention.csv"
    path.parent.mkdir(exist_ok=True)
    write_csv(path, rows)
    terminalreporter.section("medians, measured in turn with the eager layer")
    terminalreporter.write_line(
        f"{'case':<40}{'layer':<14}{'microseconds':>22}{'/ eager':>10}{'rounds':>8}"
    )
    for row in rows:
        time = f"{1e6 * row['median_seconds']:.1f} ± {1e6 * row['spread_seconds']:.1f}"
        terminalreporter.write_line(
            f"{row['case']:<40}{row['layer']:<14}{time:>22}{row['ratio_to_eager']:>10.2f}"
            f"{row['rounds']:>8}"
        )
    terminalreporter.write_line(f"± is the interquartile range. Written: {path}")
