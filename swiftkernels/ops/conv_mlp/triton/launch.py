"""The Triton kernels as a backend (`ops/operator.py`).

The backward is that of PyTorch's operators (`gradients.py`) with a depthwise convolution, and for
wide layers: there the products take longer than to write and read what is between them.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftkernels.backends import cache
from swiftkernels.backends.layouts import accumulator, output_like
from swiftkernels.backends.torch_state import device_guard, fits_kernels
from swiftkernels.backends.triton.kernel_launch import KernelLaunch, Pointer
from swiftkernels.backends.triton.linear import Linear, linear_launch
from swiftkernels.backends.triton.sizes import architecture, cdiv, power_of_two, sum_tile
from swiftkernels.backends.triton.tensors import (
    Layout,
    contiguous,
    has_tensor_cores,
    precision,
    read_tokens,
    rows_layout,
)
from swiftkernels.ops.conv_mlp import gradients, reference
from swiftkernels.ops.conv_mlp.gradients import Saved, saved_like
from swiftkernels.ops.conv_mlp.triton import config
from swiftkernels.ops.conv_mlp.triton.backward import (
    _finish_backward_kernel,
    _input_backward_kernel,
    _weights_backward_kernel,
)
from swiftkernels.ops.conv_mlp.triton.forward import _forward_kernel, _input_kernel
from swiftkernels.ops.conv_mlp.weights import Options, Weights
from swiftkernels.ops.operator import Needs

__all__ = ["Saved", "backward", "forward", "saved_like"]


class Norm(NamedTuple):
    """A BatchNorm in evaluation behind the depthwise convolution, or before the first product."""

    weight: Tensor | None = None
    """[C]"""
    bias: Tensor | None = None
    """[C]"""
    mean: Tensor | None = None
    """[C]; None: there is no BatchNorm."""
    variance: Tensor | None = None
    """[C]"""


class _Pixels(NamedTuple):
    """An image that the kernels can read as sequences of pixels [B, N, C]."""

    data: Tensor
    sequences: int
    n_pixels: int
    layout: Layout

    @property
    def joined(self) -> Layout | None:
        """The layout as one sequence of all pixels; None if their stride differs between images."""
        (batch_stride,), stride, channels_last, _ = self.layout
        if self.n_pixels == 1:
            stride = batch_stride
        one = self.sequences == 1 or batch_stride == self.n_pixels * stride
        if not (channels_last and one and self.sequences * self.n_pixels < 2**31):
            return None
        return Layout((0,), stride, True, math.gcd(16, stride))


def _pixels(t: Tensor) -> _Pixels:
    """t [B, C, H, W], or a copy where the kernels cannot read its strides."""
    found = read_tokens(t)
    return _Pixels(found.data, found.batch, found.n_tokens, found.layout)


def _join(images: Sequence[_Pixels]) -> list[_Pixels]:
    """The images of the batch as one sequence of pixels, if all of them allow it.

    Then small images share tiles.
    """
    joined = []
    for image in images:
        found = image.joined
        if found is None:
            return list(images)
        joined.append(_Pixels(image.data, 1, image.sequences * image.n_pixels, found))
    return joined


class _Key(NamedTuple):
    """What the launches of a call depend on: constants of the kernels, sizes of the grids."""

    sequences: int
    n_pixels: int
    width: int
    hidden: int
    out_width: int
    options: Options
    dtype: torch.dtype
    device: torch.device
    precision: str
    missing: tuple[bool, ...]
    """Which of the tensors are None."""
    reusable: bool
    """See `KernelLaunch`."""
    layouts: tuple[Layout, ...]
    """Of x; in a backward also of dout and dx."""


def _key(
    images: Sequence[_Pixels],
    weights: Weights,
    options: Options,
    tensors: Sequence[Tensor | None],
) -> _Key:
    x = images[0]
    return _Key(
        x.sequences, x.n_pixels, weights.width, weights.weight1.shape[0], weights.token_dim,
        options, x.data.dtype, x.data.device, precision(x.data.dtype, True),
        tuple([t is None for t in tensors]),
        fits_kernels(*[image.data for image in images], *tensors),
        tuple([image.layout for image in images]),
    )  # fmt: skip


def _shared(key: _Key, cfg: config.Config) -> dict[str, Any]:
    """The constants that the kernels on tiles of pixels have in common."""
    return {
        "C": key.width, "H": key.hidden, "D": key.out_width, "ACTIVATION": key.options.activation,
        "CHANNELS_LAST": key.layouts[0].channels_last, "ALIGN": key.layouts[0].align,
        "PRECISION": key.precision, "BLOCK_N": cfg.block_n, "BLOCK_H": cfg.block_h,
        "num_warps": cfg.num_warps, "num_stages": cfg.num_stages,
    }  # fmt: skip


class _Sizes(NamedTuple):
    """What the launches of a forward depend on besides `_Key`."""

    types: tuple[torch.dtype | None, ...]
    """Of `Norm` and of the scale."""
    height: int
    width: int
    kernel: int
    """Of the depthwise convolution; 0: there is none."""
    taps_first: bool
    """See `taps_first`."""
    has_norm: bool
    eps: float


def _input_constants(key: _Key, sizes: _Sizes) -> dict[str, Any]:
    return {"KERNEL": sizes.kernel, "TAPS_FIRST": sizes.taps_first, "EPS": sizes.eps}


class _Fused:
    """A forward in one launch."""

    def __init__(self, key: _Key, sizes: _Sizes) -> None:
        widest = max(key.width, key.out_width)
        cfg = config.forward_config(widest, key.dtype, sizes.kernel > 0, architecture(key.device))
        tiles = cdiv(key.n_pixels, cfg.block_n)
        block_d = min(power_of_two(key.out_width), cfg.block_j)
        block_k = power_of_two(key.width)
        self._launch = KernelLaunch(
            _forward_kernel,
            key.sequences * tiles * cdiv(key.out_width, block_d),
            (key.n_pixels, tiles, sizes.height, sizes.width, *key.layouts[0].strides),
            _shared(key, cfg)
            | _input_constants(key, sizes)
            | {
                "RESIDUAL": key.options.residual, "BLOCK_D": block_d,
                "BLOCK_K": block_k if sizes.kernel else min(block_k, cfg.block_k),
            },
            key.reusable,
        )  # fmt: skip

    @property
    def ready(self) -> bool:
        """Whether the call takes addresses."""
        return self._launch.ready

    def __call__(self, x: Tensor, pointers: Sequence[Pointer], out: Pointer) -> None:
        """Launch in the current stream.

        Args:
            x: makes new tensors of its type and device.
            pointers: of the image and of the tensors, as `_in_order` has them.
            out: as `output_like` says.
        """
        self._launch(*pointers, out)


class _InSteps:
    """A forward of a wide layer: a launch for what is before the products, and one for each."""

    def __init__(self, key: _Key, sizes: _Sizes) -> None:
        pixels = key.sequences * key.n_pixels
        (x,) = key.layouts
        C, H, D = key.width, key.hidden, key.out_width
        activation, residual = key.options
        self._before: KernelLaunch | None = None
        before = x
        if sizes.kernel or sizes.has_norm:
            tiles = cdiv(key.n_pixels, config.INPUT_BLOCK_N)
            self._before = KernelLaunch(
                _input_kernel,
                key.sequences * tiles * cdiv(C, config.INPUT_BLOCK_C),
                (key.n_pixels, tiles, sizes.height, sizes.width, *x.strides),
                _input_constants(key, sizes)
                | {
                    "C": C, "CHANNELS_LAST": x.channels_last, "ALIGN": x.align,
                    "BLOCK_N": config.INPUT_BLOCK_N, "BLOCK_C": config.INPUT_BLOCK_C,
                    "num_warps": 4, "num_stages": 1,
                },
                key.reusable,
            )  # fmt: skip
            before = rows_layout(key.n_pixels, C)
        self._scratch = pixels * C, pixels * H
        self._residual = residual
        first = Linear(
            key.sequences, key.n_pixels, C, H, activation, True, key.dtype, key.device,
            key.precision,
        )  # fmt: skip
        second = first._replace(in_dims=H, out_dims=D, activation="none", operand=False)
        self._first = linear_launch(first, before, None, key.reusable)
        self._second = linear_launch(
            second, rows_layout(key.n_pixels, H), x if residual else None, key.reusable
        )

    @property
    def ready(self) -> bool:
        """Whether the call takes addresses."""
        return self._second.ready

    def __call__(self, x: Tensor, pointers: Sequence[Pointer], out: Pointer) -> None:
        """Launch in the current stream; the arguments are those of `_Fused`."""
        image, *around, weight1, bias1, weight2, bias2, scale = pointers
        between, hidden = image, x.new_empty(self._scratch[1])
        if self._before is not None:
            between = x.new_empty(self._scratch[0])
            self._before(image, *around, between)
        self._first(between, weight1, bias1, None, None, hidden)
        residual = image if self._residual else None
        self._second(hidden, weight2, bias2, scale, residual, out)


@functools.lru_cache(maxsize=512)
def _forward_launches(key: _Key, sizes: _Sizes) -> _Fused | _InSteps:
    return (_Fused if _is_narrow(key.width, key.out_width) else _InSteps)(key, sizes)


def _is_narrow(width: int, out_width: int) -> bool:
    """Whether one launch computes a forward, and kernels a backward."""
    return max(width, out_width) <= config.MAX_FUSED_WIDTH


def taps_first(depthwise: Tensor) -> Tensor:
    """A depthwise weight [C, 1, k, k], in memory as [k, k, C]: the kernels load it fastest so."""
    return depthwise.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def _in_order(weights: Weights, norm: Norm) -> tuple[Tensor | None, ...]:
    """The tensors as the kernels of the forward take them."""
    return (*weights[:2], *norm, *weights[2:])


def infer(x: Tensor, weights: Weights, norm: Norm, eps: float, options: Options) -> Tensor:
    """The output, in channels_last memory format.

    Args:
        x: [B, C, H, W]
        weights: as they are; `norm` is not folded into them.
        norm: what is computed between and after the products.
        eps: of the BatchNorm.
        options: of the operator.
    """
    out = x.new_empty_strided(*output_like(x, weights.token_dim))
    if out.numel() == 0:
        return out
    if _is_left_to_pytorch(x.dtype, weights):
        out.copy_(_infer_by_pytorch(x, weights, norm, eps, options))
    else:
        with device_guard(x):
            launches, pointers = _prepare(x, weights, norm, eps, options)
            launches(x, pointers, out)
    return out


def _is_left_to_pytorch(dtype: torch.dtype, weights: Weights) -> bool:
    """Whether PyTorch's libraries compute a forward: wide layers without tensor cores."""
    narrow = _is_narrow(weights.width, weights.token_dim)
    return not (narrow or has_tensor_cores(dtype, precision(dtype, True)))


def _infer_by_pytorch(
    x: Tensor, weights: Weights, norm: Norm, eps: float, options: Options
) -> Tensor:
    """`infer` by PyTorch's operators."""
    before = reference.depthwise(x, weights)
    if norm.mean is not None:
        before = F.batch_norm(
            before, norm.mean, norm.variance, norm.weight, norm.bias, False, 0.0, eps
        )
    scale = None if weights.scale is None else weights.scale.flatten()
    products = weights._replace(depthwise_weight=None, depthwise_bias=None, scale=scale)
    out = reference.conv_mlp(before, products, None, options._replace(residual=False))
    return x + out if options.residual else out


def _prepare(
    x: Tensor, weights: Weights, norm: Norm, eps: float, options: Options
) -> tuple[_Fused | _InSteps, list[Tensor | None]]:
    """The launches of a forward, and their pointers but for that of the output."""
    (image,) = _join([_pixels(x)])
    depthwise, *others = _in_order(weights, norm)
    kernel, is_taps_first = 0, False
    if depthwise is not None:
        kernel = depthwise.shape[-1]
        is_taps_first = depthwise.permute(2, 3, 1, 0).is_contiguous()
        depthwise = depthwise if is_taps_first else depthwise.contiguous()
    tensors = [depthwise, *contiguous(others)]
    types = tuple([None if t is None else t.dtype for t in (*norm, weights.scale)])
    height, width = x.shape[2:]
    sizes = _Sizes(types, height, width, kernel, is_taps_first, norm.mean is not None, eps)
    key = _key([image], weights, options, tensors)
    return _forward_launches(key, sizes), [image.data, *tensors]


class InferencePlan:
    """Launches the kernels of a layer by address, once they are compiled for such inputs.

    Nothing is folded or packed: the kernels read the tensors of the layer as they are.

    Args:
        x: an input of the calls.
        tensors: `Weights`, then `Norm` or nothing. The plan is called with these.
        eps: of the BatchNorm.
        options: of the operator.
    """

    lasting = True

    def __init__(
        self, x: Tensor, tensors: Sequence[Tensor | None], eps: float, options: Options
    ) -> None:
        self._eps, self._options = eps, options
        self._places = cache.places(cache.present(tuple(tensors)))
        self._precision = precision(x.dtype, True)
        weights, norm = Weights(*tensors[:7]), Norm(*tensors[7:])  # type: ignore[arg-type]
        self._out = output_like(x, weights.token_dim)
        self._launches: _Fused | _InSteps | None = None
        if x.numel() > 0 and not _is_left_to_pytorch(x.dtype, weights):
            launches, pointers = _prepare(x, weights, norm, eps, options)
            readable = all(map(operator.is_, pointers, (x, *_in_order(weights, norm))))
            if readable and fits_kernels(*pointers):
                self._launches = launches
                self._addresses = [None if t is None else t.data_ptr() for t in pointers[1:]]

    def __call__(
        self, x: Tensor, tensors: tuple[Tensor | None, ...], mask: None, residual_scale: None
    ) -> Tensor | None:
        if self._places != cache.places(cache.present(tensors)):
            return None
        if self._precision != precision(x.dtype, True):
            return None  # PyTorch's setting has changed
        launches = self._launches
        if launches is None or not launches.ready or not fits_kernels(x):
            weights, norm = Weights(*tensors[:7]), Norm(*tensors[7:])  # type: ignore[arg-type]
            return infer(x, weights, norm, self._eps, self._options)
        out = torch.empty_strided(*self._out, dtype=x.dtype, device=x.device)
        with device_guard(x):
            launches(x, (x.data_ptr(), *self._addresses), out.data_ptr())
        return out


def forward(
    inputs: Sequence[Tensor], weights: Weights, mask: None, options: Options, keep: str
) -> tuple[Tensor, Saved]:
    """The output in channels_last memory format; nothing else is kept."""
    return infer(inputs[0], weights, Norm(), 0.0, options), Saved()


class _BackwardLaunches:
    """The launches of a backward without depthwise convolution.

    Attributes:
        splits: partial sums of the gradients of the weights.
        sizes: numbers of the gradients of W1, W2, b1, b2.
    """

    def __init__(self, key: _Key) -> None:
        x, dout, dx = key.layouts
        tokens, weights = config.backward_configs(
            max(key.width, key.out_width), key.dtype, architecture(key.device)
        )
        of_dout = {"DOUT_CHANNELS_LAST": dout.channels_last, "DOUT_ALIGN": dout.align}
        widest = power_of_two(max(key.width, key.out_width))
        tiles = cdiv(key.n_pixels, tokens.block_n)
        block_c = min(power_of_two(key.width), tokens.block_j)
        self.input = KernelLaunch(
            _input_backward_kernel,
            key.sequences * tiles * cdiv(key.width, block_c),
            (key.n_pixels, tiles, *x.strides, *dout.strides, *dx.strides),
            _shared(key, tokens)
            | of_dout
            | {
                "RESIDUAL": key.options.residual, "DX_CHANNELS_LAST": dx.channels_last,
                "DX_ALIGN": dx.align, "BLOCK_K": min(widest, tokens.block_k), "BLOCK_C": block_c,
            },
            key.reusable,
        )  # fmt: skip
        block_j = min(widest, weights.block_j)
        jobs = cdiv(key.hidden, weights.block_h)
        jobs *= cdiv(max(key.width, key.out_width), block_j)
        tiles_per_sequence = cdiv(key.n_pixels, weights.block_n)
        tiles = key.sequences * tiles_per_sequence
        self.sizes = (
            key.hidden * key.width, key.out_width * key.hidden, key.hidden, key.out_width,
        )  # fmt: skip
        # Partial sums are written and read in the type of the accumulators.
        part_bytes = 2 * sum(self.sizes) * accumulator(key.dtype).itemsize
        x_bytes = key.sequences * key.n_pixels * key.width * key.dtype.itemsize
        max_splits = config.MAX_PARTIAL_BYTES * x_bytes // part_bytes
        self.splits, tiles_per_split = config.split_pixels(jobs, tiles, max_splits)
        part_stride = 0 if self.splits == 1 else sum(self.sizes)
        self.weights = KernelLaunch(
            _weights_backward_kernel,
            jobs * self.splits,
            (
                key.n_pixels, tiles, tiles_per_split, tiles_per_sequence, part_stride,
                *x.strides, *dout.strides,
            ),
            _shared(key, weights)
            | of_dout
            | {"BLOCK_K": min(widest, weights.block_k), "BLOCK_J": block_j},
            key.reusable,
        )  # fmt: skip
        columns, partials = sum_tile(sum(self.sizes))
        self.finish = KernelLaunch(
            _finish_backward_kernel,
            cdiv(sum(self.sizes), columns),
            (self.splits,),
            {
                "C": key.width, "H": key.hidden, "D": key.out_width, "BLOCK_J": columns,
                "BLOCK_S": partials, "num_warps": 8, "num_stages": 2,
            },
            key.reusable,
        )  # fmt: skip


_backward_launches = functools.lru_cache(maxsize=512)(_BackwardLaunches)


def forget_launches() -> None:
    """Clear the cache of launches, after a change that their keys do not show."""
    _forward_launches.cache_clear()
    _backward_launches.cache_clear()


def backward(
    dout: Tensor,
    inputs: Sequence[Tensor],
    weights: Weights,
    mask: None,
    saved: Saved,
    options: Options,
    needs: Needs,
) -> list[Tensor | None]:
    """Gradients of x and of the weights; None where not needed or without bias."""
    narrow = _is_narrow(weights.width, weights.token_dim)
    if weights.depthwise_weight is not None or not narrow:
        return gradients.backward(dout, inputs, weights, mask, saved, options, needs)
    (x,) = inputs
    with device_guard(x):
        dx = torch.empty_like(x)
        written = _pixels(dx)
        images = _join([_pixels(x), _pixels(dout), written])
        scaled = weights._replace(weight2=gradients.scaled_weight2(weights), scale=None)
        _, _, weight1, bias1, weight2, bias2, _ = ready = Weights(*contiguous(scaled))
        key = _key(images, ready, options, ready)
        launches = _backward_launches(key)
        read = (images[0].data, images[1].data, weight1, bias1, weight2)
        if needs.inputs:
            launches.input(*read, written.data)
            if written.data is not dx:
                dx.copy_(written.data)
        if not needs.weights:
            return [dx, *[None] * len(weights)]
        sums = [
            None if w is None else w.new_empty(w.shape) for w in (weight1, weight2, bias1, bias2)
        ]
        if launches.splits == 1:
            launches.weights(*read, *sums)
        else:
            acc = accumulator(x.dtype)
            parts = x.new_empty(launches.splits, sum(launches.sizes), dtype=acc)
            each = parts.split(launches.sizes, 1)
            given = (None if s is None else p for s, p in zip(sums, each, strict=True))
            launches.weights(*read, *given)
            launches.finish(parts, *sums)
    dw1, dw2, db1, db2 = sums
    assert dw2 is not None
    second = gradients.of_second_layer(dw2, db2, weights)
    return [dx if needs.inputs else None, None, None, dw1, db1, *second]
