"""Inputs and states that once gave wrong numbers or ended the process, for both layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swiftkernels import AdditiveAttention, SeparableAttention, additive_self_attention
from swiftkernels import weights_changed as report_changes
from swiftkernels.backends.cpu import library
from swiftkernels.ops.plan import MAX_PLANS

pytestmark = pytest.mark.skipif(library.loaded() is None, reason="no CPU kernels")

WIDTH = 64
layers = pytest.mark.parametrize("make", [AdditiveAttention, SeparableAttention])

HOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "other strides": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "other types": lambda t: t.double() if t.is_floating_point() else t,
}


@layers
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_may_give_saved_tensors_other_strides_and_types(make, hook):
    layer, x = make(WIDTH), torch.randn(2, 49, WIDTH, requires_grad=True)
    own = {p.data_ptr() for p in (x, *layer.parameters())}

    def unpack(t: Tensor) -> Tensor:
        return t if t.data_ptr() in own else hook(t)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        out = layer(x)
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad(out.sum(), leaves)
    for grad, expected in zip(grads, torch.autograd.grad(layer(x).sum(), leaves), strict=True):
        assert torch.equal(grad, expected)


@layers
@pytest.mark.parametrize("grad", [True, False])
def test_an_input_without_memory_is_an_error(make, grad):
    layer, x = make(WIDTH), torch.randn(1, 9, WIDTH)
    with torch.set_grad_enabled(grad):
        layer(x)
        x.untyped_storage().resize_(0)
        for _ in range(2):
            with pytest.raises(ValueError, match="x must have memory"):
                layer(x)


@layers
def test_a_tensor_of_zeros_without_memory_is_filled(make):
    layer, zeros = make(WIDTH), torch.zeros(1, 9, WIDTH)
    with torch.no_grad():
        expected = layer(zeros)
        for _ in range(2):
            torch.testing.assert_close(layer(torch._efficientzerotensor((1, 9, WIDTH))), expected)


def hadamard(n: int) -> Tensor:
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@pytest.mark.parametrize("width", [64, 256])
def test_changed_signs_of_equal_numbers_are_noticed(width):
    """Sums of the words, and sums of these sums, do not see them."""
    layer, x = AdditiveAttention(width).requires_grad_(False), torch.randn(2, 9, width)
    layer.proj.weight.data = hadamard(width) / 8
    for column in (1, width // 4, width - 1):
        layer(x), layer(x)
        layer.proj.weight.data[:, column].neg_()
        report_changes()
        torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x))
    layer.final.bias.data = torch.tensor([1.0, -1, -1, 1]).repeat_interleave(width // 4)
    for _ in range(3):
        layer(x), layer(x)
        layer.final.bias.data.neg_()
        torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x))


def test_options_that_change_at_every_call_do_not_fill_the_memory():
    layer, x = AdditiveAttention(16).requires_grad_(False), torch.randn(1, 9, 16)
    weights = layer._plain_weights()
    assert weights is not None
    for i in range(2 * MAX_PLANS):
        layer.eps = 1e-12 * (i + 1)
        layer(x)
        additive_self_attention(x, *weights, scale=0.1 + i / 1000)
    assert len(layer._plans()._slots) <= MAX_PLANS


@pytest.mark.parametrize(
    ("name", "value"),
    [("pooling", ["l2"]), ("layout", "nchw"), ("layout", ["auto"]), ("backend", ["cpu"])],
)
def test_an_option_that_was_made_wrong_is_named(name, value):
    layer, x = AdditiveAttention(8), torch.randn(1, 8, 4, 4)
    layer(x)
    setattr(layer, name, value)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            layer(x)


@layers
def test_sparse_inputs_are_refused(make):
    with pytest.raises(TypeError, match=r"x must be a dense tensor.*to_dense"):
        make(8)(torch.randn(1, 9, 8).to_sparse())


def separable(**options: Any) -> SeparableAttention:
    torch.manual_seed(0)
    return SeparableAttention(16, **options).eval()


def test_dropouts_of_separable_attention_keep_their_own_mode():
    x = torch.randn(1, 49, 16)
    layer = separable(proj_drop=0.5)
    layer.out_drop.train()
    assert (layer(x) == 0).any()
    layer = separable(attn_drop=0.5)
    layer.attn_drop.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("name", ["attn_drop", "out_drop"])
def test_hooks_of_dropouts_of_separable_attention_run(name):
    layer, calls = separable(), []
    layer.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    layer(torch.randn(1, 9, 16))
    assert calls == [name]


def test_dropouts_of_separable_attention_may_be_replaced():
    layer, x = separable(), torch.randn(1, 9, 16)
    expected = layer(x)
    layer.attn_drop = layer.out_drop = nn.Identity()
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {"stride": (1, 2)}])
def test_convolutions_that_are_more_than_pointwise_are_called(options):
    layer, x = separable(), torch.randn(1, 16, 4, 4)
    layer.qkv_proj = nn.Conv2d(16, 33, 1, **options)
    assert torch.equal(layer(x), layer._call_parts(x))
