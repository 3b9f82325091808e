"""The Triton kernels of additive attention where they are special: routes, widths, long inputs.

What all operators share is in tests/contract, which runs in the interpreter too.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from swiftkernels import AdditiveAttention
from swiftkernels.backends.triton import sizes
from swiftkernels.ops.additive_attention import api, reference
from swiftkernels.ops.additive_attention.op import SELF_ATTENTION
from swiftkernels.ops.additive_attention.reference import POOLINGS
from swiftkernels.ops.additive_attention.triton import config, launch
from swiftkernels.ops.additive_attention.weights import Options
from swiftkernels.ops.operator import Call
from swiftkernels.testing.cases import (
    SELF_NAMES,
    assert_gradients_survive_cancellation,
    backward_by,
    cancelling_tensors,
    convert,
    forward_backward,
    forward_by,
    make_mask,
    make_tensors,
    split,
)
from swiftkernels.testing.tolerance import assert_as_good_as_eager, assert_exact, relative_error

WIDTHS = (37, 56, 96, 220, 320)
OTHER_WIDTHS = (48, 64, 112, 128, 168, 192, 224, 384, 512)

Tensors = list[Tensor | None]


def run_kernels(
    tensors: Tensors, dout: Tensor, mask: Tensor | None, options: Options
) -> dict[str, Tensor]:
    """Output and all gradients by the kernels."""

    def attention(*tensors: Tensor) -> Tensor:
        return api.additive_self_attention(
            *tensors, mask=mask, **options._asdict(), backend="triton"
        )

    return forward_backward(attention, tensors, SELF_NAMES, dout)


def run_definition(
    tensors: Tensors, dout: Tensor, mask: Tensor | None, options: Options, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output and all gradients by the definition, in `dtype`."""

    def attention(*tensors: Tensor) -> Tensor:
        (x,), weights = split(tensors)
        return reference.additive_self_attention(x, weights, mask, options)

    return forward_backward(attention, convert(tensors, dtype), SELF_NAMES, dout)


def options_for(token_dim: int, pooling: str = "l2", qk_norm: bool = True) -> Options:
    return Options(pooling, qk_norm, token_dim**-0.5, 1e-12)


@pytest.fixture(params=["fused", "projecting", "wide"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels of every width, for layers wider than 16: wide ones are slow here."""
    limit = {"fused": None, "projecting": "MAX_FUSED_WIDTH", "wide": "MAX_PROJECTED_WIDTH"}
    if limit[request.param]:
        monkeypatch.setattr(config, limit[request.param], 16)
    launch.forget_launches()
    yield request.param
    launch.forget_launches()


@pytest.mark.parametrize(
    "width", [*WIDTHS, *(pytest.param(w, marks=pytest.mark.slow) for w in OTHER_WIDTHS)]
)
def test_every_width_equals_the_definition(width):
    """Fused (up to 64), projecting (up to 128) and wide layers."""
    tensors = make_tensors(1, 18, width, width, 1, dtype=torch.float64, seed=1)
    dout = torch.randn(1, 18, width, dtype=torch.float64)
    exact = run_definition(tensors, dout, None, options_for(width), torch.float64)
    assert_exact(run_kernels(tensors, dout, None, options_for(width)), exact)


@pytest.mark.parametrize(
    ("n_tokens", "in_dims", "token_dim", "heads"),
    [(1, 16, 16, 1), (7, 37, 8, 2), (49, 20, 30, 2), (65, 80, 33, 3), (20, 70, 150, 2)],
)
def test_odd_sizes_and_heads_equal_the_definition(n_tokens, in_dims, token_dim, heads):
    tensors = make_tensors(2, n_tokens, in_dims, token_dim, heads, dtype=torch.float64, seed=2)
    dout = torch.randn(2, n_tokens, token_dim, dtype=torch.float64)
    options = options_for(token_dim, "softmax")
    mask = make_mask(2, n_tokens)
    exact = run_definition(tensors, dout, mask, options, torch.float64)
    assert_exact(run_kernels(tensors, dout, mask, options), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n_tokens", "width"),
    [
        pytest.param(49, 56, marks=pytest.mark.slow),
        (33, 112),
        pytest.param(20, 220, marks=pytest.mark.slow),
    ],
)
def test_errors_are_at_most_twice_those_of_eager(dtype, n_tokens, width):
    tensors = make_tensors(2, n_tokens, width, width, 1, dtype=dtype, seed=6)
    dout = torch.randn(2, n_tokens, width).to(dtype)
    options = options_for(width)
    ours = run_kernels(tensors, dout, None, options)
    eager = run_definition(tensors, dout, None, options, dtype)
    exact = run_definition(tensors, dout, None, options, torch.float64)
    for name, value in ours.items():
        assert_as_good_as_eager(value, eager[name], exact[name], name=name)


@pytest.mark.parametrize("pooling", ["l2", "softmax"])
@pytest.mark.parametrize(("n_tokens", "width"), [(300, 20), (70, 80)])
def test_scores_of_almost_equal_tokens_have_exact_gradients(n_tokens, width, pooling):
    """Their weights are almost the same too, and most of what reaches the scores cancels."""
    tensors = make_tensors(2, n_tokens, width, width, 1, dtype=torch.float64, seed=21)
    tensors[0] = tensors[0][:, :1] + 1e-3 * tensors[0]
    dout = torch.randn(2, n_tokens, width, dtype=torch.float64)
    options = options_for(width, pooling)
    exact = run_definition(tensors, dout, None, options, torch.float64)
    eager = run_definition(tensors, dout.float(), None, options, torch.float32)
    ours = run_kernels(convert(tensors, torch.float32), dout.float(), None, options)
    for name, value in ours.items():
        if name in ("output", "w_g"):
            assert_as_good_as_eager(value, eager[name], exact[name], name=name)
        else:  # in which what rounding leaves of G . dG stays
            error, eager_error = (relative_error(t, exact[name]) for t in (value, eager[name]))
            assert error <= 8 * eager_error + 1e-6, f"{name}: {error:.3g}, eager {eager_error:.3g}"


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_where_biases_cancel_the_mean(pooling):
    draws = [cancelling_tensors("both", 1e-3, 2, 49, 24, seed) for seed in range(3)]
    ours, definition = (
        functools.partial(
            api.additive_self_attention, backend=backend, pooling=pooling, qk_norm=False
        )
        for backend in ("triton", "reference")
    )
    assert_gradients_survive_cancellation(ours, definition, draws)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_for_every_pooling(pooling, dtype):
    tensors = make_tensors(2, 40, 24, 24, 1, dtype=dtype, seed=7)
    dout = torch.randn(2, 40, 24).to(dtype)
    options = options_for(24, pooling)
    ours = run_kernels(tensors, dout, None, options)
    eager = run_definition(tensors, dout, None, options, dtype)
    exact = run_definition(tensors, dout, None, options, torch.float64)
    for name, value in ours.items():
        assert_as_good_as_eager(value, eager[name], exact[name], name=name)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("pooling", POOLINGS)
def test_zero_rows_follow_normalize(pooling):
    """Below eps the clamp is constant: values and gradients as torch.nn.functional.normalize."""
    tensors = make_tensors(2, 9, 20, 20, 1, bias=False, dtype=torch.float64, seed=8)
    tensors[0][:, ::3] = 0
    tensors[0][1] *= 1e-14
    dout = torch.randn(2, 9, 20, dtype=torch.float64)
    options = options_for(20, pooling)
    exact = run_definition(tensors, dout, None, options, torch.float64)
    assert_exact(run_kernels(tensors, dout, None, options), exact)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_large_rows_in_half_precision_stay_finite(pooling):
    tensors = make_tensors(2, 33, 48, 48, 1, dtype=torch.float16, seed=10)
    tensors[0][:, ::2] *= 1e4
    dout = torch.randn(2, 33, 48).half()
    for name, result in run_kernels(tensors, dout, None, options_for(48, pooling)).items():
        assert result.isfinite().all(), name


@pytest.mark.slow
def test_seventy_thousand_tokens_in_half_precision_stay_finite():
    """Where a sum in float16 would overflow: 70,000 equal tokens have |G| = 70,000."""
    tensors = make_tensors(1, 1, 16, 16, 1, dtype=torch.float16, seed=11)
    tensors[0] = tensors[0].expand(1, 70_000, 16)
    options = options_for(16, "sum")
    out, _ = forward_by(launch, tensors, None, options)
    (x,), weights = split([None if t is None else t.double() for t in tensors])
    exact = reference.additive_self_attention(x, weights, None, options)
    assert out.isfinite().all()
    within = exact.abs() < torch.finfo(torch.float16).max
    assert within.any()
    assert torch.allclose(out[within].double(), exact[within], rtol=2e-2)


@pytest.mark.usefixtures("route")
def test_images_are_read_through_their_strides():
    """[B, C, H W] as tokens: no copy, and the gradient has the strides of the input."""
    tensors = make_tensors(2, 20, 24, 24, 1, dtype=torch.float64, seed=13)
    tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    dout = torch.randn(2, 24, 20, dtype=torch.float64).transpose(1, 2)
    options = options_for(24)
    ours = run_kernels(tensors, dout, None, options)
    assert_exact(ours, run_definition(tensors, dout, None, options, torch.float64))
    assert ours["x"].stride() == tensors[0].stride()


def test_a_batch_element_does_not_depend_on_the_others(route):
    """Bit for bit: output and gradient of the input."""
    tensors = make_tensors(3, 40, 24, 24, 1, dtype=torch.float32, seed=16)
    dout = torch.randn(3, 40, 24)
    options = options_for(24, "softmax")
    together = run_kernels(tensors, dout, None, options)
    alone = run_kernels([tensors[0][1:2], *tensors[1:]], dout[1:2], None, options)
    for name in ("output", "x"):
        if route != "wide":
            assert torch.equal(together[name][1:2], alone[name])
        else:
            # The projections come from PyTorch's GEMM, which chooses its order by the batch.
            assert relative_error(together[name][1:2], alone[name]) < 1e-5


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("needed", [[0], [4], [5, 9], list(range(1, 10))])
def test_only_the_gradients_asked_for_are_computed(needed):
    tensors = make_tensors(1, 20, 24, 24, 1, dtype=torch.float64, seed=20)
    dout = torch.randn(1, 20, 24, dtype=torch.float64)
    exact = run_definition(tensors, dout, None, options_for(24), torch.float64)
    for i in needed:
        tensors[i].requires_grad_()
    out = api.additive_self_attention(*tensors, backend="triton")
    grads = torch.autograd.grad(out, [tensors[i] for i in needed], dout)
    names = [SELF_NAMES[i] for i in needed]
    assert_exact(dict(zip(names, grads, strict=True)), {name: exact[name] for name in names})


@pytest.mark.parametrize(
    ("width", "dtype"),
    [*itertools.product([16, 64, 65, 128], [torch.float16, torch.float32])],
)
def test_splits_cover_every_token_count(width, dtype):
    """N from 1 to 65536 by the shape logic alone."""
    block_n = config.choose_config(width, dtype).block_n
    for n_tokens in [*range(1, 300), 784, 3136, 16384, 16385, 65535, 65536]:
        splits, tiles_per_split = launch.split_tokens(n_tokens, block_n)
        assert splits <= sizes.MAX_SPLITS
        tokens = tiles_per_split * block_n
        assert (splits - 1) * tokens < n_tokens <= splits * tokens


def test_more_splits_than_are_combined_at_once(monkeypatch):
    """Enough tokens for several rounds of the combining loops, and for the last to be partial."""
    monkeypatch.setattr(config, "BLOCK_S", 4)
    launch.forget_launches()
    n_tokens = 32 * (2 * config.BLOCK_S + 3) + 5
    tensors = make_tensors(1, n_tokens, 16, 16, 1, dtype=torch.float64, seed=21)
    dout = torch.randn(1, n_tokens, 16, dtype=torch.float64)
    for pooling in ("l2", "softmax"):
        options = options_for(16, pooling)
        exact = run_definition(tensors, dout, None, options, torch.float64)
        assert_exact(run_kernels(tensors, dout, None, options), exact)


def test_batch_elements_more_than_two_to_the_31_elements_apart():
    """The pages between the two are never touched, so they take no memory."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    tensors = make_tensors(2, 9, 16, 16, 1, dtype=torch.float16, seed=22)
    stride = 2**31 + 64
    far = torch.empty(stride + 9 * 16, dtype=torch.float16).as_strided((2, 9, 16), (stride, 16, 1))
    far.copy_(tensors[0])
    dout = torch.randn(2, 9, 16).half()
    near_results = run_kernels(tensors, dout, None, options_for(16))

    def attention(x: Tensor) -> Tensor:
        return api.additive_self_attention(x, *tensors[1:], backend="triton")

    assert torch.equal(attention(far), near_results["output"])
    tensors = [far, *tensors[1:]]
    _, saved = forward_by(launch, tensors, None, options_for(16))
    dx, *_ = backward_by(launch, dout, tensors, None, saved, options_for(16))
    assert torch.equal(dx, near_results["x"])


@pytest.mark.usefixtures("route")
def test_the_operator_of_every_route_is_registered_rightly():
    """Also where the rows of a batch are no multiple of eight."""
    (x,), weights = split(make_tensors(1, 9, 24, 24, 1, dtype=torch.float32, seed=23))
    for t in (x, *weights):
        t.requires_grad_()
    call = Call((x,), weights, None, options_for(24), "triton", "statistics")
    torch.library.opcheck(SELF_ATTENTION.op, SELF_ATTENTION._flat(call))


@pytest.mark.usefixtures("route")
def test_gradients_share_no_memory():
    layer = AdditiveAttention(24, 24, 1, backend="triton")
    layer(torch.randn(1, 9, 24)).sum().backward()
    versions = {p: p.grad._version for p in layer.parameters()}
    layer.w_g.grad.zero_()
    for p in layer.parameters():
        assert p.grad.untyped_storage().nbytes() == p.grad.nbytes
        assert p is layer.w_g or p.grad._version == versions[p]
