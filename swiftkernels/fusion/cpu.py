"""Runs the steps of a chain by the compiled kernels: packs them into the structs of csrc/abi.h."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftkernels.backends.cpu import library
from swiftkernels.backends.cpu.library import CANCELLATION, TYPES
from swiftkernels.backends.cpu.packing import NEVER_STALE, Packer
from swiftkernels.backends.layouts import image_strides
from swiftkernels.fusion import steps as of
from swiftkernels.fusion.steps import ACTIVATIONS, Step, size_after
from swiftkernels.ops.additive_attention.cpu import config
from swiftkernels.ops.additive_attention.cpu import packing as attention
from swiftkernels.ops.conv_mlp.cpu import pack as pack_conv_mlp
from swiftkernels.ops.conv_mlp.weights import Weights as ConvMlpWeights

# The structs of csrc/abi.h, and `StepKind`.
_PRODUCT = struct.Struct("6q2P")
_COUNT = struct.Struct("q")
_DEPTHWISE = struct.Struct("5q2P")
_NORMALISE = struct.Struct("2qd2P")
_AVERAGE = struct.Struct("2qP")
_STEP = struct.Struct("qP2q")
_PROGRAM = struct.Struct("3qP")
_CALL = struct.Struct("5qP4qP4qP")
_KINDS: tuple[type[Step], ...] = (
    of.Stem, of.Convolution, of.PartialConvolution, of.Depthwise, of.Normalise, of.ConvMlp,
    of.Attention, of.Average, of.SqueezeExcite, of.Pool, of.Linear,
)  # fmt: skip

MAX_SIZES = 256
"""Sizes of images for which the form of each attention is remembered."""

_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}

library.register_interface(
    "network",
    {
        "revision": 2,
        "sizeof(Product)": _PRODUCT.size,
        "sizeof(Stem)": 2 * _PRODUCT.size,
        "sizeof(DepthwiseWeights)": _DEPTHWISE.size,
        "sizeof(PartialWeights)": _PRODUCT.size + _COUNT.size,
        "sizeof(NormaliseWeights)": _NORMALISE.size,
        "sizeof(AverageWeights)": _AVERAGE.size,
        "sizeof(SqueezeExciteWeights)": 2 * _PRODUCT.size + _COUNT.size,
        "sizeof(Step)": _STEP.size,
        "sizeof(Program)": _PROGRAM.size,
        "sizeof(Call)": _CALL.size,
        **{kind.kind.upper(): code for code, kind in enumerate(_KINDS)},
        **{gate: code for code, gate in enumerate(of.GATES)},
        **_CODES,
    },
)

kernels = library.kernels_of("network", "forward")


class Packed(NamedTuple):
    """A chain as the kernels read it."""

    program: bytes
    """`struct Program`"""
    out_channels: int
    memory: list[Any]
    """What the pointers refer to."""


class Programs:
    """The packed forms of a chain: attention has one for many tokens and one for few."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps
        self._by_size: dict[tuple[int, int], tuple[Packed, tuple[int, int]]] = {}
        self._by_forms: dict[tuple[int, ...], Packed] = {}
        self.uses_plain_attention = False

    def for_size(self, height: int, width: int) -> tuple[Packed, tuple[int, int]]:
        """The chain for images of that size, and the size of its output."""
        found = self._by_size.get((height, width))
        if found is None:
            forms = self.forms(height, width)
            packed = self._by_forms.get(forms) or _pack(self._steps, forms)
            out_size = height, width
            for step in self._steps:
                out_size = size_after(step, *out_size)
            if len(self._by_size) >= MAX_SIZES:
                self._by_size.clear()
            self._by_forms[forms] = packed
            found = self._by_size[height, width] = packed, out_size
        return found

    def use_plain_attention(self) -> None:
        """Other forms lose digits with these weights: use the plain one from now on."""
        self.uses_plain_attention = True
        self._by_size.clear()

    def forms(self, height: int, width: int) -> tuple[int, ...]:
        """The form of each attention, for images of that size."""
        forms = []
        for step in self._steps:
            height, width = size_after(step, height, width)
            if isinstance(step, of.Attention):
                w, norm = step.weights, step.options.qk_norm
                form = config.form(height * width, w.in_dims, w.width, norm)
                forms.append(attention.PLAIN if self.uses_plain_attention else form)
        return tuple(forms)


def run(steps: tuple[Step, ...], x: Tensor, slot: Any) -> Tensor:
    """The output of the chain, in the memory format channels_last.

    Args:
        steps: of the chain.
        x: [B, C, H, W] with elements, of any strides, in one of `library.TYPES`.
        slot: keeps the packed chain.

    Raises:
        MemoryError: not enough memory.
    """
    return _run(steps, x, slot, torch.get_num_threads(), 0)


def seconds_of_steps(steps: tuple[Step, ...], x: Tensor, slot: Any) -> list[float]:
    """The time that one thread spends in each step, for benchmarks; arguments as for `run`."""
    run(steps, x, slot)  # a call that packs again after a cancellation would count twice
    seconds = torch.zeros(len(steps), dtype=torch.float64, device="cpu")
    _run(steps, x, slot, 1, seconds.data_ptr())
    return [float(s) for s in seconds]


def _run(steps: tuple[Step, ...], x: Tensor, slot: Any, threads: int, seconds: int) -> Tensor:
    """The output of the chain; `seconds`: the address to which the times of steps are added."""
    programs = slot.program
    if programs is None:
        programs = slot.program = Programs(steps)
    batch, _, height, width = x.shape
    packed, out_size = programs.for_size(height, width)
    shape = (batch, packed.out_channels, *out_size)
    out = torch.empty(shape, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
    call = _CALL.pack(
        batch, height, width, threads, TYPES[x.dtype], library.address("x", x), *image_strides(x),
        out.data_ptr(), *image_strides(out), seconds,
    )  # fmt: skip
    status = kernels().swiftkernels_network_forward(packed.program, call)
    if status == CANCELLATION:
        programs.use_plain_attention()
        return _run(steps, x, slot, threads, seconds)
    library.check(status)
    return out


def _pack(steps: Sequence[Step], forms: Sequence[int]) -> Packed:
    packer = Packer(kernels())
    memory: list[Any] = [packer.buffers]
    fields = []
    remaining = iter(forms)
    for step in steps:
        form = next(remaining) if isinstance(step, of.Attention) else 0
        weights = ctypes.create_string_buffer(_weights(packer, step, form) or b"\0")
        memory.append(weights)
        code = _KINDS.index(type(step))
        fields.append(_STEP.pack(code, ctypes.addressof(weights), form, step.adds))
    array = ctypes.create_string_buffer(b"".join(fields))
    memory.append(array)
    channels = out_channels = steps[0].in_channels
    for step in steps:
        out_channels = _out_channels(step, out_channels)
    program = _PROGRAM.pack(channels, out_channels, len(steps), ctypes.addressof(array))
    return Packed(program, out_channels, memory)


def _out_channels(step: Step, channels: int) -> int:
    if isinstance(step, (of.Convolution, of.Depthwise, of.Linear)):
        return step.weight.shape[0]
    return step.weight2.shape[0] if isinstance(step, (of.Stem, of.ConvMlp)) else channels


def _weights(packer: Packer, step: Step, form: int) -> bytes:
    """The struct of the weights of a step."""
    if isinstance(step, of.Stem):
        first, second = step.convolutions
        # The first convolution reads the channels of x one by one, the second channels_last maps.
        return _convolution(packer, first, step.weight1.flatten(1)) + _convolution(packer, second)
    if isinstance(step, of.Convolution):
        return _convolution(packer, step)
    if isinstance(step, of.Depthwise):
        channels, kernel = len(step.weight), step.weight.shape[-1]
        return _DEPTHWISE.pack(
            channels, kernel, step.stride, step.multiplier, _CODES[step.activation],
            packer.rows(step.weight.flatten(1).t()), packer.vector(step.bias, channels),
        )  # fmt: skip
    if isinstance(step, of.PartialConvolution):
        kernel = step.weight.shape[-1]
        whole = of.Convolution(step.weight, step.bias, 1, kernel // 2)
        return _convolution(packer, whole) + _COUNT.pack(step.channels)
    if isinstance(step, of.Normalise):
        vectors = [packer.vector(t, step.in_channels) for t in (step.weight, step.bias)]
        return _NORMALISE.pack(step.in_channels, step.over_image, step.eps, *vectors)
    if isinstance(step, of.Average):
        channels = len(step.scale)
        return _AVERAGE.pack(channels, step.kernel, packer.vector(step.scale, channels))
    if isinstance(step, of.SqueezeExcite):
        first_layer = _product(packer, step.weight1, step.bias1, activation=step.activation)
        gate = _COUNT.pack(list(of.GATES).index(step.gate))
        return first_layer + _product(packer, step.weight2, step.bias2) + gate
    if isinstance(step, of.ConvMlp):
        weights = ConvMlpWeights(**step.tensors())  # type: ignore[arg-type]
        return pack_conv_mlp(packer, weights, step.options) + NEVER_STALE
    if isinstance(step, of.Attention):
        fields = attention.pack(packer, step.weights, step.residual_scale, step.options, form)
        return fields + NEVER_STALE
    if isinstance(step, of.Linear):
        return _product(packer, step.weight, step.bias)
    return b""


def _convolution(packer: Packer, step: of.Convolution, rows: Tensor | None = None) -> bytes:
    if rows is None:
        rows = step.weight.permute(0, 2, 3, 1).flatten(1)  # [D, k k C], in the order y, x, channel
    kernel, in_dims = step.weight.shape[-1], step.weight.shape[1]
    sizes = in_dims, kernel, step.stride, step.padding
    return _product(packer, rows, step.bias, sizes, step.activation)


def _product(
    packer: Packer,
    rows: Tensor,
    bias: Tensor,
    sizes: tuple[int, int, int, int] | None = None,
    activation: str = "none",
) -> bytes:
    """`struct Product` of a matrix [D, K]; `sizes`: channels, kernel, stride and padding."""
    in_dims, *window = sizes or (rows.shape[1], 1, 1, 0)
    return _PRODUCT.pack(
        in_dims, len(rows), *window, _CODES[activation], packer.matrix(rows.t()),
        packer.vector(bias, len(rows)),
    )  # fmt: skip
