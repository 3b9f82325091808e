"""What a call costs: kernel launches, other operators, bytes kept for the backward."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import calls
from swiftkernels import AdditiveAttention
from swiftkernels.testing.cases import make_tensors
from swiftkernels.testing.costs import saved_bytes
from tests.interpreter.instruments import TorchKernels, count_launches

NARROW, FUSED_LIMIT, WIDE, VERY_WIDE = 48, 64, 168, 260


def layer(width: int) -> AdditiveAttention:
    return AdditiveAttention(width, width, 1, backend="triton")


@pytest.mark.parametrize("width", [NARROW, FUSED_LIMIT, WIDE, VERY_WIDE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_forward_is_two_launches_or_three(width, dtype):
    """Without tensor cores, PyTorch's libraries compute the last product of wide layers."""
    with count_launches() as launches, torch.no_grad():
        layer(width).to(dtype)(torch.randn(2, 20, width, dtype=dtype))
    if width <= 128:
        assert launches == ["_pool_forward_kernel", "_output_forward_kernel"]
    else:
        product = ["_linear_kernel"] if dtype == torch.float16 else []
        assert launches == ["_pool_forward_kernel", "_operands_kernel", *product]


@pytest.mark.parametrize(
    ("width", "expected"), [(NARROW, 3), (FUSED_LIMIT, 3), (WIDE, 4), (VERY_WIDE, 4)]
)
def test_a_backward_is_at_most_four_launches(width, expected):
    out = layer(width)(torch.randn(2, 20, width, requires_grad=True))
    with count_launches() as launches:
        out.sum().backward()
    assert len(launches) == expected


@pytest.mark.parametrize("width", [NARROW, WIDE, VERY_WIDE])
def test_a_forward_calls_nothing_else_up_to_128(width):
    """Above, one GEMM makes queries and keys, and weights are concatenated for both products."""
    tensors = make_tensors(2, 20, width, width, 1, dtype=torch.float16, seed=0)
    with count_launches(), TorchKernels() as torch_kernels, torch.no_grad():
        calls.forward(tensors)
    names = [name for name, _ in torch_kernels.calls]
    assert names == ([] if width <= 128 else ["cat", "cat", "addmm", "cat"])


@pytest.mark.parametrize("width", [NARROW, WIDE, VERY_WIDE])
def test_other_operators_of_a_backward_are_three_products_of_weights(width):
    """dWp, dbp and dWf from matrices of E x E, no casts and no sums; above 128 q, k and dx too."""
    batch, n_tokens = 2, 45
    tensors = make_tensors(batch, n_tokens, width, width, 1, dtype=torch.float16, seed=1)
    backward = calls.forward(tensors)
    with count_launches(), TorchKernels() as torch_kernels, torch.no_grad():
        backward()
    wide = ["cat", "cat", "addmm", "mm", "addmm_"] if width > 128 else []
    assert [name for name, _ in torch_kernels.calls] == [*wide, "mm", "mv", "addmm_"]
    for _, shapes in torch_kernels.calls[len(wide) :]:
        assert all(max(shape) <= width for shape in shapes)


@pytest.mark.parametrize("width", [NARROW, WIDE, VERY_WIDE])
@pytest.mark.parametrize("images", [False, True])
def test_a_backward_needs_no_more_than_the_input(width, images):
    """Kept besides the parameters: at most 1.05 x the bytes of x; the eager layer keeps 7.1 x."""
    shape = (2, width, 14, 14) if images else (2, 196, width)
    x = torch.randn(shape, requires_grad=True)
    attention = layer(width)
    kept = saved_bytes(lambda: attention(x), attention.parameters())
    folded = width * width * 4  # M = Wf Wp, of the size of a parameter
    assert x.nbytes <= kept <= 1.05 * x.nbytes + folded
