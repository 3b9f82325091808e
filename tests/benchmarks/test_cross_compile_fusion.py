"""The kernels of fused networks compile for GPUs that are not there."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import cross_compile
from benchmarks.gpu.cross_compile import ARCHITECTURES, Cell
from swiftkernels.fusion.steps import Convolution
from swiftkernels.fusion.triton import launch

pytestmark = pytest.mark.usefixtures("fresh_triton_cache")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("side", [5, 8])
@pytest.mark.parametrize("channels", [3, 24, 37])
def test_every_promised_alignment_holds(channels: int, side: int, channels_last: bool) -> None:
    """Of a slice of wider images; a GPU would fault or read others."""
    x = torch.zeros(3, channels + 8, side, side, dtype=torch.float16)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x = x[:, :channels]
    step = Convolution(torch.zeros(16, channels, 3, 3).half(), torch.zeros(16).half())
    with cross_compile.recorded_launches() as launches:
        launch.ConvolutionPlan(x, step)(x, launch.pack(step), None, None)
    ((_, arguments),) = launches
    assert arguments["CHANNELS_LAST"] is channels_last
    for name in ("stride_b", "stride_h", "stride_w"):
        assert arguments[name] % arguments["ALIGN"] == 0


@pytest.mark.parametrize(
    ("width", "dtype", "architecture"),
    [
        (48, "fp16", "sm_80"),
        pytest.param(56, "bf16", "sm_90", marks=pytest.mark.slow),
        pytest.param(64, "fp32", "gfx942", marks=pytest.mark.slow),
        pytest.param(112, "fp16", "sm_120", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_fits_a_gpu(width: int, dtype: str, architecture: str) -> None:
    """It compiles, fits into shared memory and registers, uses tensor cores and wide loads."""
    cell = Cell(ARCHITECTURES[architecture], dtype, width, "fusion")
    names = [recorded.name for recorded in cell.launches]
    half = width // 2
    expected = [f"convolution_3_{half}", f"convolution_{half}_{width}"]
    if width <= 64:
        expected.append(f"convolution_{width}_{2 * width}")
    assert names == [*expected, "residual_output_forward"]
    for recorded in cell.launches:
        found = cross_compile.examine(recorded, cell.architecture)
        assert not cross_compile.unexpected(cell, recorded, found), (recorded.name, found)
