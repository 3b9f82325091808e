"""Outputs of networks, compared whatever their structure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from swiftkernels.integrations import probe


def leaves(out: Any) -> list[Any]:
    """The tensors and other values in nested outputs, with the keys that lead to them.

    Raises:
        ValueError: outputs that cannot be compared.
    """
    if out is None or isinstance(out, (Tensor, bool, int, float, str)):
        return [out]
    if dataclasses.is_dataclass(out) and not isinstance(out, (type, Mapping)):
        out = {f.name: getattr(out, f.name) for f in dataclasses.fields(out)}
    if isinstance(out, Mapping):
        return [leaf for key, value in out.items() for leaf in (str(key), *leaves(value))]
    if isinstance(out, (list, tuple)):
        return [leaf for value in out for leaf in (type(value).__name__, *leaves(value))]
    raise ValueError(
        f"model must return tensors, in lists, tuples or dicts; got a {type(out).__name__}, which "
        "cannot be compared. Fuse the part of the model that returns tensors."
    )


def is_same_output(out: Any, expected: Any) -> bool:
    mine, theirs = leaves(out), leaves(expected)
    if type(out) is not type(expected) or len(mine) != len(theirs):
        return False
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.dtype != b.dtype or not is_near(a, b):
                return False
        elif type(a) is not type(b) or a != b:
            return False
    return True


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of the recorded run are the same, or equal."""
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def is_near(out: Tensor, expected: Tensor) -> bool:
    """As `probe.is_near`, also for tensors without elements and integers."""
    if out.numel() == 0 or not out.is_floating_point():
        return torch.equal(out, expected)
    return probe.is_near(out, expected)
