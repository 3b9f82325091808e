"""`accelerate` on convolutional blocks: which are found, what they compute, and what stays."""

from __future__ import annotations

import copy
import pickle
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from swiftkernels import accelerate, doctor, fuse_for_inference
from swiftkernels.backends.cpu import library
from swiftkernels.models import swiftformer_xs
from swiftkernels.ops.conv_mlp.layer import ConvMlpForward
from swiftkernels.testing.tolerance import assert_as_good_as_eager, relative_error
from tests.integrations.test_accelerate import randn, results

needs_kernels = pytest.mark.skipif(bool(library.why_not()), reason="no compiled kernels")


class StochasticDepth(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return x * (torch.rand(len(x), 1, 1, 1) >= self.rate) / (1 - self.rate)


class Block(nn.Module):
    """A block with names of its own."""

    def __init__(self, width: int = 6, rate: float = 0.0, activation: Any = nn.GELU) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.bn = nn.BatchNorm2d(width)
        self.squeeze = nn.Conv2d(2 * width, width, 1)  # registered in another order
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.nonlinear = activation()
        self.gain = nn.Parameter(torch.full((width, 1, 1), 0.5))
        self.depth = StochasticDepth(rate)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.nonlinear(self.expand(self.bn(self.spatial(x))))
        return x + self.depth(self.gain * self.squeeze(hidden))


class Functional(nn.Module):
    """No BatchNorm, depthwise convolution, scale or residual, and an activation as a function."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, 9, 1), nn.Conv2d(9, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.silu(self.a(x)))


def reasons(model: nn.Module) -> dict[str, str]:
    return {block.name: block.reason for block in accelerate(copy.deepcopy(model)).blocks}


@needs_kernels
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [Block, lambda: Block(rate=0.4), Functional, lambda: Block(1)])
def test_blocks_are_found_whatever_their_names(make: Callable[[], nn.Module], training) -> None:
    block, x = make().train(training), randn(3, 6, 7, 5)
    if isinstance(block, Block):
        x = x[:, : block.bn.num_features]
    exact, eager = results(block, x, torch.float64), results(block, x)
    done = accelerate(block)
    assert [found.reason for found in done.blocks] == [""]
    assert isinstance(block, ConvMlpForward)
    for name, t in results(block, x).items():
        if name == "spatial.bias" and training:  # 0 but for rounding, because a BatchNorm follows
            continue
        assert_as_good_as_eager(t, eager[name], exact[name], ulps=16, name=name)
    done.undo()
    assert not isinstance(block, ConvMlpForward)
    for name, t in results(block, x).items():
        assert torch.equal(t, eager[name]), name


def with_sigmoid(block: Any) -> None:
    block.nonlinear = nn.Sigmoid()


def with_dropout(block: Any) -> None:
    block.nonlinear = nn.Sequential(nn.GELU(), nn.Dropout(0.5))


def with_groups(block: Any) -> None:
    block.expand = nn.Conv2d(6, 12, 1, groups=2)


def with_adapter(block: Any) -> None:
    block.expand = nn.Sequential(block.expand, nn.Conv2d(12, 12, 1))


def with_hook(block: Any) -> None:
    block.squeeze.register_forward_hook(lambda *_: None)


def with_parametrization(block: Any) -> None:
    weight_norm(block.squeeze)


def with_subclass(block: Any) -> None:
    class Quantised(nn.Conv2d):
        pass

    block.expand.__class__ = Quantised


def with_replaced_forward(block: Any) -> None:
    block.forward = lambda x: x


def on_meta(block: Any) -> None:
    block.to("meta")


def with_an_attribute_of_ours(block: Any) -> None:
    block.compose = "of the fork"


def with_a_norm_behind(block: Any) -> None:
    block.__class__ = NormBehind


class NormBehind(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.squeeze(self.nonlinear(self.expand(self.spatial(x)))) + self.bn(x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_sigmoid, "nonlinear is a Sigmoid, not one of relu, gelu"),
        (with_dropout, "in training is another: a dropout"),
        (with_groups, "expand has .* 2 groups"),
        (with_adapter, "3 pointwise convolutions; two are supported, without adapters"),
        (with_hook, "squeeze cannot be read, because it has hooks"),
        (with_parametrization, "squeeze cannot be read, because it is a ParametrizedConv2d"),
        (with_subclass, "expand cannot be read, because it is a Quantised"),
        (with_replaced_forward, "its forward was replaced"),
        (on_meta, "no values yet"),
        (with_an_attribute_of_ours, "its own compose would be overwritten"),
        (with_a_norm_behind, "no arrangement of its parts"),
    ],
)
def test_other_blocks_are_left_alone_by_name(change: Callable[[Any], None], words: str) -> None:
    model = nn.Sequential(Block(), Block())
    change(model[1])
    kind, before = type(model[1]), dict(vars(model[1]))
    done = accelerate(model)
    assert [found.name for found in done.blocks] == ["0", "1"]
    assert done.blocks[0].form is not None
    assert done.blocks[1].form is None
    assert re.search(words, done.blocks[1].reason), done.blocks[1].reason
    assert type(model[1]) is kind
    assert vars(model[1]).keys() == before.keys()


def test_shared_weights_are_left_alone() -> None:
    model = nn.Sequential(Block(), Block(), Block())
    model[1].expand.weight = model[0].expand.weight
    found = reasons(model)
    assert "shares its weight" in found["0"]
    assert "shares its weight" in found["1"]
    assert found["2"] == ""


def test_a_block_that_is_held_twice_is_one_block() -> None:
    block = Block()
    assert reasons(nn.Sequential(block, block)) == {"0": ""}


def test_a_model_without_blocks_raises() -> None:
    with pytest.raises(ValueError, match=r"must hold additive attentions, or blocks with a pointw"):
        accelerate(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1)))


def test_blocks_without_the_backend_are_left_alone() -> None:
    done = accelerate(Block(), backend="reference")
    assert [found.reason for found in done.blocks] == ["blocks have no backend 'reference'"]


def calls_parts(block: Any, x: Tensor) -> bool:
    """Whether the block's own code runs."""
    with mock.patch.object(type(block), "_call_parts", return_value=x) as parts:
        block(x)
    return bool(parts.called)


LATER: dict[str, Callable[[Any], None]] = {
    "hook": with_hook,
    "adapter": with_adapter,
    "parametrization": with_parametrization,
    "another activation": lambda b: setattr(b, "nonlinear", nn.ReLU()),
    "an option of the activation": lambda b: setattr(b.nonlinear, "approximate", "tanh"),
    "a hook on the activation": lambda b: b.nonlinear.register_forward_hook(lambda *_: None),
    "another rate": lambda b: setattr(b.depth, "rate", 0.5),
    "another module": lambda b: setattr(b, "depth", nn.Dropout(0.5)),
}


@needs_kernels
@pytest.mark.parametrize("change", LATER)
def test_what_changes_later_is_noticed(change: str) -> None:
    block, x = Block().train(), randn(3, 6, 7, 5)
    expected = copy.deepcopy(block)
    accelerate(block)
    assert not calls_parts(block, x)
    assert doctor(block).blocks[0].reason == ""
    for b in (block, expected):
        torch.manual_seed(0)
        LATER[change](b)
    assert calls_parts(block, x)
    assert "is called, because it" in doctor(block).blocks[0].reason
    torch.manual_seed(0)
    out = block(x)
    torch.manual_seed(0)
    torch.testing.assert_close(out, expected(x))


@needs_kernels
def test_copies_and_pickles_are_accelerated() -> None:
    model, x = nn.Sequential(Block(), Functional()).eval(), randn(2, 6, 7, 5)
    accelerate(model)
    with torch.no_grad():
        out = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert isinstance(twin[0], ConvMlpForward)
            assert torch.equal(twin(x), out)


@needs_kernels
@pytest.mark.parametrize("training", [True, False])
def test_autocast(training: bool) -> None:
    block, x = Block().train(training), randn(2, 6, 7, 5)
    eager = results(block, x)
    with torch.autocast("cpu", torch.bfloat16):
        accelerate(block)
        out = block(x)
    assert out.dtype == torch.float32  # x + branch
    torch.testing.assert_close(out, eager["output"], rtol=3e-2, atol=3e-2)


@needs_kernels
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_train() -> None:
    block, x = Block().train(), randn(2, 6, 7, 5)
    accelerate(block)
    expected = results(block, x)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    compiled(leaf).square().sum().backward()
    torch.testing.assert_close(leaf.grad, expected["x"])
    for name, p in block.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


@needs_kernels
def test_checkpointed_blocks_train() -> None:
    block, x = Block().eval(), randn(2, 6, 7, 5)
    accelerate(block)
    expected = results(block, x)
    leaf = x.clone().requires_grad_()
    out = checkpoint(block, leaf, use_reentrant=False)
    assert isinstance(out, Tensor)
    out.square().sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, expected["x"])


DISTRIBUTED = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.integrations.test_accelerate_blocks import Block, randn
from swiftkernels import accelerate
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
torch.manual_seed(0)
block = Block().eval()
accelerate(block)
parallel = DistributedDataParallel(block)
parallel(randn(4, 6, 7, 5)[2 * rank : 2 * rank + 2]).square().sum().backward()
torch.save([p.grad for p in block.parameters()], f"{folder}/{rank}.pth")
dist.destroy_process_group()
"""


@needs_kernels
def test_two_processes_average_the_gradients(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DISTRIBUTED]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    torch.manual_seed(0)
    expected = results(Block().eval(), randn(4, 6, 7, 5))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pth")
        for gradient, (name, _) in zip(found, Block().named_parameters(), strict=True):
            torch.testing.assert_close(2 * gradient, expected[name], rtol=1e-4, atol=1e-4)


@needs_kernels
def test_networks_of_others(timm: ModuleType, transformers: ModuleType) -> None:
    config = transformers.SwiftFormerConfig(depths=(1, 1, 2, 1), embed_dims=[8, 12, 16, 20])
    networks = {
        "timm": (timm.create_model("swiftformer_xs", drop_path_rate=0.1), 20),
        "transformers": (transformers.SwiftFormerForImageClassification(config), 9),
        "poolformer": (timm.create_model("poolformer_s12"), 12),
        "fastvit": (timm.create_model("fastvit_t8"), 10),
        "ours": (swiftformer_xs(), 0),
    }
    for name, (network, count) in networks.items():
        found = accelerate(network).blocks
        assert sum(block.form is not None for block in found) == count, name
    assert {block.reason for block in found} == {"it has these kernels"}


@needs_kernels
def test_accelerated_networks_can_be_fused(timm: ModuleType) -> None:
    model = timm.create_model("swiftformer_xs", num_classes=3).eval()
    x = randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        accelerate(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        fused = fuse_for_inference(model)
        assert not fused.report.left
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)


SIZES = [
    (2, 64, 64),
    pytest.param((1, 224, 224), marks=pytest.mark.slow),
    pytest.param((1, 225, 257), marks=pytest.mark.slow),
]


@needs_kernels
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", SIZES)
def test_all_gradients_of_a_network(timm: ModuleType, size: Any, memory_format: Any) -> None:
    """For all parameters of XS, on average at most twice the error of eager.

    Those of a single small parameter scatter: errors of the layers behind it have one sign in all
    its numbers. The sums of PyTorch's BatchNorm are less accurate in channels_last memory format,
    which the blocks return. In training, biases before a BatchNorm have gradients of rounding only,
    so the network is in evaluation mode.
    """
    torch.manual_seed(0)
    model = timm.create_model("swiftformer_xs", num_classes=10).eval()
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if "gamma" in name or "running_var" in name:
                t.uniform_(0.5, 1.5)
    batch, height, width = size
    x = randn(batch, 3, height, width)
    exact, eager = results(model, x, torch.float64), results(model, x)
    accelerate(model)
    model.to(memory_format=memory_format)
    ours = results(model, x.contiguous(memory_format=memory_format))
    ratios = []
    for name, t in ours.items():
        assert_as_good_as_eager(t, eager[name], exact[name], ulps=64, name=name)
        errors = relative_error(t, exact[name]), relative_error(eager[name], exact[name])
        ratios.append(max(errors[0], 1e-9) / max(errors[1], 1e-9))
    assert statistics.geometric_mean(ratios) <= 2
