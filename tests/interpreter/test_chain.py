"""Chains of fused networks on a GPU: their blocks and attention go to the Triton kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from swiftkernels import fuse_for_inference
from swiftkernels.backends.triton import tensors
from swiftkernels.fusion.chain import FusedChain
from swiftkernels.fusion.steps import Convolution
from swiftkernels.fusion.triton import program
from swiftkernels.models import SwiftFormer, swiftformer_l3, swiftformer_xs
from swiftkernels.ops.plan import KeepsPlans
from swiftkernels.testing.tolerance import assert_as_good_as_eager
from tests.fusion import networks
from tests.fusion.test_chain import X, attention, conv_mlp, randn, whole
from tests.interpreter.instruments import TorchKernels, count_launches

BLOCK = "_forward_kernel"
CONVOLUTION = "_convolution_kernel"
SMALL = X[:, :, :17, :19]
ATTENTION = ["_pool_forward_kernel", "_output_forward_kernel"]


@pytest.fixture(autouse=True)
def tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, kernels compute what tensor cores may; the interpreter does not round."""
    monkeypatch.setattr(tensors, "allow_tf32", lambda convolution=False: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks_and_attention_go_to_the_kernels(dtype: torch.dtype) -> None:
    chain = FusedChain(whole()).to(dtype)
    x = SMALL.to(dtype)
    with torch.no_grad(), count_launches() as launches:
        out = chain(x)
    stem = [CONVOLUTION] * 2
    assert launches == [*stem, BLOCK, *ATTENTION, BLOCK, CONVOLUTION, *ATTENTION]
    exact = copy.deepcopy(chain).double().plain(x.double())
    assert_as_good_as_eager(out, chain.plain(x), exact)
    with torch.no_grad():
        assert torch.equal(chain(x), out)


def test_float64_and_gradients_are_computed_in_operators() -> None:
    chain = FusedChain(whole())
    with count_launches() as launches:
        chain(SMALL.clone().requires_grad_())
        chain.double()(SMALL.double())
    assert launches == []


def test_new_values_and_other_sizes() -> None:
    chain = FusedChain(whole())
    with torch.no_grad():
        for size in (17, 12, 17):
            x = SMALL[:, :, :size]
            torch.testing.assert_close(chain(x), chain.plain(x), rtol=1e-4, atol=1e-5)
            chain.conv_mlp1_weight1.mul_(1.5)
            chain.attention2_final_bias.add_(1)
            chain.stem0_weight1.neg_()


def test_a_fused_network_is_a_launch_for_every_block() -> None:
    """Three for an encoder with attention, besides its attention; and the head is PyTorch's."""
    torch.manual_seed(0)
    network = SwiftFormer((16, 24), (2, 2), num_classes=5).eval()
    fused = fuse_for_inference(network)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), count_launches() as launches:
        out = fused(x)
    stage = [BLOCK, BLOCK, *ATTENTION, BLOCK]
    assert launches == [CONVOLUTION] * 2 + stage + [CONVOLUTION] + stage
    (chain,) = (part for part in fused.modules() if isinstance(part, FusedChain))
    with torch.no_grad(), count_launches(), TorchKernels() as kernels:
        program.run(chain.steps, x, chain.slot)
    assert [name for name, _ in kernels.calls] == ["mean", "addmm"]
    with torch.no_grad():
        torch.testing.assert_close(out, network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("size", [(5, 7), (1, 1)])
def test_the_last_kernel_of_attention_adds_its_input(scale: bool, size: tuple[int, int]) -> None:
    chain = FusedChain([attention(8, scale), conv_mlp(8, 0)])
    x = randn(2, 8, *size)
    exact = copy.deepcopy(chain).double().plain(x.double())
    with torch.no_grad():
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            for _ in range(2):
                assert_as_good_as_eager(chain(given), chain.plain(given), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_queries_and_keys_of_wide_attention_are_one_product(dtype: torch.dtype) -> None:
    """Above 128 channels; the weights of both products are packed once."""
    step = attention(65)
    assert step.weights.width == 130
    chain = FusedChain([step]).to(dtype)
    x = randn(2, 65, 3, 2).to(dtype).contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(chain).double().plain(x.double())
    with torch.no_grad(), count_launches() as launches:
        assert_as_good_as_eager(chain(x), chain.plain(x), exact)
    assert launches == ["_pool_forward_kernel", "_operands_kernel", "_linear_kernel"]
    with torch.no_grad(), count_launches(), TorchKernels() as kernels:
        out = program.run(chain.steps, x, chain.slot)
    assert [name for name, _ in kernels.calls] == ["addmm"]
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("allowed", ["convolutions", "products"])
def test_without_tensor_cores_the_libraries_compute_products(
    allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 is allowed for convolutions and for products by settings of their own."""

    def allow_tf32(convolution: bool = False) -> bool:
        return convolution == (allowed == "convolutions")

    chain = FusedChain(whole())
    with torch.no_grad():
        expected = chain(SMALL)
        monkeypatch.setattr(tensors, "allow_tf32", allow_tf32)
        with count_launches() as launches:
            out = chain(SMALL)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        used = {BLOCK, CONVOLUTION} if allowed == "convolutions" else set()
        assert set(launches) == used
        with count_launches() as launches:
            chain.half()(SMALL.half())
        assert set(launches) == {BLOCK, CONVOLUTION, *ATTENTION}


def test_images_are_read_as_they_are() -> None:
    """Also contiguous ones: the stem copies nothing."""
    chain = FusedChain(whole()[:2])
    strided = SMALL.repeat_interleave(2, 3)[..., ::2]
    for x in (SMALL, SMALL.contiguous(memory_format=torch.channels_last), strided):
        with torch.no_grad():
            torch.testing.assert_close(chain(x), chain.plain(x), rtol=1e-4, atol=1e-5)
            with count_launches(), TorchKernels() as kernels:
                program.run(chain.steps, x, chain.slot)
        assert kernels.calls == []


def test_deep_convolutions_are_those_of_pytorch() -> None:
    step = Convolution(randn(4, 70, 3, 3), randn(4))
    chain, x = FusedChain([step, attention(4)]), randn(1, 70, 6, 5)
    with torch.no_grad(), count_launches() as launches:
        torch.testing.assert_close(chain(x), chain.plain(x), rtol=1e-4, atol=1e-5)
    assert launches == ATTENTION


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "size"),
    [(swiftformer_xs, (32, 32)), (swiftformer_xs, (225, 257)), (swiftformer_l3, (32, 32))],
    ids=["XS, 32", "XS, 225 x 257", "L3, 32"],
)
def test_whole_networks_are_as_right_as_eager(
    make: Callable[..., SwiftFormer], size: tuple[int, int], dtype: torch.dtype
) -> None:
    model = networks.prepared(make(num_classes=10)).to(dtype)
    for part in model.modules():
        if isinstance(part, KeepsPlans):
            part.backend = "reference"
    fused = fuse_for_inference(model)
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad(), count_launches() as launches:
        out = fused(x)
    assert launches.count(CONVOLUTION) == (4 if make is swiftformer_xs else 3)
    with torch.no_grad():
        eager, exact = model(x), model.double()(x.double())
    assert_as_good_as_eager(out, eager, exact)
