"""The kernels of conv_mlp compile for GPUs that are not there."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import calls, cross_compile
from benchmarks.gpu.cross_compile import ARCHITECTURES, Cell

pytestmark = pytest.mark.usefixtures("fresh_triton_cache")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("side", [4, 7])
@pytest.mark.parametrize("width", [24, 220])
def test_every_promised_alignment_holds(width: int, side: int, channels_last: bool) -> None:
    """Of a slice of wider images; a GPU would fault or write astray."""
    x = torch.zeros(3, width + 8, side, side, dtype=torch.float16)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with cross_compile.recorded_launches() as launches:
        calls.block(x[:, :width], 40, 3, infer=True)
        calls.block(x[:, :width], 40, None)()
    assert len(launches) in (4, 5)
    for kernel, arguments in launches:
        for prefix in ("", "dout_", "dx_"):
            align = arguments.get(f"{prefix.upper()}ALIGN", 1)
            for name in ("stride_b", "stride"):
                assert arguments.get(f"{prefix}{name}", 0) % align == 0, (kernel, name)


@pytest.mark.parametrize(
    ("width", "dtype", "images", "architecture"),
    [
        (48, "fp16", False, "sm_80"),
        pytest.param(112, "fp32", True, "sm_90", marks=pytest.mark.slow),
        pytest.param(220, "bf16", True, "gfx942", marks=pytest.mark.slow),
        pytest.param(512, "fp16", False, "sm_90", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_fits_a_gpu(width: int, dtype: str, images: bool, architecture: str) -> None:
    """It compiles, fits into shared memory and registers, uses tensor cores and wide loads."""
    cell = Cell(ARCHITECTURES[architecture], dtype, width, "conv_mlp")
    launches = cross_compile.block_launches_of(
        width, cross_compile.DTYPES[dtype], class_=cell.architecture.class_, images=images
    )
    names = [recorded.name for recorded in launches]
    assert names[:4] == [
        "block_forward", "mlp_forward", "mlp_input_backward", "mlp_weights_backward",
    ]  # fmt: skip
    for recorded in launches:
        found = cross_compile.examine(recorded, cell.architecture)
        assert not cross_compile.unexpected(cell, recorded, found), (recorded.name, found)
