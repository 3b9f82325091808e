"""The compiled CPU kernels: accuracy, layouts, threads, packed weights, plans.

They are held to the error of eager PyTorch in the same type, both against float64.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import gc
import itertools
import mmap
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from swiftkernels import (
    AdditiveAttention,
    additive_attention,
    additive_self_attention,
    warmup,
)
from swiftkernels.backends.cpu import library
from swiftkernels.ops import plan
from swiftkernels.ops.additive_attention import cpu
from swiftkernels.ops.additive_attention.cpu import config, inference_plan, launch
from swiftkernels.ops.additive_attention.weights import Options, Weights
from swiftkernels.ops.operator import Needs
from swiftkernels.ops.plan import Plans
from swiftkernels.testing import costs
from swiftkernels.testing.cases import (
    POOLINGS,
    SELF_NAMES,
    assert_gradients_survive_cancellation,
    cancelling_tensors,
    convert,
    make_mask,
    make_query_key_tensors,
    make_tensors,
)
from swiftkernels.testing.tolerance import assert_as_good_as_eager, relative_error
from tests.builds import ROOT
from tests.cpu_cases import (
    BACKWARDS,
    FORMS,
    SIZES,
    Tensors,
    assert_accurate,
    assert_forms_accurate,
    attend,
    backward_in_use,
    form_in_use,
    gradients,
    kernels_in_use,
    options_of,
    tensors_of,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # inside torch itself
]

HAVE_KERNELS = library.loaded() is not None
RUNNABLE = [isa for isa, runs in library.available().items() if runs]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
poolings = pytest.mark.parametrize("pooling", POOLINGS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def without_kernels(test: Callable[..., None]) -> Callable[..., None]:
    """This test needs no kernels."""
    test.needs_no_kernels = True  # type: ignore[attr-defined]
    return test


@pytest.fixture(autouse=True)
def _need_kernels(request) -> None:
    if not HAVE_KERNELS and not hasattr(request.function, "needs_no_kernels"):
        pytest.skip(f"backend='cpu' {library.why_not()}")


@pytest.fixture(params=RUNNABLE)
def isa(request) -> Iterator[str]:
    """Each library that was built and that the processor can run, in use."""
    with library_in_use(request.param):
        yield request.param


def library_in_use(isa: str) -> contextlib.AbstractContextManager[None]:
    return kernels_in_use(library.declare(library.load(isa).handle, "additive"))


def random_tokens(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make_layer(in_dims: int = 16, token_dim: int = 16, num_heads: int = 1, **options: Any):
    """A layer on the CPU kernels, the same at every call."""
    torch.manual_seed(0)
    return AdditiveAttention(in_dims, token_dim, num_heads, **{"backend": "cpu"} | options)


def by_definition(
    layer: AdditiveAttention, x: Tensor, dtype: torch.dtype | None = None, **kwargs: Any
) -> Tensor:
    """What the definition makes of the layer's present weights; in another type if asked."""
    backend, layer.backend = layer.backend, "reference"
    try:
        with torch.no_grad():
            if dtype is None:
                return layer(x, **kwargs)
            kwargs = {
                name: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
                for name, v in kwargs.items()
            }
            return copy.deepcopy(layer).to(dtype)(x.to(dtype), **kwargs)
    finally:
        layer.backend = backend


def assert_right(layer: AdditiveAttention, x: Tensor, ours: Tensor, **kwargs: Any) -> None:
    """The output is as good as eager's on the layer's present weights."""
    exact = by_definition(layer, x, torch.float64, **kwargs)
    assert_as_good_as_eager(ours, by_definition(layer, x, **kwargs), exact)


def run_in_a_process(name: str, **environment: str) -> str:
    """Call a function of this module in a fresh process; its output."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            f"from tests.ops.additive_attention import test_cpu; test_cpu.{name}()",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


# Accuracy, by the error of eager PyTorch in the same type.


@dtypes
@pytest.mark.parametrize("case", range(len(SIZES)), ids=map(str, SIZES))
def test_error_is_within_twice_that_of_eager(isa, case, dtype):
    assert_accurate(tensors_of(case, dtype), **options_of(case, *SIZES[case][:2]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@poolings
def test_every_variant_is_as_accurate_as_eager(isa, pooling, qk_norm, masked, bias):
    tensors = make_tensors(3, 41, 20, 12, 2, bias=bias, dtype=torch.float32)
    mask = make_mask(3, 41) if masked else None
    assert_accurate(tensors, pooling=pooling, qk_norm=qk_norm, mask=mask)


@pytest.mark.parametrize("dropped", [name for name in SELF_NAMES if name.endswith("bias")])
def test_each_bias_may_be_missing_alone(dropped):
    tensors = make_tensors(2, 9, 6, 5, dtype=torch.float32)
    tensors[SELF_NAMES.index(dropped)] = None
    assert_accurate(tensors)


@pytest.mark.parametrize("options", [{"scale": 3.0}, {"scale": -0.5}, {"scale": 2}, {"eps": 2.0}])
@pytest.mark.parametrize("pooling", ["softmax", "linear", "l2"])
def test_scale_and_eps_are_honoured(pooling, options):
    assert_accurate(make_tensors(2, 9, 6, 5, dtype=torch.float32), pooling=pooling, **options)


@pytest.mark.parametrize("n_tokens", [1, 7, 31, 32, 33, 49, 65, 256, 257, 700])
@pytest.mark.parametrize("batch", [1, 2, 5, 33])
def test_all_counts_of_tokens_and_batch_elements(batch, n_tokens):
    case = batch + n_tokens
    torch.set_num_threads(1 + case % 3 // 2)
    tensors = make_tensors(batch, n_tokens, 6, 9, dtype=torch.float32)
    assert_accurate(tensors, pooling=POOLINGS[case % 4], mask=make_mask(batch, n_tokens))


@poolings
@dtypes
def test_batch_elements_with_all_tokens_masked_are_as_good_as_eager(isa, pooling, dtype):
    tensors = make_tensors(3, 70, 12, 10, dtype=dtype)
    mask = make_mask(3, 70)
    mask[1] = False
    mask[2, 32:] = False  # a whole slice of the sums
    if dtype == torch.float16 and pooling == "l2":  # eps is 0 there: eager divides 0 by 0
        tensors, mask = [tensors[0][[0, 2]], *tensors[1:]], mask[[0, 2]]
    assert_accurate(tensors, pooling=pooling, mask=mask)


@pytest.mark.parametrize("recompute", [True, False])
def test_batch_elements_with_all_tokens_masked_give_no_nan_in_float16(recompute):
    tensors = make_tensors(2, 40, 12, 10, dtype=torch.float16)
    mask = make_mask(2, 40)
    mask[1] = False
    result = gradients(tensors, mask=mask, recompute=recompute)
    assert all(t.isfinite().all() for t in result.values())


@poolings
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_rows_are_treated_as_by_normalize(isa, pooling, dtype, bias):
    tensors = make_tensors(2, 40, 6, 5, bias=bias, dtype=dtype)
    tensors[0][0, 1] = 0
    tensors[0][1] = 0
    for recompute in (True, False):
        result = gradients(tensors, pooling=pooling, recompute=recompute)
        assert all(t.isfinite().all() for t in result.values())
    # Tokens that are all the same leave of some gradients only what rounding makes of them.
    tensors[0][1, ::2] = random_tokens(20, 6, dtype=dtype)
    assert_accurate(tensors, pooling=pooling)


@pytest.mark.parametrize("pooling", ["l2", "softmax"])
@pytest.mark.parametrize(("batch", "n_tokens"), [(4, 49), (1, 700), (3, 300), (2, 1300)])
@pytest.mark.parametrize("threads", [1, 2])
def test_scores_of_almost_equal_tokens_have_exact_gradients(isa, threads, batch, n_tokens, pooling):
    """Their weights are almost the same too, and most of what reaches the scores cancels."""
    torch.set_num_threads(threads)
    tensors = make_tensors(batch, n_tokens, 24, 20)
    tensors[0] = tensors[0][:, :1] + 1e-3 * tensors[0]
    assert_accurate(convert(tensors, torch.float32), pooling=pooling)


@poolings
def test_zero_rows_give_no_nan_in_float16(pooling):
    """There eps is 0 and eager divides 0 by 0."""
    tensors = make_tensors(2, 40, 6, 5, bias=False, dtype=torch.float16)
    tensors[0][0, 1] = 0
    tensors[0][1] = 0
    for recompute in (True, False):
        result = gradients(tensors, pooling=pooling, recompute=recompute)
        assert not any(t.isnan().any() for t in result.values())
        assert result["output"].isfinite().all()


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_below_eps_have_the_gradient_of_a_constant_norm(isa, dtype, eps):
    """Rows of q and k from zero to just below eps; some above as well."""
    tensors = make_tensors(2, 6, 5, 4)
    shrink = torch.tensor([0, 1e-3, 0.1, 0.2, 0.3, 10], dtype=torch.float64).unsqueeze(1) * eps
    tensors[0], tensors[2], tensors[4] = tensors[0] * shrink, None, None
    dout = random_tokens(2, 6, 4, seed=3)
    assert_accurate(convert(tensors, dtype), dout, eps=eps)


@pytest.mark.parametrize("factor", [1e-15, 1e-6, 1e-3, 1e4, 1e8])
@pytest.mark.parametrize("pooling", ["l2", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_and_tiny_tokens(isa, dtype, pooling, factor):
    """Without biases, beside which the tiny would be all the same."""
    tensors = make_tensors(2, 33, 12, 10, bias=False)
    tensors[0] = tensors[0] * factor
    assert_accurate(convert(tensors, dtype), pooling=pooling)


@poolings
def test_rows_of_norm_above_65504_are_normalised_in_float16(isa, pooling):
    """In float16 their norm is infinite, and eager's unit rows are 0: its error at tokens of a size
    that suits it is the measure."""
    small = make_tensors(2, 9, 64, 64, bias=False, dtype=torch.float16)
    small[0] = small[0].sign() * (1 + 0.1 * small[0].abs()).clamp(max=2)
    large = [small[0] * 2**14, *small[1:]]
    wide = convert(large, torch.float64)
    assert (wide[0] @ wide[1].T).norm(dim=-1).min() > torch.finfo(torch.float16).max
    exact = gradients(wide, None, "reference", pooling=pooling)
    exact_small = gradients(convert(small, torch.float64), None, "reference", pooling=pooling)
    eager_small = gradients(small, None, "reference", pooling=pooling)
    for recompute in (True, False):
        ours = gradients(large, pooling=pooling, recompute=recompute)
        assert all(t.isfinite().all() for t in ours.values())
        # Gradients of the tokens are below the smallest numbers of the type.
        for name in set(ours) - {"x"}:
            bound = 2 * relative_error(eager_small[name], exact_small[name])
            error = relative_error(ours[name], exact[name])
            assert error <= bound + 4 * torch.finfo(torch.float16).eps, name


@pytest.mark.parametrize("spread", [2, 1, 0.6, 0.5, 0.3, 0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("layer", ["query", "key", "both"])
def test_biases_that_cancel_the_mean_cost_no_accuracy(isa, layer, spread):
    tensors, _ = cancelling(layer, spread)
    assert_forms_accurate(tensors)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("spread", [2, 1, 0.5, 1e-2, 1e-4])
@poolings
def test_gradients_where_biases_cancel_the_mean(pooling, spread, qk_norm):
    options: dict[str, Any] = {"pooling": pooling, "qk_norm": qk_norm}
    reference = functools.partial(additive_self_attention, backend="reference", **options)
    for layer in ("query", "key", "both"):
        draws = [cancelling_tensors(layer, spread, 2, 600, 24, seed) for seed in range(7)]
        for kind in BACKWARDS:
            with backward_in_use(kind) as recompute:
                ours = functools.partial(
                    additive_self_attention, backend="cpu", recompute=recompute, **options
                )
                assert_gradients_survive_cancellation(ours, reference, draws, f"{layer}, {kind}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["tokens", "channels first"])
def test_gradients_where_biases_cancel_the_mean_of_unmasked_tokens(isa, layout, dtype):
    """Most tokens are padding, whose queries are as long as the bias."""
    tensors = cancelling_tensors("both", 1e-2, 3, 300, 24)
    mask = torch.zeros(3, 300, dtype=torch.bool)
    mask[:, :60] = True
    tensors[0][~mask] = 0
    tensors = convert(tensors, dtype)
    if layout == "channels first":
        tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert_accurate(tensors, qk_norm=False, pooling="sum", mask=mask)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("spread", [2, 1, 0.5, 0.1, 1e-2, 1e-4])
@poolings
def test_outputs_where_biases_cancel_the_mean(pooling, spread, qk_norm):
    for n_tokens in (7, 49, 1000):
        tensors = cancelling_tensors("both", spread, 2, n_tokens, 48)
        assert_forms_accurate(tensors, pooling=pooling, qk_norm=qk_norm)


def parameters(tensors: Tensors) -> Weights:
    """Weights that are packed."""
    return Weights(*[None if t is None else nn.Parameter(t, False) for t in tensors[1:]])


def infer(
    x: Tensor,
    weights: Weights,
    options: Options,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    plans: Plans | None = None,
) -> Tensor:
    """The output by the inference plans of the CPU kernels."""
    arguments = x, weights, mask, options, scale, plans or Plans()
    return plan.run(lambda: inference_plan(*arguments), x, weights, mask, scale)[0]


@pytest.mark.parametrize("form", ["triangular", "folded"])
def test_cancellation_is_noticed_and_remembered(isa, form):
    tensors, options = cancelling("both", 1e-3)
    harmless = [random_tokens(2, 40, 12, seed=2), *tensors[1:]]
    plans = Plans()
    with form_in_use(FORMS[form]):
        weights = parameters(tensors)
        attend_to = functools.partial(infer, weights=weights, options=options)
        attend_to(harmless[0], plans=plans)
        slot = plans.slot((FORMS[form], options, torch.float32), (*weights, None))
        assert not slot.packed.cancels
        attend_to(tensors[0], plans=plans)
        assert slot.packed.cancels
        again = attend_to(tensors[0], plans=plans), attend_to(harmless[0], plans=plans)
        with form_in_use(FORMS["plain"]):
            plain = attend_to(tensors[0]), attend_to(harmless[0])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("row_norm", [1e-1, 1e-2, 1e-3])
def test_few_rows_may_cancel(isa, row_norm):
    """The norms of the others hide them from the check for cancellation."""
    tensors, _ = cancelling("both", 3)
    few, mean = tensors[0][:, ::5], random_tokens(12, seed=9)
    few.copy_(mean + row_norm * (few - mean))
    assert_forms_accurate(tensors)


def cancelling(layer: str, spread: float) -> tuple[Tensors, Options]:
    """Tokens around a mean that the bias of the query or key layer takes away; their options."""
    tensors = make_tensors(2, 40, 12, 10)
    mean = random_tokens(12, seed=9, dtype=torch.float64)
    tensors[0] = mean + spread * tensors[0]
    if layer != "key":
        tensors[2] = -tensors[1] @ mean
    if layer != "query":
        tensors[4] = -tensors[3] @ mean
    return convert(tensors, torch.float32), Options("l2", True, 10**-0.5, 1e-12)


@poolings
def test_long_inputs_are_as_accurate_as_by_eager(isa, pooling):
    """A float32 sum over all tokens one by one is not: its error grows with their number."""
    assert_accurate(make_tensors(1, 20_000, 8, 8, dtype=torch.float32), pooling=pooling)


@pytest.mark.parametrize("width", [512, 900])
def test_wide_layers_are_as_accurate_as_eager(width):
    assert_accurate(make_tensors(1, 9, width, width, dtype=torch.float32))


@forms
@pytest.mark.parametrize("n_tokens", [9, 300])
def test_a_batch_element_does_not_depend_on_the_others(isa, form, n_tokens):
    """Not even on NaN beside it."""
    x, *layer = make_tensors(4, n_tokens, 6, 5, dtype=torch.float32)
    with form_in_use(form):
        alone = attend(x[1:2], *layer)
        exact = attend(*convert([x[1:2], *layer], torch.float64), backend="reference")
        eager = attend(x[1:2], *layer, backend="reference")
        assert_as_good_as_eager(alone, eager, exact)
        assert torch.equal(attend(x, *layer)[1:2], alone)
        x[[0, 2, 3]] = torch.nan
        out = attend(x, *layer)
        assert torch.equal(out[1:2], alone)
        assert out[[0, 2, 3]].isnan().all()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@poolings
def test_what_is_no_number_is_not_hidden(isa, pooling, number):
    """One bad token spoils its batch element, as in eager mode."""
    x, *layer = make_tensors(2, 40, 6, 5, dtype=torch.float32)
    x[0, 35, 2] = number
    eager = attend(x, *layer, pooling=pooling, backend="reference")
    for form in FORMS.values():
        with form_in_use(form):
            out = attend(x, *layer, pooling=pooling)
        assert out[eager.isnan()].isnan().all()
        assert out[1].isfinite().all()


def test_a_token_without_part_in_the_pooling_changes_no_other(isa):
    x, *layer = make_tensors(1, 40, 6, 5, dtype=torch.float32)
    mask = make_mask(1, 40)
    hidden = int((~mask[0]).nonzero()[0])
    for form in FORMS.values():
        with form_in_use(form):
            before = attend(x, *layer, mask=mask)
            other = x.clone()
            other[0, hidden] += 1
            after = attend(other, *layer, mask=mask)
        kept = torch.arange(40) != hidden
        assert torch.equal(before[0, kept], after[0, kept])
        assert not torch.equal(before[0, hidden], after[0, hidden])


# Layouts.


def spread_out(t: Tensor, dim: int, step: int) -> Tensor:
    """The same numbers in every `step`-th place of a dimension."""
    return t.repeat_interleave(step, dim)[(slice(None),) * dim + (slice(None, None, step),)]


LAYOUTS = {
    "channels first": lambda t: t.mT.contiguous().mT,
    "batch elements between tokens": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "everything reversed": lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "gaps between tokens": lambda t: spread_out(t, 1, 3),
    "gaps between channels": lambda t: spread_out(t, 2, 2),
    "part of wider tokens": lambda t: torch.cat([t, t], 2)[..., : t.shape[2]],
    "part of longer batch elements": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "odd offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
}
EXPANDED = {
    "one batch element": lambda t: t[:1].expand(t.shape),
    "one token": lambda t: t[:, :1].expand(t.shape),
    "one channel": lambda t: t[..., :1].expand(t.shape),
    "one number": lambda t: t[:1, :1, :1].expand(t.shape),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [*LAYOUTS, *EXPANDED])
@pytest.mark.parametrize("n_tokens", [33, 270])
def test_any_strides_give_the_result_of_contiguous_tensors(isa, n_tokens, layout, dtype):
    arrange = {**LAYOUTS, **EXPANDED}[layout]
    tensors = make_tensors(2, n_tokens, 20, 24, dtype=dtype)
    tensors[0], dout = arrange(tensors[0]), arrange(random_tokens(2, n_tokens, 24, dtype=dtype))
    dense = [tensors[0].contiguous(), *tensors[1:]]
    for form in FORMS.values():
        with form_in_use(form):
            assert torch.equal(attend(*tensors), attend(*dense))
    for recompute in (True, False):
        ours = gradients(tensors, dout, recompute=recompute)
        expected = gradients(dense, dout.contiguous(), recompute=recompute)
        for name, t in ours.items():
            assert torch.equal(t, expected[name]), (name, recompute)
        assert ours["x"].stride() == torch.empty_like(tensors[0]).stride()


@pytest.mark.parametrize("arrange", [lambda m: m.mT.contiguous().mT, lambda m: m[:1].expand(3, -1)])
def test_masks_of_any_strides(arrange):
    tensors, mask = make_tensors(3, 40, 12, 10, dtype=torch.float32), make_mask(3, 40)
    mask = arrange(mask)
    expected = gradients(tensors, mask=mask.contiguous())
    for name, t in gradients(tensors, mask=mask).items():
        assert torch.equal(t, expected[name]), name


@pytest.mark.parametrize("layout", ["transposed", "part of a wider one"])
def test_weights_of_any_strides(isa, layout):
    tensors = make_tensors(2, 40, 16, 16, dtype=torch.float32)

    def arrange(t: Tensor) -> Tensor:
        if t.dim() == 1:
            return torch.stack([t, t], 1)[:, 0]
        return t.mT.contiguous().mT if layout == "transposed" else torch.cat([t, t], 1)[:, :16]

    strided = [tensors[0], *map(arrange, tensors[1:])]
    for form in FORMS.values():
        with form_in_use(form):
            assert torch.equal(attend(*strided), attend(*tensors))
    assert_accurate(strided)


def test_a_bias_may_be_expanded():
    tensors = make_tensors(2, 40, 16, 16, dtype=torch.float32)
    for i in (2, 4, 7, 9):
        tensors[i] = tensors[i][:1].expand(16)
    assert_accurate(tensors)


@pytest.mark.parametrize("image", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", [False, True])
def test_no_copy_of_the_input_is_made(image, residual):
    layer, scale = make_layer(), random_tokens(16) if residual else None
    format_ = torch.channels_last if image == "channels_last" else torch.contiguous_format
    x = random_tokens(2, 16, 9, 9).to(memory_format=format_)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            layer(x, residual_scale=scale)  # packs the weights
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                layer(x, residual_scale=scale)
        names = {event.name for event in seen.events()}
        assert any("aten::empty" in name for name in names)
        assert names.isdisjoint({"aten::copy_", "aten::clone", "aten::contiguous", "aten::cat"})


def test_the_output_in_a_short_call_is_the_only_tensor_made():
    layer, x = make_layer(), random_tokens(2, 16, 9, 9)
    with torch.no_grad():
        layer(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            layer(x)
    assert [e.name for e in seen.events() if e.name.startswith("aten")] == ["aten::empty_strided"]


def random_images(count: int) -> Iterator[Tensor]:
    """Small images [B, 6, H, W]: axes in any order of memory, with gaps and repetitions."""
    generator = torch.Generator().manual_seed(0)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    for i in range(count):
        shape = (1 + below(2), 6, 1 + below(3), 1 + below(3))
        order = torch.randperm(4, generator=generator).tolist()
        x = random_tokens(*(shape[d] for d in order), seed=i)
        x = x.permute(*(order.index(d) for d in range(4)))
        for d in range(4):
            if below(3) == 0:
                x = spread_out(x, d, 2) if below(3) else x.narrow(d, 0, 1).expand(shape)
        yield x


@pytest.mark.parametrize("residual", [False, True])
def test_images_of_any_strides(residual):
    layer, scale = make_layer(6, 6), random_tokens(6) if residual else None
    # One channel for all, of strides that torch.empty_like takes for those of channels last.
    grey = [random_tokens(9).as_strided((1, 6, 3, 3), (3, 0, 3, 1))]
    for x in itertools.chain(grey, random_images(100)):
        with torch.no_grad():
            first = layer(x, residual_scale=scale)
            second = layer(x, residual_scale=scale)
        for out in (first, second):
            assert_right(layer, x, out, residual_scale=scale)
        assert torch.equal(first, second)


# Threads.


DIVISIONS = {
    "whole batch elements": (30, 49, 24, 20),
    "batch elements": (30, 260, 24, 20),
    "tokens": (1, 700, 24, 20),
    "tokens of several batch elements": (2, 300, 24, 20),
    "few tokens": (2, 7, 24, 20),
    "chunks of tokens": (1, 1700, 24, 20),
    "chunks of batch elements": (4, 1100, 8, 9),
}
"""Batch, tokens, C, D where threads share the work in that way, whatever their number here."""


@pytest.mark.parametrize("division", DIVISIONS)
@forms
def test_the_output_does_not_depend_on_the_number_of_threads(isa, form, division):
    tensors = make_tensors(*DIVISIONS[division], dtype=torch.float32)
    outputs = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        with form_in_use(form):
            outputs.append(attend(*tensors))
    assert all(torch.equal(out, outputs[0]) for out in outputs)


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("kind", BACKWARDS)
def test_gradients_do_not_depend_on_threads(isa, kind, division):
    """Of tokens to the bit; of weights to rounding, and to the bit for a number of threads."""
    tensors = make_tensors(*DIVISIONS[division], dtype=torch.float32)
    exact = gradients(convert(tensors, torch.float64), None, "reference")
    eager = gradients(tensors, None, "reference")
    leaves = [t.requires_grad_() for t in tensors]
    dout = random_tokens(*exact["output"].shape, seed=1)
    results = []

    def run() -> dict[str, Tensor]:
        with backward_in_use(kind) as recompute:
            out = additive_self_attention(*leaves, backend="cpu", recompute=recompute)
            grads = torch.autograd.grad(out, leaves, dout)
        return {"output": out.detach(), **dict(zip(SELF_NAMES, grads, strict=True))}

    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        result, again = run(), run()
        for name, t in result.items():
            assert torch.equal(t, again[name]), (name, threads)
            assert_as_good_as_eager(t, eager[name], exact[name], name=name)
        results.append(result)
    for name in ("output", "x"):
        assert all(torch.equal(result[name], results[0][name]) for result in results), name


def test_threads_share_a_batch_element_unless_its_matrices_outweigh_it():
    by_elements = functools.partial(config.backward_by_elements, threads=2)
    assert by_elements(2, 49, 512)
    assert by_elements(1, 49, 512)
    assert not by_elements(1, 196, 320)


@pytest.mark.parametrize(("batch", "n_tokens"), [(2, 200), (4, 49), (3, 100)])
def test_few_batch_elements_for_many_threads(isa, batch, n_tokens):
    """Here the number of threads decides between whole batch elements and tiles."""
    tensors = make_tensors(batch, n_tokens, 24, 20, dtype=torch.float32)
    exact = gradients(convert(tensors, torch.float64), None, "reference")
    eager = gradients(tensors, None, "reference")
    outputs = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        result = gradients(tensors)
        outputs.append(result["output"])
        for name, t in result.items():
            assert_as_good_as_eager(t, eager[name], exact[name], name=name)
    assert all(torch.equal(out, outputs[0]) for out in outputs)


class Watched:
    """A library whose calls of the forward leave their arguments in `calls`."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self.handle = handle
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)

    def swiftkernels_additive_forward(self, layer: bytes, call: bytes) -> int:
        self.calls.append(launch._CALL.unpack(call))
        return int(self.handle.swiftkernels_additive_forward(layer, call))


def test_as_many_threads_are_used_as_torch_is_told():
    watched = Watched(launch.kernels())
    tensors = make_tensors(4, 9, 6, 5, dtype=torch.float32)
    with kernels_in_use(watched):
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            attend(*tensors)
            assert watched.calls[-1][3] == threads


def test_other_python_threads_run_during_a_call():
    tensors = make_tensors(1, 2000, 64, 64, dtype=torch.float32)
    torch.set_num_threads(1)
    attend(*tensors)
    begin = time.perf_counter()
    attend(*tensors)
    # A call that takes a fifth of a second.
    repeats = 1 + int(0.2 / (time.perf_counter() - begin))
    tensors[0] = tensors[0].expand(repeats, -1, -1)
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    attend(*tensors)
    end = time.perf_counter()
    done.set()
    thread.join()
    middle = [t for t in ticks if begin + 0.25 * (end - begin) < t < end - 0.25 * (end - begin)]
    assert len(middle) >= 3, (len(ticks), end - begin)


def test_threads_of_python_share_a_layer():
    layer = make_layer()
    images = [random_tokens(2, 16, 5 + i, 7, seed=i) for i in range(4)]
    results: list[list[Tensor]] = [[] for _ in images]

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                results[i].append(layer(images[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, outputs in zip(images, results, strict=True):
        assert_right(layer, x, outputs[0])
        assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_threads_of_python_share_a_query_weight():
    """Two layers keep their packed weights in one place, each in turn."""
    layers = [make_layer(128, 128), make_layer(128, 128)]
    nn.init.normal_(layers[1].proj.weight, std=0.1)
    layers[1].to_query.weight = layers[0].to_query.weight
    x = random_tokens(4, 100, 128)
    expected = [by_definition(layer, x) for layer in layers]
    results: list[list[Tensor]] = [[], []]

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(40):
                results[i].append(layers[i](x))

    torch.set_num_threads(1)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, eager in zip(results, expected, strict=True):
        for out in outputs:
            torch.testing.assert_close(out, eager, rtol=1e-4, atol=1e-4)


def fork_after_parallel_work() -> None:
    """In a child, OpenMP's threads are gone; waiting for them would take forever."""
    torch.set_num_threads(2)
    tensors = make_tensors(4, 300, 24, 20, dtype=torch.float32)
    expected = gradients(tensors), attend(*tensors)
    child = os.fork()
    if child == 0:
        # torch's own products would wait: the child asks for one thread of them alone.
        torch.set_num_threads(1)
        same = torch.equal(attend(*tensors), expected[1])
        launch.torch.get_num_threads = lambda: 2
        same = same and torch.equal(attend(*tensors), expected[1])
        ours = gradients(tensors)
        same = same and all(torch.equal(ours[n], expected[0][n]) for n in ("output", "x"))
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            print("the same" if status == 0 else f"status {status}")
            # And the parent still can.
            assert torch.equal(attend(*tensors), expected[1])
            return
        time.sleep(0.05)
    os.kill(child, 9)
    print("the child hangs")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_computes_the_same():
    assert run_in_a_process("fork_after_parallel_work").strip() == "the same"


# The packed weights.


@pytest.fixture
def reused(monkeypatch) -> list[bool]:
    """Grows at each call of a layer: whether a plan of an earlier call served it."""
    found: list[bool] = []
    attend, attend_anew = AdditiveAttention._attend, AdditiveAttention._attend_anew

    def watching(layer: AdditiveAttention, *args: Any) -> Tensor:
        if layer.backend != "reference":
            found.append(True)
        return attend(layer, *args)

    def watching_anew(layer: AdditiveAttention, *args: Any) -> Tensor:
        if layer.backend != "reference":
            found[-1] = False
        return attend_anew(layer, *args)

    monkeypatch.setattr(AdditiveAttention, "_attend", watching)
    monkeypatch.setattr(AdditiveAttention, "_attend_anew", watching_anew)
    return found


def test_a_warm_layer_packs_nothing_and_has_its_plans(packings, reused):
    model = nn.Sequential(make_layer(), nn.Identity(), make_layer())
    before = copy.deepcopy(model.state_dict())
    assert warmup(model, training=True, image_sizes=[(3, 3), (12, 12)]) == ["0", "2"]
    assert len(packings) == 2 * 2  # layers, forms
    packings.clear()
    reused.clear()
    with torch.no_grad():
        for x in (
            random_tokens(1, 16, 3, 3),
            random_tokens(1, 16, 12, 12),
            random_tokens(1, 9, 16),
        ):
            model(x)
    model(random_tokens(1, 9, 16).requires_grad_()).sum()
    assert not packings
    assert len(reused) == 8
    assert all(reused)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_weights_are_packed_once(packings, reused):
    layer = make_layer()
    with torch.no_grad():
        for seed in range(3):
            layer(random_tokens(2, 9, 16, seed=seed))
            layer(random_tokens(1, 16, 3, 4, seed=seed))
    assert reused == 2 * [False] + 4 * [True]
    assert len(packings) == 1
    for _ in range(2):
        layer(random_tokens(2, 9, 16).requires_grad_()).sum().backward()
    with torch.no_grad():
        layer(random_tokens(2, 9, 16))
    assert len(packings) == 1
    layer.to_query.weight.data.mul_(2)
    with torch.no_grad():
        for _ in range(3):
            layer(random_tokens(2, 9, 16))
    assert len(packings) == 2


def optimise(optimiser: Callable[..., torch.optim.Optimizer], **options: Any):
    def change(layer: AdditiveAttention) -> None:
        step = optimiser(layer.parameters(), lr=0.01, **options)
        with torch.enable_grad():
            layer(random_tokens(2, 9, 16, seed=5)).square().sum().backward()
        step.step()

    return change


def load_state(layer: AdditiveAttention, **options: Any) -> None:
    state = {name: t + 0.1 for name, t in layer.state_dict().items()}
    layer.load_state_dict(state, **options)


def write_one_element(layer: AdditiveAttention) -> None:
    with torch.no_grad():
        layer.proj.weight[1, 3] += 1


def write_one_element_in_inference_mode(layer: AdditiveAttention) -> None:
    with torch.inference_mode():
        layer.final.weight[1, 3] += 1


def write_past_the_version(layer: AdditiveAttention) -> None:
    version = layer.to_key.weight._version
    layer.to_key.weight.data.mul_(1.5)
    assert layer.to_key.weight._version == version


def write_a_bias_past_the_version(layer: AdditiveAttention) -> None:
    layer.final.bias.data.add_(1)


def write_through_numpy(layer: AdditiveAttention) -> None:
    layer.w_g.detach().numpy()[...] *= -2


def take_other_data(layer: AdditiveAttention) -> None:
    layer.to_query.weight.data = layer.to_query.weight.data * 1.5


def take_another_parameter(layer: AdditiveAttention) -> None:
    layer.proj.weight = nn.Parameter(layer.proj.weight.detach() * 1.5)


def take_another_layer(layer: AdditiveAttention) -> None:
    layer.final = nn.Linear(16, 16)


def drop_a_bias(layer: AdditiveAttention) -> None:
    layer.proj.bias = None


def transpose_a_weight(layer: AdditiveAttention) -> None:
    """At its address, in its version."""
    layer.proj.weight = nn.Parameter(layer.proj.weight.detach().t())


def go_to_another_type_and_back(layer: AdditiveAttention) -> None:
    layer.to(torch.bfloat16).to(torch.float32)


def parametrise(name: str):
    def change(layer: AdditiveAttention) -> None:
        parametrize.register_parametrization(layer.get_submodule(name), "weight", Doubled())

    return change


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


CHANGES = [
    optimise(torch.optim.SGD),
    optimise(torch.optim.Adam),
    optimise(torch.optim.Adam, foreach=True),
    optimise(torch.optim.Adam, fused=True),
    load_state,
    functools.partial(load_state, assign=True),
    write_one_element,
    write_one_element_in_inference_mode,
    write_past_the_version,
    write_a_bias_past_the_version,
    write_through_numpy,
    take_other_data,
    take_another_parameter,
    take_another_layer,
    drop_a_bias,
    transpose_a_weight,
    go_to_another_type_and_back,
    parametrise("to_query"),
    parametrise("proj"),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("n_tokens", [9, 90])
def test_changed_weights_are_noticed(n_tokens, change):
    layer, x = make_layer(), random_tokens(2, n_tokens, 16)
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        before = [layer(x) for _ in range(3)]
    layer(leaf).sum().backward()
    change(layer)
    with torch.no_grad():
        after = [layer(x) for _ in range(3)]
    for out in after:
        assert_right(layer, x, out)
    if change is not go_to_another_type_and_back:
        assert not torch.allclose(before[-1], after[0])
    results = []
    for dtype, backend in (
        (torch.float32, "cpu"), (torch.float32, "reference"), (torch.float64, "reference")
    ):  # fmt: skip
        if dtype == torch.float64:
            layer = copy.deepcopy(layer).double()
        layer.backend = backend
        leaf = x.to(dtype).requires_grad_()
        results.append(torch.autograd.grad(layer(leaf).sin().sum(), leaf)[0])
    assert_as_good_as_eager(*results)


@pytest.mark.parametrize("name", ["to_query", "to_key", "proj", "final"])
def test_a_weight_that_is_computed_anew_at_every_call(name):
    """The allocator gives it the address of the one before it, of the same version."""
    layer, x = make_layer(48, 48), random_tokens(2, 9, 48)
    parametrise(name)(layer)
    original = layer.get_submodule(name).parametrizations.weight.original
    for element in range(4):
        with torch.no_grad():
            original[0, element] += 5
            out = layer(x)
        assert_right(layer, x, out)


def test_weights_at_one_address_in_other_strides():
    straight = make_tensors(2, 9, 16, 16, dtype=torch.float32)
    turned = [*straight[:6], straight[6].t(), *straight[7:]]
    for tensors in (straight, turned):
        exact = attend(*convert(tensors, torch.float64), backend="reference")
        eager = attend(*tensors, backend="reference")
        assert_as_good_as_eager(attend(*tensors), eager, exact)


def cut_weights_at_their_addresses() -> None:
    names = ("to_query", "to_key", "proj", "final")
    for name, training in itertools.product(names, (False, True)):
        layer, x = make_layer(), random_tokens(2, 9, 16)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                for _ in range(2):
                    layer(x)
        linear = layer.get_submodule(name)
        linear.weight = nn.Parameter(linear.weight.detach()[:, :8])
        with torch.set_grad_enabled(training):
            error = outcome(lambda layer=layer, x=x: layer(x))
        assert isinstance(error, tuple), (name, training)
        assert error[0] is ValueError, error
    print("refused")


def test_a_weight_cut_at_its_address_is_refused():
    """It stands where it stood, but what the kernels would read is not all there."""
    assert run_in_a_process("cut_weights_at_their_addresses").strip() == "refused"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["to_query", "proj"])
def test_a_weight_of_another_class_is_noticed(name, training):
    layer, x = make_layer(), random_tokens(2, 9, 16)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                layer(x)
    eager = by_definition(layer, x)
    linear = layer.get_submodule(name)
    linear.weight = nn.Parameter(TwoTensor(*[linear.weight.detach().clone() for _ in range(2)]))
    with torch.set_grad_enabled(training):
        out = layer(x).detach()
    assert type(out) is TwoTensor
    torch.testing.assert_close(out.a, eager)


def test_layers_with_one_query_weight_are_distinguished():
    first, second = make_layer(), make_layer()
    nn.init.normal_(second.proj.weight)
    second.to_query.weight = first.to_query.weight
    x = random_tokens(2, 9, 16)
    with torch.no_grad():
        for layer in (first, second, first, second):
            assert_right(layer, x, layer(x))


def test_weights_made_in_inference_mode_have_no_version(reused):
    with torch.inference_mode():
        layer = make_layer()
        x = random_tokens(2, 9, 16)
        for _ in range(2):
            layer(x)
        layer.proj.weight[1, 3] += 1
        assert_right(layer, x, layer(x))
    assert any(reused)  # and are not packed at every call all the same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_converted_to_another_type(dtype):
    layer, x = make_layer(), random_tokens(2, 9, 16)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        layer.to(dtype)
        for _ in range(2):
            assert_right(layer, x.to(dtype), layer(x.to(dtype)))
            with pytest.raises(TypeError, match="dtype of x"):
                layer(x)


@pytest.mark.parametrize("residual", [False, True])
def test_what_is_kept_of_a_layer_goes_with_it(residual):
    layer, scale = make_layer(), random_tokens(16) if residual else None
    x = random_tokens(2, 9, 16)
    with torch.no_grad():
        for _ in range(2):
            layer(x, residual_scale=scale)
    layer(x.requires_grad_(), residual_scale=scale).sum().backward()
    slots = layer._plans()._slots
    packed = [weakref.ref(b) for slot in slots.values() for b in slot.packed.buffers]
    assert packed
    del layer, slots
    assert not any(b() is not None for b in packed)


def test_what_is_kept_of_weights_of_a_function_goes_with_them():
    gc.collect()
    before = len(plan._known)
    x, *weights = make_tensors(2, 9, 6, 5, dtype=torch.float32)
    weights = [nn.Parameter(w, requires_grad=False) for w in weights]
    for _ in range(2):
        additive_self_attention(x, *weights, backend="cpu")
    assert len(plan._known) == before + 1
    del weights
    gc.collect()
    assert len(plan._known) == before


def test_computed_weights_leave_nothing_behind():
    layer, x = make_layer(), random_tokens(2, 9, 16)
    parametrise("to_query")(layer)
    with torch.no_grad():
        for _ in range(5):
            layer(x)
    assert not layer._plans().by_key
    assert not layer._plans()._slots


def test_weights_written_to_at_every_call_are_not_taken_for_packed():
    """As by a moving average that goes past the version counters."""
    layer, x = make_layer(), random_tokens(2, 9, 16)
    for factor in (1.1, 0.8, 1.3):
        for p in layer.parameters():
            p.data.mul_(factor)
        with torch.no_grad():
            assert_right(layer, x, layer(x))
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        assert_right(layer, x, out.detach())


def work_under_other_defaults() -> None:
    """New tensors of another type or on another device than those of the call."""
    tensors = make_tensors(2, 40, 12, 10, dtype=torch.float32)
    layer, image = make_layer(), random_tokens(2, 16, 3, 4)
    scale, dout = random_tokens(16), random_tokens(2, 40, 10)
    exact = gradients(tensors, dout, "reference")
    expected = by_definition(layer, image), by_definition(layer, image, residual_scale=scale)

    def work() -> tuple[list[dict[str, Tensor]], list[tuple[Tensor, Tensor]]]:
        results = [gradients(tensors, dout, recompute=recompute) for recompute in (True, False)]
        layer.invalidate()
        with torch.no_grad():
            outputs = [(layer(image), layer(image, residual_scale=scale)) for _ in range(3)]
        return results, outputs

    def check(results: list[dict[str, Tensor]], outputs: list[tuple[Tensor, Tensor]]) -> None:
        for name, t in ((name, t) for result in results for name, t in result.items()):
            torch.testing.assert_close(t, exact[name], rtol=1e-4, atol=1e-4)
        for out, by_eager in itertools.product(outputs, [expected]):
            torch.testing.assert_close(out, by_eager, rtol=1e-4, atol=1e-4)

    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        done = work()
        torch.set_default_dtype(torch.float32)
        check(*done)
    torch.set_default_device("meta")
    done = work()
    torch.set_default_device("cpu")
    check(*done)
    print("done")


def test_the_defaults_of_torch_do_not_matter():
    """In a process of its own: it would end where buffers are too small or have no address."""
    assert run_in_a_process("work_under_other_defaults").strip() == "done"


# Plans, and which calls they must not serve.


def outcome(call: Callable[[], Any]) -> Any:
    """The result, or the error's type and message."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def warm_and_cold(
    residual: bool = False, training: bool = False
) -> tuple[Callable[[Tensor], Any], Callable]:
    """A layer with plans, and the same without."""
    warm, scale = make_layer(), random_tokens(16) if residual else None
    cold = copy.deepcopy(warm)
    with torch.set_grad_enabled(training):
        for _ in range(2):
            warm(random_tokens(2, 9, 16), residual_scale=scale)
            warm(random_tokens(2, 16, 3, 3), residual_scale=scale)
    return (
        lambda x: outcome(lambda: warm(x, residual_scale=scale)),
        lambda x: outcome(lambda: cold(x, residual_scale=scale)),
    )


ODD_INPUTS = {
    "other width": lambda: random_tokens(2, 9, 15),
    "other channels": lambda: random_tokens(2, 15, 3, 3),
    "channels last": lambda: random_tokens(2, 3, 3, 16),
    "two axes": lambda: random_tokens(9, 16),
    "one number": lambda: torch.tensor(1.0),
    "float64": lambda: random_tokens(2, 9, 16, dtype=torch.float64),
    "bfloat16": lambda: random_tokens(2, 9, 16, dtype=torch.bfloat16),
    "int": lambda: torch.ones(2, 9, 16, dtype=torch.int64),
    "meta": lambda: torch.empty(2, 9, 16, device="meta"),
    "mkldnn": lambda: random_tokens(2, 16, 3, 3).to_mkldnn(),
    "sparse": lambda: random_tokens(2, 9, 16).to_sparse(),
    "no batch elements": lambda: random_tokens(0, 9, 16),
    "no tokens": lambda: random_tokens(2, 0, 16),
    "no tensor": lambda: [[0.0] * 16],
    "none": lambda: None,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ODD_INPUTS)
def test_odd_inputs_fare_as_at_the_first_call(kind, residual, training):
    x = ODD_INPUTS[kind]()
    warm, cold = warm_and_cold(residual, training)
    with torch.set_grad_enabled(training):
        results = warm(x), cold(x)
    if isinstance(results[1], Tensor):
        assert results[0].shape == results[1].shape
        assert results[0].device == results[1].device
    else:
        assert results[0] == results[1]


@pytest.mark.parametrize("kind", ["parameter", "negative bit", "five axes", "three axes"])
def test_unusual_inputs_are_right(kind):
    x = {
        "parameter": lambda: nn.Parameter(random_tokens(2, 9, 16)),
        "negative bit": lambda: torch.complex(*random_tokens(2, 2, 9, 16)).conj().imag,
        "five axes": lambda: random_tokens(2, 16, 2, 3, 4),
        "three axes": lambda: random_tokens(2, 9, 16),
    }[kind]()
    assert x.is_neg() == (kind == "negative bit")
    layer = make_layer()
    with torch.no_grad():
        for _ in range(3):
            assert_right(layer, x, layer(x))


def test_a_gradient_with_the_negative_bit_is_right():
    tensors = make_tensors(2, 9, 6, 5, dtype=torch.float32)
    dout = torch.complex(*random_tokens(2, 2, 9, 5)).conj().imag
    expected = gradients(tensors, dout.resolve_neg())
    for name, t in gradients(tensors, dout).items():
        assert torch.equal(t, expected[name]), name


@pytest.mark.parametrize("shape", [(2, 9, 16), (2, 16, 3, 3)])
def test_training_by_a_plan_gives_the_same_gradients(shape, reused):
    layer, x = make_layer(), random_tokens(*shape).requires_grad_()
    inputs = (x, *layer.parameters())
    results = []
    for _ in range(2):
        out = layer(x)
        grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)
        results.append([out, *torch.autograd.grad(layer(x).square().sum(), inputs), *second])
    assert reused == [False, True, True, True]
    for first, again in zip(*results, strict=True):
        assert torch.equal(first, again)
    with torch.no_grad():
        layer.proj.weight.mul_(2)
    layer(x)
    layer.proj.weight.data = layer.proj.weight.detach().t()
    torch.testing.assert_close(layer(x), by_definition(layer, x))
    assert reused[-2:] == [True, False]


def test_gradients_are_recorded_after_a_planned_call(reused):
    layer, x = make_layer(), random_tokens(2, 9, 16)
    with torch.no_grad():
        layer(x)
        assert not layer(x).requires_grad
    assert reused == [False, True]
    assert layer(x).requires_grad
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    assert layer(x.requires_grad_()).requires_grad


def test_autocast_is_honoured_after_a_planned_call(reused):
    layer, x = make_layer(), random_tokens(2, 9, 16)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(2):
                assert layer(x).dtype == torch.bfloat16
            with torch.autocast("cpu", enabled=False):
                assert layer(x).dtype == torch.float32
    assert reused == [False, True, False, False, True]


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_transforms_are_seen_after_a_planned_call(backend, reused):
    layer, x = make_layer(backend=backend).double().float(), random_tokens(3, 9, 16)
    layer.requires_grad_(False)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        reused.clear()
        by_element = torch.vmap(lambda t: layer(t.unsqueeze(0)).squeeze(0))(x)
        torch.testing.assert_close(by_element, by_definition(layer, x))
        tangent = torch.func.jvp(layer, (x,), (x.cos(),))[1]
        with forward_ad.dual_level(), torch.enable_grad():
            dual = layer(forward_ad.make_dual(x, x.cos()))
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)
    grad = torch.func.grad(lambda t: layer(t).sum())(x)
    assert not any(reused)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(layer(leaf).sum(), leaf)[0])


def test_modes_and_subclasses_are_seen_after_a_planned_call(reused):
    layer, x = make_layer(), random_tokens(2, 9, 16)
    with torch.no_grad():
        for _ in range(2):
            expected = layer(x)
        reused.clear()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            out = layer(mode.from_tensor(x))
            assert (out.shape, out.stride()) == (expected.shape, expected.stride())
            assert type(out) is not Tensor
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 4 * 2 * 2 * 9 * 16 * 16
    assert not any(reused)


def test_tensor_subclasses_pass_through(reused):
    layer, x = make_layer(), random_tokens(2, 9, 16)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        reused.clear()
        wrapped = AdditiveAttention(16, 16, 1, backend="cpu")
        for name, p in layer.named_parameters():
            module, _, attribute = name.rpartition(".")
            pair = nn.Parameter(TwoTensor(p.detach().clone(), p.detach().clone()))
            setattr(wrapped.get_submodule(module), attribute, pair)
        for _ in range(2):
            out = wrapped(TwoTensor(x, x + 1))
            assert type(out) is TwoTensor
            assert_right(layer, x, out.a)
            assert_right(layer, x + 1, out.b)
    assert not any(reused)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_after_a_planned_call_have_plain_operators(reused):
    layer, x = make_layer(backend="auto"), random_tokens(2, 9, 16)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        reused.clear()
        traced = torch.jit.trace(layer, x, check_trace=False)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "aten::linear" in kinds
    assert_right(layer, x + 1, traced(x + 1).detach())
    assert not any(reused)


def test_a_layer_with_other_options_gets_other_plans(reused):
    layer, x = make_layer(), random_tokens(2, 9, 16)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        layer.backend = "reference"
        assert torch.equal(layer(x), by_definition(layer, x))
        layer.backend = "cpu"
        layer.pooling = "softmax"
        assert_right(layer, x, layer(x))
        layer.qk_norm, layer.scale_factor = False, 2.0
        assert_right(layer, x, layer(x))
    assert reused == [False, True, False, False]


def test_masks_have_plans_and_token_weights_have_not(reused):
    layer, x, mask = make_layer(), random_tokens(2, 9, 16), make_mask(2, 9)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        assert_right(layer, x, layer(x, mask), mask=mask)
        out, attention, G = layer(x, return_weights=True)
    assert_right(layer, x, out)
    assert (attention.shape, G.shape) == ((2, 9), (2, 16))
    assert reused == [False, True, False, False]


# The residual branch.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tokens", [12, 96])
@pytest.mark.parametrize("order", ["tokens", "image", "channels_last"])
def test_the_residual_branch_is_added(isa, order, n_tokens, dtype):
    torch.manual_seed(0)
    layer = make_layer(20, 20).to(dtype)
    height = n_tokens // 4
    shape = (2, n_tokens, 20) if order == "tokens" else (2, 20, height, 4)
    x = random_tokens(*shape, dtype=dtype)
    if order == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    for scale in (random_tokens(20, dtype=dtype), random_tokens(20, 1, 1, dtype=dtype)):
        exact = by_definition(layer, x, torch.float64, residual_scale=scale)
        branch = by_definition(layer, x.double(), torch.float64)
        by_channel = scale.double().flatten()
        if order != "tokens":
            by_channel = by_channel.view(20, 1, 1)
        torch.testing.assert_close(exact, x.double() + by_channel * branch)
        eager = by_definition(layer, x, residual_scale=scale)
        with torch.no_grad():
            outputs = [layer(x, residual_scale=scale) for _ in range(3)]
        for out in outputs:
            assert_as_good_as_eager(out, eager, exact)
            assert out.stride() == x.stride()
        out = layer(x, residual_scale=scale)
        assert_as_good_as_eager(out.detach(), eager, exact)


def test_the_residual_branch_has_all_gradients():
    layer, x = make_layer(), random_tokens(2, 16, 3, 4)
    scale = nn.Parameter(random_tokens(16, 1, 1))
    results = []
    for dtype, backend in ((torch.float64, "reference"), (None, "reference"), (None, "cpu")):
        branch = copy.deepcopy(layer).to(dtype or torch.float32)
        branch.backend = backend
        leaf = x.to(dtype or torch.float32).requires_grad_()
        factor = scale.detach().to(dtype or torch.float32).requires_grad_()
        out = branch(leaf, residual_scale=factor)
        grads = torch.autograd.grad(out.sin().sum(), [leaf, factor, *branch.parameters()])
        results.append([out.detach(), *grads])
    exact, eager, ours = results
    assert ours[2].shape == scale.shape
    for t, by_eager, expected in zip(ours, eager, exact, strict=True):
        assert_as_good_as_eager(t, by_eager, expected)


def test_the_residual_branch_under_autocast():
    layer, x, scale = make_layer(), random_tokens(2, 16, 3, 4), random_tokens(16)
    with torch.no_grad():
        for _ in range(2):
            layer(x, residual_scale=scale)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = layer(x, residual_scale=scale)
            eager = by_definition(layer, x, residual_scale=scale)
    exact = by_definition(layer, x, torch.float64, residual_scale=scale)
    assert_as_good_as_eager(ours, eager, exact)


def test_a_changed_residual_scale_is_noticed():
    layer, x, scale = make_layer(), random_tokens(2, 9, 16), random_tokens(16)
    with torch.no_grad():
        for _ in range(2):
            layer(x, residual_scale=scale)
        scale[3] += 1
        assert_right(layer, x, layer(x, residual_scale=scale), residual_scale=scale)
        scale.data.mul_(2)
        assert_right(layer, x, layer(x, residual_scale=scale), residual_scale=scale)
        scale = scale * 3
        assert_right(layer, x, layer(x, residual_scale=scale), residual_scale=scale)
        assert_right(layer, x, layer(x))
        scale = scale[:1].expand(16)
        assert_right(layer, x, layer(x, residual_scale=scale), residual_scale=scale)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("token_dim", "scale", "error", "message"),
    [
        (16, torch.ones(15), ValueError, "residual_scale must have 16 elements"),
        (12, torch.ones(16), ValueError, "residual_scale must have 16 elements"),
        (12, torch.ones(12), ValueError, "residual_scale must have 16 elements"),
        (16, torch.ones(16).double(), TypeError, "residual_scale must have the dtype"),
        (16, 1.0, TypeError, "residual_scale must be a torch.Tensor"),
        (16, torch.ones(16, device="meta"), ValueError, "residual_scale must be on the device"),
    ],
)
def test_a_residual_scale_that_does_not_fit_is_refused(token_dim, scale, error, message, warm):
    layer, x = make_layer(16, token_dim), random_tokens(2, 9, 16)
    with torch.no_grad():
        for _ in range(2 * warm):
            layer(x)
        with pytest.raises(error, match=message):
            layer(x, residual_scale=scale)


# The operators.


@pytest.fixture
def forward_calls(monkeypatch) -> list[str]:
    """Grows at each run of the operator's CPU forward by what it is asked to keep."""
    calls: list[str] = []
    forward = cpu.forward

    def counting(*args: Any) -> tuple[Tensor, ...]:
        calls.append(args[-1])
        return forward(*args)

    monkeypatch.setattr(cpu, "forward", counting)
    return calls


def with_gradients(
    attention: Callable[..., Tensor], module: AdditiveAttention, x: Tensor
) -> list[Tensor]:
    """The output, and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    out = attention(x)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])]


def assert_gradients(ours: list[Tensor], layer: AdditiveAttention, x: Tensor) -> None:
    """The output and the gradients are as good as eager's."""
    layer = copy.deepcopy(layer)
    layer.backend = "reference"
    eager = with_gradients(layer, layer, x)
    layer.double()
    exact = with_gradients(layer, layer, x.double())
    for t, by_eager, expected in zip(ours, eager, exact, strict=True):
        assert_as_good_as_eager(t, by_eager, expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("training", [False, True])
def test_compiled_layers_take_the_kernels(forward_calls, training):
    """In one graph for all sizes."""
    layer, graphs = make_layer(backend="auto"), []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counting)
    for batch, height, width in [(2, 3, 4), (3, 7, 7), (5, 14, 9)]:
        x = random_tokens(batch, 16, height, width)
        if training:
            assert_gradients(with_gradients(compiled, layer, x), layer, x)
        else:
            with torch.no_grad():
                assert_right(layer, x, compiled(x))
    assert len(graphs) == 1
    assert forward_calls == ["statistics" if training else "nothing"] * 3


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("n_tokens", "kept"), [(9, "rows"), (72 * 8, "statistics")])
def test_compiled_wide_layers_keep_what_they_would(forward_calls, n_tokens, kept):
    layer, x = make_layer(72, 72, backend="auto"), random_tokens(1, n_tokens, 72)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_gradients(with_gradients(compiled, layer, x), layer, x)
    assert forward_calls == [kept]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("recompute", [True, False])
def test_compiled_between_other_operators(forward_calls, recompute):
    """Through the whole compiler but for its code generator."""
    layer = make_layer(backend="auto", recompute=recompute)
    leaf = random_tokens(2, 16, 3, 4).requires_grad_()
    parameters = [leaf, *layer.parameters()]

    def model(x: Tensor) -> Tensor:
        return layer(x.cos()).sin()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    ours = torch.autograd.grad(compiled(leaf).sum(), parameters)
    expected = torch.autograd.grad(model(leaf).sum(), parameters)
    for t, eager in zip(ours, expected, strict=True):
        torch.testing.assert_close(t, eager)
    assert forward_calls == ["statistics" if recompute else "rows"] * 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_with_plans_compiles(training, residual):
    layer, x = make_layer(backend="auto"), random_tokens(2, 16, 3, 4)
    scale = random_tokens(16) if residual else None
    with torch.no_grad():
        for _ in range(2):
            layer(x, residual_scale=scale)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        out = compiled(x, residual_scale=scale)
    assert_right(layer, x, out.detach(), residual_scale=scale)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_hold_plain_operators_only(strict):
    layer, x = make_layer(backend="auto"), random_tokens(2, 9, 16)
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        program = torch.export.export(layer, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets
    assert all(target.startswith("aten.") for target in targets), targets
    assert torch.equal(program.module()(x), by_definition(layer, x))


@pytest.mark.parametrize("recompute", [True, False])
def test_checkpointing_recomputes_and_gives_the_same_gradients(forward_calls, recompute):
    layer, x = make_layer(recompute=recompute), random_tokens(2, 9, 16)
    plain = with_gradients(layer, layer, x)
    assert len(forward_calls) == 1
    recomputed = with_gradients(lambda x: checkpoint(layer, x, use_reentrant=False), layer, x)
    assert forward_calls == ["statistics" if recompute else "rows"] * 3
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("shape", [(2, 9, 16), (2, 16, 3, 3)])
def test_checkpointing_a_layer_that_was_never_called(shape):
    """Its first call goes through all checks, the one in the backward past them."""
    x = random_tokens(*shape).requires_grad_()
    grads = [
        torch.autograd.grad(call(make_layer()).sin().sum(), x)[0]
        for call in (lambda f: f(x), lambda f: checkpoint(f, x, use_reentrant=False))
    ]
    assert torch.equal(*grads)


@pytest.mark.parametrize(("recompute", "most"), [(True, 1.1), (False, 3.15)])
@dtypes
def test_what_is_kept_for_the_backward(recompute, most, dtype):
    layer = make_layer(48, 48, recompute=recompute).to(dtype)
    x = random_tokens(1, 3136, 48, dtype=dtype).requires_grad_()
    kept = costs.saved_bytes(lambda: layer(x), layer.parameters()) / x.untyped_storage().nbytes()
    statistics = 3 * 4 / (48 * dtype.itemsize)  # float32 in every type
    assert 1 <= kept <= most + statistics - 3 / 48


def test_recompute_is_chosen_by_width(forward_calls):
    for width in (64, 65):
        make_layer(width, width)(random_tokens(1, 9, width).requires_grad_())
    assert forward_calls == ["statistics", "rows"]
    assert config.RECOMPUTE_WIDTH == 64


def test_very_wide_layers_fold_as_well():
    """Their tiles are too large to be multiplied as they are."""
    for in_dims, token_dim in ((4, 1064), (1064, 4), (1064, 1064)):
        assert_accurate(make_tensors(1, 70, in_dims, token_dim, dtype=torch.float32))


def test_long_inputs_need_no_rows_at_any_width(forward_calls):
    make_layer(72, 72)(random_tokens(1, 72 * 8, 72).requires_grad_())
    make_layer(72, 72)(random_tokens(2, 72 * 3, 72).requires_grad_())
    make_layer(72, 72)(random_tokens(9, 72, 72).requires_grad_())
    assert forward_calls == ["statistics", "rows", "rows"]


# Memory: nothing is touched beside the tensors.

PAGE = mmap.PAGESIZE
_libc_mprotect = functools.cache(lambda: ctypes.CDLL(None, use_errno=True).mprotect)


def guarded(t: Tensor | None, at_end: bool) -> Tensor | None:
    """The numbers of t, dense as they are, before or behind a page that must not be touched."""
    if t is None:
        return None
    nbytes = t.numel() * t.element_size()
    pages = -(-nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbidden = address + pages * PAGE if at_end else address
    protect = _libc_mprotect()
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert protect(forbidden, PAGE, 0) == 0
    offset = pages * PAGE - nbytes if at_end else PAGE
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset)
    # The dimensions in their order in memory.
    order = sorted(range(t.dim()), key=lambda d: -t.stride(d))
    dense = flat.view([t.shape[d] for d in order])
    dense.copy_(t.permute(order))
    return dense.permute([order.index(d) for d in range(t.dim())])


def allocated(out: Tensor) -> contextlib.AbstractContextManager[object]:
    """What inference allocates for its output."""
    return mock.patch.object(torch, "empty_strided", return_value=out)


def work_between_forbidden_pages() -> None:
    """Touching one of them ends the process."""
    sizes = [(2, 33, 37, 37, 1), (1, 7, 220, 37, 1), (1, 260, 21, 110, 2), (3, 5, 5, 3, 1)]
    cases = itertools.product(RUNNABLE, (True, False), enumerate(sizes))
    for isa, at_end, (i, size) in cases:
        dtype = DTYPES[i % 3]
        tensors = make_tensors(*size, dtype=dtype)
        mask = make_mask(*size[:2])
        dout = random_tokens(size[0], size[1], size[3], dtype=dtype)
        if i % 2:
            tensors[0], dout = tensors[0].mT.contiguous().mT, dout.mT.contiguous().mT
        options = Options("l2", True, 0.5, 1e-12)
        with library_in_use(isa):
            expected = gradients(tensors, dout, mask=mask, scale=0.5)
            fenced = [guarded(t, at_end) for t in tensors]
            assert all(t.stride() == f.stride() for t, f in zip(tensors, fenced, strict=True))
            fence = {"mask": guarded(mask, at_end), "scale": 0.5}
            for kind in BACKWARDS:
                with backward_in_use(kind) as recompute:
                    ours = gradients(fenced, guarded(dout, at_end), recompute=recompute, **fence)
                for name, t in ours.items():
                    torch.testing.assert_close(t, expected[name], rtol=1e-2, atol=1e-2)
            for form in FORMS.values():
                out = guarded(torch.zeros_like(expected["output"]), at_end)
                with form_in_use(form), allocated(out):
                    infer(fenced[0], parameters(fenced), options, fence["mask"])
                torch.testing.assert_close(out, expected["output"], rtol=1e-2, atol=1e-2)
            if size[2] == size[3]:
                scale = guarded(random_tokens(size[2], dtype=dtype), at_end)
                out = guarded(torch.empty_like(tensors[0]), at_end)
                with allocated(out):
                    infer(fenced[0], parameters(fenced), options, fence["mask"], scale)
                torch.testing.assert_close(
                    out, tensors[0] + scale * expected["output"], rtol=2e-2, atol=2e-2
                )
    print("done")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
def test_nothing_is_touched_beside_the_tensors():
    assert run_in_a_process("work_between_forbidden_pages").strip() == "done"


# Errors.


def test_too_little_memory_is_an_error(isa):
    """What the kernels ask for is more than any machine has."""
    tensors = make_tensors(1, 9, 6, 5, dtype=torch.float32)
    weights, options = parameters(tensors), Options("l2", True, 0.5, 1e-12)
    torch.set_num_threads(2)
    huge = tensors[0][:, :1].expand(1, 1 << 48, 6)
    out = tensors[0].new_empty(1, 1, 5).expand(1, 1 << 48, 5)
    for form in FORMS.values():
        with form_in_use(form), allocated(out), pytest.raises(MemoryError, match="Free some, or"):
            infer(huge, weights, options)
    saved = launch.Saved(torch.zeros(1, 5), torch.zeros(8), torch.zeros(0))
    with pytest.raises(MemoryError, match=r"Free some, or use backend="):
        launch.backward(out, (huge,), weights, None, saved, options, Needs(False, True))


def test_what_the_kernels_do_not_take_is_refused():
    tensors = make_tensors(1, 9, 6, 5)
    with pytest.raises(ValueError, match=r"takes float32, bfloat16 and float16; got float64.*auto"):
        attend(*tensors)
    with pytest.raises(ValueError, match=r"needs a tensor on the CPU; got one on meta"):
        attend(*(t.to("meta", torch.float32) for t in tensors))
    queries = make_query_key_tensors(1, 9, 6, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"takes tokens and computes queries and keys itself"):
        additive_attention(*queries, backend="cpu")


def ask_for_kernels_switched_off() -> None:
    tensors = make_tensors(1, 9, 6, 5, dtype=torch.float32)
    out = attend(*tensors, backend="auto")
    assert torch.equal(out, attend(*tensors, backend="reference"))
    try:
        attend(*tensors)
    except ValueError as error:
        print(error)


@without_kernels
def test_kernels_may_be_switched_off():
    said = run_in_a_process("ask_for_kernels_switched_off", SWIFTKERNELS_CPU_ISA="none")
    assert "switched off by SWIFTKERNELS_CPU_ISA=none" in said
    assert "backend='auto'" in said


def test_the_folded_form_is_for_many_tokens(monkeypatch):
    measured = {"folded_from": 4.0, "folded_from_without_norms": 1.0}
    monkeypatch.setattr(config, "_measured", measured.__getitem__)
    assert config.form(63, 16, 8, True) == FORMS["triangular"]
    assert config.form(64, 16, 8, True) == FORMS["folded"]
    assert config.form(16, 8, 16, False) == FORMS["folded"]
