"""What a call costs: kernel launches, other operators, bytes kept for the backward."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import calls
from swiftkernels import AdditiveAttention
from swiftkernels.testing.cases import make_tensors
from swiftkernels.testing.costs import saved_bytes
from tests.interpreter.instruments import TorchKernels, count_launches

NARROW, FUSED_LIMIT, MIDDLE, WIDE, VERY_WIDE = 48, 64, 96, 168, 260


def layer(width: int) -> AdditiveAttention:
    return AdditiveAttention(width, width, 1, backend="triton")


@pytest.mark.parametrize("width", [NARROW, FUSED_LIMIT, MIDDLE, WIDE, VERY_WIDE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_forward_is_two_launches(width, dtype):
    with count_launches() as launches, torch.no_grad():
        layer(width).to(dtype)(torch.randn(2, 20, width, dtype=dtype))
    second = "_output_forward_kernel" if width <= 128 else "_operands_kernel"
    assert launches == ["_pool_forward_kernel", second]


@pytest.mark.parametrize(
    ("width", "expected"),
    [(NARROW, 3), (FUSED_LIMIT, 3), (MIDDLE, 2), (WIDE, 2), (VERY_WIDE, 2)],
)
def test_a_backward_is_at_most_three_launches(width, expected):
    out = layer(width)(torch.randn(2, 20, width, requires_grad=True))
    with count_launches() as launches:
        out.sum().backward()
    assert len(launches) == expected


@pytest.mark.parametrize("width", [NARROW, MIDDLE, WIDE, VERY_WIDE])
def test_a_forward_calls_nothing_else_up_to_128(width):
    """Above, the four products of the definition."""
    tensors = make_tensors(2, 20, width, width, 1, dtype=torch.float16, seed=0)
    with count_launches(), TorchKernels() as torch_kernels, torch.no_grad():
        calls.forward(tensors)
    names = [name for name, _ in torch_kernels.calls]
    assert names == ([] if width <= 128 else ["addmm"] * 4)


@pytest.mark.parametrize("width", [NARROW, MIDDLE, WIDE, VERY_WIDE])
def test_other_operators_of_a_backward_are_products_and_sums(width):
    """Up to 64, of matrices of E x E: dWp, dbp and dWf, no casts and no sums."""
    tensors = make_tensors(2, 135, width, width, 1, dtype=torch.float16, seed=1)
    backward = calls.forward(tensors)
    with count_launches(), TorchKernels() as torch_kernels, torch.no_grad():
        backward()
    of_weights = ["mm", "mv", "addmm_"]
    expected = {
        NARROW: of_weights,
        # dw_g, dbq and dbk; dWq, dWk, U, V and dbf
        MIDDLE: ["sum", *["_to_copy"] * 3, *["mm"] * 4, "sum", *of_weights],
    }
    # dz, dy and dx; dw_g, dbq, dbk and dbp; the four matrices and dbf
    wide = [*["mm"] * 3, "addmm", "sum", *["_to_copy"] * 4, *["mm"] * 4, "sum"]
    assert [name for name, _ in torch_kernels.calls] == expected.get(width, wide)
    if width == NARROW:
        for _, shapes in torch_kernels.calls:
            assert all(max(shape) <= width for shape in shapes)


@pytest.mark.parametrize("width", [NARROW, MIDDLE, WIDE, VERY_WIDE])
@pytest.mark.parametrize("images", [False, True])
def test_a_backward_needs_no_more_than_the_input(width, images):
    """Besides the parameters: at most 1.05 x the bytes of x, above 128 of x and four rows of E for
    each token; the eager layer keeps 7.1 x."""
    shape = (2, width, 14, 14) if images else (2, 196, width)
    x = torch.randn(shape, requires_grad=True)
    attention = layer(width)
    kept = saved_bytes(lambda: attention(x), attention.parameters())
    folded = width * width * 4 if width <= 128 else 4 * x.nbytes  # M = Wf Wp, or the rows
    assert x.nbytes <= kept <= 1.05 * x.nbytes + folded
