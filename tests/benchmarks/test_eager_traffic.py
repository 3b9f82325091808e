"""Bytes of PyTorch's own operators, and of what Inductor makes of them, without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from benchmarks.gpu import inductor
from benchmarks.gpu.eager import EagerTraffic, count, distinct_bytes
from benchmarks.gpu.traffic import Shape, minimum_bytes
from swiftkernels import AdditiveAttention
from swiftkernels.testing.peers import PEERS


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_distinct_bytes_count_an_expanded_axis_once():
    assert distinct_bytes(meta(3, 1).expand(3, 100)) == 6
    assert distinct_bytes(meta(0, 5)) == 0


def test_views_and_allocations_are_no_kernels():
    with EagerTraffic() as traffic:
        meta(4, 6).transpose(0, 1).reshape(2, 12).unflatten(1, (3, 4))[0].expand(2, 3, 4)
        torch.empty_like(meta(4, 6))
    # The reshape of a transposed tensor copies.
    assert [operator.name for operator in traffic.operators] == ["clone"]


def test_reads_writes_and_operations_are_those_of_the_operators():
    x, w = meta(5, 8), meta(8, 3)
    with EagerTraffic() as traffic:
        y = x @ w
        y += 1
        y.fill_(0)
    product, addition, fill = traffic.operators
    assert (product.read, product.written) == (x.nbytes + w.nbytes, y.nbytes)
    assert product.flops == 2 * 5 * 8 * 3
    assert (addition.read, addition.written) == (y.nbytes, y.nbytes)
    assert (fill.read, fill.written) == (0, y.nbytes)
    assert (traffic.launches, traffic.matmuls) == (3, 1)


def test_a_linear_layer_reads_its_input_and_weights_once():
    layer, x = nn.Linear(8, 3, device="meta", dtype=torch.float16), meta(5, 8)
    forward = count(layer, x, backward=False)
    assert forward.bytes == x.nbytes + layer.weight.nbytes + layer.bias.nbytes + 5 * 3 * 2
    both = count(layer, x, backward=True)
    # dx = dout W and dW = dout^T x: two further products.
    assert both.flops == 3 * forward.flops


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("backward", [False, True])
def test_every_peer_can_be_counted(name, backward):
    module = PEERS[name](48).to("meta", torch.float16)
    assert count(module, meta(2, 49, 48), backward).launches >= 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_attention_by_scores_does_not_write_the_scores(dtype):
    module = PEERS["mhsa"](32).to("meta", dtype)
    x = meta(1, 4096, 32, dtype=dtype)
    scores = 4096 * 4096 * dtype.itemsize
    assert count(module, x, backward=True).bytes < scores / 2


def test_the_eager_layer_moves_several_times_the_minimum():
    shape = Shape(8, 3136, 48)
    layer = AdditiveAttention(48, 48, 1, backend="reference", device="meta", dtype=torch.float16)
    for backward in (False, True):
        traffic = count(layer, meta(*shape), backward)
        assert traffic.bytes > 5 * minimum_bytes(shape, torch.float16, backward)


def test_the_minimum_is_each_tensor_once():
    x, weights = 2 * 5 * 8 * 4, 4 * (4 * 64 + 5 * 8)
    shape = Shape(2, 5, 8)
    assert minimum_bytes(shape, torch.float32, backward=False) == 2 * x + weights
    assert minimum_bytes(shape, torch.float32, backward=False, passes=2) == 3 * x + weights
    # The backward reads x, dout and the weights, and writes their gradients.
    assert minimum_bytes(shape, torch.float32, backward=True) == 5 * x + 3 * weights


@pytest.mark.slow
def test_inductor_fuses_what_eager_launches_one_by_one():
    cases = [inductor.Case(2, 196, 48, "float16", backward) for backward in (False, True)]
    for case, counted in inductor.count(cases):
        layer = AdditiveAttention(48, 48, 1, backend="reference", device="meta").half()
        eager = count(layer, meta(2, 196, 48), case.backward)
        assert counted.matmuls < counted.launches < eager.launches
        least = minimum_bytes(Shape(2, 196, 48), torch.float16, case.backward)
        assert least < counted.bytes < eager.bytes


@pytest.mark.slow
def test_what_inductor_cannot_do_is_said():
    with pytest.raises(RuntimeError, match=r"benchmarks\.gpu\.inductor .* failed"):
        list(inductor.count([inductor.Case(2, 196, 48, "no type", False)]))
