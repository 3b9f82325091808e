"""Fused networks on a real GPU: as right as eager, and the same by CUDA graphs."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

from swiftkernels import fuse_for_inference
from swiftkernels.fusion.chain import FusedChain
from swiftkernels.fusion.network import FusedNetwork, FusionReport
from swiftkernels.models import swiftformer_l3, swiftformer_xs
from swiftkernels.testing.tolerance import assert_as_good_as_eager, budget, relative_error
from swiftkernels.tools.verify import DTYPES
from tests.fusion import networks
from tests.fusion.test_chain import whole


def model_of(size: str) -> nn.Module:
    """With random statistics and scales, the same at every call."""
    make = {"xs": swiftformer_xs, "l3": swiftformer_l3}[size]
    return networks.prepared(make(num_classes=10))


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fused_on(
    device: torch.device, dtype: torch.dtype = torch.float16, size: str = "xs", graph: bool = True
) -> FusedNetwork:
    return fuse_for_inference(model_of(size).to(device, dtype), graph=graph)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 225, 257), (8, 3, 224, 224)])
@pytest.mark.parametrize("size", ["xs", "l3"])
def test_they_are_as_right_as_eager(gpu, size, shape, dtype):
    model, x = model_of(size).to(gpu, dtype), images(*shape).to(gpu, dtype)
    fused, eager = fuse_for_inference(model), model(x)
    exact = model.double()(x.double())
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        for _ in range(2):  # the second call launches by address
            assert_as_good_as_eager(fused(given), eager, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_gives_what_the_launches_give(cuda, dtype):
    """But for roundings: PyTorch's libraries may choose other algorithms in a graph."""
    fused = fused_on(cuda, dtype)
    plain = fused_on(cuda, dtype, graph=False)
    outs = []
    for shape in [(4, 3, 224, 224), (1, 3, 96, 64)]:
        for seed in range(4):
            x = images(*shape, seed=seed).to(cuda, dtype)
            outs.append((fused(x), plain(x)))
    for ours, expected in outs:  # later calls have not overwritten them
        assert relative_error(ours, expected) <= budget(0.0, dtype, ulps=16)
    assert [note.reason for note in fused.report.graphs] == ["", ""]


def test_graphs_follow_the_weights(cuda):
    fused, x = fused_on(cuda), images(2, 3, 64, 64).to(cuda, torch.float16)
    before = [fused(x) for _ in range(3)][-1]
    fused.load_state_dict({name: 0.5 * t for name, t in fused.state_dict().items()})
    after = [fused(x) for _ in range(3)]
    assert not torch.equal(after[0], before)
    assert torch.equal(after[0], after[2])
    fused.float()
    x = x.float()
    after = [fused(x) for _ in range(3)]
    assert after[2].dtype == torch.float32
    assert torch.equal(after[0], after[2])
    copied = copy.deepcopy(fused)
    assert copied.report.graphs == ()
    assert torch.equal([copied(x) for _ in range(3)][-1], after[2])


def test_graphs_in_streams_and_threads(cuda):
    """Each stream writes its images late: a replay in another order would read others."""
    fused = fused_on(cuda)
    inputs = [images(2, 3, 64, 64, seed=seed).to(cuda, torch.float16) for seed in range(4)]
    expected = [fused(x) for x in inputs]
    torch.cuda.synchronize(cuda)
    found: dict[int, Tensor] = {}

    def call(number: int) -> None:
        stream = torch.cuda.Stream(cuda)
        with torch.cuda.stream(stream), torch.no_grad():
            work = torch.randn(2048, 2048, device=cuda)
            for _ in range(5):
                x = torch.full_like(inputs[number], torch.nan)
                for _ in range(10):
                    work = (work @ work).clamp(-1, 1)
                x.copy_(inputs[number])
                out = fused(x)
            stream.synchronize()
        found[number] = out

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, out in enumerate(expected):
        assert torch.equal(found[number], out)


@pytest.mark.parametrize("first", [True, False])
def test_graphs_in_inference_mode(cuda, first):
    fused, x = fused_on(cuda), images(2, 3, 64, 64).to(cuda, torch.float16)
    expected = fused(x)
    with torch.inference_mode(first):
        fused(x)
    for mode in (True, False):
        with torch.inference_mode(mode):
            out = fused(x)
            assert out.is_inference() is mode
            assert torch.equal(out, expected)


def test_a_graph_on_a_device_that_is_not_the_current_one(cuda, other_gpu):
    torch.cuda.set_device(cuda)
    fused, x = fused_on(other_gpu), images(2, 3, 64, 64).to(other_gpu, torch.float16)
    outs = [fused(x) for _ in range(3)]
    assert torch.cuda.current_device() == cuda.index
    assert outs[2].device == other_gpu
    assert torch.equal(outs[0], outs[2])
    moved, y = fused.to(cuda), x.to(cuda)
    outs = [moved(y) for _ in range(3)]
    assert torch.equal(outs[0], outs[2])


def test_a_capture_that_fails_does_no_harm(cuda):
    """A network that waits for the GPU cannot be captured."""

    class Waits(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            return out if out.isfinite().all().item() else out + 1

    chain = FusedChain(whole()).to(cuda)
    waits = FusedNetwork(Waits(chain), FusionReport((), ()), "x", graph=True)
    x, stream = images(2, 3, 64, 64).to(cuda), torch.cuda.current_stream(cuda)
    expected = chain(x)
    for _ in range(3):
        assert torch.equal(waits(x), expected)
        assert torch.cuda.current_stream(cuda) == stream
    (note,) = waits.report.graphs
    assert note.reason.startswith("the capture failed")
    fused, x = fused_on(cuda), x.half()
    outs = [fused(x) for _ in range(3)]
    assert torch.equal(outs[2], outs[0])
    assert [note.reason for note in fused.report.graphs] == [""]


def test_a_network_in_the_graph_of_its_user(cuda):
    fused, x = fused_on(cuda), images(2, 3, 64, 64).to(cuda, torch.float16)
    expected = [fused(x) for _ in range(3)][-1]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_device(cuda)
    with torch.cuda.graph(graph):
        out = fused(x)
    graph.replay()
    assert torch.equal(out, expected)
