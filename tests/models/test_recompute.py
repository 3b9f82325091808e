"""Recomputed blocks: same gradients, and buffers updated once a batch, in any class of module."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swiftkernels.models import SwiftFormer, recompute


class Centred(nn.Module):
    """A custom norm: its output depends on the mean that it updates in the same call."""

    mean: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("unused", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))[:, None, None]
        return (x - self.mean).square()


def spectrally_normed(channels: int) -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(channels, channels, 1))


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "batch_norm": nn.BatchNorm2d,
    "cumulative": lambda c: nn.BatchNorm2d(c, momentum=None),
    "frozen": lambda c: nn.BatchNorm2d(c).eval(),
    "without_statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "sync_batch_norm": nn.SyncBatchNorm,
    "instance_norm": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "own": Centred,
    "spectral_norm": spectrally_normed,
}


def trained(module: nn.Module, run: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Gradients and buffers after each of two batches, with two backwards for each."""
    found: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    for step in range(2):
        x = torch.randn(3, 4, 6, 5, generator=generator).requires_grad_()
        loss = run(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert x.grad is not None
        found[f"{step}.x"] = x.grad
        found |= {f"{step}.{k}": p.grad.clone() for k, p in module.named_parameters()}
        found |= {f"{step}.{k}": b.clone() for k, b in module.named_buffers()}
    return found


def assert_recomputed_the_same(layer: nn.Module) -> None:
    plain = nn.Sequential(nn.Conv2d(4, 4, 1), layer, nn.Conv2d(4, 4, 1))
    again = copy.deepcopy(plain)
    buffers = dict(again.named_buffers())
    expected = trained(plain, plain)
    # A single block, so that the input of the layer is recomputed, too.
    found = trained(again, lambda x: recompute.recomputed(nn.Sequential(again), x))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    if not isinstance(layer, Centred):  # its forward replaces its buffer
        assert all(b is buffers[name] for name, b in again.named_buffers())


@pytest.mark.parametrize("name", LAYERS)
def test_buffers_are_updated_once_a_batch(name):
    torch.manual_seed(0)
    assert_recomputed_the_same(LAYERS[name](4))


def test_batch_norm_with_activation_of_timm(timm):
    torch.manual_seed(0)
    assert_recomputed_the_same(timm.layers.BatchNormAct2d(4))


def test_second_batch_before_the_backward_changes_nothing():
    """The first graph is recomputed with the buffers of its own forward."""
    gradients = []
    for run in (lambda block, x: block(x), recompute.recomputed):
        torch.manual_seed(0)
        block = nn.Sequential(Centred(4))
        x, other = torch.randn(2, 3, 4, 6, 5)
        x.requires_grad_()
        loss = run(block, x).square().sum()
        run(block, other)
        loss.backward()
        gradients.append((x.grad, block[0].mean))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_without_gradients_the_blocks_just_run():
    block = nn.Sequential(nn.BatchNorm2d(4))
    x = torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        recompute.recomputed(block, x)
    assert block[0].num_batches_tracked == 1


def test_model_with_synchronised_batch_norm():
    states = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(SwiftFormer((8, 16), (2, 2), num_classes=3))
        model.set_grad_checkpointing(enable)
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        states.append((gradients, model.state_dict()))
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_examples_run():
    found = doctest.testmod(recompute, extraglobs={"torch": torch, "nn": nn})
    assert found.attempted > 0
    assert found.failed == 0
