"""The compiled program of a chain, on every CPU library that was built and runs here."""

from __future__ import annotations

import random
from unittest import mock

import pytest
import torch

from swiftkernels import fuse_for_inference
from swiftkernels.backends.cpu import library
from swiftkernels.fusion import chain as chains
from swiftkernels.fusion import cpu
from swiftkernels.fusion.steps import Attention, Pool
from swiftkernels.ops.additive_attention.weights import Options, Weights
from tests.fusion import networks

ISAS = [isa for isa, runs in library.available().items() if runs]

pytestmark = pytest.mark.skipif(not ISAS, reason="needs compiled kernels")


@pytest.fixture(params=ISAS)
def isa(request):
    """Each library in use, one after the other."""
    with mock.patch.object(library, "loaded", return_value=library.load(request.param)):
        cpu.kernels.cache_clear()
        yield request.param
    cpu.kernels.cache_clear()


@pytest.fixture
def threads():
    """Sets the number of threads; afterwards it is as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def chain_of(model):
    """The only chain of a fused network, and the same steps in float64."""
    found = next(m for m in fuse_for_inference(model).modules() if isinstance(m, chains.FusedChain))
    exact = [s.with_tensors({k: t if t is None else t.double() for k, t in s.tensors().items()})
             for s in found.steps]  # fmt: skip
    return found, exact


def run_in_float64(steps, x):
    x = x.double()
    for step in steps:
        x = step.plain(x)
    return x


@torch.no_grad()
def test_images_of_any_size_and_strides_give_the_values_of_the_definition(isa, threads):
    chain, exact = chain_of(networks.ours())
    generator = random.Random(1)
    for _ in range(25):
        threads(generator.randint(1, 3))
        batch, height, width = (generator.randint(1, most) for most in (4, 70, 70))
        x = torch.randn(batch, 3, height, width + 3)[..., 2:-1]
        if generator.random() < 0.5:
            x = x.contiguous(memory_format=torch.channels_last)
        out = cpu.run(chain.steps, x, chains.Slot())
        torch.testing.assert_close(out.double(), run_in_float64(exact, x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_part_of_a_network_is_right_alone(isa):
    chain, exact = chain_of(networks.ours())
    x = torch.randn(2, 3, 45, 70)
    for step, definition in zip(chain.steps, exact, strict=True):
        expected = definition.plain(x.double())
        if not isinstance(step, Pool):  # it needs the width of a step before it
            out = cpu.run((step,), x, chains.Slot())
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
        x = expected.float()


@torch.no_grad()
def test_results_depend_neither_on_threads_nor_on_the_batch(isa, threads):
    chain, _ = chain_of(networks.ours())
    x = torch.randn(5, 3, 75, 58)
    threads(1)
    expected = torch.cat([cpu.run(chain.steps, image, chain.slot) for image in x.split(1)])
    for count in (1, 2, 3, 4, 7):
        threads(count)
        assert torch.equal(cpu.run(chain.steps, x, chain.slot), expected)


@torch.no_grad()
def test_attention_of_which_a_bias_cancels_uses_the_plain_form(isa):
    torch.manual_seed(0)
    width, mean = 16, torch.randn(16)
    query = torch.randn(width, width)
    weights = Weights(
        query, -query @ mean, torch.randn(width, width), None, torch.randn(width, 1),
        torch.randn(width, width), None, torch.randn(width, width), None,
    )  # fmt: skip
    step = Attention(weights, Options("l2", True, width**-0.5, 1e-12), None)
    x = mean[None, :, None, None] + 1e-2 * torch.randn(1, width, 9, 9)
    slot = chains.Slot()
    out = cpu.run((step,), x, slot)
    assert slot.program.uses_plain_attention
    torch.testing.assert_close(out, step.plain(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(isa, dtype):
    chain, exact = chain_of(networks.ours().to(dtype))
    x = torch.randn(2, 3, 64, 64, dtype=dtype)
    out = cpu.run(chain.steps, x, chain.slot)
    assert out.dtype == dtype
    expected = run_in_float64(exact, x)
    assert (out.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()
