"""A lock on the output folder: one training at a time."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from swiftkernels.utils.files import make_folder
from swiftkernels.utils.text import shown

NAME = "lock"
"""Name of the lock file. It stays in the folder; only a lock on it says that the folder is used."""

PATIENCE = 1.0
"""Seconds to wait for a lock."""

_held: set[Any] = set()
"""Open lock files of this process. A child process inherits them, and with them the lock. It closes
its copies, so that a loading process does not keep the lock when the training is killed."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Lock the folder, and create it if necessary, until the end of the block.

    The operating system releases the lock when the process ends, even if it is killed.

    Yields:
        Whether the folder is locked: False where files cannot be locked.

    Raises:
        ValueError: another process has locked it, the message says which; or it is a file.
        OSError: the folder or the lock file could not be created.
    """
    make_folder("out", folder)
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    exclusive = True
    path = folder / NAME
    with path.open("ab+", buffering=0) as file:
        try:
            _try_for_a_moment(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            holder = shown(path.read_text(errors="replace").strip()) or "an unknown process"
            raise ValueError(
                f"out must be a folder that no other training uses; {shown(folder)} is locked by "
                f"{holder}. Wait for it, stop it, or choose another folder."
            ) from None
        except OSError as error:
            exclusive = False
            print(
                f"warning: {shown(path)} cannot be locked ({error.strerror}): make sure that no "
                f"other training writes to {shown(folder)}.",
                file=sys.stderr,
            )
        _held.add(file)
        try:
            with contextlib.suppress(OSError):  # for example a full disk
                file.truncate(0)
                file.write(_this_process().encode())
            yield exclusive
        finally:
            _held.discard(file)


def _try_for_a_moment(lock: Callable[[], None]) -> None:
    """Lock, or raise BlockingIOError. The lock of a killed process may outlive it for a moment."""
    last = time.monotonic() + PATIENCE
    while True:
        try:
            return lock()
        except BlockingIOError:
            if time.monotonic() > last:
                raise
        time.sleep(PATIENCE / 20)


def _this_process() -> str:
    now = datetime.now(timezone.utc)
    return f"process {os.getpid()} on {socket.gethostname()}, since {now:%Y-%m-%d %H:%M:%S} UTC\n"


def _close_in_child() -> None:
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
