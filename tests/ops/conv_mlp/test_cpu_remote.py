"""The CPU kernels of conv_mlp under sanitizers, and for 64-bit ARM in an emulator."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from swiftkernels.ops.conv_mlp.reference import ACTIVATIONS
from tests.ops.additive_attention import test_cpu_neon as neon
from tests.ops.additive_attention import test_cpu_sanitizers as sanitizers
from tests.ops.conv_mlp.cases import (
    CHANNELS,
    DTYPES,
    HIDDEN,
    IMAGES,
    KERNELS,
    LAYOUTS,
    assert_accurate,
    kernels_in_use,
    make_tensors,
)

PROCESSES = [
    *(pytest.param(build, marks=sanitizers.pytestmark) for build in sanitizers.BUILDS),
    pytest.param("neon", marks=neon.pytestmark),
]


@pytest.fixture(scope="module", autouse=True, params=PROCESSES)
def _remote(request, tmp_path_factory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("driver")
    if request.param == "neon":
        process = neon.emulated_kernels(folder)
    else:
        process = sanitizers.sanitized_kernels(folder, request.param)
    with process as remote, kernels_in_use(remote):
        yield


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("image", IMAGES)
def test_odd_sizes(image: tuple[int, int]) -> None:
    options = zip(itertools.cycle(KERNELS), itertools.cycle(DTYPES), itertools.cycle(ACTIVATIONS))
    for (C, H), option in zip(itertools.product(CHANNELS, HIDDEN), options, strict=False):
        kernel, dtype, activation = option
        assert_accurate(make_tensors((2, C, *image), H, kernel), dtype, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts(layout, dtype) -> None:
    for C, kernel in itertools.product((16, 21), KERNELS):
        tensors = make_tensors((3, C, 12, 13), 40, kernel)
        tensors[0] = layout(tensors[0].to(dtype))
        assert_accurate(tensors, dtype)
