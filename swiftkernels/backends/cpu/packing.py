"""Packs weights for the compiled kernels, and notices when the weights change."""

from __future__ import annotations

import ctypes
import itertools
import struct
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftkernels.backends import cache
from swiftkernels.backends.cpu.library import DONE, STALE, TYPES, address, check

# `struct Fingerprint` in csrc/fingerprint.h.
MAX_SOURCES = 12
FINGERPRINT = struct.Struct("P3q" * MAX_SOURCES + "2q2Q")

NEVER_STALE = bytes(FINGERPRINT.size)
"""The fingerprint of no weights, for packed weights that are used once, or are a snapshot."""

SMALL = 80_000
"""Up to so many bytes of weights (E = 64), reading all takes hardly longer than a sample."""


class Packed:
    """Packed weights, as a forward reads them.

    Attributes:
        fields: the C struct of the weights, which ends with a `Fingerprint`.
        buffers: the memory of its pointers.
        cancels: whether a kernel reported tokens for which another form is more accurate.
        uses: calls that used them.
    """

    __slots__ = ("buffers", "cancels", "fields", "uses")

    def __init__(self, fields: bytes, buffers: list[Tensor]) -> None:
        self.fields, self.buffers, self.cancels, self.uses = fields, buffers, False, 0


def packed_weights(
    library: ctypes.CDLL,
    slot: cache.Slot,
    watched: tuple[Tensor, ...],
    pack: Callable[[Packer], bytes],
) -> Packed | None:
    """The packed weights; None where packing does not pay, or changes could not be noticed.

    The weights are packed once for each of their states (`backends/cache.py`).

    Args:
        library: the compiled kernels.
        slot: keeps the packed weights.
        watched: the weights, whose fingerprint every call compares.
        pack: packs them; returns the C struct without the `Fingerprint` at its end.
    """
    if any(_rows(w) is None for w in watched):
        return None  # neither rows nor columns are adjacent in memory

    def pack_and_watch() -> Packed:
        packer = Packer(library)
        fields = pack(packer)
        return Packed(fields + _fingerprint(library, watched), packer.buffers)

    def unchanged(packed: Packed) -> bool:
        fingerprint = packed.fields[-FINGERPRINT.size :]
        of_all_bytes: int = FINGERPRINT.unpack(fingerprint)[-2]
        return bool(library.swiftkernels_fingerprint(fingerprint, True) == of_all_bytes)

    found: Packed | None = slot.ensure(watched, unchanged, pack_and_watch)
    return found


class PackedPlan:
    """Runs a forward of x alone with packed weights, as a plan (`ops/plan.py`).

    Its guards are the state of the weights and, in the kernels, their fingerprint.

    Args:
        kernel: the C function.
        fields: its `struct Call`: sizes, threads, type, address and strides of x, address and
            strides of the output, and zeros.
        sizes: of calls with the shape of x.
        x: an input of the calls.
        x_strides, out_strides: as in the struct.
        out: shape and strides of the output.
        slot: keeps the packed weights.
    """

    __slots__ = (
        "_empty", "_fields", "_kernel", "_out", "_out_strides", "_sizes", "_slot", "_type",
        "_x_strides", "_zeros",
    )  # fmt: skip

    lasting = True

    def __init__(
        self,
        kernel: Callable[[bytes, bytes], int],
        fields: struct.Struct,
        sizes: Sequence[int],
        x: Tensor,
        x_strides: Sequence[int],
        out: tuple[Sequence[int], Sequence[int]],
        out_strides: Sequence[int],
        slot: cache.Slot,
        zeros: int = 0,
    ) -> None:
        self._kernel, self._fields, self._slot = kernel, fields, slot
        self._sizes, self._type, self._zeros = sizes, TYPES[x.dtype], (0,) * zeros
        self._x_strides, self._out_strides = x_strides, out_strides
        self._out, self._empty = out, 0 in out[0]

    def __call__(
        self, x: Tensor, weights: tuple[Tensor | None, ...], mask: None, residual_scale: None
    ) -> Tensor | None:
        packed: Packed | None = self._slot.find(cache.present(weights))
        if packed is None:
            return None
        out = torch.empty_strided(*self._out, dtype=x.dtype, device="cpu")
        if self._empty:
            return out
        call = self._fields.pack(
            *self._sizes, torch.get_num_threads(), self._type, address("x", x), *self._x_strides,
            out.data_ptr(), *self._out_strides, *self._zeros,
        )  # fmt: skip
        status = self._kernel(packed.fields, call)
        if status == STALE:
            self._slot.renew()
            return None
        if status != DONE:
            check(status)
        packed.uses += 1
        return out


def _fingerprint(library: ctypes.CDLL, watched: Sequence[Tensor]) -> bytes:
    """`struct Fingerprint` of tensors."""
    sources = [rows for rows in map(_rows, watched) if rows is not None]
    unused = [(0, 0, 0, 0)] * (MAX_SOURCES - len(sources))
    small = sum(rows * row_bytes for _, rows, row_bytes, _ in sources) <= SMALL
    never_sample = small or any(w.is_inference() for w in watched)
    fields = (*itertools.chain(*sources, *unused), len(sources), never_sample)
    blank = FINGERPRINT.pack(*fields, 0, 0)
    sums = [library.swiftkernels_fingerprint(blank, all_bytes) for all_bytes in (True, False)]
    return FINGERPRINT.pack(*fields, *sums)


def _rows(w: Tensor) -> tuple[int, int, int, int] | None:
    """Address, number, bytes and stride in bytes of w's rows, or of its columns.

    None if neither are adjacent in memory.
    """
    rows = w.detach().squeeze()
    if rows.dim() > 2 and rows.is_contiguous():
        rows = rows.flatten(1)
    if rows.dim() < 2:
        rows = rows.view(1, -1) if rows.is_contiguous() else rows.unsqueeze(1)
    if rows.shape[-1] > 1 and rows.stride(-1) != 1:
        rows = rows.mT
    if rows.dim() > 2 or (rows.shape[1] > 1 and rows.stride(1) != 1):
        return None
    size = rows.element_size()
    return rows.data_ptr(), rows.shape[0], rows.shape[1] * size, rows.stride(0) * size


def float32(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Weights as the kernels read them without packing: contiguous float32."""
    return [
        t
        if t is None or (t.dtype == torch.float32 and t.is_contiguous())
        else t.detach().float().contiguous()
        for t in tensors
    ]


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """The addresses of tensors; 0 for None.

    Raises:
        ValueError: one has no memory.
    """
    found = [0 if t is None else t.data_ptr() for t in tensors]
    if 0 in found:
        for t in tensors:
            if t is not None and t.data_ptr() == 0 and t.numel() > 0:
                raise ValueError(
                    f"the weights must have memory; one of shape {tuple(t.shape)} has none, as its "
                    "storage was freed. Restore its values before the call."
                )
    return found


class Packer:
    """Packs matrices and vectors into buffers that it keeps; returns their addresses."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.lanes = library.swiftkernels_lanes()
        self.buffers: list[Tensor] = []

    def buffer(self, floats: int) -> Tensor:
        """Floats that it keeps, not initialised."""
        buffer = torch.empty(floats, dtype=torch.float32, device="cpu")
        self.buffers.append(buffer)
        return buffer

    def panel_floats(self, K: int, columns: int) -> int:
        """Floats of a matrix [K, columns] as panels."""
        return K * self._padded(columns)

    def matrix(self, b: Tensor) -> int:
        """b [K, columns] as panels (csrc/gemm.h)."""
        return self.matrices([b])

    def matrices(self, matrices: Sequence[Tensor]) -> int:
        """The panels of several matrices, one after the other."""
        floats = [self.panel_floats(*b.shape) for b in matrices]
        panels = self.buffer(sum(floats))
        for b, part in zip(matrices, panels.split(floats), strict=True):
            b = b.detach().float()
            self.library.swiftkernels_pack(b.data_ptr(), *b.shape, *b.stride(), part.data_ptr())
        return panels.data_ptr()

    def vector(self, v: Tensor | None, length: int) -> int:
        """v padded with zeros, as panels of a single row; all zeros for None."""
        if v is None:
            return self.buffer(self._padded(length)).zero_().data_ptr()
        return self.matrix(v.view(1, length))

    def rows(self, matrix: Tensor) -> int:
        """The rows of a matrix, each padded with zeros."""
        count, columns = matrix.shape
        padded = self.buffer(count * self._padded(columns)).zero_()
        padded.view(count, -1)[:, :columns] = matrix.detach()
        return padded.data_ptr()

    def triangles(self, layers: Sequence[tuple[Tensor, Tensor]]) -> tuple[int, int]:
        """For `triangular_norms2` in csrc/gemm.h, of one or two layers (weight, bias) of one size.

        R of the decomposition [weight | bias] = Q R has |weight x + bias| = |R [x; 1]|.
        """
        joined = (torch.cat([weight, bias.unsqueeze(1)], dim=1) for weight, bias in layers)
        columns = [torch.linalg.qr(w, mode="r").R.t() for w in joined]  # [C + 1, min(E, C + 1)]
        step = 2 // len(layers) * self.lanes
        panels, biases = [], []
        for at in range(0, columns[0].shape[1], step):
            parts = [R[:, at : at + step] for R in columns]
            width = self._padded(parts[0].shape[1])
            part = torch.cat([F.pad(p, (0, width - p.shape[1])) for p in parts], dim=1)
            panels.append(part[min(at, len(part) - 1) : -1])
            biases.append(part[-1:])
        return self.matrices(panels), self.matrices(biases)

    def _padded(self, columns: int) -> int:
        return -(-columns // self.lanes) * self.lanes
