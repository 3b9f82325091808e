"""Which form of the forward and the backward is the fastest, by shape."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from swiftkernels.backends import torch_state
from swiftkernels.backends.cpu import library
from swiftkernels.ops.additive_attention.cpu.packing import FOLDED, PLAIN, TRIANGULAR

TABLE = Path(__file__).with_name("forms.json")
"""Measured and written by `python -m benchmarks.cpu_forms`."""

SHORT_SEQUENCE = 256
"""Most tokens of batch elements that are processed in groups; as in csrc/schedule.h."""

RECOMPUTE_WIDTH = 64
"""Widest q and k that a backward computes again instead of reading them."""

NARROW = 8
"""Narrower layers use the plain form: the others save nothing, and normalised rows of one number
would not be exactly 1 or -1."""


def form(n_tokens: int, in_dims: int, width: int, qk_norm: bool) -> int:
    """The fastest form for batch elements of `n_tokens` tokens.

    The folded form saves half a product per token, and computes a matrix per batch element. It pays
    where there are several times as many tokens as channels.
    """
    if width < NARROW:
        return PLAIN
    name = "folded_from" if qk_norm else "folded_from_without_norms"
    ratio = n_tokens / max(in_dims, width)
    return FOLDED if ratio >= _measured(name) else TRIANGULAR


def keeps_rows(batch: int, n_tokens: int, width: int) -> bool:
    """Whether a backward is faster with the normalised q and k of the forward.

    Narrow rows are computed again, which is faster than reading them from memory.
    """
    return width > RECOMPUTE_WIDTH and not folds_backward(batch, n_tokens, width)


def folds_backward(batch: int, n_tokens: int, width: int) -> bool:
    """Whether the folded backward, without queries and keys, is faster.

    It saves products per token, but computes some E x E matrices per batch element, and more of
    them once.
    """
    if width < NARROW:
        return False
    return n_tokens >= _measured("folded_backward_from") * width and batch * n_tokens >= 8 * width


def backward_by_elements(batch: int, n_tokens: int, width: int, threads: int) -> bool:
    """Whether each thread of a backward takes batch elements of its own, or all share each one.

    If all share, a token costs 8 products with E x E matrices, the batch 2 products of such
    matrices, and threads wait for each other (1.5 x). Otherwise a token costs 9 products, and each
    batch element has one thread.
    """
    if batch >= threads:
        return True
    shared = 1.5 * (8 + 2 * width / (batch * n_tokens)) / threads
    return shared >= 9 / batch


@torch_state.constant_under_compile
def _measured(name: str) -> float:
    """The measured threshold of that name, in tokens per channel."""
    return _table()[name]


@functools.cache
def _table() -> dict[str, float]:
    """The thresholds for the library in use."""
    table = json.loads(TABLE.read_text())
    loaded = library.loaded()
    found: dict[str, float] = table.get(loaded.name if loaded else "", table["default"])
    return found
