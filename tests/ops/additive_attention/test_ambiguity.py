"""Warnings about the order of the axes."""

from __future__ import annotations

import warnings

import pytest
import torch

from swiftkernels import AdditiveAttention
from swiftkernels.ops.additive_attention import layer as layer_module


@pytest.fixture(autouse=True)
def _warn_again() -> None:
    """Whatever shapes earlier tests have warned of."""
    layer_module._warn_of_ambiguity.cache_clear()


def test_an_image_as_wide_as_its_channels_is_ambiguous():
    layer = AdditiveAttention(8)
    with pytest.warns(UserWarning, match=r"\[2, 8, 5, 8\].*layout='channels_first'"):
        out = layer(torch.randn(2, 8, 5, 8))
    assert out.shape == (2, 8, 5, 8)


@pytest.mark.parametrize("shape", [(2, 8, 5, 8), (2, 8, 8, 8)])
def test_the_warning_comes_once_for_each_shape(shape):
    layer = AdditiveAttention(8)
    with pytest.warns(UserWarning, match="Pass layout="):
        layer(torch.randn(shape))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(shape))
        layer(torch.randn(shape).requires_grad_())


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("auto", (2, 8, 5, 7)),
        ("auto", (2, 8, 8)),
        ("channels_first", (2, 8, 5, 8)),
        ("channels_last", (2, 8, 5, 8)),
    ],
)
def test_what_is_not_ambiguous_gives_no_warning(layout, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdditiveAttention(8, layout=layout)(torch.randn(shape))
