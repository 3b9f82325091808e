"""What the backends share: the accumulator type and the packed projection."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type that norms, scores and sums are computed in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pack_projections(
    wq: Tensor, bq: Tensor | None, wk: Tensor, bk: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Query and key layer as one with 2 E outputs: weight [2 E, C], bias [2 E] or None."""
    weight = torch.cat((wq, wk))
    if bq is None and bk is None:
        return weight, None
    if bq is None or bk is None:
        zeros = wq.new_zeros(wq.shape[0])
        bq, bk = zeros if bq is None else bq, zeros if bk is None else bk
    return weight, torch.cat((bq, bk))
