"""The layer's weights as the compiled kernels read them: folded, packed, and kept while unchanged.

The forms, with the unit rows qn = rq q and kn = rk k (README.md of the operator derives them):

    plain       out = ((G * kn) Wp^T + bp + qn) Wf^T + bf
    triangular  out = rk (G * k) M^T + rq (C x + c0) + c
    folded      out = rk (A x + a) + rq (C x + c0) + c

M = Wf Wp, C = Wf Wq, c0 = Wf bq and c = Wf bp + bf depend on weights only, A = M diag(G) Wk and
a = M diag(G) bk on the batch element too. The norms of the last two forms come from R, the
triangular factor of [Wq | bq]: |Wq x + bq| = |R [x; 1]|.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import weakref
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from swiftkernels.backends import cache
from swiftkernels.ops.additive_attention.reference import POOLINGS, Options

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
_LAYER = struct.Struct("5q2d12Pd7P" + "P3q" * 10 + "2q2Q")
_RAW_LAYER = struct.Struct("5q2d9P")
_SOURCES = 10

SMALL = 80_000
"""Up to so many bytes of weights (E = 64), a look at all takes hardly longer than at a sample."""


class Packed:
    """A layer ready for the kernels.

    Attributes:
        fields: `struct Layer`.
        buffers: what its pointers point at.
        cancels: the kernels met tokens for which the plain form is more accurate.
        uses: calls that it served.
    """

    __slots__ = ("buffers", "cancels", "fields", "uses")

    def __init__(self, fields: bytes, buffers: list[Tensor]) -> None:
        self.fields, self.buffers, self.cancels, self.uses = fields, buffers, False, 0


class KnownLayer:
    """What is kept for one layer while all its matrices live.

    It watches over their storages, of which PyTorch keeps one object each: weak references to the
    tensors themselves would forbid `torch.utils.swap_tensors`. While they live, nothing else can
    stand at their addresses.
    """

    __slots__ = ("matrices", "notes", "slots")

    def __init__(self, weights: Weights) -> None:
        place = _place(weights.wq, weights.wf)
        layers = _layers  # a local: at exit the module's may be gone

        def forget(_: object) -> None:
            if layers.get(place) is self:
                del layers[place]

        self.matrices = [weakref.ref(w.untyped_storage(), forget) for w in _matrices(weights)]
        self.slots: dict[Hashable, cache.Slot] = {}
        """By `packing_key`. Their states are of these matrices."""
        self.notes: dict[Hashable, Any] = {}
        """Whatever else is to be kept; it has to do with the state of the weights itself."""

    def is_of(self, weights: Weights) -> bool:
        """Whether it is of these weights, in whatever state."""
        storages = [w.untyped_storage() for w in _matrices(weights)]
        return all(ref() is s for ref, s in zip(self.matrices, storages, strict=True))

    def find_packed(self, tensors: tuple[Tensor, ...], key: Hashable) -> Packed | None:
        """What is packed for these tensors as they are; None: `packed_layer` has to look closer."""
        slot = self.slots.get(key)
        if (
            slot is None
            or slot.generation != cache.generation()
            or slot.state != cache.state(tensors)
        ):
            return None
        packed: Packed | None = slot.packed
        return packed


_layers: dict[tuple[int, int], KnownLayer] = {}
"""By `_place`: layers may have one of these weights in common."""


def packed_layer(
    library: ctypes.CDLL, weights: Weights, options: Options, form: int, dtype: torch.dtype
) -> Packed | None:
    """The layer packed for a form, its weights rounded to dtype; None where that does not pay.

    It is packed once for each state of the weights (`backends/cache.py`). That does not pay for
    matrices that are made anew at every call, such as those of a parametrization: only parameters
    are packed. Nor does it where weights change between any two calls. And what lies in memory
    neither row by row nor column by column cannot be watched.
    """
    tensors = present(weights)
    lasting = all(type(w) is Parameter for w in _matrices(weights))
    if not lasting or any(_rows(w) is None for w in tensors):
        return None
    slots = layer_of(weights).slots
    key = packing_key(weights.layer_scale is not None, options, form, dtype)
    slot = slots.get(key)
    if slot is None:
        slot = slots[key] = cache.Slot()
    state = cache.state(tensors)
    if slot.state != state or (slot.packed is not None and not _unchanged(library, slot)):
        slot.renew(state)
    if slot.packed is None and slot.pays():
        slot.fill(pack(library, rounded(weights, dtype), options, form, watched=tensors))
    if slot.packed is None:
        slot.skipped += 1
    packed: Packed | None = slot.packed
    return packed


def found_stale(weights: Weights, options: Options, form: int, dtype: torch.dtype) -> None:
    """The kernels found other weights than those that were packed."""
    slot = layer_of(weights).slots.get(
        packing_key(weights.layer_scale is not None, options, form, dtype)
    )
    if slot is not None:
        slot.renew(slot.state)


Addresses = tuple[int | None, ...]


def addresses(weights: Weights) -> Addresses:
    """Where the weights' data begin."""
    return tuple([None if w is None else w.data_ptr() for w in weights])


def _place(query_weight: Tensor, final_weight: Tensor) -> tuple[int, int]:
    return query_weight.data_ptr(), final_weight.data_ptr()


def find_layer(query_weight: Tensor, final_weight: Tensor) -> KnownLayer | None:
    """What is kept for a layer with these weights, and perhaps still its other ones."""
    return _layers.get(_place(query_weight, final_weight))


def layer_of(weights: Weights) -> KnownLayer:
    """What is kept for a layer, empty at first."""
    layer = find_layer(weights.wq, weights.wf)
    if layer is None or not layer.is_of(weights):
        layer = _layers[_place(weights.wq, weights.wf)] = KnownLayer(weights)
    return layer


def _matrices(weights: Weights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vectors may be views made anew for every call; the kernels look at all of their numbers."""
    return weights.wq, weights.wk, weights.wp, weights.wf


def present(weights: Weights) -> tuple[Tensor, ...]:
    """Those that are not None."""
    return tuple([w for w in weights if w is not None])


def packing_key(scaled: bool, options: Options, form: int, dtype: torch.dtype) -> Hashable:
    """What a packing depends on beside the numbers in the weights; `scaled`: with a layer scale."""
    return form, options, dtype, scaled


def _rows(w: Tensor) -> tuple[int, int, int, int] | None:
    """Address, number and bytes of w's rows, and bytes from one to the next; None: not of rows."""
    rows = w.detach().squeeze()
    if rows.dim() < 2:
        rows = rows.view(1, -1) if rows.is_contiguous() else rows.unsqueeze(1)
    if rows.shape[-1] > 1 and rows.stride(-1) != 1:
        rows = rows.mT
    if rows.dim() > 2 or (rows.shape[1] > 1 and rows.stride(1) != 1):
        return None
    size = rows.element_size()
    return rows.data_ptr(), rows.shape[0], rows.shape[1] * size, rows.stride(0) * size


def rounded(weights: Weights, dtype: torch.dtype) -> Weights:
    """The weights in that type; themselves, if they are."""
    if weights.wq.dtype == dtype:
        return weights
    return Weights(*[None if w is None else w.detach().to(dtype) for w in weights])  # type: ignore[arg-type]


def _unchanged(library: ctypes.CDLL, slot: cache.Slot) -> bool:
    """Compare all bytes of the weights, if something has said since that weights changed."""
    if slot.generation == cache.generation():
        return True
    fields = slot.packed.fields
    if library.swiftkernels_fingerprint(fields, True) != _LAYER.unpack(fields)[-2]:
        return False
    slot.generation = cache.generation()
    return True


def pack(
    library: ctypes.CDLL,
    weights: Weights,
    options: Options,
    form: int,
    watched: Sequence[Tensor] = (),
) -> Packed:
    """Fold in float64 where there is something to fold, and pack.

    `watched`: what the kernels compare at every call with what it is now.
    """
    packer = _Packer(library)
    fields = _forward_fields(packer, weights, options, form)
    sources = [rows for rows in map(_rows, watched) if rows is not None]
    missing = [(0, 0, 0, 0)] * (_SOURCES - len(sources))
    small = sum(rows * row_bytes for _, rows, row_bytes, _ in sources) <= SMALL
    always_whole = small or any(w.is_inference() for w in watched)
    watch = (*itertools.chain(*sources, *missing), len(sources), always_whole)
    unmarked = _LAYER.pack(*fields, *watch, 0, 0)
    marks = [library.swiftkernels_fingerprint(unmarked, everything) for everything in (True, False)]
    return Packed(_LAYER.pack(*fields, *watch, *marks), packer.buffers)


def raw_layer(weights: Weights, options: Options) -> tuple[bytes, list[Tensor | None]]:
    """`struct RawLayer` for training, and the tensors that must live as long as it is used."""
    ready = [
        t
        if t is None or (t.dtype == torch.float32 and t.is_contiguous())
        else t.detach().float().contiguous()
        for t in weights[:9]
    ]
    pointers = [0 if t is None else t.data_ptr() for t in ready]
    if 0 in pointers:
        _check_memory(ready)
    return _RAW_LAYER.pack(*_sizes(weights, options), *pointers), ready


def _check_memory(tensors: Sequence[Tensor | None]) -> None:
    for t in tensors:
        if t is not None and t.data_ptr() == 0 and t.numel() > 0:
            raise ValueError(
                f"the weights must have memory; one of shape {tuple(t.shape)} has none, as its "
                "storage was freed. Bring its values back before the call."
            )


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
