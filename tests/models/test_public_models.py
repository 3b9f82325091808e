"""The layers of the official code, timm and transformers, with the same weights."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels import AdditiveAttention
from swiftkernels.testing.tolerance import (
    EXACT,
    assert_as_good_as_eager,
    assert_exact,
    relative_error,
)

BACKENDS = ("auto", "aten", "reference")
SIZES = [(48, 48, 1), (56, 28, 2), (37, 64, 2)]
"""in_dims, token_dim, num_heads."""


class OfficialLayer(nn.Module):
    """The formulas of the official layer, before and after the change of pooling in July 2023."""

    def __init__(self, in_dims: int, token_dim: int, num_heads: int, pooling: str) -> None:
        super().__init__()
        width = token_dim * num_heads
        self.pooling = pooling
        self.scale_factor = token_dim**-0.5
        self.to_query, self.to_key = nn.Linear(in_dims, width), nn.Linear(in_dims, width)
        self.w_g = nn.Parameter(torch.randn(width, 1))
        self.Proj, self.final = nn.Linear(width, width), nn.Linear(width, token_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k = F.normalize(self.to_query(x), dim=-1), F.normalize(self.to_key(x), dim=-1)
        scores = q @ self.w_g * self.scale_factor  # [B, N, 1]
        # Before the change: over an axis of size one, so that all weights are 1.
        weights = F.normalize(scores, dim=1) if self.pooling == "l2" else scores.softmax(dim=-1)
        global_query = (weights * q).sum(dim=1, keepdim=True)
        return self.final(self.Proj(global_query * k) + q)


def timm_layer(timm: ModuleType, *sizes: int) -> nn.Module:
    return timm.models.swiftformer.EfficientAdditiveAttention(*sizes)


def transformers_layer(transformers: ModuleType, dim: int) -> nn.Module:
    module = transformers.models.swiftformer.modeling_swiftformer
    return module.SwiftFormerEfficientAdditiveAttention(transformers.SwiftFormerConfig(), dim)


def with_the_weights_of(theirs: nn.Module, *sizes: int, **kwargs: str) -> AdditiveAttention:
    """Our layer with all weights of theirs."""
    ours = AdditiveAttention(*sizes, **kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours


def run(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output, and the gradients of x and of the nine parameters, in that type."""
    layer = copy.deepcopy(layer).to(dtype)
    x = x.to(dtype).requires_grad_()
    out = layer(x)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, (x, *parameters), dout)
    result = {"output": out.detach(), "x": grads[0]}
    for name, grad in sorted(zip(names, grads[1:], strict=True)):
        result[name.replace("Proj", "proj")] = grad
    assert len(result) == 11
    return dict(sorted(result.items()))


def assert_same(ours: AdditiveAttention, theirs: nn.Module, x: Tensor) -> None:
    """Equal in float64; in float32 the error is at most twice theirs, and a few ulps."""
    exact = run(theirs, x, torch.float64)
    assert_exact(run(ours, x, torch.float64), exact)
    single, their_single = run(ours, x, torch.float32), run(theirs, x, torch.float32)
    for name in exact:
        assert_as_good_as_eager(single[name], their_single[name], exact[name], name=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("pooling", ["l2", "sum"])
def test_outputs_and_gradients_of_the_official_layer(pooling, sizes, backend):
    torch.manual_seed(0)
    theirs = OfficialLayer(*sizes, pooling)
    ours = with_the_weights_of(theirs, *sizes, pooling=pooling, backend=backend)
    assert_same(ours, theirs, torch.randn(2, 49, sizes[0]))


@pytest.mark.parametrize("pooling", ["l2", "sum"])
def test_official_layer_with_the_other_pooling_differs(pooling):
    """The keys do not determine the pooling, so the tests must detect a wrong one."""
    torch.manual_seed(0)
    theirs = OfficialLayer(48, 48, 1, pooling)
    ours = with_the_weights_of(theirs, 48, 48, 1, pooling="sum" if pooling == "l2" else "l2")
    x = torch.randn(2, 49, 48)
    assert relative_error(ours(x), theirs(x)) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_outputs_and_gradients_of_timm_layer(timm, sizes, backend):
    torch.manual_seed(0)
    theirs = timm_layer(timm, *sizes)
    ours = with_the_weights_of(theirs, *sizes, backend=backend)
    assert_same(ours, theirs, torch.randn(2, sizes[0], 7, 5))


@pytest.mark.parametrize("shape", [(2, 48, 7, 5), (1, 48, 7, 5), (2, 48, 1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_strides_are_those_of_timm(timm, backend, memory_format, shape):
    theirs = timm_layer(timm, 48, 32, 2)
    ours = with_the_weights_of(theirs, 48, 32, 2, backend=backend)
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    out, expected = ours(x), theirs(x)
    # The stride of an axis of one element means nothing.
    axes = [axis for axis, size in enumerate(out.shape) if size > 1]
    assert [out.stride(a) for a in axes] == [expected.stride(a) for a in axes]


@pytest.mark.parametrize("backend", BACKENDS)
def test_timm_model_with_our_layers(timm, backend):
    """Outputs and gradients, with layer scales large enough to show the attention."""
    torch.manual_seed(0)
    theirs = timm.create_model("swiftformer_xs", num_classes=10).double().eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "layer_scale" in name:
                p.copy_(torch.rand_like(p) + 0.5)
    ours = copy.deepcopy(theirs)
    for stage in ours.stages:
        layer = stage.blocks[-1].attn
        sizes = (layer.to_query.in_features, layer.final.out_features, 1)
        stage.blocks[-1].attn = with_the_weights_of(layer, *sizes, backend=backend).double()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for model in (ours, theirs):
        out = model(x)
        grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
        results.append((out, *grads))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= EXACT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [48, 220])
def test_outputs_and_gradients_of_transformers_layer(transformers, dim, backend):
    torch.manual_seed(0)
    theirs = transformers_layer(transformers, dim)
    ours = with_the_weights_of(theirs, dim, dim, 1, pooling="sum", backend=backend)
    assert_same(ours, theirs, torch.randn(2, 49, dim))


def renamed(attention: AdditiveAttention, name: str) -> dict[str, Tensor]:
    """The state dict with the layer `proj` under that name."""
    return {k.replace("proj", name): v for k, v in attention.state_dict().items()}


@pytest.mark.parametrize("name", ["Proj", "proj"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_both_spellings_of_the_projection_load(name, bias, assign):
    source = AdditiveAttention(8, 4, 2, bias=bias)
    target = AdditiveAttention(8, 4, 2, bias=bias)
    state = renamed(source, name)
    keys = list(state)
    target.load_state_dict(state, strict=True, assign=assign)
    assert list(state) == keys  # the dict of the caller is unchanged
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["Proj", "proj"])
def test_both_spellings_load_inside_a_larger_model(name):
    def model() -> nn.Module:
        blocks = [nn.ModuleDict({"attn": AdditiveAttention(8, 8, 1)}) for _ in range(2)]
        return nn.Sequential(nn.Linear(8, 8), *blocks)

    source, target = model(), model()
    state = {k.replace(".proj.", f".{name}."): v for k, v in source.state_dict().items()}
    assert f"1.attn.{name}.weight" in state
    target.load_state_dict(state, strict=True)
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def test_missing_or_misspelt_projection_raises():
    attention = AdditiveAttention(8, 4, 2)
    with pytest.raises(RuntimeError, match=r"Missing key.*proj\.weight"):
        attention.load_state_dict({k: v for k, v in attention.state_dict().items() if "p" not in k})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*PROJ\.weight"):
        attention.load_state_dict(renamed(attention, "PROJ"))
