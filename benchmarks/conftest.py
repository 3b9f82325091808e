"""Options of the benchmarks, and what becomes of their results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import timing
from swiftkernels.writing import write_csv

ROWS = pytest.StashKey[list[dict[str, Any]]]()
"""One row for every layer measured, the columns of results/attention.csv."""


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
    # float32 means float32: MDTA's convolutions would round their operands to TF32.
    torch.backends.cudnn.allow_tf32 = False
    config.stash[ROWS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    clock = timing.clock(config.getoption("--device"))
    for item in items:
        if "benchmark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=clock, disable_gc=True))


@pytest.fixture
def rows(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    """Append a row here to see it in results/attention.csv."""
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
    terminalreporter.section("time relative to the eager layer, measured side by side")
    for case in dict.fromkeys(row["case"] for row in rows):
        ratios = [f"{r['layer']} {r['ratio_to_eager']:.2f}" for r in rows if r["case"] == case]
        terminalreporter.write_line(f"{case}: {', '.join(ratios)}")
    terminalreporter.write_line(f"written to {path}")
