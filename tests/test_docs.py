"""The documentation: examples of pages and docstrings run, figures are those of the CSV files."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import swiftkernels

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *ROOT.glob("swiftkernels/ops/*/README.md")]
MODULES = [
    info.name
    for info in pkgutil.walk_packages(swiftkernels.__path__, "swiftkernels.")
    if "._" not in info.name  # neither __main__ nor compiled libraries
]


@pytest.fixture(scope="module")
def examples() -> Iterator[ModuleType]:
    """docs/examples.py"""
    sys.path.insert(0, str(DOCS))
    try:
        yield importlib.import_module("examples")
    finally:
        sys.path.remove(str(DOCS))


def with_examples(pages: list[Path]) -> list[Path]:
    return [page for page in pages if "```python\n" in page.read_text()]


@pytest.mark.parametrize("page", with_examples(PAGES), ids=lambda page: page.stem)
@pytest.mark.usefixtures("timm", "transformers")
def test_examples_of_pages_run(examples, page: Path) -> None:
    before = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            assert all(block.code for block, _ in examples.run(page.read_text(), str(page)))
    finally:
        torch.set_num_threads(before)


def test_examples_show_what_they_print(examples) -> None:
    page = "# Page\n```python\nprint(6 * 7)\n```\n```python no-run\nunknown\n```\n"
    assert examples.with_outputs(page) == page.replace("7)\n```", "7)\n```\n\n```text\n42\n```")


def test_example_errors_have_the_lines_of_the_page(examples) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        list(examples.run("# Page\n```python\nx = 0\n1 / x\n```\n", "page.md"))
    assert (raised.traceback[-1].path, raised.traceback[-1].lineno) == ("page.md", 3)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    public = {key: getattr(swiftkernels, key) for key in swiftkernels.__all__}
    with torch.random.fork_rng(devices=[]):
        found = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn, **public})
    assert not found.failed


@pytest.mark.usefixtures("examples")
def test_figures_are_those_of_the_csv_files() -> None:
    figures = importlib.import_module("figures")
    assert figures.main(["--check"]) == 0


@pytest.mark.usefixtures("examples")
def test_unknown_tables_are_refused() -> None:
    figures = importlib.import_module("figures")
    with pytest.raises(ValueError, match="no table 'speed'; there are headline"):
        figures.written("<!-- figures: speed -->\n<!-- end of figures -->", "")


def test_links_between_pages_lead_somewhere() -> None:
    """On GitHub too, where no builder checks them."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
