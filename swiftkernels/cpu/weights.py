"""The layer's weights as the compiled kernels read them: folded, packed, and kept while unchanged.

The output of a token with the unit rows qn = rq q and kn = rk k is

    plain       out = ((G * kn) Wp^T + bp + qn) Wf^T + bf

With M = Wf Wp, C = Wf Wq, c0 = Wf bq and c = Wf bp + bf, which depend on weights only, the same is

    triangular  out = rk (G * k) M^T + rq (C x + c0) + c
    folded      out = rk (A x + a) + rq (C x + c0) + c      A = M diag(G) Wk, a = M diag(G) bk

and the norms need no rows of q or k: |Wq x + bq| = |R [x; 1]| with R the triangular factor of
[Wq | bq], half the multiplications. The scores are linear in x as well, and G comes from a weighted
sum of x. That makes 4 N E^2 multiplications plain, 3.5 triangular, and 3 + E / N folded. Without
norms (rq = rk = 1) the folded form is one product with A + C.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftkernels.reference import POOLINGS, Options

PLAIN, TRIANGULAR, FOLDED = range(3)
"""The forms, as `Form` in layer.h."""


class Weights(NamedTuple):
    """The weights of a layer; biases may be None."""

    wq: Tensor
    bq: Tensor | None
    wk: Tensor
    bk: Tensor | None
    w_g: Tensor
    wp: Tensor
    bp: Tensor | None
    wf: Tensor
    bf: Tensor | None
    layer_scale: Tensor | None = None
    """Of a residual branch, in any shape."""


# `struct Layer` and `struct RawLayer` in layer.h.
_LAYER = struct.Struct("5q2d12Pd7P22qQ")
_RAW_LAYER = struct.Struct("5q2d9P")
_SOURCES = 10


class Packed:
    """A layer ready for the kernels.

    Attributes:
        fields: `struct Layer`.
        buffers: what its pointers point at.
        cancels: the kernels met tokens for which the plain form is more accurate.
    """

    __slots__ = ("buffers", "cancels", "fields")

    def __init__(self, fields: bytes, buffers: list[Tensor]) -> None:
        self.fields, self.buffers, self.cancels = fields, buffers, False


State = tuple[tuple[Any, ...] | None, ...]
"""What would change with a weight, for each of them."""


class _Entry(NamedTuple):
    matrices: tuple[weakref.ref[Tensor], ...]
    """Vectors may be views made anew for every call; the kernels look at all of their numbers."""
    state: State
    packed: Packed

    def holds(self, weights: Weights, state: State) -> bool:
        """Whether it is of these weights in this state."""
        wk, wp, wf = self.matrices
        return (
            state == self.state and wk() is weights.wk and wp() is weights.wp and wf() is weights.wf
        )


class _Layer:
    """What is kept for one layer, under its query weight, for as long as that lives."""

    __slots__ = ("notes", "packed", "query_weight")

    def __init__(self, query_weight: Tensor) -> None:
        address, layers = id(query_weight), _layers  # a local: at exit the module's may be gone
        self.query_weight = weakref.ref(query_weight, lambda _: layers.pop(address, None))
        self.packed: dict[tuple[int, Options], _Entry] = {}
        self.notes: dict[Any, Any] = {}


_layers: dict[int, _Layer] = {}


def packed_layer(library: ctypes.CDLL, weights: Weights, options: Options, form: int) -> Packed:
    """The layer packed for a form.

    It is packed once for each version of the weights: for as long as they are the same tensors, at
    the same addresses, with the same version counters. Writes through `.data` do not count there,
    as they do not for autograd; the kernels look at all numbers of the vectors and samples of the
    matrices, and report those. Of weights made in inference mode, which have no counters, they look
    at everything.
    """
    state = _state(weights)
    layer = _layer(weights)
    entry = layer.packed.get((form, options))
    if entry is not None and entry.holds(weights, state):
        return entry.packed
    packed = pack(library, weights, options, form)
    matrices = tuple(map(weakref.ref, _matrices(weights)))
    layer.packed[form, options] = _Entry(matrices, state, packed)
    return packed


def find_packed(weights: Weights, options: Options, form: int) -> Packed | None:
    """What `packed_layer` would find, None if it would have to pack."""
    layer = _known_layer(weights)
    entry = None if layer is None else layer.packed.get((form, options))
    return entry.packed if entry is not None and entry.holds(weights, _state(weights)) else None


def forget(weights: Weights) -> None:
    """Drop what is kept of this layer."""
    _layers.pop(id(weights.wq), None)


def notes(weights: Weights) -> dict[Any, Any]:
    """Whatever else is to be kept for this layer; it outlives versions of the weights."""
    return _layer(weights).notes


def find_note(weights: Weights, key: object) -> Any:
    """One of the notes, None if there is none."""
    layer = _known_layer(weights)
    return None if layer is None else layer.notes.get(key)


Addresses = tuple[int | None, ...]


def addresses(weights: Weights) -> Addresses:
    """Where the weights' data begin."""
    return tuple([None if w is None else w.data_ptr() for w in weights])


def _state(weights: Weights) -> State:
    try:
        return tuple(
            [
                None if w is None else (w.data_ptr(), w._version, w.numel(), w.is_contiguous())
                for w in weights
            ]
        )
    except RuntimeError:  # inference tensors have no version counter
        return tuple(
            [None if w is None else (w.data_ptr(), w.numel(), w.is_contiguous()) for w in weights]
        )


def _matrices(weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Beside the query weight, which is the key: a new tensor may have a dead one's address."""
    return weights.wk, weights.wp, weights.wf


def _known_layer(weights: Weights) -> _Layer | None:
    layer = _layers.get(id(weights.wq))
    # Another tensor may have come to a dead one's id.
    return layer if layer is not None and layer.query_weight() is weights.wq else None


def _layer(weights: Weights) -> _Layer:
    layer = _known_layer(weights)
    if layer is None:
        layer = _layers[id(weights.wq)] = _Layer(weights.wq)
    return layer


def pack(
    library: ctypes.CDLL, weights: Weights, options: Options, form: int, watched: bool = True
) -> Packed:
    """Fold in float64 where there is something to fold, and pack.

    `watched`: let the kernels check that the weights still are what was packed.
    """
    packer = _Packer(library)
    fields = _forward_fields(packer, weights, options, form)
    sources = [w for w in weights if watched and w is not None and w.is_contiguous()]
    numbers = [number for w in sources for number in (w.data_ptr(), w.nbytes // 4)]
    numbers += [0] * (2 * _SOURCES - len(numbers))
    thorough = any(w.is_inference() for w in sources)
    watch = (*numbers, len(sources), thorough)
    fingerprint = library.swiftkernels_fingerprint(_LAYER.pack(*fields, *watch, 0))
    return Packed(_LAYER.pack(*fields, *watch, fingerprint), packer.buffers)


def raw_layer(weights: Weights, options: Options) -> tuple[bytes, list[Tensor | None]]:
    """`struct RawLayer` for training, and the tensors that must live as long as it is used."""
    ready = [
        t
        if t is None or (t.dtype == torch.float32 and t.is_contiguous())
        else t.detach().float().contiguous()
        for t in weights[:9]
    ]
    pointers = [0 if t is None else t.data_ptr() for t in ready]
    return _RAW_LAYER.pack(*_sizes(weights, options), *pointers), ready


def _sizes(weights: Weights, options: Options) -> list[float]:
    """What the structs begin with."""
    width, in_dims = weights.wq.shape
    return [
        in_dims, width, weights.wf.shape[0], POOLINGS.index(options.pooling), options.qk_norm,
        options.scale, options.eps,
    ]  # fmt: skip


def _forward_fields(packer: _Packer, weights: Weights, options: Options, form: int) -> list[float]:
    """`struct Layer` but for the fingerprint; 0 for what the form does not read."""
    w = weights
    if w.layer_scale is not None:
        scale = w.layer_scale.double().flatten()
        w = w._replace(
            wf=w.wf.double() * scale.unsqueeze(1),
            bf=None if w.bf is None else w.bf.double() * scale,
        )
    token_dim, width = w.wf.shape
    fields = [
        *_sizes(w, options), packer.matrix(w.wq.t()), packer.vector(w.bq, width),
        packer.matrix(w.wk.t()) if form != FOLDED else 0, packer.vector(w.bk, width),
    ]  # fmt: skip
    if form == PLAIN:
        plain = [
            packer.vector(w.w_g, width),
            packer.matrix(w.wp.t()), packer.vector(w.bp, width),
            packer.matrix(w.wf.t()), packer.vector(w.bf, token_dim),
        ]  # fmt: skip
        return [*fields, *plain, *[0] * 3, 0.0, *[0] * 7]
    return [*fields, *[0] * 5, *_folded_fields(packer, w, options, form)]


def _folded_fields(packer: _Packer, weights: Weights, options: Options, form: int) -> list[float]:
    """From `query_triangle` on."""
    w = Weights(*(None if t is None else t.double() for t in weights))  # type: ignore[arg-type]
    width, in_dims = w.wq.shape
    token_dim = w.wf.shape[0]
    bq, bk, bp = (w.wq.new_zeros(width) if b is None else b for b in (w.bq, w.bk, w.bp))
    bf = w.wq.new_zeros(token_dim) if w.bf is None else w.bf
    M, C, c0, c = w.wf @ w.wp, w.wf @ w.wq, w.wf @ bq, w.wf @ bp + bf
    triangle = packer.triangle(w.wq, bq) if options.qk_norm else (0, 0)
    scores = packer.vector(w.wq.t() @ w.w_g.flatten(), in_dims)
    fields = [*triangle, scores, float(bq @ w.w_g.flatten())]
    constant = [c0.unsqueeze(0)]
    if not options.qk_norm:  # rq = 1
        c, constant = c + c0, []
    if form == TRIANGULAR:
        output = packer.matrix(torch.cat([M.t(), C.t(), *constant]))
        return [*fields, output, packer.vector(c, token_dim), *[0] * 5]
    room = [C.new_zeros(in_dims + 1, token_dim)] if options.qk_norm else []
    return [
        *fields, 0, packer.vector(c, token_dim),
        *(packer.triangle(w.wk, bk) if options.qk_norm else (0, 0)),
        packer.rows(torch.cat([w.wk.t(), bk.unsqueeze(0)])),
        packer.matrix(M.t()), packer.matrix(torch.cat([*room, C.t(), *constant])),
    ]  # fmt: skip


class _Packer:
    """Packs matrices and vectors, keeps the buffers, gives their addresses."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.lanes = library.swiftkernels_lanes()
        self.buffers: list[Tensor] = []

    def _buffer(self, floats: int) -> Tensor:
        buffer = torch.empty(floats, dtype=torch.float32, device="cpu")
        self.buffers.append(buffer)
        return buffer

    def matrix(self, b: Tensor) -> int:
        """Panels of b [K, columns]."""
        b = b.detach().float()
        K, columns = b.shape
        panels = self._buffer(K * self._padded(columns))
        self.library.swiftkernels_pack(
            b.data_ptr(), K, columns, b.stride(0), b.stride(1), panels.data_ptr()
        )
        return panels.data_ptr()

    def vector(self, v: Tensor | None, length: int) -> int:
        """v, or zeros, padded with zeros: panels of a single row."""
        if v is None:
            return self._buffer(self._padded(length)).zero_().data_ptr()
        return self.matrix(v.view(1, length))

    def rows(self, matrix: Tensor) -> int:
        """Rows padded with zeros."""
        count, columns = matrix.shape
        padded = self._buffer(count * self._padded(columns)).zero_()
        padded.view(count, -1)[:, :columns] = matrix.detach()
        return padded.data_ptr()

    def triangle(self, weight: Tensor, bias: Tensor) -> tuple[int, int]:
        """R of [weight | bias] = Q R: |weight x + bias| = |R [x; 1]|."""
        R = torch.linalg.qr(torch.cat([weight, bias.unsqueeze(1)], dim=1), mode="r").R
        return self.matrix(R[:, :-1].t()), self.vector(R[:, -1], R.shape[0])

    def _padded(self, columns: int) -> int:
        return -(-columns // self.lanes) * self.lanes
