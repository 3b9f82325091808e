"""The CPU kernels under sanitizers, and with the register blocking of AVX-512 on any x86-64-v3."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from swiftkernels.backends.cpu import library
from swiftkernels.testing.cases import POOLINGS, make_mask, make_tensors
from tests.cpu_cases import (
    SIZES,
    assert_accurate,
    assert_forms_accurate,
    assert_residual_accurate,
    kernels_in_use,
    options_of,
    tensors_of,
)
from tests.cpu_remote import FLAGS, KERNELS, RemoteKernels, compile_driver

COMPILER = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), "")
HAS_V3 = "avx2" in library.available() and library.available()["avx2"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler"),
    pytest.mark.skipif(not HAS_V3, reason="needs an x86-64-v3 processor"),
]

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover", "-g", "-O1")
BUILDS = {
    "8 lanes": ("-march=x86-64-v3",),
    "16 lanes": ("-march=x86-64-v3", "-DSWIFTKERNELS_LANES=16"),
}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Beside SIZES: 8 and 16 lanes and their neighbours, more tokens than are packed for at once.
MORE_SIZES = (
    (1, 17, 15, 17, 1),
    (4, 33, 33, 31, 1),
    (1, 2, 3, 130, 1),
    (40, 16, 10, 9, 1),
    (3, 520, 9, 33, 1),
)


@contextlib.contextmanager
def sanitized_kernels(folder: Path, build: str) -> Iterator[RemoteKernels]:
    """The kernels in a process that ends at the first access beside its memory."""
    try:
        driver = compile_driver(folder / "driver", COMPILER, *SANITIZERS, *BUILDS[build])
    except AssertionError as error:
        if "lasan" in str(error) or "lubsan" in str(error):
            pytest.skip("the compiler has no sanitizers")
        raise
    remote = RemoteKernels([str(driver)], ASAN_OPTIONS="detect_leaks=1", OMP_NUM_THREADS="3")
    yield remote
    remote.close()


@pytest.fixture(scope="module", params=BUILDS)
def sanitized(request, tmp_path_factory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("driver")
    with sanitized_kernels(folder, request.param) as remote, kernels_in_use(remote):
        yield


@pytest.fixture(params=[1, 3])
def threads(request) -> Iterator[int]:
    """Numbers of threads; for torch as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("case", range(len(SIZES)), ids=map(str, SIZES))
def test_no_access_beside_the_memory(case, threads):
    dtype = DTYPES[(case + threads) % 3]
    assert_accurate(tensors_of(case, dtype), **options_of(case, *SIZES[case][:2]))


@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("size", MORE_SIZES, ids=str)
def test_more_sizes(size, threads):
    case = MORE_SIZES.index(size)
    tensors = make_tensors(*size, bias=case != 2, dtype=torch.float32)
    mask = make_mask(*size[:2]) if case % 2 == 0 else None
    assert_accurate(tensors, pooling=POOLINGS[case % 4], mask=mask)


@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tokens", [33, 300])
def test_other_layouts(dtype, n_tokens, threads):
    tensors = make_tensors(threads, n_tokens, 21, 19, dtype=dtype)
    dout = torch.randn(threads, n_tokens, 19).to(dtype)
    tensors[0], dout = tensors[0].mT.contiguous().mT, dout.mT.contiguous().mT
    assert_accurate(tensors, dout)
    tensors[0] = torch.cat([tensors[0], tensors[0]], 2)[:, ::2, :21]
    dout = dout[:1, :1].expand(threads, tensors[0].shape[1], -1)
    assert_accurate(tensors, dout)


@pytest.mark.usefixtures("sanitized")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tokens", [10, 260])
def test_the_residual_branch(dtype, n_tokens, threads):
    tensors = make_tensors(threads, n_tokens, 19, 19, dtype=dtype)
    scale = torch.randn(19, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_residual_accurate(tensors, scale)
    tensors[0] = tensors[0].mT.contiguous().mT
    assert_residual_accurate(tensors, scale)


@pytest.mark.usefixtures("sanitized")
def test_weights_at_odd_addresses():
    tensors = make_tensors(2, 33, 19, 17, dtype=torch.bfloat16)
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in tensors]
    assert all(t.data_ptr() % 4 == 2 for t in shifted)
    assert_accurate(shifted)


@pytest.fixture(scope="module")
def wide_vectors(tmp_path_factory) -> Iterator[None]:
    """A library with 16 lanes and the blocks of AVX-512, for a processor with 8 lanes."""
    made = tmp_path_factory.mktemp("wide") / "kernels.so"
    command = [
        COMPILER, *FLAGS, "-O2", "-fPIC", "-shared", "-fvisibility=hidden", *BUILDS["16 lanes"],
        *map(str, KERNELS), "-o", str(made),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    handle = library.declare(ctypes.CDLL(str(made)), "additive")
    assert handle.swiftkernels_lanes() == 16
    with kernels_in_use(handle):
        yield


@pytest.mark.usefixtures("wide_vectors")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(SIZES)), ids=map(str, SIZES))
def test_the_blocks_of_avx512(case, dtype):
    assert_accurate(tensors_of(case, dtype), **options_of(case, *SIZES[case][:2]))


@pytest.mark.usefixtures("wide_vectors")
@pytest.mark.parametrize("width", [*range(2, 70, 4), 112, 220, 224, 512])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_blocks_of_avx512_at_every_width(width, qk_norm):
    tensors = make_tensors(2, 29, 13, width, dtype=torch.float32)
    assert_forms_accurate(tensors, qk_norm=qk_norm)
    assert_accurate(make_tensors(1, 29, width, 24, dtype=torch.float32), qk_norm=qk_norm)
