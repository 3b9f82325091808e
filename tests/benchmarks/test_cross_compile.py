"""The kernels can be cross-compiled, with the arguments they are launched with."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import calls, cross_compile
from benchmarks.gpu.cross_compile import ARCHITECTURES, Cell
from swiftkernels.testing.cases import make_tensors

pytestmark = pytest.mark.usefixtures("fresh_triton_cache")


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("width", [24, 80, 264])
def test_every_promised_alignment_holds(width, images):
    """For a slice of wider tokens: with wrong promises, a GPU would fault or write elsewhere."""
    tensors = make_tensors(2, 21, width + 8, width, 1, dtype=torch.float16)
    x = tensors[0].transpose(1, 2).contiguous().transpose(1, 2) if images else tensors[0]
    tensors[0] = x[..., :width]
    tensors[1], tensors[3] = tensors[1][:, :width], tensors[3][:, :width]
    with cross_compile.recorded_launches() as launches:
        calls.forward(tensors)()
    assert launches
    for kernel, arguments in launches:
        for prefix, align in (("", "ALIGN"), ("dx_", "ALIGN"), ("dout_", "DOUT_ALIGN")):
            for name in (f"{prefix}stride_b", f"{prefix}stride"):
                assert arguments.get(name, 0) % arguments.get(align, 1) == 0, (kernel, name)


@pytest.mark.parametrize(
    ("width", "dtype", "pooling", "images", "architecture", "allowed"),
    [
        # Reading images, the fused rows kernel spills a few of sm_80's registers.
        (48, "fp16", "l2", True, "sm_80", ["spills"]),
        (56, "bf16", "softmax", False, "sm_90", []),
        (112, "fp32", "sum", False, "sm_80", []),
        (220, "fp16", "l2", False, "sm_80", []),
        (64, "fp16", "l2", False, "gfx942", []),
        pytest.param(384, "bf16", "softmax", False, "sm_86", [], marks=pytest.mark.slow),
        pytest.param(512, "bf16", "softmax", False, "sm_90", [], marks=pytest.mark.slow),
        pytest.param(512, "fp32", "l2", False, "sm_86", [], marks=pytest.mark.slow),
        # The widest of all keeps only a part of its tiles in registers.
        pytest.param(1024, "fp16", "l2", False, "sm_86", ["spills"], marks=pytest.mark.slow),
    ],
)
def test_every_kernel_fits_a_gpu(width, dtype, pooling, images, architecture, allowed):
    """It compiles, fits into shared memory and registers, uses tensor cores and wide loads."""
    cell = Cell(ARCHITECTURES[architecture], dtype, width)
    launches = cross_compile.launches_of(
        width,
        cross_compile.DTYPES[dtype],
        class_=cell.architecture.class_,
        pooling=pooling,
        images=images,
        masked=True,
    )
    assert len(launches) == (5 if width <= 64 else 4)
    for recorded in launches:
        found = cross_compile.examine(recorded, cell.architecture)
        wrong = cross_compile.unexpected(cell, recorded, found)
        assert set(wrong) <= set(allowed), (recorded.name, found)


@pytest.mark.slow
def test_the_whole_grid_fits(tmp_path):
    """What is in docs/results and has not changed since is not compiled again."""
    results = cross_compile.Results(cross_compile.DOCS / "results" / "gpu_kernels.json")
    results.path = tmp_path / "gpu_kernels.json"
    cells = cross_compile.grid()
    cross_compile.compile_all(cells, results)
    wrong = [
        (cell.key(recorded), problem)
        for cell in cells
        for recorded in cell.launches
        for problem in cross_compile.unexpected(cell, recorded, results.get(cell, recorded))
    ]
    assert not wrong


def test_a_fact_is_forgotten_when_its_launch_changes(tmp_path):
    """By another tile size, and by other source."""
    cell = Cell(ARCHITECTURES["sm_80"], "fp16", 48)
    recorded, *_ = cell.launches
    results = cross_compile.Results(tmp_path / "facts.json")
    results.put(cell, recorded, {"spills": 0})
    results.save()
    results = cross_compile.Results(tmp_path / "facts.json")
    assert results.get(cell, recorded)["spills"] == 0
    changed = recorded._replace(arguments=recorded.arguments | {"BLOCK_N": 16})
    assert results.get(cell, changed) is None
    assert cross_compile.digest(recorded) != cross_compile.digest(cell.launches[1])


def test_problems_are_found():
    cell = Cell(ARCHITECTURES["sm_80"], "fp16", 48)
    recorded, *_ = cell.launches
    good = {"shared": 0, "spills": 0, "stack": 0, "tensor": ["HMMA"], "load": 128}
    assert cross_compile.problems(cell, recorded, good) == []
    for change, problem in (
        ({"error": "CompilationError"}, "does not compile"),
        ({"shared": 166_913}, "over shared memory"),
        ({"spills": 1}, "spills"),
        ({"stack": 8}, "spills"),
        ({"tensor": []}, "no tensor cores"),
        ({"load": 64}, "narrow loads"),
    ):
        assert cross_compile.problems(cell, recorded, good | change) == [problem]


@pytest.mark.parametrize(
    ("width", "dtype", "bits"),
    [(48, "fp16", 128), (220, "fp16", 64), (220, "fp32", 128), (37, "bf16", 16), (37, "fp32", 32)],
)
def test_rows_are_aligned_as_their_width_allows(width, dtype, bits):
    assert cross_compile.row_alignment(width, dtype) == bits


def test_launches_are_those_of_the_class_asked_for():
    """In any order; the last product of wide layers has fewer stages on AMD's GPUs."""

    def stages(class_: str) -> int:
        launches = cross_compile.fused_launches_of(320, torch.float16, class_=class_)
        return launches[-1].arguments["num_stages"]

    assert stages("large") > stages("amd") == 2
