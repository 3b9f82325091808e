"""Where and when the kernels run: on the device of their input, in its stream, in graphs."""

from __future__ import annotations

import pytest
import torch

from swiftkernels.testing.timing import capture
from swiftkernels.testing.tolerance import budget, relative_error
from tests.gpu.layers import make_layer, random_images, train

WIDTHS = (48, 112, 320)
"""Fused, projecting, and with a GEMM before."""

widths = pytest.mark.parametrize("width", WIDTHS)


@widths
def test_it_runs_on_the_device_of_its_input(gpu, other_gpu, width):
    """Which is not the current device, and does not become it."""
    module = torch.get_device_module(gpu)
    expected = train(
        make_layer(width, torch.float16, gpu), random_images(width, torch.float16, gpu)
    )
    layer = make_layer(width, torch.float16, other_gpu)
    x = random_images(width, torch.float16, other_gpu)
    module.set_device(gpu)
    found = train(layer, x)
    assert module.current_device() == gpu.index
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device == other_gpu
        # Two GPUs may be of different kinds, which sum in different orders.
        assert relative_error(ours.to(gpu), theirs) <= budget(0.0, torch.float16)


def test_two_devices_in_turn(gpu, other_gpu):
    layers = {d: make_layer(48, torch.float16, d) for d in (gpu, other_gpu)}
    inputs = {d: random_images(48, torch.float16, d) for d in layers}
    first = {d: train(layers[d], inputs[d]) for d in layers}
    for _ in range(3):
        again = {d: train(layers[d], inputs[d]) for d in layers}
        for d in layers:
            for ours, theirs in zip(again[d], first[d], strict=True):
                assert torch.equal(ours, theirs)


def test_weights_on_another_device_are_refused(gpu, other_gpu):
    layer = make_layer(48, torch.float16, other_gpu)
    with pytest.raises(ValueError, match="must be on the device of x"):
        layer(random_images(48, torch.float16, gpu))


@widths
def test_it_runs_in_the_current_stream(gpu, width):
    """After what was put there before: in another stream it would read NaN."""
    module = torch.get_device_module(gpu)
    layer = make_layer(width, torch.float16, gpu)
    values = random_images(width, torch.float16, gpu)
    expected = train(layer, values)  # compiled now, so that the launches below are fast
    x = torch.full_like(values, torch.nan)
    work = torch.randn(4096, 4096, device=gpu)
    module.synchronize(gpu)
    stream = module.Stream(gpu)
    with module.stream(stream):
        for _ in range(20):
            work = (work @ work).clamp(-1, 1)
        x.copy_(values)
        found = train(layer, x)
    stream.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@widths
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_graph_replays_on_new_inputs(cuda, width, backward):
    layer = make_layer(width, torch.float16, cuda)
    x = random_images(width, torch.float16, cuda)

    def call() -> list[torch.Tensor]:
        if backward:
            return train(layer, x)
        with torch.no_grad():
            return [layer(x)]

    torch.cuda.set_device(cuda)
    replay = capture(call)
    for seed in (2, 3):
        x.copy_(random_images(width, torch.float16, cuda, seed=seed))
        replayed = [t.clone() for t in replay()]
        for ours, theirs in zip(replayed, call(), strict=True):
            assert torch.equal(ours, theirs)
