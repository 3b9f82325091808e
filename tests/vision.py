"""torchvision beside a torch that it was not built for.

PyPI's torchvision is compiled for PyPI's torch. Beside another build of the same version, such as
the one for CPUs, its compiled operators do not load, and without two of them it does not even
import. All but these operators is Python: what the tests need of them is declared here.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

_LIBRARIES: list[torch.library.Library] = []
"""Declarations hold as long as their library lives."""


def import_torchvision() -> ModuleType:
    """torchvision, or skip the test where it is not installed."""
    try:
        return importlib.import_module("torchvision")
    except ImportError:
        return pytest.importorskip("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", _nms, "CPU")
    _LIBRARIES.append(library)
    torchvision = importlib.import_module("torchvision")
    ops = importlib.import_module("torchvision.ops.boxes")
    ops._assert_has_ops = lambda: None  # type: ignore[attr-defined]
    return torchvision


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression: indices of the boxes that no better one covers, best first."""
    box_iou = importlib.import_module("torchvision.ops").box_iou
    order = scores.argsort(descending=True, stable=True)
    overlaps = box_iou(boxes[order], boxes[order]) > iou_threshold
    kept = torch.ones(len(order), dtype=torch.bool)
    for i in range(len(order)):
        if kept[i]:
            kept[i + 1 :] &= ~overlaps[i, i + 1 :]
    return order[kept]
