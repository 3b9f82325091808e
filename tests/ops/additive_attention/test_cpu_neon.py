"""The CPU kernels for 64-bit ARM, in an emulator."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from swiftkernels.testing.cases import make_mask, make_tensors
from tests.cpu_cases import (
    SIZES,
    assert_accurate,
    assert_residual_accurate,
    kernels_in_use,
    options_of,
    tensors_of,
)
from tests.cpu_remote import RemoteKernels, compile_driver

COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (COMPILER and EMULATOR),
        reason="needs a cross compiler and an emulator: "
        "apt install g++-aarch64-linux-gnu qemu-user-static",
    ),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def emulated_kernels(folder: Path) -> Iterator[RemoteKernels]:
    """The kernels in an emulated process."""
    driver = compile_driver(folder / "driver", str(COMPILER), "-O2", "-static")
    remote = RemoteKernels([str(EMULATOR), str(driver)])
    assert remote.swiftkernels_lanes() == 4
    yield remote
    remote.close()


@pytest.fixture(scope="module", autouse=True)
def _neon(tmp_path_factory) -> Iterator[None]:
    with emulated_kernels(tmp_path_factory.mktemp("driver")) as remote, kernels_in_use(remote):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(SIZES)), ids=map(str, SIZES))
def test_neon_is_as_accurate_as_eager(case, dtype):
    torch.set_num_threads(1 + case % 2)
    assert_accurate(tensors_of(case, dtype), **options_of(case, *SIZES[case][:2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tokens", [33, 270])
def test_neon_with_other_layouts(n_tokens, dtype):
    tensors = make_tensors(2, n_tokens, 21, 19, dtype=dtype)
    dout = torch.randn(2, n_tokens, 19).to(dtype)
    tensors[0], dout = tensors[0].mT.contiguous().mT, dout.mT.contiguous().mT
    assert_accurate(tensors, dout, mask=make_mask(2, n_tokens))
    square = make_tensors(2, n_tokens, 19, 19, dtype=dtype)
    assert_residual_accurate(square, torch.linspace(-1, 1, 19).to(dtype))
