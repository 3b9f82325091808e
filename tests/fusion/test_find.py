"""Blocks are found by their parts, whatever their names, order and place of the BatchNorm."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.fusion import find
from tests.fusion import networks

DIM = 6


class Block(nn.Module):
    """A convolutional block with a BatchNorm in any place."""

    def __init__(
        self, kernel: int = 3, place: str = "depthwise", act: Any = None, residual: bool = True,
        hidden: int = 2 * DIM,
    ) -> None:  # fmt: skip
        super().__init__()
        self.place, self.residual = place, residual
        self.second = nn.Conv2d(hidden, DIM, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden if place == "first" else DIM, eps=1e-3)
        self.first = nn.Conv2d(DIM, hidden, 1)
        self.depthwise = nn.Conv2d(DIM, DIM, kernel, padding=kernel // 2, groups=DIM)
        self.act = nn.GELU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        def layer(name: str, x: Tensor) -> Tensor:
            out = getattr(self, name)(x)
            return self.norm(out) if self.place == name else out

        out = layer("second", self.act(layer("first", layer("depthwise", x))))
        return x + out if self.residual else out


def found(block: nn.Module) -> find.Found:
    model = networks.prepared(nn.Sequential(block, nn.Identity()))
    clone = copy.deepcopy(model).double()
    find.randomise(clone)
    return find.find(model, clone)


def assert_found(block: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """The block is found as one unit, which gives its output in float64; the steps."""
    model = networks.prepared(nn.Sequential(block, nn.Identity())).double()
    (unit,) = found(block).units
    steps = unit.steps(model)
    out = x.double()
    for step in steps:
        out = step.plain(out)
    with torch.no_grad():
        torch.testing.assert_close(out, model(x.double()))
    return steps


X = torch.randn(2, DIM, 6, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("place", ["depthwise", "first", "second"])
@pytest.mark.parametrize("residual", [True, False])
def test_batchnorms_are_folded_wherever_they_stand(kernel, place, residual):
    (step,) = assert_found(Block(kernel, place, residual=residual), X)
    assert step.residual == residual
    assert step.depthwise_weight.shape == (DIM, 1, kernel, kernel)


def test_layers_of_one_width_are_found_in_any_order():
    """`second` is registered first, and its shape does not show its place."""
    assert_found(Block(hidden=DIM), X)


ACTS = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(inplace=True),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "none": nn.Identity(),
}


@pytest.mark.parametrize("name", ACTS)
def test_activations_are_found_by_their_values(name):
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ACTS[name](x)

    for act in (ACTS[name], Own()):
        (step,) = assert_found(Block(act=act), X)
        assert step.activation == name


def test_activations_without_modules_are_found():
    class Functional(networks.OfficialEncoder):
        def __init__(self) -> None:
            super().__init__(DIM, 2 * DIM)
            del self.act

        def forward(self, x: Tensor) -> Tensor:
            return x + self.pwconv2(F.hardswish(self.pwconv1(self.norm(self.dwconv(x)))))

    block = Functional()
    del block.layer_scale
    (step,) = assert_found(block, X)
    assert step.activation == "hardswish"


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm(DIM), nn.BatchNorm2d(DIM, affine=False)])
def test_other_batchnorms(norm):
    block = Block()
    block.norm = norm
    assert_found(block, X)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


OTHERS = [
    ("act", nn.Mish(), "its part act is a Mish"),
    ("act", nn.PReLU(), "its part act is a PReLU"),
    ("act", Double(), "its part act is a Double"),
    ("norm", nn.GroupNorm(2, DIM), "its part norm is a GroupNorm"),
    ("norm", nn.BatchNorm2d(DIM, track_running_stats=False), "its part norm is a BatchNorm2d"),
    (
        "depthwise",
        nn.Conv2d(DIM, DIM, 3, padding=2, dilation=2, groups=DIM),
        "its part depthwise is a Conv2d",
    ),
    ("extra", nn.Conv2d(DIM, DIM, 3), "its part extra is called 0 times"),
    ("extra", nn.BatchNorm2d(DIM), "its part extra is called 0 times"),
]


@pytest.mark.parametrize(("name", "part", "reason"), OTHERS)
def test_other_blocks_are_left_with_a_reason(name, part, reason):
    block = Block()
    setattr(block, name, part)
    result = found(block)
    assert result.units == []
    assert [(left.name, left.reason) for left in result.left] == [("0", reason)]


@pytest.mark.parametrize("pooling", ["l2", "sum"])
@pytest.mark.parametrize("heads", [1, 2])
def test_encoders_with_any_attention(pooling, heads):
    block = networks.OfficialBlock(DIM, pooling)
    block.attn = networks.OfficialLayer(DIM, DIM, heads, pooling)
    steps = assert_found(block, X)
    assert [step.kind for step in steps] == ["conv_mlp", "attention", "conv_mlp"]
    assert steps[1].options.pooling == pooling
    assert steps[1].weights.width == heads * DIM


def test_renamed_parts_are_found_by_the_output():
    steps = assert_found(networks.RenamedBlock(DIM), X)
    assert [step.kind for step in steps] == ["conv_mlp", "attention", "conv_mlp"]
    assert steps[0].activation == "silu"
    assert steps[1].options.pooling == "softmax"
    assert steps[2].depthwise_weight is None


def test_attention_of_another_eps_is_left():
    class Attention(networks.OfficialLayer):
        def forward(self, x: Tensor) -> Tensor:
            q = F.normalize(self.to_query(x), dim=-1)
            k = F.normalize(self.to_key(x), dim=-1, eps=1e-6)
            return self.final(self.Proj(q.sum(1, keepdim=True) * k) + q)

    block = networks.OfficialBlock(DIM, "sum")
    block.attn = Attention(DIM, DIM, 1, "sum")
    left = {block.name: block.reason for block in found(block).left}
    assert "no pooling and no order" in left["0.attn"]
