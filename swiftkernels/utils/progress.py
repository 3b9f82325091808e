"""Progress of long loops: a bar on a terminal, else a line from time to time."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

INTERVAL = 30.0
"""Seconds between two lines if the output is not a terminal."""

_last_line = -INTERVAL
"""When this process last wrote a line, of any loop."""


class Progress:
    """Progress of a loop, on stderr.

    On a terminal a bar of tqdm, if that is installed; else a line at the start, and then at most
    one every `INTERVAL` seconds.

    Args:
        total: number of steps.
        units: name of the steps, in the plural.
        text: name of the loop.
        done: number of steps done before.
        leave: keep the bar at the end of the loop.
        position: line of the bar on the terminal, if several processes show one.
        quiet: show nothing.

    Example:
        >>> with Progress(3, "cases", "checking") as progress:
        ...     for _ in range(3):
        ...         progress.advance()
    """

    def __init__(
        self,
        total: int,
        units: str,
        text: str = "",
        *,
        done: int = 0,
        leave: bool = False,
        position: int | None = None,
        quiet: bool = False,
    ) -> None:
        self.total, self.units, self.text = total, units, text
        self.done = self._before = done
        self.quiet = quiet
        self._note = ""
        self._began = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty() and not quiet:
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                counts = "{n_fmt} of {total_fmt} " + units
                self._bar = tqdm(
                    total=total,
                    desc=text or None,
                    initial=done,
                    leave=leave,
                    position=position,
                    bar_format="{l_bar}{bar}| " + counts + ", {elapsed} < {remaining}{postfix}",
                )

    def __enter__(self) -> Progress:
        self._line()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, text: str) -> None:
        """Change the text."""
        self.text = text
        if self._bar is not None:
            self._bar.set_description(text)
        self._line()

    def note(self, note: str) -> None:
        """Show an intermediate result, such as a loss."""
        self._note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note)

    def write(self, text: str) -> None:
        """Print a line on stdout, above the bar."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def advance(self) -> None:
        """Count one step."""
        self.done += 1
        if self._bar is not None:
            self._bar.update()
        self._line()

    def _line(self) -> None:
        global _last_line
        now = time.monotonic()
        if self._bar is not None or self.quiet or now - _last_line < INTERVAL:
            return
        _last_line = now
        parts = [f"{self.done} of {self.total} {self.units}"]
        if self.done > self._before:
            left = (now - self._began) / (self.done - self._before) * (self.total - self.done)
            parts.append(f"about {duration(left)} left")
        if self._note:
            parts.append(self._note)
        text = f"{self.text}: " if self.text else ""
        print(text + ", ".join(parts), file=sys.stderr, flush=True)


def track(items: Sequence[T], units: str, text: str = "", **options: Any) -> Iterator[T]:
    """Iterate over items and show the progress; options as in `Progress`."""
    with Progress(len(items), units, text, **options) as progress:
        for item in items:
            yield item
            progress.advance()


@contextlib.contextmanager
def timed(text: str, quiet: bool = False) -> Iterator[None]:
    """A line on stderr for work without steps: its name and, at the end, how long it took.

    Example:
        >>> with timed("loading"):
        ...     pass
    """
    if quiet:
        yield
        return
    began = time.monotonic()
    print(f"{text} ... ", end="", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        print(file=sys.stderr)
        raise
    print(duration(time.monotonic() - began), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A duration in words, in seconds, minutes or hours.

    Example:
        >>> duration(7.4), duration(61), duration(5000)
        ('7 s', '1 min 1 s', '1 h 23 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, rest_minutes = divmod(minutes, 60)
    return f"{hours} h {rest_minutes} min" if hours else f"{minutes} min {rest} s"


def share_lock(lock: Any) -> None:
    """Let the bars of several processes share the terminal, by a common lock."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        tqdm.set_lock(lock)
