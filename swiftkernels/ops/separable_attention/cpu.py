"""Calls the compiled kernels: what a forward and a backward hand over and get back."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from swiftkernels.backends.cpu import library
from swiftkernels.ops.separable_attention.layouts import Sequences, empty_output, sequences_of
from swiftkernels.ops.separable_attention.weights import Options, Weights

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Codes of the types, as `Type` in tokens.h."""

# The structs of csrc/abi.h.
_PACKED_WEIGHTS = struct.Struct("2q7P")
_RAW_WEIGHTS = struct.Struct("2q4P")
_SEQUENCES = "P4q"
_CALL = struct.Struct(f"5q{_SEQUENCES * 2}3P")
_BACKWARD_CALL = struct.Struct(f"5q{_SEQUENCES * 3}3Pq4P")

_NOTHING = (0, 0, 0, 0, 0)


class Saved(NamedTuple):
    """What the backward needs beside the inputs, in float32; B counts sequences."""

    context: Tensor
    """[B, C]."""
    pooled: Tensor
    """[B, C]: the mean of the tokens, weighted with the softmax of their scores."""
    softmax: Tensor
    """[B, 2]: the highest score, and the sum of exp(score - highest)."""


class Packed:
    """Weights ready for the kernels.

    Attributes:
        fields: `struct PackedWeights`.
        buffers: what its pointers point at.
        uses: calls that it served.
    """

    __slots__ = ("buffers", "fields", "uses")

    def __init__(self, fields: bytes, buffers: list[Tensor]) -> None:
        self.fields, self.buffers, self.uses = fields, buffers, 0


@functools.cache
def kernels() -> ctypes.CDLL:
    """The library in use, its functions with their types."""
    loaded = library.loaded()
    assert loaded is not None, "the backend is chosen where there is a library"
    return declare(loaded.handle)


def declare(handle: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the types of the functions of a library."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("lanes", number, ()),
        ("pack", None, (pointer, *[number] * 4, pointer)),
        ("separable_forward", ctypes.c_int, (ctypes.c_char_p, ctypes.c_char_p)),
        ("separable_forward_training", ctypes.c_int, (ctypes.c_char_p, ctypes.c_char_p)),
        ("separable_backward", ctypes.c_int, (ctypes.c_char_p, ctypes.c_char_p)),
    ):
        function = getattr(handle, f"swiftkernels_{name}")
        function.restype, function.argtypes = result, arguments
    return handle


def why_not(x: Tensor, weights: Weights, options: Options) -> str:
    """Why the kernels cannot take x, as continuation of "backend='cpu' ..."; empty if they can."""
    if x.device.type != "cpu":
        return f"needs a tensor on the CPU; got one on {x.device}"
    if x.dtype not in TYPES:
        return f"takes float32, bfloat16 and float16; got {str(x.dtype).removeprefix('torch.')}"
    return library.why_not()


def saved_like(
    inputs: tuple[Tensor], weights: Weights, mask: None, options: Options, keep: str
) -> Saved:
    """Uninitialised room for what a backward needs; empty where none follows."""
    (x,) = inputs
    batch, groups, _, width, _ = sequences_of(x)
    count = 0 if keep == "nothing" else batch * groups
    new = functools.partial(x.new_empty, dtype=torch.float32)
    return Saved(new(count, width), new(count, width), new(count, 2))


def forward(
    inputs: tuple[Tensor], weights: Weights, mask: None, options: Options, keep: str
) -> tuple[Tensor, Saved]:
    """out, [B, N, D] or [B, D, P, N], and what the backward needs unless `keep` is "nothing"."""
    (x,) = inputs
    out = empty_output(x, weights.token_dim)
    saved = saved_like(inputs, weights, mask, options, keep)
    if out.numel() > 0:
        fields, _alive = raw_weights(weights)
        call = _call(x, out, None if keep == "nothing" else saved)
        _check(kernels().swiftkernels_separable_forward_training(fields, call))
    return out, saved


def infer(x: Tensor, out: Tensor, packed: Packed) -> None:
    """Fill out for inference with packed weights."""
    if out.numel() > 0:
        _check(kernels().swiftkernels_separable_forward(packed.fields, _call(x, out, None)))
        packed.uses += 1


def backward(
    dout: Tensor,
    inputs: tuple[Tensor],
    weights: Weights,
    mask: None,
    saved: Saved,
    options: Options,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the four weights; None where not asked for or without bias."""
    (x,) = inputs
    needs_inputs, needs_weights = needs
    dx = torch.empty_like(x) if needs_inputs else None
    gradients = [
        torch.empty(w.shape, dtype=torch.float32) if w is not None and needs_weights else None
        for w in weights
    ]
    fields, _alive = raw_weights(weights)
    call = _BACKWARD_CALL.pack(
        *_sizes(x), *_pointer(x), *_pointer(dout), *(_NOTHING if dx is None else _pointer(dx)),
        *[t.data_ptr() for t in saved], needs_weights,
        *[0 if g is None else g.data_ptr() for g in gradients],
    )  # fmt: skip
    _check(kernels().swiftkernels_separable_backward(fields, call))
    dtype = weights.qkv_weight.dtype
    return dx, *[None if g is None else g.to(dtype) for g in gradients]


def _call(x: Tensor, out: Tensor, saved: Saved | None) -> bytes:
    kept = (0, 0, 0) if saved is None else [t.data_ptr() for t in saved]
    return _CALL.pack(*_sizes(x), *_pointer(x), *_pointer(out), *kept)


def _sizes(x: Tensor) -> tuple[int, ...]:
    """What the structs of a call begin with."""
    s = sequences_of(x)
    return s.batch, s.groups, s.tokens, torch.get_num_threads(), TYPES[x.dtype]


def _pointer(t: Tensor) -> tuple[int, ...]:
    """`struct Sequences`."""
    return t.data_ptr(), *sequences_of(t).strides


def raw_weights(weights: Weights) -> tuple[bytes, list[Tensor | None]]:
    """`struct RawWeights`, and the tensors that must live as long as it is used."""
    ready = [None if t is None else t.detach().float().contiguous() for t in weights]
    pointers = [0 if t is None else t.data_ptr() for t in ready]
    return _RAW_WEIGHTS.pack(weights.width, weights.token_dim, *pointers), ready


def pack(weights: Weights, dtype: torch.dtype) -> Packed:
    """The weights, rounded to dtype, as the kernels read them in inference."""
    handle = kernels()
    lanes = handle.swiftkernels_lanes()
    buffers: list[Tensor] = []

    def padded(t: Tensor | None, rows: int, columns: int) -> int:
        """Rows padded with zeros to whole vectors."""
        buffer = torch.zeros(rows, -(-columns // lanes) * lanes)
        if t is not None:
            buffer[:, :columns] = t
        buffers.append(buffer)
        return buffer.data_ptr()

    def panels(t: Tensor) -> int:
        """Panels of the transpose."""
        columns, K = t.shape
        t = t.float()
        buffer = torch.empty(K * -(-columns // lanes) * lanes)
        handle.swiftkernels_pack(
            t.data_ptr(), K, columns, t.stride(1), t.stride(0), buffer.data_ptr()
        )
        buffers.append(buffer)
        return buffer.data_ptr()

    qkv, qkv_bias, proj, proj_bias = (None if t is None else t.detach().to(dtype) for t in weights)
    assert qkv is not None
    assert proj is not None
    width, out_width = qkv.shape[1], proj.shape[0]
    query, key, value = qkv.flatten(1).split([1, width, width])
    key_bias, value_bias = (None, None) if qkv_bias is None else qkv_bias[1:].split(width)
    fields = _PACKED_WEIGHTS.pack(
        width, out_width, padded(query, 1, width),
        padded(key, width, width), padded(key_bias, 1, width),
        panels(value), padded(value_bias, 1, width),
        panels(proj.flatten(1)), padded(proj_bias, 1, out_width),
    )  # fmt: skip
    return Packed(fields, buffers)


def _check(status: int) -> None:
    if status != 0:
        raise MemoryError(
            "The CPU kernels found no memory for their tiles. Free some, or use "
            "backend='reference'."
        )
