"""Chains of fused networks on a GPU: their blocks and attention go to the Triton kernels."""

from __future__ import annotations

import copy

import pytest
import torch

from swiftkernels import fuse_for_inference
from swiftkernels.fusion.chain import FusedChain
from swiftkernels.models import SwiftFormer
from swiftkernels.testing.tolerance import assert_as_good_as_eager
from tests.fusion.test_chain import X, whole
from tests.interpreter.instruments import count_launches

BLOCK = "_forward_kernel"
SMALL = X[:, :, :17, :19]
ATTENTION = ["_pool_forward_kernel", "_output_forward_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks_and_attention_go_to_the_kernels(dtype: torch.dtype) -> None:
    chain = FusedChain(whole()).to(dtype)
    x = SMALL.to(dtype)
    with torch.no_grad(), count_launches() as launches:
        out = chain(x)
    assert launches == [BLOCK, *ATTENTION, BLOCK, *ATTENTION]
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
    """Three for an encoder with attention, besides its attention."""
    torch.manual_seed(0)
    network = SwiftFormer((16, 24), (2, 2), num_classes=5).eval()
    fused = fuse_for_inference(network)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), count_launches() as launches:
        out = fused(x)
    stage = [BLOCK, BLOCK, *ATTENTION, BLOCK]
    assert launches == stage * 2
    with torch.no_grad():
        torch.testing.assert_close(out, network(x), rtol=1e-4, atol=1e-5)
