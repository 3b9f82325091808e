"""`ConvMlp`: a drop-in for parts of SwiftFormers, which is fused where that is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from swiftkernels import ConvMlp
from swiftkernels.backends import torch_state
from swiftkernels.backends.cpu import library
from swiftkernels.ops.conv_mlp.layer import has_settings, settings_of
from swiftkernels.testing.tolerance import assert_as_good_as_eager

needs_kernels = pytest.mark.skipif(bool(library.why_not()), reason="no compiled kernels")


def randomised(block: nn.Module) -> Any:
    """In evaluation, with random parameters and statistics."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, t in block.state_dict().items():
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=generator) / max(1, t[0].numel()) ** 0.5)
                t.abs_().add_(0.5) if "var" in name else None
    return block.eval()


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def fused(block: ConvMlp, x: Tensor) -> str:
    """What a call computes as one operator: "all", the "pair" of pointwise layers, or "nothing"."""
    with (
        mock.patch.object(block, "_call_parts", return_value=x) as parts,
        mock.patch.object(block, "compose", return_value=x) as composed,
    ):
        block(x)
    return "nothing" if parts.called else "pair" if composed.called else "all"


FORMS: dict[str, dict[str, Any]] = {
    "encoder": {},
    "mlp": {"kernel_size": None, "residual": False, "layer_scale": None},
    "without norm": {"norm": False, "kernel_size": 5},
    "without biases": {"bias": False, "kernel_size": 7, "activation": "silu"},
    "plain": {"norm": False, "kernel_size": None, "layer_scale": None, "bias": False},
}


@needs_kernels
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folded_weights_are_as_good_as_the_parts(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    block = randomised(ConvMlp(20, 48, **options, backend="cpu")).to(dtype)
    x = images(2, 20, 9, 7).to(dtype)
    with torch.no_grad():
        first = block(x)
        assert fused(block, x) == "all"
        assert torch.equal(block(x), first)
        eager = block._call_parts(x)
        exact = copy.deepcopy(block).double()._call_parts(x.double())
        assert_as_good_as_eager(first, eager, exact)


@needs_kernels
def test_what_is_fused() -> None:
    block, x = randomised(ConvMlp(8)), images(1, 8, 5, 5)
    assert fused(block, x) == "pair"
    with torch.no_grad():
        assert fused(block, x) == "all"
        assert fused(block.train(), x) == "pair"
        assert fused(block.eval(), x) == "all"
        assert fused(block.eval(), x.double()) == "nothing"
        assert fused(ConvMlp(8, norm=False).train(), x) == "all"
        with torch.autocast("cpu", torch.bfloat16):
            assert fused(block, x) == "all"
            assert block(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(block, x) == "pair"
    block.requires_grad_(False)
    assert fused(block, x) == "all"
    assert fused(block, x.clone().requires_grad_()) == "pair"
    block.backend = "reference"
    assert fused(block, x) == "nothing"


@needs_kernels
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_as_good_as_those_of_the_parts(
    options: dict[str, Any], training: bool
) -> None:
    block = randomised(ConvMlp(20, 48, **options)).train(training)
    x = images(2, 20, 9, 7)

    def gradients(block: Any, x: Tensor, backend: str) -> dict[str, Tensor]:
        block = copy.deepcopy(block)
        block.backend = backend
        leaf = x.clone().requires_grad_()
        block(leaf).square().sum().backward()
        return {"x": leaf.grad, **{name: p.grad for name, p in block.named_parameters()}}

    ours, eager = (gradients(block, x, backend) for backend in ("cpu", "reference"))
    exact = gradients(copy.deepcopy(block).double(), x.double(), "reference")
    for name in exact:
        if training and name == "dwconv.bias":  # 0 but for rounding, because a BatchNorm follows
            continue
        assert_as_good_as_eager(ours[name], eager[name], exact[name], name=name)


@needs_kernels
def test_training_changes_what_is_folded() -> None:
    """The parameters by an optimizer, and the statistics of the BatchNorm by the forward alone."""
    block, x = ConvMlp(8, backend="cpu"), images(4, 8, 6, 5)
    optimizer = torch.optim.SGD(block.parameters(), 1e-2)
    for step in range(6):
        if step % 2:
            block.train()(x).square().mean().backward()
            optimizer.step()
        else:
            with torch.no_grad():
                block.train()(x + step)
        block.eval()
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(block(x), block._call_parts(x))


def with_hook(block: Any) -> None:
    block.norm.register_forward_hook(lambda *_: None)


def with_adapter(block: Any) -> None:
    block.pwconv1 = nn.Sequential(block.pwconv1, nn.Conv2d(32, 32, 1))


def with_parametrization(block: Any) -> None:
    weight_norm(block.pwconv2)


def with_stride(block: Any) -> None:
    block.pwconv1 = nn.Conv2d(8, 32, 1, padding=1)
    block.pwconv2 = nn.Conv2d(32, 8, 3)


def with_dilation(block: Any) -> None:
    block.dwconv = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)


def with_other_padding(block: Any) -> None:
    block.dwconv = nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect")


def with_full_convolution(block: Any) -> None:
    block.dwconv = nn.Conv2d(8, 8, 3, padding=1)


def with_other_norm(block: Any) -> None:
    block.norm = nn.GroupNorm(2, 8)


def without_statistics(block: Any) -> None:
    block.norm = nn.BatchNorm2d(8, track_running_stats=False)


CHANGES = (
    with_hook,
    with_adapter,
    with_parametrization,
    with_stride,
    with_dilation,
    with_other_padding,
    with_full_convolution,
    with_other_norm,
    without_statistics,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_parts_that_are_more_than_their_weights_are_called(change: Callable[[Any], None]) -> None:
    block, x = randomised(ConvMlp(8)), images(1, 8, 5, 5)
    change(block)
    block.eval()
    around = change not in (with_adapter, with_parametrization, with_stride)
    with torch.no_grad():
        assert fused(block, x) == ("pair" if around and not library.why_not() else "nothing")
        torch.testing.assert_close(block(x), block._call_parts(x))


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("value", ["tanh", 0, torch.zeros(2), None])
def test_other_settings_are_noticed(
    value: object, lists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_state, "lists_attributes", lambda: lists)
    part: Any = nn.GELU()
    settings = settings_of(part)
    assert has_settings(part.eval(), settings)
    assert not has_settings(nn.ReLU(), settings)
    part.approximate = value
    assert not has_settings(part, settings)


@needs_kernels
def test_a_norm_without_affine_parameters_is_folded() -> None:
    block, x = ConvMlp(8).eval(), images(1, 8, 5, 5)
    block.norm = nn.BatchNorm2d(8, affine=False).eval()
    with torch.no_grad():
        assert fused(block, x) == "all"
        torch.testing.assert_close(block(x), block._call_parts(x))


@pytest.mark.parametrize("part", ["ConvEncoder", "Mlp"])
def test_is_a_drop_in_for_parts_of_timm(timm: ModuleType, part: str) -> None:
    swiftformer = pytest.importorskip("timm.models.swiftformer")
    theirs = randomised(getattr(swiftformer, part)(12, 48))
    options = FORMS["encoder" if part == "ConvEncoder" else "mlp"]
    check_drop_in(theirs, options)


@pytest.mark.parametrize("part", ["SwiftFormerConvEncoder", "SwiftFormerMlp"])
def test_is_a_drop_in_for_parts_of_transformers(transformers: ModuleType, part: str) -> None:
    modeling = pytest.importorskip("transformers.models.swiftformer.modeling_swiftformer")
    config = transformers.SwiftFormerConfig(drop_conv_encoder_rate=0.0, drop_mlp_rate=0.0)
    theirs = randomised(getattr(modeling, part)(config, 12))
    check_drop_in(theirs, FORMS["mlp" if part == "SwiftFormerMlp" else "encoder"])


def check_drop_in(theirs: nn.Module, options: dict[str, Any]) -> None:
    ours = ConvMlp(12, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 12, 9, 7)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours._call_parts(x), theirs(x), rtol=1e-6, atol=1e-6)
    model = nn.Sequential(nn.Identity(), ConvMlp(12, **options))
    model.load_state_dict({f"1.{name}": t for name, t in theirs.state_dict().items()})


@needs_kernels
def test_inputs_that_are_not_plain() -> None:
    block, x = randomised(ConvMlp(8)), images(1, 8, 5, 5)
    with torch.no_grad():
        expected = block(torch.zeros(1, 8, 5, 5))
        for _ in range(2):
            torch.testing.assert_close(block(torch._efficientzerotensor((1, 8, 5, 5))), expected)
        with pytest.raises(TypeError, match=r"x must be a dense tensor.*to_dense"):
            block(x.to_sparse())
        block(x)
        x.untyped_storage().resize_(0)
        for _ in range(2):
            with pytest.raises(ValueError, match="x must have memory"):
                block(x)


def test_errors_say_what_to_do() -> None:
    for arguments, message in (
        ((0,), "channels must be at least 1"),
        ((8, 0), "hidden must be at least 1.*4"),
        ((8, 32, 4), "kernel_size must be one of 3, 5, 7, None"),
        ((8, 32, 3, "tanh"), "activation must be one of"),
        ((8, 32, 3, "gelu", True, float("nan")), "layer_scale must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            ConvMlp(*arguments)
    with pytest.raises(ValueError, match="backend must be one of"):
        ConvMlp(8, backend="fast")
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must be \[B, 8, H, W\]"):
        ConvMlp(8, backend="cpu").eval()(images(1, 9, 5, 5))
