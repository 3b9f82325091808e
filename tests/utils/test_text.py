"""Names from outside in messages."""

from __future__ import annotations

import doctest

import pytest

from swiftkernels.utils import text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("stages.0", "stages.0"),
        ("größe 3", "größe 3"),
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("\udcff.png", "\\udcff.png"),  # a byte of a file name that is not UTF-8
        ("right\u202eleft", "right\\u202eleft"),
        ("\x9b31m\x00", "\\x9b31m\\x00"),
        (3, "3"),
    ],
)
def test_control_characters_are_escaped(given, expected):
    assert text.shown(given) == expected
    assert text.shown(given).isprintable()


def test_long_names_are_shortened():
    assert text.shown("a" * 1000 + "b" * 1000) == "a" * 98 + "..." + "b" * 98


def test_messages_keep_their_lines():
    assert text.shown_lines("one\x1b\n  two" + 300 * "x") == "one\\x1b\n  two" + 300 * "x"


def test_examples_run():
    found = doctest.testmod(text)
    assert found.attempted > 0
    assert found.failed == 0
