"""`doctor`: which layers of a model run fused, on which backend, and why others do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from swiftkernels.integrations.probe import part_names
from swiftkernels.ops import linear_parts
from swiftkernels.ops.additive_attention.layer import AttentionForward
from swiftkernels.ops.additive_attention.op import SELF_ATTENTION
from swiftkernels.ops.conv_mlp.layer import ConvMlpForward
from swiftkernels.ops.conv_mlp.op import CONV_MLP
from swiftkernels.ops.operator import Operator

FUSED = ("triton", "cpu")
N_TOKENS = 49
"""Tokens of the input for which a backend is chosen; compiled kernels serve any number."""


@dataclass(frozen=True)
class AttentionReport:
    """How one additive attention or convolutional block of a model runs."""

    name: str
    kind: str
    """The name of its class."""
    backend: str
    """The backend for inputs with the dtype and device of its weights, without gradients."""
    reason: str
    """Why it does not run fused; empty if it does."""

    def __str__(self) -> str:
        how = f"not fused: {self.reason}" if self.reason else f"fused, backend {self.backend!r}"
        return f"{self.name or '(the model)'}: {self.kind}, {how}"


class Diagnosis:
    """How the additive attentions and convolutional blocks of a model run; print it.

    Attributes:
        attentions: a report for each attention, in the order of `model.named_modules()`.
        blocks: the same for the convolutional blocks of this library and accelerated ones.
    """

    def __init__(self, attentions: list[AttentionReport], blocks: list[AttentionReport]) -> None:
        self.attentions, self.blocks = attentions, blocks

    def __str__(self) -> str:
        lines = _lines("additive attentions", self.attentions)
        return "\n".join(
            lines + (_lines("convolutional blocks", self.blocks) if self.blocks else [])
        )


def _lines(what: str, reports: list[AttentionReport]) -> list[str]:
    fused = sum(not report.reason for report in reports)
    return [f"{fused} of {len(reports)} {what} run fused", *(f"  {report}" for report in reports)]


def doctor(model: nn.Module) -> Diagnosis:
    """Report which attentions and convolutional blocks run fused, and why others do not.

    Only inspects the model: nothing is run or changed.

    Args:
        model: any module, with layers of this library, accelerated layers or others.

    Raises:
        TypeError: model is not a module.

    Example:
        >>> from swiftkernels import AdditiveAttention
        >>> model = nn.Sequential(AdditiveAttention(64, 64, 1), AdditiveAttention(64, 64, 1))
        >>> handle = model[1].final.register_forward_hook(lambda *_: None)
        >>> print(doctor(model))  # doctest: +SKIP
        1 of 2 additive attentions run fused
          0: AdditiveAttention, fused, backend 'cpu'
          1: AdditiveAttention, not fused: final is called, because it has hooks
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    found, blocks = [], []
    for name, module in model.named_modules():
        kind = type_before_parametrizations(module).__name__
        if isinstance(module, AttentionForward):
            found.append(AttentionReport(name, kind, *_backend_of_attention(module)))
        elif isinstance(module, ConvMlpForward):
            blocks.append(AttentionReport(name, kind, *_backend_of_block(module)))
        elif part_names(module):
            reason = "it is from another library; swiftkernels.accelerate(model) changes that"
            found.append(AttentionReport(name, kind, "", reason))
    return Diagnosis(found, blocks)


def _backend_of_attention(layer: Any) -> tuple[str, str]:
    """The backend of a layer, and why it does not run fused."""
    called = linear_parts.called(layer, layer.names[:4])
    if called:
        return "", linear_parts.listed(called)
    like = _first_parameter(layer)
    x = torch.empty(1, N_TOKENS, layer.in_dims, dtype=like.dtype, device=like.device)
    w_g = layer._parameters.get(layer.names.w_g)
    width = layer.in_dims if w_g is None else w_g.numel()
    return _backend(SELF_ATTENTION, layer, x, width)


def _backend_of_block(block: Any) -> tuple[str, str]:
    """The same for a convolutional block."""
    if why := block.why_called():
        return "", why
    like, width = _first_parameter(block), block.get_submodule(block.form.first).in_channels
    x = torch.empty(1, width, 1, N_TOKENS, dtype=like.dtype, device=like.device)
    return _backend(CONV_MLP, block, x, width)


def _backend(operator: Operator, layer: Any, x: Tensor, width: int) -> tuple[str, str]:
    """The backend of a layer for an input, and why that does not run fused."""
    if "forward" in vars(layer):
        return "", "its forward was replaced"
    try:
        with torch.no_grad():
            backend = operator.choose_backend(layer.backend, x, width)
    except ValueError as error:
        return "", str(error)
    if backend in FUSED:
        return backend, ""
    if layer.backend != "auto":
        return backend, f"backend {backend!r} was requested"
    fused = [name for name in FUSED if name in operator.backends]
    return backend, " ".join(operator.why_not(name, x, width) for name in fused)


def _first_parameter(layer: nn.Module) -> Tensor:
    return next(layer.parameters(), torch.empty(0))
