"""The kernels of separable attention compile for GPUs that are not there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.gpu import cross_compile
from benchmarks.gpu.cross_compile import ARCHITECTURES, Launch
from swiftkernels.ops.operator import Needs
from swiftkernels.ops.separable_attention.triton import launch
from swiftkernels.ops.separable_attention.weights import Options, Weights

NO_TENSOR_CORES = ("pool_forward", "context_forward", "context_backward", "sum_partials")
"""Without products of matrices, or with some of few rows in float32."""


pytestmark = pytest.mark.usefixtures("fresh_triton_cache")


def launches_of(x: Tensor, width: int) -> list[Launch]:
    """Those of a forward and a backward with all gradients."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=x.dtype)

    weights = Weights(
        zeros(1 + 2 * width, width), zeros(1 + 2 * width), zeros(width, width), zeros(width)
    )
    launch.forget_launches()
    with cross_compile.recorded_launches() as launches:
        out, saved = launch.forward((x,), weights, None, Options(), "statistics")
        dout = torch.zeros_like(out)
        launch.backward(dout, (x,), weights, None, saved, Options(), Needs(True, True))
    return launches


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("tokens", [12, 16, 35])
@pytest.mark.parametrize("width", [24, 80, 264])
def test_every_promised_alignment_holds(width: int, tokens: int, groups: int | None) -> None:
    """Of a slice of wider tokens; a GPU would fault or write astray."""
    shape = (2, tokens, width + 8) if groups is None else (2, width + 8, groups, tokens)
    x = torch.zeros(shape, dtype=torch.float16)
    x = x[..., :width] if groups is None else x[:, :width]
    for kernel, arguments in launches_of(x, width):
        for prefix in ("", "out_", "dout_", "dx_"):
            align = arguments.get(f"{prefix.upper()}ALIGN", 1)
            for name in ("stride_b", "stride_g", "stride"):
                assert arguments.get(f"{prefix}{name}", 0) % align == 0, (kernel, name)
        if not arguments.get("CHANNELS_LAST", True):
            assert arguments["n_tokens"] % arguments["ALIGN"] == 0, kernel


@pytest.mark.parametrize(
    ("width", "dtype", "images", "architecture"),
    [
        (64, "fp16", True, "sm_80"),
        (128, "bf16", False, "sm_90"),
        (192, "fp32", True, "gfx942"),
        pytest.param(512, "bf16", True, "sm_80", marks=pytest.mark.slow),
        pytest.param(256, "fp16", False, "gfx942", marks=pytest.mark.slow),
        pytest.param(384, "fp32", True, "sm_90", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_fits_a_gpu(width: int, dtype: str, images: bool, architecture: str) -> None:
    """It compiles, fits into shared memory and registers, uses tensor cores and wide loads."""
    shape = (2, width, 4, 64) if images else (2, 64, width)
    target = ARCHITECTURES[architecture]
    launches = launches_of(torch.zeros(shape, dtype=cross_compile.DTYPES[dtype]), width)
    assert len(launches) == 9
    for recorded in launches:
        found = cross_compile.examine(recorded, target)
        assert "error" not in found, (recorded.name, found)
        assert found["shared"] <= target.shared_memory, (recorded.name, found)
        assert not found["spills"], (recorded.name, found)
        assert found["load"] >= 128, (recorded.name, found)
        if dtype != "fp32" and recorded.name not in NO_TENSOR_CORES:
            assert found["tensor"], (recorded.name, found)
