"""`doctor`: which attentions of a model run fused, on which backend, and why others do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from swiftkernels.integrations.probe import part_names
from swiftkernels.ops import linear_parts
from swiftkernels.ops.additive_attention.layer import AttentionForward
from swiftkernels.ops.additive_attention.op import SELF_ATTENTION

FUSED = ("triton", "cpu")
N_TOKENS = 49
"""Tokens of the input for which a backend is chosen; compiled kernels serve any number."""


@dataclass(frozen=True)
class AttentionReport:
    """How one additive attention of a model runs."""

    name: str
    kind: str
    """The name of its class."""
    backend: str
    """The backend for tokens with the dtype and device of its weights, without gradients."""
    reason: str
    """Why it does not run fused; empty if it does."""

    def __str__(self) -> str:
        how = f"not fused: {self.reason}" if self.reason else f"fused, backend {self.backend!r}"
        return f"{self.name or '(the model)'}: {self.kind}, {how}"


class Diagnosis:
    """How the additive attentions of a model run; print it.

    Attributes:
        attentions: a report for each attention, in the order of `model.named_modules()`.
    """

    def __init__(self, attentions: list[AttentionReport]) -> None:
        self.attentions = attentions

    def __str__(self) -> str:
        fused = sum(not a.reason for a in self.attentions)
        head = f"{fused} of {len(self.attentions)} additive attentions run fused"
        return "\n".join([head, *(f"  {a}" for a in self.attentions)])


def doctor(model: nn.Module) -> Diagnosis:
    """Report which additive attentions of a model run fused, and why others do not.

    Only inspects the model: nothing is run or changed.

    Args:
        model: any module, with attentions of this library, accelerated attentions or others.

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
    found = []
    for name, module in model.named_modules():
        kind = type_before_parametrizations(module).__name__
        if isinstance(module, AttentionForward):
            found.append(AttentionReport(name, kind, *_backend(module)))
        elif part_names(module):
            reason = "it is from another library; swiftkernels.accelerate(model) changes that"
            found.append(AttentionReport(name, kind, "", reason))
    return Diagnosis(found)


def _backend(layer: Any) -> tuple[str, str]:
    """The backend of a layer, and why it does not run fused."""
    called = linear_parts.called(layer, layer.names[:4])
    if called:
        return "", linear_parts.listed(called)
    if "forward" in vars(layer):
        return "", "its forward was replaced"
    like = next(layer.parameters(), torch.empty(0))
    x = torch.empty(1, N_TOKENS, layer.in_dims, dtype=like.dtype, device=like.device)
    w_g = layer._parameters.get(layer.names.w_g)
    width = layer.in_dims if w_g is None else w_g.numel()
    try:
        with torch.no_grad():
            backend = SELF_ATTENTION.choose_backend(layer.backend, x, width)
    except ValueError as error:
        return "", str(error)
    if backend in FUSED:
        return backend, ""
    if layer.backend != "auto":
        return backend, f"backend {backend!r} was requested"
    return backend, " ".join(SELF_ATTENTION.why_not(fused, x, width) for fused in FUSED)
