"""Calls the compiled kernels: what a forward and a backward hand over and get back.

The signatures are those of `triton/launch.py`; nothing here is differentiable.
"""

from __future__ import annotations

import ctypes
import functools
import struct

import torch
from torch import Tensor

from swiftkernels.backends.cpu import library
from swiftkernels.ops.additive_attention.cpu import config, packing
from swiftkernels.ops.additive_attention.cpu.packing import PLAIN, Weights
from swiftkernels.ops.additive_attention.reference import Options

Saved = tuple[Tensor, Tensor, Tensor]
"""G [B, E]; a, 1/|q|, 1/|k| [3, B, N] and 1/|s| [B] in one [B, 3 N + 1]; qn and kn [2, B, N, E]."""

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Codes of the types, as `Type` in tokens.h."""

# `struct Call` and `struct BackwardCall` in layer.h.
_CALL = struct.Struct("6qP3qP3qP2q3P")
_BACKWARD_CALL = struct.Struct("9qP3qP3qP3qP2q12P")

_NOTHING = (0, 0, 0)
_NOTHING_AT_ALL = (0, 0, 0, 0)

# `Status` in layer.h.
_STALE, _CANCELLATION = 2, 3


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
        ("fingerprint", ctypes.c_uint64, (ctypes.c_char_p, number)),
        ("forward", ctypes.c_int, (ctypes.c_char_p, ctypes.c_char_p)),
        ("forward_training", ctypes.c_int, (ctypes.c_char_p, ctypes.c_char_p)),
        ("backward", ctypes.c_int, (ctypes.c_char_p, ctypes.c_char_p)),
    ):
        function = getattr(handle, f"swiftkernels_{name}")
        function.restype, function.argtypes = result, arguments
    return handle


def additive_self_attention_forward(
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    w_g: Tensor,
    wp: Tensor,
    bp: Tensor | None,
    wf: Tensor,
    bf: Tensor | None,
    mask: Tensor | None,
    options: Options,
    keep: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B, N, D], and what `keep` asks for: "nothing", "statistics", or "rows" beside them."""
    layer = Weights(wq, bq, wk, bk, w_g, wp, bp, wf, bf)
    batch, n_tokens, _ = x.shape
    token_dim, width = wf.shape
    out = x.new_empty(batch, n_tokens, token_dim)
    if keep == "nothing":
        run(x, out, layer, mask, options)
        return out, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    global_query = x.new_empty(batch, width, dtype=torch.float32)
    statistics = x.new_empty(batch, 3 * n_tokens + 1, dtype=torch.float32)
    rows = x.new_empty((2, batch, n_tokens, width) if keep == "rows" else 0)
    if out.numel() > 0:
        fields, _alive = packing.raw_layer(layer, options)
        kept = (global_query, statistics, rows)
        call = _call_fields(
            batch, n_tokens, PLAIN, x, x.stride(), out, out.stride(), False, mask, kept
        )
        _check(kernels().swiftkernels_forward_training(fields, call))
    return out, global_query, statistics, rows


def run(x: Tensor, out: Tensor, layer: Weights, mask: Tensor | None, options: Options) -> Tensor:
    """Fill out for inference, in the fastest form; with a layer scale, x is added to it.

    The weights may be of a wider type than x, which they are rounded to.
    """
    if out.numel() > 0:
        form = config.form(x.shape[1], x.shape[2], layer.wq.shape[0], options.qk_norm)
        _run(x, out, layer, mask, options, form)
    return out


def _run(
    x: Tensor, out: Tensor, layer: Weights, mask: Tensor | None, options: Options, form: int
) -> None:
    sizes = (x.shape[0], x.shape[1], form, x, x.stride(), out, out.stride())
    scale = layer.layer_scale
    for _ in range(2):
        packed = packing.packed_layer(kernels(), layer, options, form, x.dtype)
        if packed is None:
            break
        if call_forward(packed, *sizes, scale is not None, mask):
            return
        if packed.cancels:
            assert form != PLAIN, "the plain form takes all numbers"
            _run(x, out, layer, mask, options, PLAIN)
            return
        # Written to past the version counters.
        packing.found_stale(layer, options, form, x.dtype)
    if scale is None:
        _run_unpacked(x, out, layer, mask, options)
    else:
        _run(x, out, layer._replace(layer_scale=None), mask, options, form)
        torch.add(x, out.mul_(scale.flatten()), out=out)


def _run_unpacked(
    x: Tensor, out: Tensor, layer: Weights, mask: Tensor | None, options: Options
) -> None:
    """In the plain form, with the weights read as they are, like a forward of training."""
    fields, _alive = packing.raw_layer(packing.rounded(layer, x.dtype), options)
    call = _call_fields(
        x.shape[0], x.shape[1], PLAIN, x, x.stride(), out, out.stride(), False, mask, None
    )
    _check(kernels().swiftkernels_forward_training(fields, call))


def call_forward(
    packed: packing.Packed,
    batch: int,
    n_tokens: int,
    form: int,
    x: Tensor,
    x_strides: tuple[int, ...],
    out: Tensor,
    out_strides: tuple[int, ...],
    add_input: bool,
    mask: Tensor | None = None,
) -> bool:
    """Run the forward; strides are of batch, token, channel. False: not with these packed weights.

    Either they are stale, or `packed.cancels`: the plain form is to be taken.
    """
    if packed.cancels:
        return False
    call = _call_fields(
        batch, n_tokens, form, x, x_strides, out, out_strides, add_input, mask, None
    )
    status = kernels().swiftkernels_forward(packed.fields, call)
    if status in (_STALE, _CANCELLATION):
        packed.cancels = status == _CANCELLATION
        return False
    _check(status)
    packed.uses += 1
    return True


def _call_fields(
    batch: int,
    n_tokens: int,
    form: int,
    x: Tensor,
    x_strides: tuple[int, ...],
    out: Tensor,
    out_strides: tuple[int, ...],
    add_input: bool,
    mask: Tensor | None,
    kept: Saved | None,
) -> bytes:
    """`struct Call`."""
    return _CALL.pack(
        batch, n_tokens, form, torch.get_num_threads(), TYPES[x.dtype], add_input, x.data_ptr(),
        *x_strides, out.data_ptr(), *out_strides,
        *(_NOTHING if mask is None else (mask.data_ptr(), *mask.stride())),
        *(_NOTHING if kept is None else [t.data_ptr() for t in kept]),
    )  # fmt: skip


def additive_self_attention_backward(
    dout: Tensor,
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    w_g: Tensor,
    wp: Tensor,
    bp: Tensor | None,
    wf: Tensor,
    bf: Tensor | None,
    mask: Tensor | None,
    saved: Saved,
    options: Options,
    needs_tokens: bool,
    needs_weights: bool,
) -> list[Tensor | None]:
    """Gradients of x and the nine weights; None where not asked for or without bias."""
    handle = kernels()
    batch, n_tokens, _ = x.shape
    width = wf.shape[1]
    threads = torch.get_num_threads()
    whole = n_tokens <= config.WHOLE_ROWS and config.backward_by_items(
        batch, n_tokens, width, threads
    )
    # Few tokens in all make the products of E x E matrices behind the moments too expensive.
    direct = whole and batch * n_tokens < 2 * width
    folded = saved[2].numel() == 0 and config.folds_backward(batch, n_tokens, width)
    layer = Weights(wq, bq, wk, bk, w_g, wp, bp, wf, bf)
    fields, _alive = packing.raw_layer(layer, options)
    dx = torch.empty_like(x) if needs_tokens else None
    gradients = [
        torch.empty_like(w, dtype=torch.float32, memory_format=torch.contiguous_format)
        if w is not None and needs_weights
        else None
        for w in layer[:9]
    ]
    call = _BACKWARD_CALL.pack(
        batch, n_tokens, whole, threads, TYPES[x.dtype], direct, folded, needs_tokens,
        needs_weights,
        x.data_ptr(), *x.stride(), dout.data_ptr(), *dout.stride(),
        *(_NOTHING_AT_ALL if dx is None else (dx.data_ptr(), *dx.stride())),
        *(_NOTHING if mask is None else (mask.data_ptr(), *mask.stride())),
        *[t.data_ptr() for t in saved],
        *[0 if g is None else g.data_ptr() for g in gradients],
    )  # fmt: skip
    _check(handle.swiftkernels_backward(fields, call))
    if x.dtype != torch.float32:
        gradients = [None if g is None else g.to(x.dtype) for g in gradients]
    return [dx, *gradients]


def _check(status: int) -> None:
    if status != 0:
        raise MemoryError(
            "The CPU kernels found no memory for their tiles. Free some, or use "
            "backend='reference'."
        )
