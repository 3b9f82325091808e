"""Fixtures of several test modules."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from swiftkernels.ops.additive_attention.cpu import packing
from swiftkernels.utils import files
from tests.stubs import import_timm
from tests.vision import import_torchvision

DISK_BYTES = 4000
"""Of a file on a `full_disk`: less than any file of the library needs."""

# A shell starts background jobs with SIGINT ignored. Processes of tests that press Ctrl-C would
# inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if importlib.util.find_spec("torchvision"):
    # Before transformers, which does not import beside a torchvision that does not.
    import_torchvision()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Neither an earlier test nor a cache on disk has compiled anything."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def fresh_triton_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton compiles each time."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    return import_timm()


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file takes more than `DISK_BYTES` bytes."""
    write = files._Raw.write

    def limited(file: Any, data: Any) -> int:
        room = DISK_BYTES - file.tell()
        if room <= 0:
            file.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise file.failure
        return write(file, bytes(data)[:room])

    monkeypatch.setattr(files._Raw, "write", limited)


@pytest.fixture
def packings(monkeypatch) -> list[int]:
    """Grows by the form at each time weights are packed."""
    packed: list[int] = []
    pack = packing.pack

    def counting(*args: Any) -> bytes:
        packed.append(args[-1])
        return pack(*args)

    monkeypatch.setattr(packing, "pack", counting)
    return packed


@pytest.fixture
def one_thread() -> Iterator[None]:
    """More only where a test asks for them: small work is faster so, beside other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Whatever a kernel does not write shows as NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
