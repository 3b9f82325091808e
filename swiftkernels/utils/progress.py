"""How far long work is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

INTERVAL = 30.0
"""Seconds between two lines where the output is no terminal."""

_last_line = -INTERVAL
"""When this process wrote a line, of whichever work."""


class Progress:
    """Progress of a loop, on stderr: a bar by tqdm on a terminal, if tqdm is installed; else a line
    at the start, and then at most one every `INTERVAL` seconds.

    Args:
        total: steps of the loop.
        units: what the steps are, in the plural.
        text: what is going on.
        done: steps that were done before.
        leave: keep the bar when the loop is over.
        position: line of the bar on the terminal, where several processes show theirs.
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
        """Tell what is going on now."""
        self.text = text
        if self._bar is not None:
            self._bar.set_description(text)
        self._line()

    def note(self, note: str) -> None:
        """Add a result so far, such as a loss."""
        self._note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note)

    def write(self, text: str) -> None:
        """Leave a line above the bar, on stdout."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def advance(self) -> None:
        """One step is done."""
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
    """The items, with the progress of the loop over them; options as of `Progress`."""
    with Progress(len(items), units, text, **options) as progress:
        for item in items:
            yield item
            progress.advance()


@contextlib.contextmanager
def timed(text: str, quiet: bool = False) -> Iterator[None]:
    """A line on stderr for work without steps: what it is, and when it is done how long it took.

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
    """Seconds, minutes or hours.

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
    """Let the bars of several processes take turns on the terminal, by a lock that they share."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        tqdm.set_lock(lock)
