"""Bytes that cross the boundaries of kernels: how they are counted, and what was promised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import calls
from benchmarks.gpu.traffic import Shape, count_ours, extrapolate, minimum_bytes
from swiftkernels import AdditiveAttention
from swiftkernels.backends.triton.kernel_launch import KernelLaunch
from swiftkernels.fusion.steps import Convolution
from swiftkernels.fusion.triton.launch import ConvolutionPlan, pack
from swiftkernels.testing.triton_trace import SECTOR, trace

TENSORS = 8
"""Outputs and partial sums of one launch, at most."""


@pytest.mark.parametrize("batch", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_the_bytes_of_narrow_layers_are_affine_in_the_batch(batch):
    """What extrapolation assumes: exact, but for sectors that two batch elements share."""
    one, two, more = (count_ours(Shape(b, 64, 16), torch.float16) for b in (1, 2, batch))
    for a, b, counted in zip(one, two, more, strict=True):
        predicted = extrapolate(a, b, batch)
        assert predicted.operators == counted.operators
        for ours, theirs in zip(predicted.launches, counted.launches, strict=True):
            assert ours.kernel == theirs.kernel
            assert ours.programs == theirs.programs
            assert ours.dot_flops == theirs.dot_flops
            assert ours.requested == theirs.requested
            shared = SECTOR * batch * TENSORS
            assert ours.distinct == pytest.approx(theirs.distinct, abs=shared)


def test_extrapolation_needs_the_same_kernels():
    one, _ = count_ours(Shape(1, 64, 16), torch.float16)
    with pytest.raises(ValueError, match="the same kernels at batches 1 and 2"):
        extrapolate(one, one._replace(launches=one.launches[:1]), 8)


@pytest.mark.parametrize("shape", [Shape(1, 784, 56), Shape(1, 900, 72)])
def test_a_forward_moves_little_more_than_two_passes(shape):
    """At most 1.15 x (2 x + out + weights), in two launches, from 12 E tokens."""
    attention = AdditiveAttention(shape.width, shape.width, 1, backend="triton").half()
    with trace() as launches, torch.no_grad():
        attention(torch.randn(shape).half())
    assert len(launches) <= 2
    two_passes = minimum_bytes(shape, torch.float16, backward=False, passes=2)
    assert sum(launch.distinct for launch in launches) <= 1.15 * two_passes


def test_forward_and_backward_are_six_launches_and_gemms_on_weights():
    width = 24
    parts = count_ours(Shape(2, 67, width), torch.float16)
    operators = [operator for part in parts for operator in part.operators]
    others = [operator for operator in operators if not operator.is_matmul]
    assert sum(len(part.launches) for part in parts) + len(others) <= 6
    for operator in operators:
        assert all(max(shape) <= width for shape in operator.shapes), operator


@pytest.mark.parametrize(
    ("layer", "side"), [("encoder", 9), ("convolution", 9), ("mlp", 4), ("mlp", 15)]
)
def test_the_kernels_of_a_block_touch_their_tensors_once(layer, side, monkeypatch):
    """What `benchmarks.gpu.blocks` counts: the bytes of a launch are those of its tensors."""
    tensors: list[Tensor] = []
    launch = KernelLaunch.__call__

    def recording(self: KernelLaunch, *pointers: Tensor | None) -> None:
        tensors.extend(t for t in pointers if t is not None)
        launch(self, *pointers)

    monkeypatch.setattr(KernelLaunch, "__call__", recording)
    x = torch.zeros(2, side, side, 24, dtype=torch.float16).movedim(-1, 1)
    with trace() as launches:
        if layer == "convolution":
            step = Convolution(x.new_zeros(40, 24, 3, 3), x.new_zeros(40))
            ConvolutionPlan(x, step)(x, pack(step), None, None)
        else:
            encoder = layer == "encoder"
            backward = calls.block(x, 48, 3 if encoder else None, infer=encoder)
            if not encoder:
                backward()
    expected = {("encoder", 9): 1, ("convolution", 9): 1, ("mlp", 4): 3, ("mlp", 15): 4}
    assert len(launches) == expected[layer, side]
    given = sum(t.nbytes for t in tensors)
    assert given <= sum(one.distinct for one in launches) <= given + SECTOR * len(tensors)
