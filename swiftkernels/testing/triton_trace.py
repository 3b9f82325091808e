"""Counts and checks the memory accesses of Triton kernels, lane by lane, without a GPU.

    TRITON_INTERPRET=1 python ...

    with trace() as launches:
        kernel[grid](x, out, n, BLOCK=64)  # on CPU tensors
    print(table(launches))

Counted, for every launch:

* requested bytes: of all unmasked lanes of loads and of stores. The multiprocessors request these;
* distinct bytes: of the 32-byte sectors that are accessed at least once. These have to cross the
  boundary of the kernel, if caches keep everything within a launch. Tensors are assumed to start at
  multiples of 512 bytes, as PyTorch's CUDA allocator places them;
* operations of dot products, 2 per multiply-add, with the padding of the tiles.

Checked, for every lane:

* it accesses an element of a tensor argument;
* no other program writes what its program reads or writes, unless all use atomics;
* no other lane of its program, which may be another thread, stores to the same address.

If a tensor is written, every element of it has to be written.

Every tensor is in its own buffer between poisoned guards, even if tensors were adjacent. Lanes out
of bounds are masked, so that a wrong kernel does no damage.

The interpreter cannot show reads that race with stores of the same program, limits of shared
memory, or rounding to tf32. If the last program, chosen by an atomic counter, reduces what the
others wrote, that is reported as a race.
"""

from __future__ import annotations

import contextlib
import linecache
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swiftkernels.testing import interpreter

SECTOR = 32
"""Bytes of one memory transaction."""

PLACEMENT = 512
"""PyTorch's CUDA allocator places tensors at multiples of so many bytes."""

LARGEST_GUARD = 1 << 20
POISON = 0xFF
"""The value of every byte of the guards: NaN in all float types, -1 in integers."""

_NOBODY, _SEVERAL = -1, -2
_CONFLICTS = {
    "load": ("store", "atomic"),
    "store": ("load", "store", "atomic"),
    "atomic": ("load", "store"),
}


class MemoryFaultError(Exception):
    """A kernel accessed memory in a forbidden way; the message says which kernel, where and how."""


@dataclass(frozen=True)
class Bytes:
    """Bytes of the loads, or of the stores, of a launch."""

    requested: int
    distinct: int


@dataclass(frozen=True)
class Finding:
    """One error of a kernel, at one place."""

    rule: str
    """ "out of bounds", "race", "lanes collide", "overwritten", "not written" or "guard" """
    kernel: str
    argument: str
    offset: int
    """Index of the first wrong element, in elements from the argument's first one."""
    detail: str
    place: str
    """Source lines of the kernel and of the functions it called; "" for errors of a launch."""
    count: int
    """Wrong lanes, in all programs."""

    def __str__(self) -> str:
        where = f"\n    {self.place}" if self.place else ""
        return (
            f"{self.rule}: {self.kernel} {self.detail} (argument {self.argument!r}, element "
            f"{self.offset}; {self.count} in all){where}"
        )


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: str
    grid: tuple[int, int, int]
    loads: Bytes
    stores: Bytes
    dot_flops: int
    findings: tuple[Finding, ...]

    @property
    def programs(self) -> int:
        across, down, deep = self.grid
        return across * down * deep

    @property
    def requested(self) -> int:
        """Bytes of loads and stores."""
        return self.loads.requested + self.stores.requested

    @property
    def distinct(self) -> int:
        """Bytes of loads and stores."""
        return self.loads.distinct + self.stores.distinct


@contextlib.contextmanager
def trace(check: bool = True, complete: bool = True) -> Iterator[list[Launch]]:
    """Record the launches inside this context, in order.

    Args:
        check: raise at the end if there are findings; otherwise they are only in
            `Launch.findings`.
        complete: a launch that stores to a tensor must store to every element of it. Pass False
            for kernels that change only a part on purpose.

    Raises:
        MemoryFaultError: there are findings; with kernel, line, argument and offset.
        RuntimeError: Triton does not interpret.

    Example:
        >>> with trace() as launches:  # doctest: +SKIP
        ...     kernel[(4,)](x, out)
        >>> launches[0].loads.distinct  # doctest: +SKIP
        4096
    """
    if not interpreter.interpreting():
        raise RuntimeError(
            "trace needs Triton's interpreter; set TRITON_INTERPRET=1 before triton is imported."
        )
    recorder = _Recorder(complete)
    with interpreter.observe(recorder):
        try:
            yield recorder.launches
        except Exception as error:
            # It is often a consequence of the findings, which are more useful.
            if check:
                _raise_findings(recorder.launches, error)
            raise
    if check:
        _raise_findings(recorder.launches)


def _raise_findings(launches: Sequence[Launch], cause: Exception | None = None) -> None:
    found = [finding for launch in launches for finding in launch.findings]
    if found:
        more = f"\n... and {len(found) - 10} more" if len(found) > 10 else ""
        raise MemoryFaultError("\n".join(map(str, found[:10])) + more) from cause


def table(launches: Sequence[Launch]) -> str:
    """The launches, one per line, with their bytes in kB."""
    lines = [
        f"{'kernel':<28}{'programs':>9}{'requested kB':>22}{'distinct kB':>20}{'dot':>10}",
        f"{'':<28}{'':>9}{'loads':>11}{'stores':>11}{'loads':>10}{'stores':>10}{'MFLOP':>10}",
    ]
    for launch in launches:
        requested = launch.loads.requested, launch.stores.requested
        distinct = launch.loads.distinct, launch.stores.distinct
        lines.append(
            f"{launch.kernel:<28}{launch.programs:>9}"
            + "".join(f"{b / 1e3:>11.1f}" for b in requested)
            + "".join(f"{b / 1e3:>10.1f}" for b in distinct)
            + f"{launch.dot_flops / 1e6:>10.2f}"
        )
    return "\n".join(lines)


class _Recorder:
    """The observer behind `trace`."""

    def __init__(self, complete: bool) -> None:
        self.launches: list[Launch] = []
        self._complete = complete
        self._current: _Running | None = None

    def begin(self, kernel: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self._current = _Running(kernel, arguments)
        return self._current.arguments

    def grid(self, grid: tuple[int, int, int]) -> None:
        if self._current:
            self._current.grid = grid

    def program(self, index: int) -> None:
        if self._current:
            self._current.program = index

    def access(
        self, kind: str, addresses: np.ndarray, mask: np.ndarray, itemsize: int
    ) -> np.ndarray:
        return self._current.access(kind, addresses, mask, itemsize) if self._current else mask

    def dot(self, flops: int) -> None:
        if self._current:
            self._current.flops += flops

    def end(self) -> None:
        if self._current:
            self.launches.append(self._current.finish(self._complete))
        self._current = None


@dataclass(eq=False)
class _Argument:
    """A tensor argument of a kernel, as bytes of its storage."""

    name: str
    tensor: Tensor
    start: int = field(init=False)
    used: np.ndarray = field(init=False)
    """Which of the bytes from `start` to `end` belong to elements of the tensor."""

    def __post_init__(self) -> None:
        t = self.tensor
        if t.device.type != "cpu":
            raise TypeError(
                f"trace runs kernels on CPU tensors; argument {self.name!r} is on {t.device}."
            )
        extent = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        elements = torch.zeros(extent if t.numel() else 0, dtype=torch.bool)
        if t.numel():
            elements.as_strided(t.shape, t.stride()).fill_(True)
        self.start = int(t.storage_offset()) * t.element_size()
        self.used = elements.numpy().repeat(t.element_size())

    @property
    def end(self) -> int:
        return self.start + len(self.used)

    def overlaps(self, other: _Argument) -> bool:
        """Whether the two have elements in common."""
        if self.tensor.untyped_storage()._cdata != other.tensor.untyped_storage()._cdata:
            return False
        start, end = max(self.start, other.start), min(self.end, other.end)
        if end <= start:
            return False
        mine, theirs = (a.used[start - a.start : end - a.start] for a in (self, other))
        return bool((mine & theirs).any())


class _Region:
    """Arguments that share elements, in a buffer of their own between guards."""

    def __init__(self, arguments: list[_Argument]) -> None:
        self.arguments = arguments
        self.start = min(a.start for a in arguments)
        length = max(a.end for a in arguments) - self.start
        self.granule = min(a.tensor.element_size() for a in arguments)
        """Bytes of the smallest element; accesses are compared in this unit."""
        used = np.zeros(length, bool)
        for a in arguments:
            used[a.start - self.start : a.end - self.start] |= a.used
        self._used_bytes = used
        self.used = used[:: self.granule]

        guard = min(max(length, 4096), LARGEST_GUARD)
        self._buffer = torch.full((length + 2 * guard + 2 * PLACEMENT,), POISON, dtype=torch.uint8)
        address = self._buffer.data_ptr() + guard
        self._first = guard + (self.start - address) % PLACEMENT
        self.low = self._buffer.data_ptr() + self._first
        self.high = self.low + length
        self._inside = self._buffer.numpy()[self._first : self._first + length]
        self._inside[used] = self._storage_bytes()[used]

        granules = len(self.used)
        self.users = {kind: np.full(granules, _NOBODY, np.int32) for kind in _CONFLICTS}
        """By kind of access: the program that accessed a granule, or `_SEVERAL`."""
        self._last_lane = np.empty(granules, np.int32)
        self._first_sector = self.low // SECTOR
        sectors = (self.high - 1) // SECTOR - self._first_sector + 1 if length else 0
        self.sectors = {kind: np.zeros(sectors, bool) for kind in ("load", "store")}

    def _storage_bytes(self) -> np.ndarray:
        storage = self.arguments[0].tensor.untyped_storage()
        raw = torch.empty(0, dtype=torch.uint8).set_(storage)
        data: np.ndarray = raw.numpy()
        return data[self.start : self.start + self.high - self.low]

    def view(self, argument: _Argument) -> Tensor:
        """The argument's tensor, in the buffer."""
        t = argument.tensor
        offset = self._first + argument.start - self.start
        moved = torch.empty(0, dtype=t.dtype)
        return moved.set_(
            self._buffer.untyped_storage(), offset // t.element_size(), t.shape, t.stride()
        )

    def write_back(self) -> None:
        """Copy the results of the kernel to the tensors."""
        if self.written.any():
            self._storage_bytes()[self._used_bytes] = self._inside[self._used_bytes]

    @property
    def is_one_tensor(self) -> bool:
        """Whether all arguments are the same bytes; otherwise some may be only inputs."""
        return len({(a.start, a.end) for a in self.arguments}) == 1

    @property
    def written(self) -> np.ndarray:
        """Which granules were stored to."""
        stored: np.ndarray = self.users["store"] != _NOBODY
        return stored | (self.users["atomic"] != _NOBODY)

    def guards_are_intact(self) -> bool:
        """Whether nothing was written outside of the tensors."""
        buffer = self._buffer.numpy()
        before, after = buffer[: self._first], buffer[self._first + len(self._inside) :]
        parts = (before, after, self._inside[~self._used_bytes])
        return all(bool((part == POISON).all()) for part in parts)

    def granules(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        """The granules of elements at these addresses, [lanes, granules of an element]."""
        first = (addresses - self.low) // self.granule
        return first[:, None] + np.arange(max(itemsize // self.granule, 1))

    def count_sectors(self, kind: str, addresses: np.ndarray) -> None:
        touched = addresses // SECTOR - self._first_sector
        for name in ("load", "store") if kind == "atomic" else (kind,):
            self.sectors[name][touched] = True

    def conflicts(self, kind: str, granules: np.ndarray, program: int) -> np.ndarray:
        """Which granules another program accesses, so that the order of the programs matters."""
        found = np.zeros(granules.shape, bool)
        for other in _CONFLICTS[kind]:
            users = self.users[other][granules]
            found |= (users != _NOBODY) & (users != program)
        return found

    def use(self, kind: str, granules: np.ndarray, program: int) -> None:
        users = self.users[kind]
        before = users[granules]
        users[granules] = np.where((before == _NOBODY) | (before == program), program, _SEVERAL)

    def overwritten(self, granules: np.ndarray, lanes: np.ndarray, program: int) -> np.ndarray:
        """Which granules another lane of this program stored to before."""
        mine = self.users["store"][granules] == program
        overwritten: np.ndarray = mine & (self._last_lane[granules] != lanes[:, None])
        return overwritten

    def collisions(self, granules: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Which granules a later lane of the same store writes too."""
        self._last_lane[granules] = lanes[:, None]
        collide: np.ndarray = self._last_lane[granules] != lanes[:, None]
        return collide

    def locate(self, address: int) -> tuple[_Argument, int]:
        """The argument at an address, or the nearest one, and the index of its element there."""

        def distance(a: _Argument) -> int:
            return max(a.start - byte, byte - a.end + 1, 0)

        byte = address - self.low + self.start
        nearest = min(self.arguments, key=distance)
        return nearest, (byte - nearest.start) // nearest.tensor.element_size()


class _Running:
    """A launch in progress."""

    def __init__(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.kernel = kernel
        self.grid = (0, 0, 0)
        self.program = 0
        self.flops = 0
        self._requested = {"load": 0, "store": 0}
        self._findings: dict[tuple[str, str, str], Finding] = {}
        self.regions, self.arguments = _move_apart(arguments)

    def access(
        self, kind: str, addresses: np.ndarray, mask: np.ndarray, itemsize: int
    ) -> np.ndarray:
        where = addresses.reshape(-1).astype(np.int64)
        allowed = mask.reshape(-1).copy()
        left = np.flatnonzero(allowed)
        for region in self.regions:
            if not len(left):
                break
            inside = (where[left] >= region.low) & (where[left] + itemsize <= region.high)
            lanes, left = left[inside], left[~inside]
            granules = region.granules(where[lanes], itemsize)
            used = region.used[granules].all(1)
            if not used.all():
                self._out_of_bounds(kind, region, where[lanes[~used]])
                allowed[lanes[~used]] = False
                lanes, granules = lanes[used], granules[used]
            if len(lanes):
                self._record(kind, region, where[lanes], lanes, granules, itemsize)
        if len(left):
            allowed[left] = False
            self._out_of_bounds(kind, self._nearest(int(where[left[0]])), where[left])
        return allowed

    def _record(
        self,
        kind: str,
        region: _Region,
        addresses: np.ndarray,
        lanes: np.ndarray,
        granules: np.ndarray,
        itemsize: int,
    ) -> None:
        for name in ("load", "store") if kind == "atomic" else (kind,):
            self._requested[name] += len(addresses) * itemsize
        region.count_sectors(kind, addresses)
        conflict = region.conflicts(kind, granules, self.program).any(1)
        if conflict.any():
            detail = f"({kind}) accesses what another program writes, or writes what it reads"
            self._find("race", region, addresses[conflict], detail)
        if kind == "store":
            twice = region.overwritten(granules, lanes, self.program).any(1)
            if twice.any():
                detail = "stores to an element twice, from different lanes, in an undefined order"
                self._find("overwritten", region, addresses[twice], detail)
            collide = region.collisions(granules, lanes).any(1)
            if collide.any():
                detail = "stores from several lanes to one element"
                self._find("lanes collide", region, addresses[collide], detail)
        region.use(kind, granules, self.program)

    def _nearest(self, address: int) -> _Region:
        if not self.regions:
            raise MemoryFaultError(f"{self.kernel} accesses memory, but has no tensor argument.")
        return min(self.regions, key=lambda r: max(r.low - address, address - r.high))

    def _out_of_bounds(self, kind: str, region: _Region, addresses: np.ndarray) -> None:
        argument, _ = region.locate(int(addresses[0]))
        shape = tuple(argument.tensor.shape)
        detail = f"({kind}) leaves its tensors; the nearest has shape {shape}"
        self._find("out of bounds", region, addresses, detail)

    def _find(self, rule: str, region: _Region, addresses: np.ndarray, detail: str) -> None:
        argument, offset = region.locate(int(addresses[0]))
        frames = interpreter.kernel_frames()
        lines = [
            f"{Path(f.filename).name}:{f.lineno} in {f.name}: "
            f"{linecache.getline(f.filename, f.lineno or 0).strip()}"
            for f in frames
        ]
        detail = f"in program {self.program} {detail}"
        finding = Finding(
            rule, self.kernel, argument.name, offset, detail, "\n    ".join(lines), len(addresses)
        )
        self._add(finding)

    def _add(self, finding: Finding) -> None:
        key = (finding.rule, finding.argument, finding.place)
        known = self._findings.get(key)
        if known:
            finding = replace(known, count=known.count + finding.count)
        self._findings[key] = finding

    def finish(self, complete: bool) -> Launch:
        """The record of the launch; copies what it wrote to its tensors."""
        for region in self.regions:
            missing = np.flatnonzero(region.used & ~region.written)
            if complete and region.is_one_tensor and region.written.any() and len(missing):
                argument, offset = region.locate(region.low + int(missing[0]) * region.granule)
                detail = "does not write all elements of a tensor that it writes"
                self._add(
                    Finding(
                        "not written", self.kernel, argument.name, offset, detail, "", len(missing)
                    )
                )
            if not region.guards_are_intact():
                detail = (
                    "changes memory outside of its tensors, by accesses that the trace did not see"
                )
                name = region.arguments[0].name
                self._add(Finding("guard", self.kernel, name, 0, detail, "", 1))
            region.write_back()
        loads, stores = (
            Bytes(
                self._requested[kind],
                SECTOR * sum(int(region.sectors[kind].sum()) for region in self.regions),
            )
            for kind in ("load", "store")
        )
        return Launch(
            self.kernel, self.grid, loads, stores, self.flops, tuple(self._findings.values())
        )


def _move_apart(arguments: dict[str, Any]) -> tuple[list[_Region], dict[str, Any]]:
    """Regions for all tensors, and the arguments with tensors in these regions."""
    found: list[_Argument] = []

    def collect(name: str, t: Tensor) -> Tensor:
        found.append(_Argument(name, t))
        return t

    for name, value in arguments.items():
        interpreter.map_tensors(value, lambda t, name=name: collect(name, t))  # type: ignore[misc]
    groups: list[list[_Argument]] = []
    for argument in found:
        joined = [g for g in groups if any(argument.overlaps(other) for other in g)]
        groups = [g for g in groups if g not in joined]
        groups.append([*(a for g in joined for a in g), argument])
    regions = [_Region(group) for group in groups]
    moved = {id(a): region.view(a) for region in regions for a in region.arguments}
    views = iter([moved[id(a)] for a in found])  # in the order of `found`
    replaced = {
        name: interpreter.map_tensors(value, lambda _: next(views))
        for name, value in arguments.items()
    }
    return regions, replaced
