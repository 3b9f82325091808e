"""`SeparableAttention`: a drop-in for two public layers, and a module like others."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from swiftkernels.backends.cpu import library
from swiftkernels.ops.separable_attention.layer import SeparableAttention
from swiftkernels.ops.separable_attention.op import separable_attention

BACKENDS = ["reference", *([] if library.why_not() else ["cpu"])]


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def check_drop_in(theirs: nn.Module, backend: str) -> None:
    """Theirs take [B, C, P, N]."""
    theirs = theirs.double().eval()
    ours = SeparableAttention(37, backend=backend).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 37, 4, 49)
    if backend == "reference":
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    else:
        expected = theirs(x)
        torch.testing.assert_close(ours.float()(x.float()), expected.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_drop_in_for_the_layer_of_timm(timm: ModuleType, backend: str) -> None:
    mobilevit = pytest.importorskip("timm.models.mobilevit")
    theirs = mobilevit.LinearSelfAttention(37)
    check_drop_in(theirs, backend)
    theirs.load_state_dict(SeparableAttention(37).state_dict())


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_a_drop_in_for_the_layer_of_transformers(transformers: ModuleType, backend: str) -> None:
    modeling = pytest.importorskip("transformers.models.mobilevitv2.modeling_mobilevitv2")
    config = transformers.MobileViTV2Config()
    check_drop_in(modeling.MobileViTV2LinearSelfAttention(config, 37), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_acts_in_training_only(backend: str) -> None:
    attention = SeparableAttention(16, 0.5, 0.5, backend=backend)
    x = images(2, 9, 16, dtype=torch.float32)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))
    # Of the scores' softmax alone: the definition with the weights' dropout.
    attention.train().out_drop.p = 0.0
    torch.manual_seed(1)
    out = attention(x)
    torch.manual_seed(1)
    rows = attention.qkv_proj(x.mT.unsqueeze(2)).movedim(1, -1)
    score, key, value = rows.split([1, 16, 16], dim=-1)
    weights = attention.attn_drop(score.softmax(-2))
    mixed = value.relu() * (weights * key).sum(-2, keepdim=True)
    expected = attention.out_proj(mixed.movedim(-1, 1)).squeeze(2).mT
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("shape", [(2, 9, 16), (2, 16, 4, 9)])
def test_parts_that_are_more_than_convolutions_are_called(shape: tuple[int, ...]) -> None:
    attention = SeparableAttention(16)
    x = images(*shape, dtype=torch.float32)
    expected = attention(x)
    calls: list[object] = []
    hook = attention.qkv_proj.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(attention(x), expected)
    assert calls
    hook.remove()
    weight_norm(attention.out_proj)
    torch.testing.assert_close(attention(x), expected)


def test_errors_say_what_to_do() -> None:
    x, w, p = torch.randn(2, 9, 16), torch.randn(33, 16), torch.randn(16, 16)
    with pytest.raises(ValueError, match=r"x must be \[B, N, 16\].*Check the width"):
        separable_attention(torch.randn(2, 9, 15), w, None, p, None)
    with pytest.raises(ValueError, match=r"1 \+ 2 C = 33 rows"):
        separable_attention(x, torch.randn(32, 16), None, p, None)
    with pytest.raises(ValueError, match="C = 16 columns; got 15"):
        separable_attention(x, w, None, torch.randn(16, 15), None)
    with pytest.raises(ValueError, match="must be a matrix, or that of a 1x1 convolution"):
        separable_attention(x, torch.randn(33, 16, 3, 3), None, p, None)
    with pytest.raises(ValueError, match="qkv_bias must have shape"):
        separable_attention(x, w, torch.randn(32), p, None)
    with pytest.raises(TypeError, match="Convert"):
        separable_attention(x, w.double(), None, p, None)
    with pytest.raises(ValueError, match="backend"):
        separable_attention(x, w, None, p, None, backend="fast")
    with pytest.raises(ValueError, match="embed_dim must be at least 1"):
        SeparableAttention(0)
