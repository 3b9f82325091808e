"""The top level of every command: exit statuses, interruptions, errors in one line.

| exit status | what ended the command |
|---|---|
| 2 | wrong arguments, files or settings, or too little memory or disk space: one line says which |
| 130, 143, 129 | SIGINT (Ctrl-C), SIGTERM, SIGHUP: one line |
| 141 | nothing reads the output, as in `swiftkernels doctor | head -1`: no line |
| 1 with a traceback | a bug |

`--traceback`, an option of every command, shows the traceback of all errors.

Only the standard library is imported here: an interruption is handled from the first import on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from swiftkernels.utils.text import shown_lines

EXPECTED = (ValueError, ImportError, OSError, FloatingPointError, MemoryError)
"""Errors with a message for the user."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""In the messages of PyTorch's RuntimeErrors."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Requests to end that are handled like Ctrl-C: files are completed or removed."""
PACKAGE = "swiftkernels"


class Terminated(KeyboardInterrupt):
    """The process was asked to end by a signal other than SIGINT."""

    signal = signal.SIGTERM


class Parser(argparse.ArgumentParser):
    """Parses the arguments of a command; adds --traceback."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.add_argument(
            "--traceback",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show the tracebacks of errors",
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        global _shows_tracebacks
        found, others = super().parse_known_args(args, namespace)
        _shows_tracebacks |= found.__dict__.pop("traceback", False)
        return found, others

    def error(self, message: str) -> NoReturn:
        super().error(shown_lines(message))


_shows_tracebacks = False
"""Whether the arguments of this command had --traceback."""


def run(body: Callable[[], int | None]) -> int:
    """Run a command.

    Args:
        body: parses the arguments with a `Parser`, and returns the exit status; None is 0. The text
            of a KeyboardInterrupt that it raises says what became of the results.

    Returns:
        The exit status.

    Raises:
        SystemExit: wrong arguments, or --help.
        Exception: an error that is not expected, a bug; with --traceback any error.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names that the encoding lacks are escaped
            stream.reconfigure(errors="backslashreplace")
    global _shows_tracebacks
    _shows_tracebacks = False
    with _signals():
        try:
            try:
                status = body() or 0
                if sys.stdout is not None:
                    sys.stdout.flush()
                return status
            except Exception:
                if _shows_tracebacks:
                    traceback.print_exc()
                raise
        except KeyboardInterrupt as interruption:
            found = getattr(interruption, "signal", signal.SIGINT)
            kept = f"; {interruption}" if str(interruption) else ""
            _say(f"\n{'interrupted' if found == signal.SIGINT else 'terminated'}{kept}")
            return 128 + found
        except EXPECTED as error:
            is_unread = isinstance(error, BrokenPipeError) and not _is_read(sys.stdout)
            if not is_unread:
                _say(f"error: {_message(error)}")
            return 141 if is_unread else 2
        except RuntimeError as error:
            if not any(text in str(error) for text in OUT_OF_MEMORY):
                raise
            _say(f"error: too little memory: {str(error).splitlines()[0]}")
            return 2
        finally:
            _flush_or_discard(sys.stdout)


def end_quietly_in_imports() -> None:
    """In a command of this library: let Ctrl-C end the process with one line until `run` is called.

    Nothing has been written then, and nothing needs to be removed. A KeyboardInterrupt would be
    raised in the middle of the imports of PyTorch, some of which catch it.
    """
    if not _is_command() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, b"\ninterrupted\n")
        os._exit(128 + number)

    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, end)


def _is_command() -> bool:
    """Whether Python was started as `swiftkernels` or `python -m swiftkernels...`."""
    if Path(sys.argv[0] if sys.argv else "").stem == PACKAGE:
        return True
    arguments = sys.orig_argv
    if "-m" not in arguments or sys.argv[:1] != ["-m"]:
        return False
    return arguments[arguments.index("-m") + 1 :][:1][0].split(".")[0] == PACKAGE


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt and other requests to end raise Terminated."""

    def raise_error(number: int, frame: FrameType | None) -> NoReturn:
        error = Terminated()
        error.signal = signal.Signals(number)
        raise error

    before = {}
    try:
        with contextlib.suppress(ValueError):  # not in the main thread
            if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
                before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in SIGNALS:
                if signal.getsignal(number) is signal.SIG_DFL:
                    before[number] = signal.signal(number, raise_error)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _message(error: Exception) -> str:
    text = str(error).strip()
    if "Original Traceback" in text:  # the text of an error in a DataLoader's process
        text = text.splitlines()[-1].partition(": ")[2]
    return text or type(error).__name__


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(shown_lines(text), file=sys.stderr, flush=True)


def _is_read(stream: Any) -> bool:
    """Whether a pipe has a reader; True for everything else, False where that is unknown."""
    try:
        file = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return True
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(file, 0)
    return not any(events & select.POLLERR for _, events in poll.poll(0))


def _flush_or_discard(stream: Any) -> None:
    """Write the rest of the output; discard it if that fails, or Python would try again at exit."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
    except (AttributeError, ValueError):  # none, or closed
        pass
