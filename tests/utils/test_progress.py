"""Progress of long loops: few lines if the output is not a terminal, one bar on a terminal."""

from __future__ import annotations

import doctest
import io
import re
import sys
import threading
from collections.abc import Iterator

import pytest

from swiftkernels.utils import progress
from swiftkernels.utils.progress import Progress, timed, track


class Clock:
    """A clock that the test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    monkeypatch.setattr(progress, "_last_line", 0.0)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def to_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Capture stderr as a terminal. Not a fixture: pytest replaces stderr after fixtures."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_without_a_terminal_there_is_a_line_every_half_minute(clock, capsys):
    with Progress(10000, "steps", "epoch 1 of 3") as bar:
        for step in range(10000):
            clock.now += 1 / 128
            bar.advance()
            bar.note(f"loss {step / 1000:.2f}")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "epoch 1 of 3: 0 of 10000 steps"
    assert len(lines) == 3
    assert re.fullmatch(r"epoch 1 of 3: 3840 of 10000 steps, about 48 s left, .*", lines[1])
    assert lines[1].endswith("loss 3.84")


def test_several_loops_share_the_interval(clock, capsys):
    for epoch in range(100):
        with Progress(5, "steps", f"epoch {epoch}") as bar:
            for _ in range(5):
                clock.now += 0.1
                bar.advance()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_text_shows_in_the_next_line_and_results_at_once(clock, capsys):
    with Progress(4, "problems", done=2) as bar:
        bar.show("first")
        bar.write("wrong: 3")
        clock.now += 31
        bar.show("second")
        bar.advance()
        clock.now += 31
        bar.advance()
    captured = capsys.readouterr()
    assert captured.out == "wrong: 3\n"
    assert captured.err.splitlines() == [
        "2 of 4 problems",
        "second: 2 of 4 problems",
        "second: 4 of 4 problems, about 0 s left",
    ]


def test_quiet_progress_prints_nothing(clock, monkeypatch):
    terminal = to_terminal(monkeypatch)
    with Progress(2, "steps", quiet=True) as bar:
        bar.advance()
    with timed("loading", quiet=True):
        pass
    assert terminal.getvalue() == ""


def test_terminal_shows_a_bar_with_units(monkeypatch):
    pytest.importorskip("tqdm")
    terminal = to_terminal(monkeypatch)
    with Progress(3, "batch sizes", "timing", leave=True) as bar:
        for _ in range(3):
            bar.note("loss 0.1")
            bar.advance()
    shown = terminal.getvalue()
    assert "timing" in shown
    assert re.search(r"100%\|.*\| 3 of 3 batch sizes, 00:00 < 00:00, loss 0.1", shown)
    assert "/s" not in shown


def test_terminal_without_tqdm_shows_lines(monkeypatch, clock):
    terminal = to_terminal(monkeypatch)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    progress.share_lock(threading.RLock())
    assert list(track("ab", "letters", "reading")) == ["a", "b"]
    assert terminal.getvalue() == "reading: 0 of 2 letters\n"


def test_timed_work_is_one_line(clock, capsys):
    with timed("loading"):
        clock.now += 61
    assert capsys.readouterr().err == "loading ... 1 min 1 s\n"

    def fail() -> None:
        with timed("loading"):
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert capsys.readouterr().err == "loading ... \n"


def test_examples_run():
    found = doctest.testmod(progress)
    assert found.attempted > 0
    assert found.failed == 0
