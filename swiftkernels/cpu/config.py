"""Which form of the output to compute, by shape; and a size that the kernels share."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from swiftkernels.cpu import library
from swiftkernels.cpu.weights import FOLDED, PLAIN, TRIANGULAR

TABLE = Path(__file__).with_name("forms.json")
"""Written by `python -m benchmarks.cpu_forms`, which measures."""

WHOLE_ROWS = 256
"""Items up to this length are worked on in one piece; as in layer.h."""

NARROW = 8
"""Below this width folding saves nothing, and rows of one number are exactly 1 or -1 plain."""


def form(n_tokens: int, in_dims: int, width: int, qk_norm: bool) -> int:
    """The fastest form for items of that many tokens.

    The folded form saves half a product for every token, and makes a matrix for every item: it pays
    where an item has several times as many tokens as channels.
    """
    if width < NARROW:
        return PLAIN
    ratio = n_tokens / max(in_dims, width)
    return FOLDED if ratio >= _folded_from(qk_norm) else TRIANGULAR


@functools.cache
def _folded_from(qk_norm: bool) -> float:
    """Tokens per channel from which on the folded form is faster."""
    table = json.loads(TABLE.read_text())
    loaded = library.loaded()
    measured = table.get(loaded.name if loaded else "", table["default"])
    return float(measured["folded_from" if qk_norm else "folded_from_without_norms"])
