"""The guard against stale packed weights.

What is packed of weights is used for as long as the weights

* are in the same memory, with the same sizes, strides and version counters, and
* give the same fingerprint, which the CPU kernels compare at every call: of all bytes or, where
  that would take more than 3 % of the call, of all vectors and a sample of each matrix. The sample
  contains a part of every row and, in any 16 rows, of every column.

After a step of any `torch.optim.Optimizer`, and after `weights_changed()`, all bytes are compared
once. What remains unnoticed: writes to a few elements of a matrix that PyTorch does not count
(through `.data`, numpy or another library's kernels), without a call of `weights_changed()`.

Weights that change between any two calls are soon read as they are, not packed: see `Slot.pays`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

WASTED = 2
"""After this many packings in a row that served a single call each, weights are packed only after
some calls with them, twice as many for each further such packing."""

State = tuple[list[Any], ...]

_bytes = operator.attrgetter("nbytes")
_dtype = operator.attrgetter("dtype")
_shape = operator.attrgetter("shape")
_version = operator.attrgetter("_version")
_generation = 0


def weights_changed() -> None:
    """Report that weights were written in a way that PyTorch does not count.

    Call it after writing single elements of a weight through `.data`, numpy, or code outside of
    PyTorch. At its next call, every layer compares all bytes of its weights with those that
    it packed. Writes by optimizers, in-place operators, `load_state_dict` and the like, and
    larger writes through `.data`, are noticed without it.

    Example:
        >>> attention = AdditiveAttention(64)
        >>> attention.final.weight.data[3, 5] = 0.25
        >>> weights_changed()
    """
    global _generation
    _generation += 1


register_optimizer_step_post_hook(lambda *_: weights_changed())


def present(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Those that are not None."""
    return tuple([t for t in tensors if t is not None])


def places(tensors: tuple[Tensor, ...]) -> State:
    """Where tensors are and how they lie. By `map`, because every call in training needs it."""
    return (
        list(map(Tensor.data_ptr, tensors)),
        list(map(_dtype, tensors)),
        list(map(_shape, tensors)),
        list(map(Tensor.stride, tensors)),
    )


def state(tensors: tuple[Tensor, ...]) -> State:
    """What changes when tensors are replaced, or written in a way that PyTorch counts."""
    found = (
        list(map(Tensor.data_ptr, tensors)),
        list(map(_bytes, tensors)),
        list(map(Tensor.stride, tensors)),
    )
    try:
        return (*found, list(map(_version, tensors)))
    except RuntimeError:  # tensors made in inference mode have no version counter
        return found


class Packed(Protocol):
    """Packed weights."""

    uses: int
    """Calls that they served."""


class Slot:
    """What is packed of some weights, the state they were in, and whether packing them has paid."""

    __slots__ = ("generation", "packed", "skipped", "state", "wasted")

    def __init__(self) -> None:
        self.state: State = ()
        self.packed: Any = None
        self.generation = -1
        """At which all bytes were last known to be those packed."""
        self.skipped = 0
        """Calls without packed weights since the weights changed."""
        self.wasted = 0
        """Packings in a row that served a single call or none."""

    def find(self, tensors: tuple[Tensor, ...]) -> Any:
        """What is packed of these tensors as they are; None: `ensure` has to look closer."""
        if self.generation == _generation and self.state == state(tensors):
            return self.packed
        return None

    def ensure(
        self,
        tensors: tuple[Tensor, ...],
        unchanged: Callable[[Any], bool],
        pack: Callable[[], Any],
    ) -> Any:
        """What is packed of these tensors, packed now if needed; None where that does not pay.

        Args:
            tensors: the weights.
            unchanged: compares all bytes of the weights with those that were packed.
            pack: packs them.
        """
        found = state(tensors)
        if self.state != found or (self.packed is not None and not self._verified(unchanged)):
            self.renew(found)
        if self.packed is None and self.pays():
            # The generation from before: the weights may change while they are packed.
            generation, packed = _generation, pack()
            self.generation, self.packed = generation, packed
        if self.packed is None:
            self.skipped += 1
        return self.packed

    def renew(self, state: State | None = None) -> None:
        """Take weights in another state, or in the same with other bytes, not packed."""
        packed: Packed | None = self.packed
        self.packed = None  # first: another thread may look
        if packed is not None:
            self.wasted = self.wasted + 1 if packed.uses <= 1 else 0
        if state is not None:
            self.state = state
        self.skipped = 0

    def pays(self) -> bool:
        """Whether packing now is likely to pay."""
        return self.wasted < WASTED or self.skipped >= 2 ** (self.wasted - WASTED)

    def _verified(self, unchanged: Callable[[Any], bool]) -> bool:
        if self.generation == _generation:
            return True
        generation = _generation
        if not unchanged(self.packed):
            return False
        self.generation = generation
        return True
