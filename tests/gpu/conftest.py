"""Tests on a real GPU; skipped where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from swiftkernels.backends import devices
from swiftkernels.ops.additive_attention.op import SELF_ATTENTION

NO_GPU = "needs a GPU that runs the Triton kernels (see swiftkernels doctor)"


def usable_gpus() -> list[torch.device]:
    """The GPUs on which backend="triton" may be asked for."""
    return [d for d in devices.gpus() if not SELF_ATTENTION.why_not("triton", _probe(d), 16)]


def _probe(device: torch.device) -> torch.Tensor:
    return torch.empty(1, 1, 16, device=device)


@pytest.fixture(autouse=True)
def gpu() -> Iterator[torch.device]:
    """The first GPU. The process ends after a test that leaves it in an error: all calls after, for
    example, an illegal access to memory fail.
    """
    found = usable_gpus()
    if not found:
        pytest.skip(NO_GPU)
    yield found[0]
    if lost := devices.why_lost(found[0]):
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # pytest-xdist starts another process
        pytest.exit(f"no further test can run in this process: {lost}", devices.LOST)


@pytest.fixture
def other_gpu(gpu) -> torch.device:
    """A second one, which is not the current device."""
    found = usable_gpus()
    if len(found) < 2:
        pytest.skip("needs two GPUs")
    return found[1]


@pytest.fixture
def cuda(gpu) -> torch.device:
    """The first GPU, of CUDA or ROCm: the others have no graphs."""
    if gpu.type != "cuda":
        pytest.skip("needs a GPU of CUDA or ROCm")
    return gpu
