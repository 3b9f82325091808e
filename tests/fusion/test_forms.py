"""Blocks of other networks: their steps, and what is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels import fuse_for_inference
from swiftkernels.backends.cpu import library
from swiftkernels.fusion import cpu, find
from swiftkernels.fusion import steps as of
from swiftkernels.fusion.chain import FusedChain, Slot
from swiftkernels.testing.tolerance import assert_as_good_as_eager
from tests.fusion import networks

DIM = 6


def normed(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))


def pointwise(inputs: int, outputs: int, **options: Any) -> nn.Sequential:
    return normed(nn.Conv2d(inputs, outputs, 1, bias=False, **options))


def depthwise(dim: int, kernel: int = 3, stride: int = 1, outputs: int = 0) -> nn.Sequential:
    conv = nn.Conv2d(dim, outputs or dim, kernel, stride, kernel // 2, groups=dim, bias=False)
    return normed(conv)


class Residual(nn.Module):
    """x + scale * inner(x)"""

    def __init__(self, *inner: nn.Module, scale: bool = False) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)
        self.scale = nn.Parameter(torch.ones(DIM, 1, 1)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return x + (out if self.scale is None else self.scale * out)


def mlp(act: nn.Module | None = None, hidden: int = 4 * DIM) -> nn.Sequential:
    act = nn.GELU() if act is None else act
    return nn.Sequential(pointwise(DIM, hidden), act, pointwise(hidden, DIM))


class Branches(nn.Module):
    """Convolutions and a BatchNorm side by side, as RepViT and FastViT are trained."""

    def __init__(self, act: nn.Module | None = None, stride: int = 1, outputs: int = DIM) -> None:
        super().__init__()
        self.large = depthwise(DIM, 7, stride, outputs)
        self.small = normed(nn.Conv2d(DIM, outputs, 3, stride, 1, groups=DIM))
        self.norm = nn.BatchNorm2d(DIM) if stride == 1 and outputs == DIM else None
        self.behind = nn.BatchNorm2d(outputs)
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.large(x) + self.small(x)
        return self.act(self.behind(out if self.norm is None else out + self.norm(x)))


class Dense(nn.Module):
    """Two dense convolutions side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = normed(nn.Conv2d(DIM, 8, 3, 2, 1)), pointwise(DIM, 8, stride=2)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.one(x) + self.other(x))


class SqueezeExcite(nn.Module):
    def __init__(self, gate: nn.Module, dim: int = DIM) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(dim, 4, 1), nn.Conv2d(4, dim, 1)
        self.act, self.gate = nn.ReLU(inplace=True), gate

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.second(self.act(self.first(mean))))


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) - x


class Partial(nn.Module):
    """A convolution of some channels; it chooses one of its forwards, as FasterNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.conv = DIM, nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.forward = self.forward_split

    def forward_split(self, x: Tensor) -> Tensor:
        first, others = x.split([2, DIM - 2], 1)
        return torch.cat([self.conv(first), others], 1)


class FasterNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spatial, self.mlp = Partial(), mlp(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.spatial(x))


class LastNorm(nn.Module):
    """ConvNeXt: LayerNorm and linear layers on [B, H, W, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.dw = nn.Conv2d(DIM, DIM, 7, padding=3, groups=DIM)
        self.norm = nn.LayerNorm(DIM, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(DIM, 24), nn.Linear(24, DIM)
        self.gamma = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.dw(x).permute(0, 2, 3, 1))
        out = self.gamma * self.fc2(F.gelu(self.fc1(out)))
        return x + out.permute(0, 3, 1, 2)


def inverted(act: nn.Module, *between: nn.Module, kernel: int = 3) -> nn.Module:
    inner = pointwise(DIM, 16), act, depthwise(16, kernel), act
    return Residual(*inner, *between, pointwise(16, DIM))


FORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BatchNorms behind both": (lambda: mlp(), "conv_mlp"),
    "residual and scale": (lambda: Residual(mlp(), scale=True), "conv_mlp"),
    "BatchNorm and depthwise in front": (
        lambda: Residual(depthwise(DIM, 7), mlp(nn.SiLU())), "conv_mlp"
    ),
    "RepViT": (
        lambda: nn.Sequential(Branches(), SqueezeExcite(nn.Sigmoid()), Residual(mlp())),
        "depthwise, squeeze_excite, conv_mlp",
    ),
    "branches and activation": (
        lambda: nn.Sequential(Branches(nn.GELU()), mlp()), "depthwise, conv_mlp"
    ),
    "strided branches with more outputs": (
        lambda: nn.Sequential(Branches(nn.GELU(), 2, 2 * DIM), pointwise(2 * DIM, DIM), mlp()),
        "depthwise, convolution, conv_mlp",
    ),
    "dense branches": (
        lambda: nn.Sequential(Dense(), depthwise(8), SqueezeExcite(nn.Hardsigmoid(), 8)),
        "convolution, depthwise, squeeze_excite",
    ),
    "residual depthwise": (lambda: nn.Sequential(Residual(depthwise(DIM)), mlp()),
                           "depthwise, conv_mlp"),
    "PoolFormer": (
        lambda: nn.Sequential(
            Residual(nn.GroupNorm(1, DIM), Pooling(), scale=True),
            Residual(nn.GroupNorm(1, DIM), nn.Conv2d(DIM, 9, 1), nn.GELU(), nn.Conv2d(9, DIM, 1)),
        ),
        "normalise, average, normalise, conv_mlp",
    ),
    "EfficientFormer": (
        lambda: nn.Sequential(Residual(Pooling(), scale=True), Residual(mlp(), scale=True)),
        "average, conv_mlp",
    ),
    "FasterNet": (FasterNet, "partial_convolution, conv_mlp"),
    "ConvNeXt": (LastNorm, "depthwise, normalise, conv_mlp"),
    "MobileNetV2": (
        lambda: inverted(nn.ReLU6(inplace=True)), "convolution, depthwise, convolution"
    ),
    "EfficientNet": (
        lambda: inverted(nn.SiLU(), SqueezeExcite(nn.Sigmoid(), 16), kernel=5),
        "convolution, depthwise, squeeze_excite, convolution",
    ),
    "embedding of patches": (
        lambda: nn.Sequential(nn.Conv2d(DIM, 8, 4, 4), nn.GroupNorm(1, 8), depthwise(8, 5, 2)),
        "convolution, normalise, depthwise",
    ),
    "three convolutions of stride 2": (
        lambda: nn.Sequential(
            normed(nn.Conv2d(DIM, 4, 3, 2, 1)), nn.GELU(), normed(nn.Conv2d(4, 8, 3, 2, 1)),
            nn.GELU(), normed(nn.Conv2d(8, 9, 3, 2, 1)),
        ),
        "stem, convolution",
    ),
}  # fmt: skip
"""Blocks, and the kinds of their steps."""


def prepared(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return networks.prepared(make())


def example(height: int = 40, width: int = 33) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randn(2, DIM, height, width, generator=generator)


def fused_of(model: nn.Module) -> Any:
    return fuse_for_inference(model, example=torch.randn(1, DIM, 32, 32))


@pytest.mark.parametrize("name", FORMS)
def test_blocks_become_steps_with_their_outputs(name):
    make, kinds = FORMS[name]
    model = prepared(make)
    fused = fused_of(model)
    (chain,) = (part for part in fused.modules() if isinstance(part, FusedChain))
    assert ", ".join(step.kind for step in chain.steps) == kinds
    assert fused.report.left == ()
    exact = copy.deepcopy(model).double()
    for size in ((40, 33), (32, 57)):
        x = example(*size)
        with torch.no_grad():
            expected = exact(x.double())
            out = fused_of(exact)(x.double())
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-10 * expected.abs().max())
            assert_as_good_as_eager(fused(x), model(x), expected, ulps=8)


@pytest.mark.skipif(bool(library.why_not()), reason="needs compiled kernels")
@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_results_depend_neither_on_threads_nor_on_the_batch(name):
    model = prepared(FORMS[name][0])
    chain = next(part for part in fused_of(model).modules() if isinstance(part, FusedChain))
    exact = copy.deepcopy(chain).double().steps
    before = torch.get_num_threads()
    try:
        for x in (example(40, 33), example(75, 58).contiguous(memory_format=torch.channels_last)):
            torch.set_num_threads(1)
            expected = torch.cat([cpu.run(chain.steps, image, Slot()) for image in x.split(1)])
            right = of.run(exact, x.double())
            torch.testing.assert_close(expected.double(), right, rtol=1e-4, atol=1e-5)
            for threads in (2, 3, 5):
                torch.set_num_threads(threads)
                assert torch.equal(cpu.run(chain.steps, x, Slot()), expected)
    finally:
        torch.set_num_threads(before)


def test_images_smaller_than_a_kernel_are_refused():
    model = prepared(lambda: nn.Sequential(nn.Conv2d(DIM, 8, 4, 4), depthwise(8), depthwise(8)))
    fused = fused_of(model)
    with pytest.raises((ValueError, RuntimeError), match=r"large enough|[Kk]ernel size"):
        fused(torch.randn(1, DIM, 3, 3))


class TwoUses(nn.Module):
    """One pointwise layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act, self.other = nn.Conv2d(DIM, DIM, 1), nn.GELU(), nn.Conv2d(DIM, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.other(self.act(self.layer(x))))


class Product(nn.Module):
    """StarNet's product of two pointwise layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = pointwise(DIM, 8), pointwise(DIM, 8)
        self.down = pointwise(8, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.one(x)) * self.two(x))


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another activation": (lambda: mlp(nn.Mish()), "its part 1 is a Mish"),
    "a clamp": (lambda: mlp(nn.Hardtanh(-2, 50)), "its part 1 is a Hardtanh"),
    "groups": (
        lambda: nn.Sequential(pointwise(DIM, 8, groups=2), nn.GELU(), pointwise(8, DIM)),
        "convolution of 1 x 1, stride 1, 2 groups",
    ),
    "shared": (TwoUses, "its part layer is called 2 times"),
    "a product": (Product, "called side by side"),
    "groups in a norm": (
        lambda: Residual(nn.GroupNorm(2, DIM), mlp()), "it belongs to no block of a known form"
    ),
}  # fmt: skip
"""Blocks that are left, and a part of the reason."""


@pytest.mark.parametrize("name", LEFT)
def test_other_blocks_are_left_with_a_reason(name):
    make, reason = LEFT[name]
    model = nn.Sequential(prepared(lambda: Residual(mlp())), prepared(make)).eval()
    clone = copy.deepcopy(model).double()
    find.randomise(clone)
    with torch.no_grad():
        found = find.find(model, clone)
    assert "1" not in {unit.names[0] for unit in found.units}
    fused = fused_of(model)
    with torch.no_grad():
        torch.testing.assert_close(fused(example()), model(example()), rtol=1e-4, atol=1e-5)
    assert "0" in {block.name for block in fused.report.fused}
    reasons = [block.reason for block in [*found.left, *fused.report.left]]
    assert any(reason in text for text in reasons), reasons


def test_poolings_that_count_zeros_outside_of_the_image_are_called():
    class Zeros(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AvgPool2d(3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(x) - x

    model = prepared(lambda: nn.Sequential(Residual(Zeros()), Residual(mlp())))
    fused = fused_of(model)
    assert [block.name for block in fused.report.fused] == ["1"]
    with torch.no_grad():
        torch.testing.assert_close(fused(example()), model(example()), rtol=1e-4, atol=1e-5)


def test_layers_with_hooks_are_left_by_name():
    model = prepared(lambda: nn.Sequential(Residual(mlp()), mlp()))
    model[1][0][0].register_forward_pre_hook(lambda *_: None)
    report = fused_of(model).report
    assert [block.name for block in report.fused] == ["0"]
    assert "1.0: Sequential, its part 0 has hooks" in str(report)


def test_dropout_in_training_is_refused():
    model = prepared(lambda: nn.Sequential(Residual(mlp()), nn.Dropout(0.5)))
    model[1].train()
    with pytest.raises(ValueError, match="evaluation mode"):
        fused_of(model)
    fused = fused_of(model.eval())
    assert [block.name for block in fused.report.fused] == ["0"]


def test_norms_outside_of_chains_are_folded():
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(DIM, DIM, 3, padding=1, groups=3, bias=False)
            self.norm = nn.BatchNorm2d(DIM)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(self.conv(x)))

    model = prepared(lambda: nn.Sequential(Residual(mlp()), Grouped(), Grouped()))
    model[2].norm.register_forward_hook(lambda *_: None)
    fused = fused_of(model)
    assert fused.report.folded == (("1.conv", "1.norm"),)
    assert "1.norm into 1.conv" in str(fused.report)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = exact(example().double())
        assert_as_good_as_eager(fused(example()), model(example()), expected, ulps=8)


def test_convolutions_of_which_others_use_the_output_keep_their_norm():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(DIM, DIM, 3, padding=1, groups=3)
            self.norm = nn.BatchNorm2d(DIM)

        def forward(self, x: Tensor) -> Tensor:
            out = self.conv(x)
            return out + self.norm(out)

    model = prepared(lambda: nn.Sequential(Residual(mlp()), Twice()))
    fused = fused_of(model)
    assert fused.report.folded == ()
    with torch.no_grad():
        torch.testing.assert_close(fused(example()), model(example()), rtol=1e-4, atol=1e-5)


def test_a_model_without_blocks_is_refused_with_what_was_looked_for():
    model = prepared(lambda: nn.Sequential(nn.Conv2d(DIM, DIM, 3), nn.Tanh()))
    with pytest.raises(
        ValueError, match=r"must hold blocks .*pointwise .*attention.*in Sequential"
    ):
        fused_of(model)


def test_a_network_of_one_size_is_fused():
    class OneSize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, DIM, 16, 16)
            self.block = Residual(mlp())
            self.places = nn.Parameter(torch.randn(1, DIM, 14, 14))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.stem(x) + self.places)

    report = fuse_for_inference(prepared(OneSize)).report
    assert [block.name for block in report.fused] == ["block"]
