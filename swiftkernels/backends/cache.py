"""The guard against stale packed weights.

Packed weights are used as long as the weights that they were made from

* are in the same memory, with the same sizes, strides and version counters, and
* have the same fingerprint. The CPU kernels compute it at every call: from all bytes or, where that
  would take more than 3 % of the call, from all vectors and a sample of each matrix. The sample has
  a part of every row and, in any 16 rows, of every column.

After a step of any `torch.optim.Optimizer`, and after `weights_changed()`, all bytes are compared
once. The guard misses only writes to a few elements of a matrix that PyTorch does not count
(through `.data`, numpy or kernels of another library), if `weights_changed()` is not called.

Weights that change before every call are soon used without packing: see `Slot.pays`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

MAX_WASTED = 2
"""Packings in a row that may serve only one call each. After that, weights are packed only if they
did not change for some calls; the number of calls doubles with each further such packing."""

State = tuple[list[Any], ...]

_bytes = operator.attrgetter("nbytes")
_dtype = operator.attrgetter("dtype")
_shape = operator.attrgetter("shape")
_version = operator.attrgetter("_version")
_generation = 0


def weights_changed() -> None:
    """Report that weights were written in a way that PyTorch does not count.

    Call it after writing single elements of a weight through `.data`, numpy, or code outside of
    PyTorch. At its next call, every layer compares all bytes of its weights with those that it
    packed. Layers notice all other writes themselves: by optimizers, in-place operators or
    `load_state_dict`, and larger ones through `.data`.

    Example:
        >>> attention = AdditiveAttention(64)
        >>> attention.final.weight.data[3, 5] = 0.25
        >>> weights_changed()
    """
    global _generation
    _generation += 1


register_optimizer_step_post_hook(lambda *_: weights_changed())


def present(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """The tensors that are not None."""
    return tuple([t for t in tensors if t is not None])


def places(tensors: tuple[Tensor, ...]) -> State:
    """Where tensors are in memory, and their types, shapes and strides."""
    return (  # by `map`: every call in training needs this
        list(map(Tensor.data_ptr, tensors)),
        list(map(_dtype, tensors)),
        list(map(_shape, tensors)),
        list(map(Tensor.stride, tensors)),
    )


def state(tensors: tuple[Tensor, ...]) -> State:
    """A value that changes if a tensor is replaced, or written in a way that PyTorch counts."""
    return (
        list(map(Tensor.data_ptr, tensors)),
        list(map(_bytes, tensors)),
        list(map(Tensor.stride, tensors)),
        versions(tensors),
    )


def versions(tensors: tuple[Tensor, ...]) -> list[int]:
    """Numbers that change where PyTorch counts a write to a tensor."""
    try:
        return list(map(_version, tensors))
    except RuntimeError:  # tensors made in inference mode have no version counter
        return []


class Packed(Protocol):
    """Packed weights."""

    uses: int
    """Calls that used them."""


class Slot:
    """Packed weights, the state of the weights that they were made from, and whether they paid."""

    __slots__ = ("generation", "packed", "skipped", "state", "wasted")

    def __init__(self) -> None:
        self.state: State = ()
        self.packed: Any = None
        self.generation = -1
        """When all bytes were last compared with those that were packed; see `weights_changed`."""
        self.skipped = 0
        """Calls without packed weights since the weights changed."""
        self.wasted = 0
        """Packings in a row that at most one call used."""

    def find(self, tensors: tuple[Tensor, ...]) -> Any:
        """The packed weights, if nothing suggests a change; None: call `ensure`."""
        if self.generation == _generation and self.state == state(tensors):
            return self.packed
        return None

    def ensure(
        self,
        tensors: tuple[Tensor, ...],
        unchanged: Callable[[Any], bool],
        pack: Callable[[], Any],
    ) -> Any:
        """The packed weights, packed now if needed; None where packing does not pay.

        Args:
            tensors: the weights.
            unchanged: compares all bytes of the weights with those that were packed.
            pack: packs them.
        """
        found = state(tensors)
        if self.state != found or (self.packed is not None and not self._verified(unchanged)):
            self.renew(found)
        if self.packed is None and self.pays():
            # The generation before packing: the weights may change while they are packed.
            generation, packed = _generation, pack()
            self.generation, self.packed = generation, packed
        if self.packed is None:
            self.skipped += 1
        return self.packed

    def renew(self, state: State | None = None) -> None:
        """Drop the packed weights: the weights have another state, or other bytes."""
        packed: Packed | None = self.packed
        self.packed = None  # first, because another thread may read it
        if packed is not None:
            self.wasted = self.wasted + 1 if packed.uses <= 1 else 0
        if state is not None:
            self.state = state
        self.skipped = 0

    def pays(self) -> bool:
        """Whether packing now is likely to pay."""
        return self.wasted < MAX_WASTED or self.skipped >= 2 ** (self.wasted - MAX_WASTED)

    def _verified(self, unchanged: Callable[[Any], bool]) -> bool:
        if self.generation == _generation:
            return True
        generation = _generation
        if not unchanged(self.packed):
            return False
        self.generation = generation
        return True
