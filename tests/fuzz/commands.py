"""Runs of commands in this process, and the rules for what they print."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hypothesis import event

LONGEST = 5000
"""Characters of an error."""


class Done(NamedTuple):
    """A command that ended."""

    status: int
    out: str
    err: str


def run(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> Done:
    """Run a command; the exit status of usage errors is 2."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as end:  # of argparse
            status = 0 if end.code is None else end.code
            event(f"usage, status {status}")
            return Done(status, out.getvalue(), err.getvalue())
    event(f"status {status}")
    return Done(status, out.getvalue(), err.getvalue())


def check_printable(text: str) -> None:
    """No control characters, and no endless lines."""
    assert len(text) < LONGEST
    assert all(line.isprintable() for line in text.split("\n")), text
