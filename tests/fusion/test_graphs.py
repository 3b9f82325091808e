"""CUDA graphs of fused networks, with CUDA faked: what is captured, when, and when not."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swiftkernels import fuse_for_inference
from swiftkernels.fusion import fuse, graphs
from swiftkernels.fusion.chain import FusedChain
from swiftkernels.fusion.network import FusedNetwork, FusionReport
from tests.fusion import networks
from tests.fusion.fake_cuda import FakeCuda, Stream, install
from tests.fusion.test_chain import whole


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install(monkeypatch)


class Dense(nn.Module):
    """Another form of output, made from a feature map."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.chain = FusedChain(whole()[:2])
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.chain(x))


def network(form: Callable[[Tensor], Any] | None = None) -> FusedNetwork:
    """A small fused network with graphs: a classifier, or a `Dense`; all of it is plain PyTorch."""
    inner = FusedChain(whole()) if form is None else Dense(form)
    fused = FusedNetwork(inner, FusionReport((), ()), "x", whole=form is None, graph=True)
    return fused.requires_grad_(False).double()


def images(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (2, 3, 33, 41), generator=generator, dtype=torch.float64)


def notes(fused: FusedNetwork) -> dict[tuple[int, ...], str]:
    return {note.shape: note.reason for note in fused.report.graphs}


def capture(fused: FusedNetwork, *shape: int) -> Tensor:
    """Images whose shape has a graph now."""
    x = images(0, *shape)
    fused(x)
    fused(x)
    assert notes(fused)[tuple(x.shape)] == ""
    return x


def test_a_shape_that_repeats_is_captured_and_replayed(cuda: FakeCuda) -> None:
    fused = network()
    outs = []
    for call in range(5):
        outs.append(fused(images(call)))
        assert len(cuda.graphs) == min(call, 1)
        assert cuda.replays == call
        expected = [graphs.ONCE] if call == 0 else [""]
        assert list(notes(fused).values()) == expected
    for call, out in enumerate(outs):  # later calls have not overwritten them
        torch.testing.assert_close(out, fused.plain(images(call)))
    strides = [3 * 33 * 41, 33 * 41, 41, 1]
    assert f"[2, 3, 33, 41], strides {strides}: captured" in str(fused.report)


def test_every_shape_and_memory_format_has_its_graph_in_one_pool(cuda: FakeCuda) -> None:
    fused = network()
    others = [images(0), images(1, 1, 3, 33, 41), images(2, 2, 3, 29, 31)]
    others.append(images(3).contiguous(memory_format=torch.channels_last))
    for _ in range(3):
        for x in others:
            torch.testing.assert_close(fused(x), fused.plain(x))
    assert len(cuda.graphs) == len(others)
    assert [note.strides for note in fused.report.graphs] == [x.stride() for x in others]
    assert len(set(cuda.pools)) == 1
    assert cuda.replays == 2 * len(others)


def test_outputs_of_any_structure_are_copied(cuda: FakeCuda) -> None:
    forms: list[Callable[[Tensor], Any]] = [
        lambda out: [out, (out.mean((2, 3)), None)],
        lambda out: {"map": out, "scale": 4, "same": out},
    ]
    for form in forms:
        fused = network(form)
        first = [fused(images(0)) for _ in range(2)][1]
        fused(images(1))
        expected = fused.plain(images(0))
        assert type(first) is type(expected)
        torch.testing.assert_close(first, expected)


def test_other_outputs_have_no_graph(cuda: FakeCuda) -> None:
    fused = network(lambda out: {"map": out, "set": frozenset([1])})
    for _ in range(3):
        assert fused(images(0))["set"] == {1}
    assert notes(fused)[2, 3, 33, 41] == (
        "the capture failed (TypeError: the network returns a frozenset)"
    )
    assert cuda.replays == 0


def change_in_place(fused: FusedNetwork) -> None:
    next(iter(fused.network.buffers())).mul_(1.5)


def load(fused: FusedNetwork) -> None:
    fused.load_state_dict({name: 0.5 * t for name, t in fused.state_dict().items()})


def replace(fused: FusedNetwork) -> None:
    (chain,) = fused._chains
    chain.stem0_bias1 = chain.stem0_bias1 + 1


def through_another_type(fused: FusedNetwork) -> None:
    fused.float().double()


def settings(fused: FusedNetwork) -> None:
    torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("change", [change_in_place, load, replace, through_another_type, settings])
@pytest.mark.parametrize("form", [None, lambda out: [out]], ids=["whole", "in parts"])
def test_graphs_are_dropped_when_weights_or_settings_change(
    cuda: FakeCuda, change: Callable[[FusedNetwork], None], form: Any
) -> None:
    fused = network(form)
    x = capture(fused)
    before = cuda.replays
    try:
        change(fused)
        for call in range(3):
            torch.testing.assert_close(fused(x), fused.plain(x))
            assert cuda.replays == before + call
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(cuda.graphs) == 2
    assert any(what == "synchronize" for what, *_ in cuda.log)  # no call was running any more


def test_moving_frees_the_graphs_at_once(cuda: FakeCuda) -> None:
    fused = network()
    capture(fused)
    assert fused._graphs is not None
    fused.to(torch.float32)
    assert not fused._graphs._memory
    assert notes(fused) == {}
    x = images(0)
    fused.to(torch.float64)
    for _ in range(3):
        torch.testing.assert_close(fused(x), fused.plain(x))
    assert notes(fused) == {(2, 3, 33, 41): ""}
    fused.release_graphs()
    assert notes(fused) == {}
    torch.testing.assert_close(fused(x), fused.plain(x))
    assert notes(fused) == {(2, 3, 33, 41): graphs.ONCE}


def saved_and_loaded(fused: FusedNetwork) -> FusedNetwork:
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded: FusedNetwork = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda fused: pickle.loads(pickle.dumps(fused)), saved_and_loaded],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies_make_graphs_of_their_own(
    cuda: FakeCuda, copied: Callable[[FusedNetwork], FusedNetwork]
) -> None:
    fused = network()
    x = capture(fused)
    other = copied(fused)
    assert notes(other) == {}
    change_in_place(other)
    capture(other)
    assert len(cuda.graphs) == 2
    torch.testing.assert_close(other(x), other.plain(x))
    torch.testing.assert_close(fused(x), fused.plain(x))
    assert not torch.equal(other(x), fused(x))
    assert notes(fused) == {(2, 3, 33, 41): ""}


def test_calls_that_are_errors_stay_errors(cuda: FakeCuda) -> None:
    fused = network()
    x = capture(fused)
    with pytest.raises(ValueError, match="must not require a gradient"):
        fused(x.clone().requires_grad_())
    with pytest.raises(TypeError, match="must have the dtype of the weights"):
        fused(x.float())
    with pytest.raises(ValueError, match="device"):
        fused(x.to("meta"))
    with pytest.raises(ValueError, match="evaluation mode"):
        fused.train()(x)


def test_autocast_runs_without_a_graph(cuda: FakeCuda) -> None:
    fused = network()
    x, other = capture(fused), images(0, 1, 3, 32, 32)
    before = cuda.replays
    with torch.autocast("cpu", torch.bfloat16):
        fused(x)
        fused(other)
    assert cuda.replays == before
    # What the report says of a shape with a graph stays.
    assert notes(fused) == {(2, 3, 33, 41): "", (1, 3, 32, 32): "autocast is on"}


def test_the_capture_of_another_graph_contains_the_kernels(cuda: FakeCuda) -> None:
    fused = network()
    x = capture(fused)
    before = cuda.replays
    cuda.outer_capture = True
    torch.testing.assert_close(fused(x), fused.plain(x))
    assert cuda.replays == before


def test_hooks_are_called(cuda: FakeCuda) -> None:
    fused = network(lambda out: [out])
    x = capture(fused)
    before, seen = cuda.replays, []
    hook = fused.network.register_forward_hook(lambda *_: seen.append("own"))
    fused(x)
    hook.remove()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: seen.append("global"))
    fused(x)
    hook.remove()
    assert seen[0] == "own"
    assert "global" in seen
    assert cuda.replays == before
    fused(x)
    assert cuda.replays == before + 1


def test_what_has_to_see_operators_does(cuda: FakeCuda, fresh_compiler: None) -> None:
    fused = network()
    x = capture(fused)
    before, expected = cuda.replays, fused.plain(x)
    torch.testing.assert_close(torch.func.vmap(fused)(x[None])[0], expected)
    torch.testing.assert_close(torch.jit.trace(fused, x, check_trace=False)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(fused)(x), expected)
    torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), expected)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    replica = copy.copy(fused)
    replica._is_replica = True
    torch.testing.assert_close(replica(x), expected)
    assert fused(x[:0]).shape == (0, 5)
    assert cuda.replays == before


def test_the_number_of_graphs_is_bounded(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    fused = network()
    sizes = [(1, 3, 32, 32 + i) for i in range(3)]
    for size in sizes[:2]:
        capture(fused, *size)
    for _ in range(3):
        x = images(0, *sizes[2])
        torch.testing.assert_close(fused(x), fused.plain(x))
    assert notes(fused) == {
        sizes[0]: "", sizes[1]: "",
        sizes[2]: "2 others are captured; release_graphs() drops them",
    }  # fmt: skip
    assert len(cuda.graphs) == 2


def test_many_shapes_that_come_once_are_forgotten(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MAX_SHAPES", 4)
    fused = network()
    capture(fused, 1, 3, 32, 32)
    for width in range(33, 40):
        fused(images(0, 1, 3, 32, width))
    assert len(notes(fused)) <= 4
    assert notes(fused)[1, 3, 32, 32] == ""


def test_a_capture_that_fails_is_reported_and_not_tried_again(cuda: FakeCuda) -> None:
    failing = True

    def form(out: Tensor) -> Tensor:
        if failing and cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return out + 0

    fused = network(form)
    for _ in range(3):
        torch.testing.assert_close(fused(images(0)), fused.plain(images(0)))
        assert cuda.current_stream() is cuda.default
    reason = "the capture failed (RuntimeError: operation not permitted when stream is capturing)"
    assert notes(fused) == {(2, 3, 33, 41): reason}
    assert reason in str(fused.report)
    assert cuda.graphs == []
    failing = False  # other shapes may be captured, in another pool
    capture(fused, 1, 3, 32, 32)
    assert cuda.pools == [2]


def test_calls_wait_for_the_one_before_in_any_stream(cuda: FakeCuda) -> None:
    fused = network()
    x = capture(fused)
    streams = [Stream(cuda), Stream(cuda)]
    start = len(cuda.log)
    for stream in streams:
        with cuda.stream(stream):
            fused(x)
    steps = [(what, stream) for what, stream, _ in cuda.log[start:]]
    assert steps == [(what, s) for s in streams for what in ("wait", "replay", "record")]
    waited = {event for what, _, event in cuda.log[start:] if what in ("wait", "record")}
    assert len(waited) == 1


def test_a_capture_is_in_order_with_the_stream_of_the_call(cuda: FakeCuda) -> None:
    fused, stream = network(), Stream(cuda)
    with cuda.stream(stream):
        capture(fused)
    side = cuda.log[0][1]
    assert side not in (stream, cuda.default)
    assert cuda.log[:2] == [("wait_stream", side, stream), ("wait_stream", stream, side)]
    assert [what for what, *_ in cuda.log[2:]] == ["wait", "replay", "record"]


def test_threads(cuda: FakeCuda) -> None:
    fused = network()
    capture(fused)
    wrong: list[BaseException] = []

    def call(seed: int) -> None:
        try:
            for size in ((2, 3, 33, 41), (1, 3, 32, 32)):
                for _ in range(5):
                    x = images(seed, *size)
                    torch.testing.assert_close(fused(x), fused.plain(x))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(cuda.graphs) == 2


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode(cuda: FakeCuda, first: bool) -> None:
    """A graph that was captured in inference mode answers calls outside of it, and vice versa."""
    fused = network()
    with torch.inference_mode(first):
        x = capture(fused)
    for mode in (first, not first, first):
        with torch.inference_mode(mode):
            y = images(4)
            out = fused(y)
            torch.testing.assert_close(out, fused.plain(y))
            assert out.is_inference() is mode
            assert not out.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(fused(x), fused.plain(x))
    assert len(cuda.graphs) == 1


def test_fuse_for_inference_makes_them(cuda: FakeCuda) -> None:
    model = networks.prepared(networks.ours()).double()
    fused = fuse_for_inference(model, graph=True)
    x = capture(fused, 1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
    assert cuda.replays == 1 + 1
    assert "CUDA graphs:\n  [1, 3, 32, 32], strides [3072, 1024, 32, 1]: captured" in str(
        fused.report
    )
    assert fuse_for_inference(model).report.graphs == ()


def test_a_network_that_was_moved_from_the_gpu_runs_without(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = network()
    capture(fused)
    monkeypatch.undo()
    torch.testing.assert_close(fused(images(0)), fused.plain(images(0)))
    fused(images(0, 1, 3, 32, 32))
    assert notes(fused)[1, 3, 32, 32] == "CUDA graphs need a CUDA device; got cpu"


def test_graphs_need_a_model_on_a_gpu() -> None:
    model = networks.prepared(networks.ours())
    with pytest.raises(
        ValueError, match=r"graph=True needs a model on one CUDA device; got one on cpu\. Move"
    ):
        fuse_for_inference(model, graph=True)
    with pytest.raises(TypeError, match="graph must be True, False or None; got 8"):
        fuse_for_inference(model, graph=8)  # type: ignore[arg-type]


def test_graphs_need_a_model_on_one_device(cuda: FakeCuda) -> None:
    parts = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="one CUDA device; got one on cpu, meta"):
        fuse._check_graph(parts, True)
    assert not fuse._check_graph(parts, None)


def test_graphs_are_the_default_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(2, 2)
    assert not fuse._check_graph(layer, None)
    monkeypatch.setattr(fuse.torch_state, "why_not_graphs", lambda device: "")
    assert fuse._check_graph(layer, None)
    assert not fuse._check_graph(layer, False)
