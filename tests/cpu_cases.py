"""What the tests of the CPU kernels share: other libraries, sizes, checks of the accuracy."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from swiftkernels import additive_self_attention
from swiftkernels.ops import plan
from swiftkernels.ops.additive_attention.cpu import config, launch
from swiftkernels.ops.additive_attention.cpu.packing import FOLDED, PLAIN, TRIANGULAR
from swiftkernels.testing.cases import (
    POOLINGS,
    SELF_NAMES,
    convert,
    forward_backward,
    make_mask,
    make_tensors,
)
from swiftkernels.testing.tolerance import assert_as_good_as_eager, budget, relative_error

Tensors = list[Tensor | None]

DRAWS = 7
"""Random gradients of the output, over which a median error is taken."""

BACKWARDS = ("rows", "recomputed rows", "folded")
"""The kinds of backwards, by what they read."""

FORMS = {"plain": PLAIN, "triangular": TRIANGULAR, "folded": FOLDED}

SIZES = (
    (2, 65, 40, 37, 1),
    (2, 49, 48, 48, 1),
    (3, 33, 20, 28, 2),
    (2, 32, 64, 64, 1),
    (1, 31, 37, 110, 2),
    (2, 7, 220, 220, 1),
    (1, 1, 48, 48, 1),
    (5, 256, 24, 16, 1),
    (1, 257, 56, 56, 1),
    (1, 700, 48, 48, 1),
    (33, 7, 16, 24, 2),
    (2, 700, 20, 37, 1),
    (2, 65, 1, 3, 1),
    (2, 65, 3, 1, 2),
    (2, 9, 100, 6, 1),
)
"""Batch, tokens, C, D, heads: with odd widths, and every division of the work among threads."""


@contextlib.contextmanager
def kernels_in_use(handle: Any) -> Iterator[None]:
    """Use the functions of another library."""

    def forget() -> None:
        plan._known.clear()  # packed for the other library's vectors
        config._table.cache_clear()

    forget()
    with mock.patch.object(launch, "kernels", return_value=handle):
        yield
    forget()


def form_in_use(form: int) -> contextlib.AbstractContextManager[object]:
    """Use one form of the output for all sizes."""
    return mock.patch.object(config, "form", return_value=form)


@contextlib.contextmanager
def backward_in_use(kind: str) -> Iterator[bool]:
    """Use one kind of backward for all sizes; yields the value for `recompute`."""
    with mock.patch.object(config, "folds_backward", return_value=kind == "folded"):
        yield kind != "rows"


def options_of(case: int, batch: int, n_tokens: int) -> dict[str, Any]:
    """The options of a case; the cases have all poolings, with and without norms and mask."""
    return {
        "pooling": POOLINGS[case % 4],
        "qk_norm": case // 4 % 2 == 0 or case % 3 == 0,
        "mask": make_mask(batch, n_tokens) if case % 2 else None,
    }


def tensors_of(case: int, dtype: torch.dtype) -> Tensors:
    """The tensors of a size; most have biases."""
    return make_tensors(*SIZES[case], bias=case % 5 != 3, dtype=dtype)


def attend(*tensors: Tensor | None, **options: Any) -> Tensor:
    """The output without gradients, by the CPU kernels unless another backend is given.

    The weights are parameters, which the CPU kernels pack.
    """
    x, *weights = tensors
    parameters = [None if w is None else nn.Parameter(w, requires_grad=False) for w in weights]
    with torch.no_grad():
        return additive_self_attention(x, *parameters, **{"backend": "cpu"} | options)


def gradients(
    tensors: Tensors, dout: Tensor | None = None, backend: str = "cpu", **options: Any
) -> dict[str, Tensor]:
    """The output and the gradients of all tensors."""
    function = functools.partial(additive_self_attention, backend=backend, **options)
    return forward_backward(function, tensors, SELF_NAMES, dout)


def assert_forms_accurate(tensors: Tensors, ulps: float = 4, **options: Any) -> None:
    """Every form of the output is as accurate as eager's."""
    exact = attend(*convert(tensors, torch.float64), **options, backend="reference")
    eager = attend(*tensors, **options, backend="reference")
    for name, form in FORMS.items():
        with form_in_use(form):
            out = attend(*tensors, **options)
        assert_as_good_as_eager(out, eager, exact, ulps, f"output, {name}")


def assert_accurate(
    tensors: Tensors, dout: Tensor | None = None, ulps: float = 4, **options: Any
) -> None:
    """Every form of the output, and every kind of backward, is as accurate as eager's.

    Either of them may by chance be several times as exact for a gradient of a few numbers. If a
    gradient exceeds its bound, the median over several gradients of the output counts.
    """
    assert_forms_accurate(tensors, ulps, **options)
    for kind in BACKWARDS:
        if kind == "folded" and tensors[0].shape[1] < 7:
            continue  # the folded form is not for these: gradients that cancel would be noise
        errors = _gradient_errors(tensors, dout, kind, **options)
        if not _within({name: [pair] for name, pair in errors.items()}, tensors[0].dtype, ulps):
            assert dout is None, f"{kind}: {errors}"
            draws = {name: [pair] for name, pair in errors.items()}
            for seed in range(1, DRAWS):
                other = _random_dout(tensors, seed)
                for name, pair in _gradient_errors(tensors, other, kind, **options).items():
                    draws[name].append(pair)
            assert _within(draws, tensors[0].dtype, ulps), f"{kind}: {draws}"


def _random_dout(tensors: Tensors, seed: int) -> Tensor:
    x, final_weight = tensors[0], tensors[-2]
    assert x is not None
    assert final_weight is not None
    generator = torch.Generator().manual_seed(seed)
    shape = (*x.shape[:2], final_weight.shape[0])
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _gradient_errors(
    tensors: Tensors, dout: Tensor | None, kind: str, **options: Any
) -> dict[str, tuple[float, float]]:
    """Errors of one kind of backward, and of eager, for the output and every gradient."""
    exact = gradients(convert(tensors, torch.float64), dout, "reference", **options)
    eager = gradients(tensors, dout, "reference", **options)
    with backward_in_use(kind) as recompute:
        ours = gradients(tensors, dout, recompute=recompute, **options)
    assert {t.dtype for t in ours.values()} == {t.dtype for t in eager.values()}
    return {
        name: (relative_error(t, exact[name]), relative_error(eager[name], exact[name]))
        for name, t in ours.items()
    }


def _within(draws: dict[str, list[tuple[float, float]]], dtype: torch.dtype, ulps: float) -> bool:
    """Whether the median errors are within the budget."""
    for pairs in draws.values():
        error, eager_error = map(statistics.median, zip(*pairs, strict=True))
        if not error <= budget(eager_error, dtype, ulps):
            return False
    return True


def assert_residual_accurate(tensors: Tensors, scale: Tensor) -> None:
    """x + scale * attention(x) in every form is as accurate as eager's."""
    results = []
    for dtype in (torch.float64, tensors[0].dtype):
        t = convert(tensors, dtype)
        results.append(t[0] + scale.to(dtype) * attend(*t, backend="reference"))
    exact, eager = results
    for name, form in FORMS.items():
        with form_in_use(form):
            out = attend(*tensors, residual_scale=scale)
        assert out.stride() == tensors[0].stride()
        assert_as_good_as_eager(out, eager, exact, name=f"output, {name}")
