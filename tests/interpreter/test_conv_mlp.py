"""The Triton kernels of conv_mlp against its definition; what a block of it costs.

What all operators share is in tests/contract, which runs in the interpreter too, and the accesses
to memory are in test_memory_safety.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from swiftkernels import ConvMlp
from swiftkernels.backends.triton import tensors as triton_tensors
from swiftkernels.ops.conv_mlp.op import conv_mlp
from swiftkernels.ops.conv_mlp.reference import ACTIVATIONS
from swiftkernels.ops.conv_mlp.triton import config, launch
from swiftkernels.ops.conv_mlp.weights import Options, Weights
from swiftkernels.testing.cases import convert, forward_backward
from swiftkernels.testing.costs import saved_bytes
from swiftkernels.testing.tolerance import assert_as_good_as_eager, assert_exact
from tests.interpreter.instruments import TorchKernels, count_launches
from tests.ops.conv_mlp.cases import (
    LAYOUTS,
    Tensors,
    channels_last,
    identity,
    make_tensors,
)
from tests.ops.conv_mlp.test_module import FORMS, fused, images, randomised

NAMES = ("x", *Weights._fields)
WIDTHS = (1, 48, 112)
OTHER_WIDTHS = (37, 56, 64, 96, 128, 168, 192, 220, 224, 320, 384, 512)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def train(
    backend: str, tensors: Tensors, dout: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """The output, and the gradients of all tensors; x is added if it has as many channels."""
    x, scale = tensors[0], tensors[-1]
    assert x is not None
    assert scale is not None
    options = {"residual": x.shape[1] == len(scale), "backend": backend} | options
    return forward_backward(functools.partial(conv_mlp, **options), tensors, NAMES, dout)


def infer(backend: str, tensors: Tensors, **options: Any) -> Tensor:
    with torch.no_grad():
        return conv_mlp(*tensors, backend=backend, **options)  # type: ignore[arg-type]


def check_training(tensors: Tensors, dtype: torch.dtype, **options: Any) -> None:
    """Output and gradients are as accurate as eager's."""
    rounded = convert(tensors, dtype)
    exact = train("reference", convert(rounded, torch.float64), **options)
    ours, eager = (train(backend, rounded, **options) for backend in ("triton", "reference"))
    for name, value in ours.items():
        assert_as_good_as_eager(value, eager[name], exact[name], name=name)


# Values.


@pytest.mark.parametrize(
    "width", [*WIDTHS, *(pytest.param(w, marks=pytest.mark.slow) for w in OTHER_WIDTHS)]
)
def test_every_width_equals_the_definition(width: int) -> None:
    for factor, kernel in ((3, 3), (1, None)):
        tensors = make_tensors((2, width, 2, 3), factor * width, kernel)
        if kernel is None:
            assert_exact(train("triton", tensors), train("reference", tensors))
        else:
            exact = {"output": infer("reference", tensors)}
            assert_exact({"output": infer("triton", tensors)}, exact)


@pytest.mark.parametrize(
    ("activation", "kernel"),
    [*zip(ACTIVATIONS, (3, 5, 7) * 2, strict=True), *itertools.product(ACTIVATIONS, [None])],
)
def test_kernels_and_activations(activation: str, kernel: int | None) -> None:
    tensors = make_tensors((2, 12, 5, 6), 40, kernel, out_dims=12 if kernel else 9)
    options = {"activation": activation}
    assert_exact(train("triton", tensors, **options), train("reference", tensors, **options))


@pytest.mark.parametrize("image", [(1, 1), (1, 9), (9, 1), (9, 10)])
def test_odd_sizes(image: tuple[int, int]) -> None:
    for batch, kernel in ((2, 3), (1, 7), (3, None)):
        tensors = make_tensors((batch, 16, *image), 24, kernel)
        assert_exact(train("triton", tensors), train("reference", tensors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "hidden"), [(20, 40), (72, 144), (132, 264)])
def test_errors_are_at_most_twice_those_of_eager(
    dtype: torch.dtype, width: int, hidden: int
) -> None:
    check_training(make_tensors((2, width, 3, 7), hidden, None), dtype)
    check_training(make_tensors((1, width, 3, 5), hidden, 3), dtype, activation="silu")


WIDE = config.MAX_FUSED_WIDTH + 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [20, WIDE])
@pytest.mark.parametrize("cudnn", [True, False])
def test_no_pixels(
    dtype: torch.dtype, width: int, cudnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_tensors, "allow_tf32", lambda convolution=False: cudnn)
    x, *weights = convert(make_tensors((2, width, 3, 4), 24, 3), dtype)
    assert x is not None
    assert infer("triton", [x[:, :, :0], *weights]).shape == (2, width, 0, 4)


@pytest.fixture
def in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide layers run in kernels in all types, so that their values can be compared exactly."""
    monkeypatch.setattr(launch, "_is_left_to_pytorch", lambda dtype, weights: False)


@pytest.mark.parametrize(("channels", "out_dims"), [(WIDE, WIDE), (20, WIDE), (WIDE, 20)])
@pytest.mark.parametrize("kernel", [3, None])
def test_wide_layers_are_a_launch_for_each_step(
    channels: int, out_dims: int, kernel: int | None, in_steps: None
) -> None:
    options = {"residual": channels == out_dims}
    tensors = make_tensors((3, channels, 3, 4), 40, kernel, out_dims=out_dims)
    products = ["_linear_kernel"] * 2
    for layout in (channels_last, Tensor.contiguous):
        tensors[0] = layout(tensors[0])
        expected = infer("reference", tensors, **options)
        with count_launches() as launches:
            found = infer("triton", tensors, **options)
        assert launches == (["_input_kernel"] if kernel else []) + products
        assert_exact({"": found}, {"": expected})
    assert_exact(train("triton", tensors), train("reference", tensors))


def test_depthwise_weights_of_either_order(in_steps: None) -> None:
    for width in (16, WIDE):
        tensors = make_tensors((2, width, 5, 4), 24, 5)
        expected = infer("reference", tensors)
        assert tensors[1] is not None
        tensors[1] = launch.taps_first(tensors[1])
        assert_exact({"": infer("triton", tensors)}, {"": expected})


@pytest.mark.parametrize("cudnn", [True, False])
def test_libraries_compute_wide_layers_without_tensor_cores(
    cudnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_tensors, "allow_tf32", lambda convolution=False: cudnn)
    block = randomised(ConvMlp(WIDE, backend="triton"))
    x = images(1, WIDE, 3, 4)
    with torch.no_grad(), count_launches() as launches:
        out = block(x)
        torch.testing.assert_close(out, block._call_parts(x), rtol=1e-4, atol=1e-5)
    assert launches == (["_input_kernel", "_linear_kernel", "_linear_kernel"] if cudnn else [])
    assert out.is_contiguous(memory_format=torch.channels_last)


# How the tensors lie in memory.


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides(layout: Callable[[Tensor], Tensor]) -> None:
    for C, kernel in ((16, 3), (21, None)):
        tensors = make_tensors((3, C, 5, 4), 20, kernel)
        assert tensors[0] is not None
        tensors[0] = layout(tensors[0])
        dout = layout(torch.randn(tensors[0].shape, dtype=torch.float64))
        expected = train("reference", tensors, dout)
        found = train("triton", tensors, dout)
        assert_exact(found, expected)
        assert found["output"].is_contiguous(memory_format=torch.channels_last)


def test_images_of_a_batch_share_tiles() -> None:
    """If their pixels have one stride; their neighbours are outside all the same."""
    tensors = make_tensors((7, 16, 2, 3), 24, 5)
    for layout in (channels_last, Tensor.contiguous):
        tensors[0] = layout(tensors[0])
        expected = torch.cat([infer("reference", [x, *tensors[1:]]) for x in tensors[0].split(1)])
        assert_exact({"": infer("triton", tensors)}, {"": expected})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batch_elements_are_independent(dtype: torch.dtype) -> None:
    """And two runs are equal to the bit."""
    x, *weights = convert(make_tensors((4, 24, 5, 5), 40, None), dtype)
    assert x is not None
    x = channels_last(x)
    dout = torch.randn_like(x)
    together, again = (train("triton", [x, *weights], dout) for _ in range(2))
    for name, t in together.items():
        assert torch.equal(t, again[name]), name
    alone = train("triton", [x[2:3], *weights], dout[2:3])
    for name in ("output", "x"):
        assert torch.equal(alone[name], together[name][2:3]), name


# Values that are not finite.


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_extreme_values(activation: str) -> None:
    found = identity(torch.tensor([3e38, 1e4, -1e4, -3e38, float("nan")]), activation, "triton")
    assert found[0] > 2e38
    assert found[1] == 1e4
    assert found[4].isnan()
    if activation != "none":
        assert (found[2:4] == 0).all()


def test_what_is_not_finite_stays_within_reach_of_the_convolution() -> None:
    tensors = convert(make_tensors((2, 16, 9, 11), 20, 3), torch.float32)
    assert tensors[0] is not None
    expected = infer("triton", tensors)
    tensors[0][0, 3, 4, 5] = float("nan")
    out = infer("triton", tensors)
    near = torch.zeros(2, 16, 9, 11, dtype=torch.bool)
    near[0, :, 3:6, 4:7] = True
    assert torch.equal(out[~near], expected[~near])
    assert out[near].isnan().all()


# The layer.


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_a_layer_is_as_good_as_its_parts(options: dict[str, Any]) -> None:
    """BatchNorm and layer scale are not folded: the kernel computes them."""
    block = randomised(ConvMlp(20, 48, **options, backend="triton")).half()
    x = images(1, 20, 3, 7).half()
    with torch.no_grad(), count_launches() as launches:
        first = block(x)
        assert fused(block, x) == "all"
        assert torch.equal(block(x), first)
        eager = block._call_parts(x)
        exact = copy.deepcopy(block).double()._call_parts(x.double())
        assert_as_good_as_eager(first, eager, exact)
    assert set(launches) == {"_forward_kernel"}


def test_a_layer_under_autocast() -> None:
    block, x = randomised(ConvMlp(8, backend="triton")), images(1, 8, 5, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), count_launches() as launches:
        out = block(x)
    assert launches == ["_forward_kernel"]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), block._call_parts(x), rtol=0.05, atol=0.05)


def test_a_layer_takes_the_kernel_by_itself_and_notices_other_tensors() -> None:
    block, x = randomised(ConvMlp(8)), images(1, 8, 5, 5)
    assert block.norm is not None
    with torch.no_grad():
        for change in (
            lambda: block.norm.running_mean.add_(1),
            lambda: block.layer_scale.data.mul_(2),
            lambda: block.load_state_dict(randomised(ConvMlp(8, layer_scale=3.0)).state_dict()),
        ):
            change()
            with count_launches() as launches:
                out = block(x)
            assert launches == ["_forward_kernel"]
            torch.testing.assert_close(out, block._call_parts(x))
        block.norm.to("meta")
        pair, around = block._pair(), block._around()
        assert pair is not None
        assert around is not None
        tensors = (*around[:2], *pair, *around[2:])
        with pytest.raises(ValueError, match=r"norm.weight must be on the device of x"):
            block._infer_by_triton(x, tensors, Options("gelu", True), None)


# What a call costs.


@pytest.mark.parametrize(("image", "expected"), [((5, 5), 2), ((12, 20), 3)])
def test_launches_and_what_is_kept(image: tuple[int, int], expected: int) -> None:
    """A forward is one launch and keeps x; a backward is three, or two on few pixels.

    For the gradient of a scale, operators of PyTorch follow.
    """
    x, _, _, *weights, _ = convert(make_tensors((2, 16, *image), 64, None), torch.float16)
    assert x is not None
    leaves = [t.requires_grad_() for t in (x, *weights) if t is not None]

    def call() -> Tensor:
        return conv_mlp(leaves[0], None, None, *leaves[1:], backend="triton")

    with count_launches() as launches, TorchKernels() as torch_kernels:
        out = call()
        assert launches == ["_forward_kernel"]
        launches.clear()
        torch.autograd.grad(out, leaves, torch.empty_like(out))
    kernels = ["_input_backward_kernel", "_weights_backward_kernel", "_finish_backward_kernel"]
    assert launches == kernels[:expected]
    others = [name for name, _ in torch_kernels.calls if not name.startswith("swiftkernels::")]
    assert others == []
    assert saved_bytes(call, leaves[1:]) == x.nbytes


def test_only_wanted_gradients_are_computed() -> None:
    tensors = make_tensors((1, 16, 15, 20), 24, None)
    expected = train("reference", tensors, torch.ones(1, 16, 15, 20, dtype=torch.float64))
    for wanted, launched in ((0, ["_input_backward_kernel"]), (3, ["_weights_backward_kernel"])):
        leaves = [
            t if t is None else t.detach().requires_grad_(i == wanted)
            for i, t in enumerate(tensors)
        ]
        out = conv_mlp(*leaves, backend="triton")  # type: ignore[arg-type]
        with count_launches() as launches:
            (found,) = torch.autograd.grad(out.sum(), leaves[wanted])
        assert launches[:1] == launched
        assert "_input_backward_kernel" not in launches[1:]
        assert_exact({"": found}, {"": expected[NAMES[wanted]]})


def test_splits_fill_a_gpu_and_move_little() -> None:
    """Partial sums are not more than the pixels they are made of are worth."""
    for jobs, tiles, most in itertools.product((1, 6, 200), (1, 7, 400), (0, 3, 100)):
        splits, tiles_per_split = config.split_pixels(jobs, tiles, most)
        assert splits <= max(1, most)
        assert (splits - 1) * tiles_per_split < tiles <= splits * tiles_per_split
        assert splits == 1 or splits * jobs <= 2 * 128
