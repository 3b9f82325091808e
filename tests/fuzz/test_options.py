"""Options of every command. What would take long is replaced."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("PIL")

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from swiftkernels.models import save_checkpoint
from swiftkernels.tools import bench, cli, verify
from swiftkernels.training import __main__ as training
from swiftkernels.utils import command
from tests.fuzz.commands import check_printable, run
from tests.fuzz.test_checkpoints import MODEL

SCORES = {"top1": 1.0, "top5": 2.0}
numbers = (
    st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(["0", "1", "-1", "32", "224", "99999999999", "1e-3", "0.5", "nan", "inf"])
)
words = st.text(st.characters(exclude_characters="\0"), max_size=12) | st.sampled_from(
    ["cpu", "cuda:99", "meta", "xpu", "cpu:7", "l2", "sum", "timm", ".", "/", "/dev/null", "~", "",
     "swiftformer_xs", "\x1b[31m", "none", "hard", "--", "-"]
)  # fmt: skip


def options_of(main: Any, *arguments: str) -> list[str]:
    """The options of a command, from its parser."""
    found: list[str] = []

    def collect(parser: Any, *_: Any, **__: Any) -> None:
        for action in parser._actions:
            for choice in getattr(action, "choices", None) or ():
                if isinstance(action, argparse._SubParsersAction) and choice in arguments:
                    collect(action.choices[choice])
            found.extend(action.option_strings)
        raise SystemExit(0)

    with mock.patch.object(command.Parser, "parse_args", collect), contextlib.suppress(SystemExit):
        main(arguments)
    return sorted(set(found) - {"-h", "--help"})


COMMANDS = {
    "doctor": cli.main,
    "verify": cli.main,
    "bench": cli.main,
    "predict": cli.main,
    "training": training.main,
}
OPTIONS = {
    name: options_of(main, *(() if name == "training" else (name,)))
    for name, main in COMMANDS.items()
}


@contextlib.contextmanager
def nothing_long() -> Iterator[None]:
    """Inside, bench measures nothing, verify checks no case, and nothing is trained."""
    with (
        mock.patch.object(bench, "_run", return_value=0),
        mock.patch.object(verify, "verify_case", side_effect=ValueError("no case here")),
        mock.patch.object(training, "train", return_value=[SCORES]),
        mock.patch.object(training, "evaluate_file", side_effect=ValueError("no file here")),
    ):
        yield


@contextlib.contextmanager
def inside(folder: str) -> Iterator[None]:
    """The working directory is a folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@st.composite
def command_lines(draw: Any) -> tuple[str, list[str]]:
    """A command, and its arguments with GOOD for files that exist."""
    name = draw(st.sampled_from(["predict", "predict", "training", "bench", "verify", "doctor"]))
    given = draw(st.lists(st.sampled_from(["WEIGHTS", "IMAGE"]) | words, max_size=1))
    arguments = ["WEIGHTS", "IMAGE", *given] if name == "predict" else []
    for _ in range(draw(st.integers(0, 3))):
        arguments.append(draw(st.sampled_from(OPTIONS[name])))
        arguments += draw(st.lists(numbers | words | st.sampled_from(["FOLDER"]), max_size=2))
    return name, draw(st.permutations(arguments)) if draw(st.booleans()) else arguments


@given(command_lines())
def test_command_lines(line):
    name, arguments = line
    with tempfile.TemporaryDirectory() as text, nothing_long(), inside(text):
        folder = Path(text)
        save_checkpoint(MODEL, folder / "w.pth")
        Image.new("RGB", (30, 40)).save(folder / "good.png")
        places = {"WEIGHTS": "w.pth", "IMAGE": "good.png", "FOLDER": "."}
        given = [places.get(argument, argument) for argument in arguments]
        done = run(COMMANDS[name], given if name == "training" else [name, *given])
    assert done.status in (0, 1, 2)
    check_printable(done.err)
    if done.status == 2:
        assert "error: " in done.err
