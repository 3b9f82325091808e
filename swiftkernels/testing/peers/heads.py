"""The number of heads of a peer."""

from __future__ import annotations


def choose_heads(dim: int, num_heads: int | None) -> int:
    """`num_heads`; by default the largest divisor of `dim` with heads at least 32 wide.

    Raises:
        ValueError: `num_heads` does not divide `dim`.

    Example:
        >>> choose_heads(192, None), choose_heads(220, None)
        (6, 5)
    """
    if num_heads is None:
        return next(h for h in range(max(1, dim // 32), 0, -1) if dim % h == 0)
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide dim = {dim}; got {num_heads}.")
    return num_heads
