"""One training at a time in a folder."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

NAME = "lock"
"""Of the file; it stays in the folder, which is in use only as long as a process holds it."""

_held: set[Any] = set()
"""The files that this process holds. A lock belongs to all processes that inherited the open file:
children close theirs, so that a loading process that outlives a training does not hold it."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the folder, which is made if need be, until the end of the block.

    The operating system releases the lock when the process ends, however it ends.

    Yields:
        Whether no other process can hold it: False where files cannot be locked.

    Raises:
        ValueError: another process holds it; the message says which.
        OSError: the folder or the file could not be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    alone = True
    path = folder / NAME
    with path.open("ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = path.read_text().strip() or "a process that did not say which it is"
            raise ValueError(
                f"out must be a folder that no other training writes to; {folder} is held by "
                f"{holder}. Wait for it, stop it, or choose another folder."
            ) from None
        except OSError as error:
            alone = False
            print(
                f"warning: {path} cannot be locked here ({error.strerror}): make sure that no "
                f"other training writes to {folder}.",
                file=sys.stderr,
            )
        _held.add(file)
        try:
            with contextlib.suppress(OSError):  # of a full disk
                file.truncate(0)
                file.write(_this_process().encode())
            yield alone
        finally:
            _held.discard(file)


def _this_process() -> str:
    now = datetime.now(timezone.utc)
    return f"process {os.getpid()} on {socket.gethostname()}, since {now:%Y-%m-%d %H:%M:%S} UTC\n"


def _close_in_child() -> None:
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
