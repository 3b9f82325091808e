"""Runs the steps of a chain on a GPU: blocks, attention and small convolutions by Triton kernels,
everything else by PyTorch's operators, in channels_last memory format.

An image never changes its memory format between steps: the kernels write NHWC, and convolutions
with weights in channels_last return it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from swiftkernels.backends.triton.tensors import has_tensor_cores, precision
from swiftkernels.fusion import steps as of
from swiftkernels.fusion.steps import Step
from swiftkernels.fusion.triton import launch
from swiftkernels.ops.additive_attention.op import SELF_ATTENTION
from swiftkernels.ops.conv_mlp.op import CONV_MLP
from swiftkernels.ops.conv_mlp.weights import Weights
from swiftkernels.ops.plan import MAX_PLANS, Plan, Plans
from swiftkernels.ops.plan import run as run_plan

Compute = Callable[[Tensor], Tensor]


def run(steps: Sequence[Step], x: Tensor, slot: Any) -> Tensor:
    """The steps on x [B, C, H, W], as `Runner` in `chain.py` says, on a GPU.

    The slot keeps the steps with weights as the kernels read them, and the launches by shape. In
    float32 without TF32, PyTorch's libraries compute the products, see `has_tensor_cores`.
    """
    if not has_tensor_cores(x.dtype, precision(x.dtype, convolution=True)):
        return of.run(steps, x)
    program: list[Compute] | None = slot.program
    if program is None:
        program = slot.program = [_prepared(step, x) for step in steps]
    # The maps that later steps may add, of which the last is the input of the next step.
    maps: deque[Tensor] = deque(maxlen=max(1, *(step.adds for step in steps)))
    # A stem reads images of any strides, and no later step adds them.
    maps.append(x if isinstance(steps[0], of.Stem) else _channels_last(x))
    for step, compute in zip(steps, program, strict=True):
        out = compute(maps[-1])
        maps.append(maps[-step.adds] + out if step.adds else out)
    return maps[-1]


def _prepared(step: Step, x: Tensor) -> Compute:
    """A step as a function of its input; `x` is on the device of the chain."""
    if isinstance(step, of.Stem):
        first, second = map(_convolution, step.convolutions)
        return lambda x: second(first(x))
    if isinstance(step, of.Convolution):
        return _convolution(step)
    if isinstance(step, of.ConvMlp):
        weights = Weights(**step.tensors())  # type: ignore[arg-type]
        if step.depthwise_weight is not None:
            packed = CONV_MLP.implementation("triton").taps_first(step.depthwise_weight)
            weights = weights._replace(depthwise_weight=packed)
        if not CONV_MLP.why_not("triton", x, weights.width):
            return _Planned(weights, lambda x: _block_plan(x, step, weights))
    tensors = step.tensors()
    if isinstance(step, of.Attention) and not SELF_ATTENTION.why_not(
        "triton", x, step.weights.width
    ):
        attend = _attention(step)
        # Products have a setting of their own for TF32.
        return lambda x: (
            attend(x) if has_tensor_cores(x.dtype, precision(x.dtype)) else step.compute(x, tensors)
        )
    return lambda x: step.compute(x, tensors)


def _convolution(step: of.Convolution) -> Compute:
    if launch.takes(step):
        return _Planned(launch.pack(step), lambda x: launch.ConvolutionPlan(x, step))
    tensors = {**step.tensors(), "weight": _channels_last(step.weight)}
    return lambda x: step.compute(x, tensors)


def _attention(step: of.Attention) -> Compute:
    """The attention with its residual branch, which the last kernel adds."""
    kernels, weights, options = SELF_ATTENTION.implementation("triton"), step.weights, step.options
    scale = step.residual_scale
    if scale is None:
        scale = weights.final_weight.new_ones(weights.token_dim)
    if kernels.is_wide(weights.width):
        packed = kernels.wide.pack(weights)

        def attend_wide(x: Tensor) -> Tensor:
            x = _channels_last(x)
            residual = kernels.Residual(x, scale)
            out: Tensor = kernels.wide.infer(x, packed, options, residual)
            return out

        return attend_wide
    attend = _Planned(
        weights, lambda x: kernels.inference_plan(x, weights, None, options, scale, Plans()), scale
    )
    return lambda x: attend(_channels_last(x))


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _block_plan(x: Tensor, step: of.ConvMlp, weights: Weights) -> Plan:
    kernels = CONV_MLP.implementation("triton")
    plan: Plan = kernels.InferencePlan(x, weights, 0.0, step.options)
    return plan


class _Planned:
    """Calls a plan of the kernels, which it keeps for each shape of x."""

    def __init__(
        self, weights: Any, make: Callable[[Tensor], Plan], residual_scale: Tensor | None = None
    ) -> None:
        self._weights, self._make, self._scale = weights, make, residual_scale
        self._plans: dict[tuple[torch.Size, tuple[int, ...]], Plan] = {}

    def __call__(self, x: Tensor) -> Tensor:
        key = x.shape, x.stride()
        plan = self._plans.get(key)
        out = None if plan is None else plan(x, self._weights, None, self._scale)
        if out is None:
            out, plan = run_plan(lambda: self._make(x), x, self._weights, None, self._scale)
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return out
