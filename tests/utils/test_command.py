"""The top level of every command: exit statuses, interruptions, errors in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftkernels.utils import command
from tests.builds import ROOT


def raising(error: BaseException) -> Callable[[], int]:
    def body() -> int:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("--size must be 1"), 2, "error: --size must be 1\n"),
        (ImportError("needs pillow"), 2, "error: needs pillow\n"),
        (OSError(28, "No space left on device", "a"), 2, "error: [Errno 28] No space left on dev"),
        (BrokenPipeError(32, "Broken pipe"), 2, "error: [Errno 32] Broken pipe\n"),
        (MemoryError(), 2, "error: MemoryError\n"),
        (ValueError("name \x1b[31m"), 2, "error: name \\x1b[31m\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "error: too little memory: CUDA out of"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), 2, "error: too little mem"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (KeyboardInterrupt("there is no file"), 130, "\ninterrupted; there is no file\n"),
        (command.Terminated(), 143, "\nterminated\n"),
        (
            ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback "
                       "(most recent call last):\n  File\nValueError: a.png is no image\n"),
            2, "error: a.png is no image\n",
        ),
    ],
)  # fmt: skip
def test_expected_failures_print_one_line(error, status, said, capsys):
    assert command.run(raising(error)) == status
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("shape"), KeyError("x"), AssertionError(), TypeError()]
)
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        command.run(raising(error))


def test_traceback_option(capsys):
    def body(*arguments: str) -> int:
        parser = command.Parser()
        commands = parser.add_subparsers(dest="name")
        commands.add_parser("sub")
        assert vars(parser.parse_args(arguments)) == {"name": "sub"}
        raise ValueError("wrong")

    for arguments in (("--traceback", "sub"), ("sub", "--traceback"), ("sub", "--trace")):
        assert command.run(lambda: body(*arguments)) == 2  # noqa: B023
        err = capsys.readouterr().err
        assert err.startswith("Traceback")
        assert err.endswith("error: wrong\n")
    assert command.run(lambda: body("sub")) == 2
    assert capsys.readouterr().err == "error: wrong\n"


def test_usage_errors_escape_arguments(capsys):
    with pytest.raises(SystemExit) as caught:
        command.run(lambda: command.Parser(prog="x").parse_args(["--\x1b[31m"]))
    assert caught.value.code == 2
    assert "\x1b" not in capsys.readouterr().err


def test_signals_are_restored():
    # Shells ignore the interrupts of processes in the background.
    own = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, *command.SIGNALS)}
        inside: dict[Any, Any] = {}
        command.run(lambda: inside.update({n: signal.getsignal(n) for n in before}))
        assert {number: signal.getsignal(number) for number in before} == before
        assert inside[signal.SIGINT] is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, own)


@pytest.mark.parametrize("module", ["swiftkernels", "swiftkernels.training"])
def test_ctrl_c_while_packages_are_imported(module, tmp_path):
    """torch is replaced by a package that swallows the interruption, as some do."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
        "except BaseException: pass\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = subprocess.run(
        [sys.executable, "-m", module], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr, done.stdout) == (130, "\ninterrupted\n", "")


def test_import_in_another_program_handles_no_signal():
    code = (
        "import signal; before = signal.getsignal(signal.SIGINT); import swiftkernels; "
        "assert signal.getsignal(signal.SIGINT) is before"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_nobody_reads_ends_in_silence(tmp_path):
    """As in `swiftkernels doctor | head -1`; a full disk is an error."""
    code = (
        "import sys\nfrom swiftkernels.utils import command\n"
        "def body():\n    for i in range(100000): print(i)\n"
        "sys.exit(command.run(body))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    for unbuffered in ("", "1"):
        environment["PYTHONUNBUFFERED"] = unbuffered
        reading, writing = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            env=environment, stdout=writing, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.close(writing)
        os.read(reading, 10)
        os.close(reading)
        assert process.communicate()[1] == ""
        assert process.returncode == 141
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env=environment, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: [Errno 28] No space left on device\n"


END_BY_SIGNALS = """
import os, signal, sys
from swiftkernels.utils import command, files

def body(number):
    with files.replacing(sys.argv[1]) as file:
        file.write(b"half")
        os.kill(os.getpid(), number)
        signal.pause()

for name in ("SIGTERM", "SIGINT", "SIGHUP"):
    print(command.run(lambda: body(getattr(signal, name))))
"""


def test_signals_end_a_command_and_remove_temporary_files(tmp_path):
    (tmp_path / "a").write_text("old")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", END_BY_SIGNALS, str(tmp_path / "a")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "143\n130\n129\n"
    assert done.stderr == "\nterminated\n\ninterrupted\n\nterminated\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def commands() -> list[str]:
    """The modules that are commands, by their last lines."""
    found = [
        path.relative_to(ROOT)
        for folder in ("swiftkernels", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if "ArgumentParser(" in path.read_text() or "command.Parser(" in path.read_text()
    ]
    return [str(path) for path in found if path.name not in ("command.py", "cli.py")]


@pytest.mark.parametrize("path", commands())
def test_every_command_has_the_same_top_level(path):
    text = (ROOT / path).read_text()
    assert "argparse.ArgumentParser(" not in text
    assert "command.run(" in text
