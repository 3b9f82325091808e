"""Text from outside, such as names in files and file names, in messages."""

from __future__ import annotations

LONGEST = 200
"""Characters of a name that are shown."""


def shown(text: object, longest: int = LONGEST) -> str:
    """A name from outside for a message: one line, without control characters.

    Args:
        text: a name, path or line of another program.
        longest: characters to show; of a longer text the middle is left out.

    Example:
        >>> shown("a\\x1b[31m\\nb")
        'a\\\\x1b[31m\\\\nb'
        >>> shown("0123456789", longest=7)
        '01...89'
    """
    text = str(text)
    if len(text) > longest:
        half = (longest - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown_lines(text: object) -> str:
    """A message of several lines, without control characters in them."""
    return "\n".join(shown(line, len(line)) for line in str(text).split("\n"))


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message.

    Example:
        >>> first_line(ValueError("no, because ..."))
        'ValueError: no, because ...'
    """
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {lines[0]}" if lines else "")
