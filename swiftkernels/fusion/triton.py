"""Runs the steps of a chain on a GPU: blocks and attention by the Triton kernels of their
operators, everything else by PyTorch's operators, in channels_last memory format.

An image never changes its memory format between steps: the kernels write NHWC, and convolutions
with weights in channels_last return it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swiftkernels.fusion import steps as of
from swiftkernels.fusion.steps import Step
from swiftkernels.ops.additive_attention.op import SELF_ATTENTION
from swiftkernels.ops.conv_mlp.op import CONV_MLP
from swiftkernels.ops.conv_mlp.weights import Weights
from swiftkernels.ops.plan import MAX_PLANS, Plan, Plans
from swiftkernels.ops.plan import run as run_plan

Compute = Callable[[Tensor], Tensor]


def run(steps: Sequence[Step], x: Tensor, slot: Any) -> Tensor:
    """The steps on x [B, C, H, W], as `Runner` in `chain.py` says, on a GPU.

    The slot keeps the steps with weights in channels_last memory format and the launches by shape.
    """
    program: list[Compute] | None = slot.program
    if program is None:
        program = slot.program = [_prepared(step, x) for step in steps]
    # The maps that later steps may add, of which the last is the input of the next step.
    maps: deque[Tensor] = deque(maxlen=max(1, *(step.adds for step in steps)))
    maps.append(x.contiguous(memory_format=torch.channels_last))
    for step, compute in zip(steps, program, strict=True):
        out = compute(maps[-1])
        maps.append(maps[-step.adds] + out if step.adds else out)
    return maps[-1]


def _prepared(step: Step, x: Tensor) -> Compute:
    """A step as a function of its input; `x` is on the device of the chain."""
    if isinstance(step, of.ConvMlp):
        weights = Weights(**step.tensors())  # type: ignore[arg-type]
        if not CONV_MLP.why_not("triton", x, weights.width):
            return _Planned(weights, lambda x: _block_plan(x, step, weights))
    if isinstance(step, of.Attention) and not SELF_ATTENTION.why_not(
        "triton", x, step.weights.width
    ):
        attend = _Planned(step.weights, lambda x: _attention_plan(x, step))
        scale = step.residual_scale
        if scale is None:
            return lambda x: x + attend(x)
        factor = scale.view(1, -1, 1, 1)
        return lambda x: torch.addcmul(x, factor, attend(x))
    tensors = step.tensors()
    if isinstance(step, (of.Stem, of.Convolution)):
        tensors = {name: _channels_last(t) for name, t in tensors.items()}
    return lambda x: step.compute(x, tensors)


def _channels_last(t: Tensor | None) -> Tensor | None:
    if t is None or t.dim() != 4:
        return t
    return t.contiguous(memory_format=torch.channels_last)


def _block_plan(x: Tensor, step: of.ConvMlp, weights: Weights) -> Plan:
    kernels = CONV_MLP.implementation("triton")
    plan: Plan = kernels.InferencePlan(x, weights, 0.0, step.options)
    return plan


def _attention_plan(x: Tensor, step: of.Attention) -> Plan:
    kernels = SELF_ATTENTION.implementation("triton")
    plan: Plan = kernels.inference_plan(x, step.weights, None, step.options, None, Plans())
    return plan


class _Planned:
    """Calls a plan of the kernels, which it keeps for each shape of x."""

    def __init__(self, weights: Any, make: Callable[[Tensor], Plan]) -> None:
        self._weights, self._make = weights, make
        self._plans: dict[tuple[torch.Size, tuple[int, ...]], Plan] = {}

    def __call__(self, x: Tensor) -> Tensor:
        key = x.shape, x.stride()
        plan = self._plans.get(key)
        out = None if plan is None else plan(x, self._weights, None, None)
        if out is None:
            out, plan = run_plan(lambda: self._make(x), x, self._weights, None, None)
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return out
