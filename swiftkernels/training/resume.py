"""The checkpoint from which a training continues: read, and checked before anything changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swiftkernels.models.checkpoint_io import check_finite, check_stored, read_file
from swiftkernels.models.family import listed
from swiftkernels.training import metrics
from swiftkernels.utils.text import shown


class State(NamedTuple):
    """The content of last.pth."""

    args: dict[str, Any]
    model: dict[str, Tensor]
    model_ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    step: int
    rows: list[metrics.Row]
    best: float
    loss: float
    loss_steps: int

    def has_scores(self) -> bool:
        """Whether the last row is the end of an epoch."""
        return bool(self.rows) and {"top1", "top5"} <= self.rows[-1].keys()

    def check(
        self,
        path: Path,
        model: nn.Module,
        average: nn.Module | None,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Raise ValueError unless the state fits a training."""
        _check_weights(path, "model", self.model, model)
        if average is not None:
            _check_weights(path, "model_ema", self.model_ema, average)
        _check_optimizer(path, self.optimizer, optimizer)


def read(path: Path) -> State:
    """The state in a file.

    Raises:
        ValueError: the file cannot be read, or is no checkpoint of a training.
    """
    try:
        content = read_file(path, "last.pth")
    except ValueError as error:
        raise ValueError(
            f"{error} Restore it from a copy, or start again in another folder."
        ) from error
    if not isinstance(content, Mapping):
        raise _wrong(path, f"it holds a {type(content).__name__}")
    found = {name: content[name] for name in State._fields if name in content}
    missing = [name for name in State._fields if name not in found]
    if missing:
        raise _wrong(path, f"it has no {', '.join(missing)}")
    loss = found["loss"]
    is_stored = isinstance(loss, Tensor) and loss.layout is torch.strided and not loss.is_meta
    if is_stored and loss.shape == ():
        found["loss"] = loss.item()
    for name, is_right in _CHECKS.items():
        if not is_right(found[name]):
            raise _wrong(path, f"its {name} is {shown(repr(found[name]), 60)}")
    return State(**found)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict)
        and set(row) <= set(metrics.COLUMNS)
        and all(isinstance(v, (int, float)) for v in row.values())  # NaN too: scores may be
        for row in value
    )


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "args": lambda value: isinstance(value, dict),
    "model": lambda value: isinstance(value, dict),
    "model_ema": lambda value: value is None or isinstance(value, dict),
    "optimizer": lambda value: isinstance(value, dict),
    "step": _is_count,
    "rows": _are_rows,
    "best": _is_number,
    "loss": _is_number,
    "loss_steps": _is_count,
}


def _wrong(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{shown(path)} must be a checkpoint that this training wrote; {what}. Restore it from a "
        "copy, or start again in another folder."
    )


def _check_weights(path: Path, entry: str, weights: Any, model: nn.Module) -> None:
    """Raise ValueError unless weights have names, shapes and types of a model, and finite data."""
    own = model.state_dict()
    if not isinstance(weights, dict):
        raise _wrong(path, f"its {entry} is {shown(repr(weights), 60)}")
    differing = sorted({*map(str, weights)} ^ own.keys())
    if differing:
        raise _wrong(path, f"names in its {entry} differ: {listed(differing)}")
    for name, t in own.items():
        _check_like(path, f"{entry}, {name}", weights[name], t)
    where = f"{shown(path)}, entry {entry!r},"
    check_stored({name: weights[name] for name, t in own.items() if t.numel()}, where)
    # Buffers may hold infinity, as masks do.
    check_finite({name: weights[name] for name, _ in model.named_parameters()}, where)


def _check_optimizer(path: Path, found: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless a state fits the parameters of an optimizer."""
    groups, states = found.get("param_groups"), found.get("state")
    own = optimizer.state_dict()["param_groups"]
    if not isinstance(groups, list) or not isinstance(states, dict):
        raise _wrong(path, "its optimizer has no param_groups and state")
    if len(groups) != len(own):
        raise _wrong(path, f"its optimizer has {len(groups)} groups of parameters, not {len(own)}")
    for group, ours in zip(groups, own, strict=True):
        if not isinstance(group, dict) or group.get("params") != ours["params"]:
            raise _wrong(path, "the parameters of its optimizer are others")
        for name in (group.keys() & ours.keys()) - {"lr", "params"}:
            if type(group[name]) is not type(ours[name]) or group[name] != ours[name]:
                raise _wrong(path, f"the {name} of its optimizer is {shown(repr(group[name]), 60)}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if states and set(states) != set(range(len(parameters))):
        raise _wrong(path, "its optimizer has no state for some parameters")
    for number, state in states.items():
        if not isinstance(state, dict) or set(state) != {"step", "exp_avg", "exp_avg_sq"}:
            raise _wrong(path, f"the state of parameter {number} in its optimizer is another")
        for name, t in state.items():
            like = torch.zeros(()) if name == "step" else parameters[number]
            _check_like(path, f"optimizer, {name} of parameter {number}", t, like)
        where = f"{shown(path)}, state of parameter {number} in the optimizer,"
        check_stored(state, where)
        check_finite(state, where)


def _check_like(path: Path, name: str, t: Any, like: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise _wrong(path, f"{name} is a {type(t).__name__}")
    if t.shape != like.shape or t.dtype != like.dtype:
        theirs, ours = (f"{x.dtype} of shape {tuple(x.shape)}" for x in (t, like))
        raise _wrong(path, f"{name} is {theirs}, not {ours}")
