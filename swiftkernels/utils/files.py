"""Atomic replacement of files and folders.

A new file is written under a temporary name in the same folder and renamed when it is complete and
on the disk. A full disk, an error or an interruption leaves the old file unchanged.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from swiftkernels.utils.text import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIX = ".tmp"
"""Suffix of temporary names."""
NAME_LENGTH = 40
"""Characters of the final name in a temporary name: file systems allow 255 bytes in total."""


@contextlib.contextmanager
def replacing(path: str | Path, name: str = "path") -> Iterator[BinaryIO]:
    """Open a temporary file for writing; at the end of the block it is renamed to `path`.

    If the block raises, the temporary file is removed.

    Args:
        path: path of the file; for a symbolic link, the file to which it points is replaced.
        name: name of the argument in error messages.

    Raises:
        ValueError: `path` is not a file in an existing folder.
        OSError: the file could not be written. The error names `path`, even if the library that
            wrote the file raised another error.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing(folder / "a.txt") as file:
        ...     _ = file.write(b"complete")
        >>> [entry.name for entry in folder.iterdir()]
        ['a.txt']
    """
    target = Path(os.path.realpath(check_file(name, path)))
    temporary = _temporary(target)
    raw = None
    try:
        raw = _Raw(temporary, "xb")
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            os.fsync(raw.fileno())
        temporary.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        failure = _failure(error, raw, temporary)
        if failure is None:
            raise
        raise _with_path(failure, path) from error


@contextlib.contextmanager
def replacing_folder(path: str | Path, name: str = "path") -> Iterator[Path]:
    """A path for a temporary folder; at the end of the block it is renamed to `path`.

    The temporary path has the suffix of `path`. An older folder is removed when the new one is
    complete. If the block raises, the temporary folder is removed.

    Raises:
        ValueError: `path` is a file, or not in an existing folder.
        OSError: the folder could not be written.
    """
    target = Path(os.path.realpath(check_folder(name, path)))
    temporary = _temporary(target).with_suffix(target.suffix)
    old = _temporary(target)
    try:
        yield temporary
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8; errors as in `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def write_csv(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    columns: Iterable[str] | None = None,
    digits: int | None = None,
) -> None:
    """Write a CSV file with a header; errors as in `replacing`.

    Args:
        path: path of the file.
        rows: rows, as dicts from columns to values.
        columns: order of the columns; default: that of the first row.
        digits: significant digits of floats; None writes them exactly.

    Raises:
        ValueError: a row has a column that is not in `columns`.
    """
    text = io.StringIO(newline="")
    names = columns if columns is not None else rows[0] if rows else ()
    lines = csv.DictWriter(text, list(names), lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows if digits is None else (rounded(row, digits) for row in rows))
    write_text(path, text.getvalue())


def append_csv(path: str | Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Append rows to a CSV file, with a header if it is new; errors as in `replacing`.

    The whole file is replaced, so that it never ends within a row. Floats are rounded, and other
    columns than `columns` are left out.
    """
    text = io.StringIO(newline="")
    lines = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    before = Path(path).read_bytes() if Path(path).exists() else b""
    if not before:
        lines.writeheader()
    lines.writerows(map(rounded, rows))
    with replacing(path) as file:
        file.write(before + text.getvalue().encode())


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file by column; none if there is no such file."""
    if not Path(path).is_file():
        return []
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def rounded(row: Mapping[str, Any], digits: int = 6) -> dict[str, Any]:
    """The row with floats formatted to a number of significant digits."""
    return {k: f"{v:.{digits}g}" if isinstance(v, float) else v for k, v in row.items()}


def save_figure(figure: Figure, path: str | Path, **options: Any) -> None:
    """Write a matplotlib figure as PNG; options as in `savefig`, errors as in `replacing`."""
    with replacing(path) as file:
        figure.savefig(file, format="png", **options)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while writing in `folder`.

    Only for a folder in which no other process writes.
    """
    for path in folder.glob(f".*.[0-9]*-{'[0-9a-f]' * 8}{SUFFIX}"):
        with contextlib.suppress(OSError):
            path.unlink()


def check_file(name: str, path: str | Path) -> Path:
    """The path, if a file can be written there.

    Raises:
        TypeError: not a path.
        ValueError: the path is a folder or a device, or its folder does not exist.
    """
    found = _check_path(name, path)
    if found.is_dir():
        what = f"{shown(found)} is a folder" if str(path) else "it is empty"
        raise ValueError(f"{name} must be the path of a file; {what}. Add a file name.")
    if found.exists() and not found.is_file():
        raise ValueError(
            f"{name} must be the path of a regular file; {shown(found)} is a device or a pipe. "
            "Choose another path."
        )
    _check_parent(name, found)
    return found


def check_folder(name: str, path: str | Path) -> Path:
    """The path, if a folder can be written there.

    Raises:
        TypeError: not a path.
        ValueError: the path is a file, or its folder does not exist.
    """
    found = _check_path(name, path)
    if not str(path):
        raise ValueError(f"{name} must be the path of a folder; it is empty. Add a name.")
    if found.exists() and not found.is_dir():
        raise ValueError(
            f"{name} must be the path of a folder; {shown(found)} is a file. Choose another path."
        )
    _check_parent(name, found)
    return found


def make_folder(name: str, path: str | Path) -> Path:
    """Create a folder, and the folders that hold it, unless it exists.

    Raises:
        TypeError: not a path.
        ValueError: the path, or the start of it, is a file.
        OSError: the folder could not be created.
    """
    found = _check_path(name, path)
    try:
        found.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next((p for p in (found, *found.parents) if p.exists() and not p.is_dir()), found)
        raise ValueError(
            f"{name} must be a folder; {shown(file)} is a file. Choose another path."
        ) from error
    return found


def _check_path(name: str, path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path; got {type(path).__name__}. Pass a str or Path.")
    return Path(path)


def _check_parent(name: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise ValueError(
            f"{name} must be in an existing folder; {shown(path.parent)} is not. Create it first."
        )


class _Raw(io.FileIO):
    """A file that stores the error of a failed write, which torch.save would replace."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def _temporary(target: Path) -> Path:
    """A path in the same folder, unique to this process and call."""
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    return target.with_name(f".{target.name[:NAME_LENGTH]}.{unique}{SUFFIX}")


def _failure(error: BaseException, raw: _Raw | None, temporary: Path) -> OSError | None:
    """The file system error that caused an error; None if it has another cause."""
    if not isinstance(error, Exception):  # an interruption
        return None
    if raw is not None and raw.failure is not None:
        return raw.failure
    if isinstance(error, OSError) and error.filename in (None, str(temporary)):
        return error
    return None


def _with_path(failure: OSError, path: str | Path) -> OSError:
    """The same error, with the final path instead of the temporary one."""
    if failure.errno is None:
        return OSError(f"{shown(path)} could not be written: {failure}")
    return OSError(failure.errno, failure.strerror, str(path))
