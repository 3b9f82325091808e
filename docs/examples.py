"""The Python examples of the documentation's pages: found, run, and printed with their output.

All ```python blocks of a page run one after the other in one namespace, as a reader would type
them. A block whose first line is ```python no-run is shown only; say in the text why.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """One example."""

    code: str
    line: int
    """Of its first line in the page, from 1."""
    end: int
    """Offset behind its closing fence."""


def blocks(page: str) -> list[Block]:
    """The examples of a page that run.

    Example:
        >>> blocks("# Page\\n```python\\nx = 1\\n```\\n")
        [Block(code='x = 1\\n', line=3, end=26)]
    """
    return [
        Block(match[2], page.count("\n", 0, match.start(2)) + 1, match.end())
        for match in _BLOCK.finditer(page)
        if match[1].strip() != "no-run"
    ]


def run(page: str, name: str = "page") -> Iterator[tuple[Block, str]]:
    """Run the examples of a page in a new folder; yields each with what it printed.

    Errors are those of the examples, with the page's line numbers.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.chdir(folder)
            for block in blocks(page):
                printed = io.StringIO()
                code = compile("\n" * (block.line - 1) + block.code, name, "exec")
                with contextlib.redirect_stdout(printed):
                    exec(code, namespace)
                yield block, printed.getvalue()
        finally:
            os.chdir(before)


def with_outputs(page: str) -> str:
    """The page with the output of each example below it."""
    pieces, at = [], 0
    for block, printed in run(page):
        pieces.append(page[at : block.end])
        if printed:
            pieces.append(f"\n\n```text\n{printed.rstrip()}\n```")
        at = block.end
    return "".join([*pieces, page[at:]])


if __name__ == "__main__":
    for path in sys.argv[1:]:
        for _ in run(Path(path).read_text(), path):
            pass
