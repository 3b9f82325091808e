"""The layer's weights as the compiled kernels read them: folded, packed, and kept while unchanged.

The output of a token with the unit rows qn = rq q and kn = rk k is

    plain       out = ((G * kn) Wp^T + bp + qn) Wf^T + bf

With M = Wf Wp, C = Wf Wq, c0 = Wf bq and c = Wf bp + bf, which only depend on weights, the same is

    triangular  out = rk (G * k) M^T + rq (C x + c0) + c
    folded      out = rk (A x + a) + rq (C x + c0) + c      A = M diag(G) Wk, a = M diag(G) bk per item

and the norms need no rows of q or k: |Wq x + bq| = |R [x; 1]| with R the triangular factor of
[Wq | bq], half the multiplications. The scores are linear in x as well, and G comes from a weighted
sum of x. That makes 4 N E^2 multiplications plain, 3.5 triangular, and 3 + E / N folded. Without
norms (rq = rk = 1) the folded form is one product with A + C.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swiftkernels.reference import POOLINGS, Options

PLAIN, TRIANGULAR, FOLDED = range(3)
"""The forms, as `Form` in layer.h."""

BACKWARD_WHOLE, BACKWARD_TILED = 3, 4
"""What the backward reads, as `BackwardLayer` in layer.h: for whole items, and for tiles."""

Weights = Sequence["Tensor | None"]
"""wq, bq, wk, bk, w_g, wp, bp, wf, bf, and the layer scale of a residual branch or None."""

# `struct Layer` and `struct BackwardLayer` in layer.h.
_LAYER = struct.Struct("5q2d12Pd7P21qQ")
_BACKWARD_LAYER = struct.Struct("5q2d12P")
_SOURCES = 10


class Packed:
    """A layer ready for the kernels.

    Attributes:
        fields: `struct Layer` or `struct BackwardLayer`.
        buffers: what its pointers point at.
        cancels: the kernels met tokens for which the plain form is more accurate.
    """

    __slots__ = ("buffers", "cancels", "fields")

    def __init__(self, fields: bytes, buffers: list[Tensor]) -> None:
        self.fields, self.buffers, self.cancels = fields, buffers, False


class _Entry(NamedTuple):
    state: tuple[tuple[int, int], ...]
    """Address and version of each weight."""
    packed: Packed


_cache: dict[int, tuple[weakref.ref[Tensor], dict[object, _Entry]]] = {}


def packed_layer(
    library: ctypes.CDLL, weights: Weights, options: Options, kind: int
) -> Packed:
    """The layer packed for a form or for the backward.

    It is packed once for each version of the weights: for as long as they stand at the same addresses
    with the same version counters. Writes through `.data` do not count there, as they do not for
    autograd; the kernels look at samples of every weight and report those.
    """
    first = weights[0]
    assert first is not None
    key = (kind, options, id(library))
    try:
        state = tuple([(w.data_ptr(), w._version) for w in weights if w is not None])
    except RuntimeError:  # inference tensors have no version counter
        return pack(library, weights, options, kind)
    held = _cache.get(id(first))
    if held is not None and held[0]() is first:
        entry = held[1].get(key)
        if entry is not None and entry.state == state:
            return entry.packed
    else:
        held = _hold(first)
    packed = pack(library, weights, options, kind)
    held[1][key] = _Entry(state, packed)
    return packed


def forget(weights: Weights) -> None:
    """Drop what is packed of this layer."""
    _cache.pop(id(weights[0]), None)


def _hold(first: Tensor) -> tuple[weakref.ref[Tensor], dict[object, _Entry]]:
    address = id(first)
    held = (weakref.ref(first, lambda _: _cache.pop(address, None)), {})
    _cache[address] = held
    return held


def pack(
    library: ctypes.CDLL, weights: Weights, options: Options, kind: int, watched: bool = True
) -> Packed:
    """Fold in float64 where there is something to fold, and pack.

    `watched`: let the kernels check that the weights still are what was packed.
    """
    packer = _Packer(library)
    wq, bq, wk, bk, w_g, wp, bp, wf, bf, layer_scale = weights
    assert wq is not None and wk is not None and w_g is not None
    assert wp is not None and wf is not None
    width, in_dims = wq.shape
    token_dim = wf.shape[0]
    sizes = (in_dims, width, token_dim, POOLINGS.index(options.pooling), int(options.qk_norm))
    if kind in (BACKWARD_WHOLE, BACKWARD_TILED):
        forward = packed_layer(library, weights, options, PLAIN)
        _, _, _, _, _, _, _, query, query_bias, key, key_bias, packed_w_g, proj, proj_bias, *_ = (
            _LAYER.unpack(forward.fields)
        )
        packer.buffers += forward.buffers
        whole = kind == BACKWARD_WHOLE
        fields = _BACKWARD_LAYER.pack(
            *sizes, options.scale, options.eps,
            packed_w_g, packer.matrix(wq), packer.matrix(wk), packer.matrix(wf),
            packer.matrix(wp) if whole else 0, 0 if whole else packer.matrix(wf @ wp),
            query, query_bias, key, key_bias, proj, proj_bias,
        )  # fmt: skip
        return Packed(fields, packer.buffers)
    if layer_scale is not None:
        wf = wf.double() * layer_scale.double().unsqueeze(1)
        bf = None if bf is None else bf.double() * layer_scale.double()
    null = 0
    fields: list[float] = [
        *sizes, options.scale, options.eps,
        packer.matrix(wq.t()), packer.vector(bq, width),
        packer.matrix(wk.t()) if kind != FOLDED else null, packer.vector(bk, width),
    ]  # fmt: skip
    if kind == PLAIN:
        fields += [
            packer.vector(w_g, width),
            packer.matrix(wp.t()), packer.vector(bp, width),
            packer.matrix(wf.t()), packer.vector(bf, token_dim),
            *[null] * 3, 0.0, *[null] * 7,
        ]  # fmt: skip
    else:
        fields += [null] * 5
        fields += _folded(packer, (wq, bq, wk, bk, w_g, wp, bp, wf, bf), options, kind)
    sources = [w for w in weights if watched and w is not None and w.is_contiguous()]
    numbers = [number for w in sources for number in (w.data_ptr(), w.nbytes // 4)]
    numbers += [0] * (2 * _SOURCES - len(numbers))
    blank = _LAYER.pack(*fields, *numbers, len(sources), 0)
    fingerprint = library.swiftkernels_fingerprint(blank)
    return Packed(_LAYER.pack(*fields, *numbers, len(sources), fingerprint), packer.buffers)


def _folded(packer: _Packer, weights: Weights, options: Options, kind: int) -> list[float]:
    """The fields of `struct Layer` from `query_triangle` on."""
    wq, bq, wk, bk, w_g, wp, bp, wf, bf = (None if w is None else w.double() for w in weights)
    assert wq is not None and wk is not None and w_g is not None
    assert wp is not None and wf is not None
    width, in_dims = wq.shape
    token_dim = wf.shape[0]
    bq, bk, bp = (wq.new_zeros(width) if b is None else b for b in (bq, bk, bp))
    bf = wq.new_zeros(token_dim) if bf is None else bf
    M, C, c0, c = wf @ wp, wf @ wq, wf @ bq, wf @ bp + bf
    query_triangle, query_triangle_bias = packer.triangle(wq, bq, options)
    if not options.qk_norm:
        c = c + c0
    fields: list[float] = [
        query_triangle, query_triangle_bias,
        packer.vector(wq.t() @ w_g, in_dims), float(bq @ w_g),
    ]  # fmt: skip
    constant = [c0.unsqueeze(0)] if options.qk_norm else []
    if kind == TRIANGULAR:
        output = torch.cat([M.t(), C.t(), *constant])
        return [*fields, packer.matrix(output), packer.vector(c, token_dim), *[0] * 5]
    parts = [C.t(), *constant]
    if options.qk_norm:
        parts.insert(0, C.new_zeros(in_dims + 1, token_dim))
    return [
        *fields, 0, packer.vector(c, token_dim),
        *packer.triangle(wk, bk, options),
        packer.rows(torch.cat([wk.t(), bk.unsqueeze(0)])),
        packer.matrix(M.t()), packer.matrix(torch.cat(parts)),
    ]  # fmt: skip


class _Packer:
    """Packs matrices and vectors, keeps the buffers, gives their addresses."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.lanes = library.swiftkernels_lanes()
        self.buffers: list[Tensor] = []

    def _keep(self, buffer: Tensor) -> int:
        self.buffers.append(buffer)
        return buffer.data_ptr()

    def _padded(self, columns: int) -> int:
        return -(-columns // self.lanes) * self.lanes

    def matrix(self, b: Tensor, single: bool = False) -> int:
        """Panels of b [K, columns]; `single`: of one vector each."""
        b = b.detach().float()
        K, columns = b.shape
        panels = torch.empty(K * self._padded(columns))
        self.library.swiftkernels_pack(
            b.data_ptr(), K, columns, b.stride(0), b.stride(1), single, panels.data_ptr()
        )
        return self._keep(panels)

    def vector(self, v: Tensor | None, length: int) -> int:
        """v, or zeros, padded with zeros."""
        padded = torch.zeros(self._padded(length))
        if v is not None:
            padded[:length] = v.detach()
        return self._keep(padded)

    def rows(self, matrix: Tensor) -> int:
        """Rows padded with zeros."""
        padded = torch.zeros(matrix.shape[0], self._padded(matrix.shape[1]))
        padded[:, : matrix.shape[1]] = matrix.detach()
        return self._keep(padded)

    def triangle(self, weight: Tensor, bias: Tensor, options: Options) -> tuple[int, int]:
        """R of [weight | bias] = Q R: |weight x + bias| = |R [x; 1]|."""
        if not options.qk_norm:
            return 0, 0
        R = torch.linalg.qr(torch.cat([weight, bias.unsqueeze(1)], dim=1), mode="r").R
        triangle = self.matrix(R[:, :-1].t(), single=True)
        return triangle, self.vector(R[:, -1], R.shape[0])
