"""What to compute in which form, by shape; and a size that the kernels share."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from swiftkernels.backends import torch_state
from swiftkernels.backends.cpu import library
from swiftkernels.ops.additive_attention.cpu.packing import FOLDED, PLAIN, TRIANGULAR

TABLE = Path(__file__).with_name("forms.json")
"""Written by `python -m benchmarks.cpu_forms`, which measures."""

SHORT_SEQUENCE = 256
"""Batch elements of up to so many tokens may be processed whole; as in csrc/schedule.h."""

RECOMPUTE_WIDTH = 64
"""Widest q and k that a backward computes again rather than reads."""

NARROW = 8
"""Below this width folding saves nothing, and rows of one number are exactly 1 or -1 plain."""


def form(n_tokens: int, in_dims: int, width: int, qk_norm: bool) -> int:
    """The fastest form for batch elements of that many tokens.

    The folded form saves half a product per token, and makes a matrix per batch element: it pays
    where there are several times as many tokens as channels.
    """
    if width < NARROW:
        return PLAIN
    name = "folded_from" if qk_norm else "folded_from_without_norms"
    ratio = n_tokens / max(in_dims, width)
    return FOLDED if ratio >= _measured(name) else TRIANGULAR


def keeps_rows(batch: int, n_tokens: int, width: int) -> bool:
    """Whether a backward is faster with the unit rows of q and k that the forward had.

    Narrow ones are computed again: memory is slower than their products.
    """
    return width > RECOMPUTE_WIDTH and not folds_backward(batch, n_tokens, width)


def folds_backward(batch: int, n_tokens: int, width: int) -> bool:
    """Whether the backward does without queries and keys.

    That saves products per token; it makes some E x E matrices per batch element, and more of them
    once.
    """
    if width < NARROW:
        return False
    return n_tokens >= _measured("folded_backward_from") * width and batch * n_tokens >= 8 * width


def backward_by_elements(batch: int, n_tokens: int, width: int, threads: int) -> bool:
    """Whether threads of a backward take short batch elements rather than share them in turn.

    Shared, a token takes 8 products of E x E and the end 2 of matrices, and threads wait for each
    other; otherwise a token takes 9, and each batch element has one thread.
    """
    if batch >= threads:
        return True
    shared = 1.5 * (8 + 2 * width / (batch * n_tokens)) / threads
    return shared >= 9 / batch


@torch_state.constant_under_compile
def _measured(name: str) -> float:
    """Tokens per channel from which on what `name` says is faster."""
    return _table()[name]


@functools.cache
def _table() -> dict[str, float]:
    """What was measured for the library in use."""
    table = json.loads(TABLE.read_text())
    loaded = library.loaded()
    found: dict[str, float] = table.get(loaded.name if loaded else "", table["default"])
    return found
