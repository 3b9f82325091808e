"""Packed weights are never stale without a word, and packing pays or does not happen."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from swiftkernels import AdditiveAttention, weights_changed
from swiftkernels.backends import cache
from swiftkernels.backends.cpu import library
from swiftkernels.backends.cpu.packing import Packed
from swiftkernels.testing.tolerance import relative_error

pytestmark = [
    pytest.mark.skipif(library.loaded() is None, reason="no CPU kernels"),
    pytest.mark.usefixtures("one_thread"),
]

MATRICES = ("to_query", "to_key", "proj", "final")
WIDTHS = (48, 49, 64, 112, 220, 320)


def make_layer(width: int = 64, dtype: torch.dtype = torch.float32) -> AdditiveAttention:
    torch.manual_seed(0)
    return AdditiveAttention(width, width, 1, dtype=dtype).eval()


def tokens(n: int, width: int, dtype: torch.dtype = torch.float32, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, n, width, generator=generator).to(dtype)


def by_a_copy(layer: AdditiveAttention, x: Tensor, **options: Any) -> Tensor:
    """What a layer that never ran makes of x."""
    return copy.deepcopy(layer)(x, **options)


def assert_noticed(
    write: Callable[[AdditiveAttention], Any],
    width: int,
    dtype: torch.dtype = torch.float32,
    n_tokens: int = 49,
) -> None:
    layer, x = make_layer(width, dtype), tokens(n_tokens, width, dtype)
    with torch.no_grad():
        for _ in range(2):
            before = layer(x)
        write(layer)
        right = by_a_copy(layer, x)
        assert not torch.equal(before, right), "the write changes nothing"
        for _ in range(2):
            assert torch.equal(layer(x), right)


def assert_current(layer: AdditiveAttention, x: Tensor) -> None:
    """Up to rounding: weights that change often are not packed, but read in another form."""
    error = relative_error(layer(x), by_a_copy(layer, x))
    assert error <= max(1e-5, 8 * torch.finfo(x.dtype).eps), error


def seeded(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(key) % 2**31)


def random_index(high: int, *key: int) -> int:
    return int(torch.randint(high, (), generator=seeded(*key)))


def row(w: Tensor, seed: int) -> None:
    w[random_index(w.shape[0], seed)].mul_(-3)


def column(w: Tensor, seed: int) -> None:
    w[:, random_index(w.shape[1], seed)].mul_(-3)


def tile(w: Tensor, seed: int) -> None:
    i, j = (random_index(n - 16, seed, axis) for axis, n in enumerate(w.shape))
    w[i : i + 16, j : j + 16].mul_(-3)


def five_percent(w: Tensor, seed: int) -> None:
    w.mul_((torch.rand(w.shape, generator=seeded(seed)) > 0.05).to(w.dtype))


def signs(w: Tensor, seed: int) -> None:
    """Two in each lane of the vectors in which the kernels look at them."""
    w[random_index(w.shape[0], seed)].neg_()


def exchanged_rows(w: Tensor, seed: int) -> None:
    i = random_index(w.shape[0] - 1, seed)
    w[[i, i + 1]] = w[[i + 1, i]]


WRITES = (row, column, tile, five_percent, signs, exchanged_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("write", WRITES)
def test_writes_past_the_version_counters_are_noticed(write, width, dtype):
    for seed, name in enumerate(MATRICES):
        assert_noticed(
            lambda layer, n=name, s=seed: write(layer.get_submodule(n).weight.data, s), width, dtype
        )


@pytest.mark.parametrize("n_tokens", [49, 784])
def test_writes_by_numpy_are_noticed(n_tokens):
    def write(layer: AdditiveAttention) -> None:
        layer.final.weight.detach().numpy()[:, 32:].fill(0)

    assert_noticed(write, 64, n_tokens=n_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [49, 220, 1100])
def test_vectors_are_watched_whole(width, dtype):
    for name in ("to_query.bias", "to_key.bias", "proj.bias", "final.bias", "w_g"):
        layer, x = make_layer(width, dtype), tokens(9, width, dtype)
        for element in (0, 1, width // 2, width - 1):
            with torch.no_grad():
                layer(x), layer(x)
                layer.get_parameter(name).data.view(-1)[element] = 100
                assert_current(layer, x)


@pytest.mark.parametrize("width", [48, 64])
def test_every_element_of_small_layers_is_watched(width):
    for seed in range(20):
        i, j = random_index(width, seed, 0), random_index(width, seed, 1)
        assert_noticed(lambda layer, i=i, j=j: layer.proj.weight.data[i, j].add_(1), width)


def test_every_element_is_watched_where_there_are_many_tokens():
    for seed in range(5):
        i, j = random_index(220, seed, 0), random_index(220, seed, 1)
        assert_noticed(
            lambda layer, i=i, j=j: layer.proj.weight.data[i, j].add_(5), 220, n_tokens=784
        )


@pytest.mark.parametrize("width", [112, 320])
@pytest.mark.parametrize("n_tokens", [7, 784])
def test_a_single_element_is_noticed_once_it_is_said(width, n_tokens):
    for name, seed in itertools.product(MATRICES, range(2)):
        i, j = random_index(width, seed, 0), random_index(width, seed, 1)

        def write(layer: AdditiveAttention, name: str = name, i: int = i, j: int = j) -> None:
            layer.get_submodule(name).weight.data[i, j] += 5
            weights_changed()

        assert_noticed(write, width, n_tokens=n_tokens)


def test_what_is_said_packs_nothing_anew_where_nothing_changed(packings):
    layer, x = make_layer(), tokens(9, 64)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
            weights_changed()
    assert len(packings) == 1


class Writer(torch.optim.Optimizer):
    """Somebody's optimizer: it writes the one element that has a gradient, through numpy."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.numpy()[...] -= p.grad.numpy()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 1.0),
    "SGD, fused": lambda p: torch.optim.SGD(p, 1.0, fused=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, 0.1, fused=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.0, fused=True),
    "Adagrad, fused": lambda p: torch.optim.Adagrad(p, 0.1, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.1),
    "somebody's": Writer,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("where", ["one element", "one row", "all but a column"])
@pytest.mark.parametrize("width", [64, 220])
def test_every_step_of_an_optimizer_is_noticed(make, where, width):
    layer, x = make_layer(width), tokens(9, width)
    for name in ("to_query", "final"):
        weight = layer.get_submodule(name).weight
        optimizer = make([weight])
        with torch.no_grad():
            layer(x), layer(x)
        for _ in range(3):
            grad = torch.zeros_like(weight)
            if where == "one element":
                grad[7, 3] = 1
            elif where == "one row":
                grad[7] = 1
            else:
                grad[:, 1:] = 1
            weight.grad = grad
            optimizer.step()
            with torch.no_grad():
                assert_current(layer, x)


def test_training_with_a_fused_optimizer_and_dead_channels():
    layer, x = make_layer(), tokens(49, 64, batch=4)
    x[..., 0] = 0
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2, fused=True)
    for _ in range(5):
        with torch.no_grad():
            assert_current(layer, x)
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()


def test_weights_at_the_address_of_dead_ones_are_noticed():
    x = tokens(9, 64)
    for seed in range(10):
        layer = make_layer()
        nn.init.normal_(layer.final.weight, std=0.1, generator=seeded(seed))
        with torch.no_grad():
            out = layer(x)
            assert relative_error(out, layer.double()(x.double())) < 1e-6
        del layer


# Packing pays or does not happen.


def test_weights_that_are_made_anew_are_not_packed(packings):
    layer, x = make_layer(), tokens(49, 64)
    normed = copy.deepcopy(layer)
    parametrizations.weight_norm(normed.to_query)
    state = {name: t.detach().clone() for name, t in layer.state_dict().items()}
    with torch.no_grad():
        expected = by_a_copy(layer, x)
        packings.clear()
        for _ in range(3):
            torch.testing.assert_close(normed(x), expected)
            out = functional_call(layer, {n: t.clone() for n, t in state.items()}, (x,))
            torch.testing.assert_close(out, expected)
            out = functional_call(layer, state, (x,))
            torch.testing.assert_close(out, expected)
    assert not packings


def test_alternating_uses_are_packed_once_each(packings):
    layer, x = make_layer(), tokens(49, 64)
    gamma, image = nn.Parameter(torch.randn(64)), tokens(64, 64).view(1, 64, 8, 8)
    with torch.no_grad():
        for _ in range(4):
            layer(x), layer(x, residual_scale=gamma), layer(image)
            layer(tokens(784, 64))  # in another form
            with torch.autocast("cpu", torch.bfloat16):
                layer(x)
    assert len(packings) == 4


def test_scales_that_are_made_anew_end_the_packing(packings):
    layer, x = make_layer(), tokens(49, 64)
    with torch.no_grad():
        for i in range(12):
            gamma = torch.full((64,), 1.0 + i)
            out = layer(x, residual_scale=gamma)
            torch.testing.assert_close(out, x + gamma * by_a_copy(layer, x))
    assert sum(1 for _ in packings) - 12 <= 5  # the copies pack once each


@pytest.mark.parametrize("write", ["copy_", "data"])
def test_weights_that_change_between_any_two_calls_are_hardly_packed(write, packings):
    """As those of a teacher that is the moving average of a student."""
    layer, x = make_layer(), tokens(49, 64)
    with torch.no_grad():
        for i in range(20):
            for p in layer.parameters():
                (p if write == "copy_" else p.data).mul_(1.01)
            out = layer(x)
            if i % 5 == 0:
                count = len(packings)
                assert relative_error(out, by_a_copy(layer, x)) < 1e-6
                del packings[count:]
    assert len(packings) <= 6
    with torch.no_grad():
        for _ in range(40):
            layer(x)
        packings.clear()
        layer(x)
    assert not packings
    slots = layer._plans()._slots.values()
    assert any(slot.packed is not None for slot in slots)  # and at last they are


def test_autocast_packs_once_and_follows_the_weights(packings):
    layer, x = make_layer(), tokens(49, 64)
    low = copy.deepcopy(layer).to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            out = layer(x)
        assert len(packings) == 1
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, low(x.to(torch.bfloat16)))
        layer.final.weight.mul_(2), low.final.weight.mul_(2)
        assert torch.equal(layer(x), low(x.to(torch.bfloat16)))


def test_layers_that_share_a_query_weight_are_right_and_hardly_packed(packings):
    first, second = make_layer(), make_layer()
    nn.init.normal_(second.proj.weight)
    second.to_query = first.to_query
    x = tokens(49, 64)
    with torch.no_grad():
        expected = by_a_copy(first, x), by_a_copy(second, x)
        packings.clear()
        for _ in range(20):
            torch.testing.assert_close(first(x), expected[0])
            torch.testing.assert_close(second(x), expected[1])
    assert len(packings) <= 10


def test_what_does_not_last_is_packed_less_and_less_often():
    slot, packed = cache.Slot(), 0
    weight = torch.zeros(1)

    def pack() -> Packed:
        nonlocal packed
        packed += 1
        return Packed(b"", [])

    for version in range(1000):
        weight.fill_(version)
        for _ in range(1 + version % 3):
            if slot.ensure((weight,), lambda _: True, pack) is not None:
                break  # and the weights change at once
    assert packed < 10


def test_a_dead_layer_tells_nothing_of_the_next(packings):
    """Which may come to its addresses: every layer is packed at its first call."""
    x = tokens(49, 64)
    with torch.no_grad():
        for _ in range(10):
            make_layer()(x)
    assert len(packings) == 10


TURNED = {
    "transposed": lambda w: w.t(),
    "other rows": lambda w: w.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)[: w.shape[0]],
    "reversed strides": lambda w: w.as_strided(w.shape, (1, w.shape[0])),
}


@pytest.mark.parametrize("turn", TURNED.values(), ids=TURNED.keys())
@pytest.mark.parametrize("wide", [True, False])
def test_weights_at_their_address_in_another_order_are_noticed(turn, wide):
    layer, x = make_layer(), tokens(9, 64)
    with torch.no_grad():
        for name in MATRICES:
            weight = layer.get_submodule(name).weight
            if wide:  # with gaps between the rows
                weight.data = torch.randn(64, 128, generator=seeded(1))[:, :64]
            layer(x), layer(x)
            weight.data = turn(weight.data)
            assert_current(layer, x)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", MATRICES)
def test_weights_of_another_shape_at_their_address_are_refused(name, grad):
    layer, x = AdditiveAttention(16, 16, 2), tokens(9, 16)
    with torch.set_grad_enabled(grad):
        layer(x), layer(x)
        weight = layer.get_submodule(name).weight
        weight.data = weight.data.reshape(8, -1)
        with pytest.raises(ValueError, match=r"must (have shape|be 64 wide)"):
            layer(x)


@pytest.mark.parametrize("grad", [True, False])
def test_weights_whose_memory_was_freed_are_refused(grad):
    layer, x = make_layer(), tokens(9, 64)
    with torch.no_grad():
        layer(x), layer(x)
    layer.final.weight.data.untyped_storage().resize_(0)
    with torch.set_grad_enabled(grad), pytest.raises((ValueError, RuntimeError)):
        layer(x)
