"""The guard against packed weights that are no longer the layer's.

Packed weights are used for as long as the weights they were made from

* are in the same memory, with the same sizes, strides and version counters, and
* give the same fingerprint, which the CPU kernels compare at every call: of all bytes or, where
  that would take more than 3 % of the call, of all vectors and a sample of each matrix. The sample
  holds a part of every row and, in any 16 rows, of every column.

After a step of any `torch.optim.Optimizer`, and after `weights_changed()`, all bytes are compared
once. What remains unnoticed: writes to a few elements of a matrix that PyTorch does not count
(through `.data`, numpy or another library's kernels), without a call of `weights_changed()`.

Weights that change between any two calls are soon read as they are, not packed: see `Slot.pays`.
"""

from __future__ import annotations

import operator
from typing import Any, Protocol

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

WASTED = 2
"""After this many packings in a row that served a single call each, weights are packed only after
some calls with them, twice as many for each further such packing."""

State = tuple[list[Any], ...]

_version = operator.attrgetter("_version")
_generation = 0


def weights_changed() -> None:
    """Say that weights were written to in a way that PyTorch does not count.

    Call it after writing single elements of a weight through `.data`, numpy, or code outside of
    PyTorch. Every layer then compares, at its next call, all bytes of its weights with those that
    it has packed. Writes by optimizers, in-place operators, `load_state_dict` and the like, and
    larger writes through `.data`, are noticed without it.

    Example:
        >>> attention = AdditiveAttention(64, 64, 1)
        >>> attention.final.weight.data[3, 5] = 0.25
        >>> weights_changed()
    """
    global _generation
    _generation += 1


register_optimizer_step_post_hook(lambda *_: weights_changed())


def generation() -> int:
    """How often something has said that weights changed."""
    return _generation


def state(tensors: tuple[Tensor, ...]) -> State:
    """What changes with the tensors. By `map`, because every call asks for it."""
    found = (
        list(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.numel, tensors)),
        list(map(Tensor.stride, tensors)),
    )
    try:
        return (*found, list(map(_version, tensors)))
    except RuntimeError:  # tensors made in inference mode have no version counter
        return found


class Packing(Protocol):
    """Weights that were packed."""

    uses: int
    """Calls that they served."""


class Slot:
    """A packing of weights, the state they were in, and whether packing them has paid."""

    __slots__ = ("generation", "packed", "skipped", "state", "wasted")

    def __init__(self) -> None:
        self.state: State = ()
        self.packed: Any = None
        self.generation = -1
        """At which all bytes were last known to be those packed."""
        self.skipped = 0
        """Calls without a packing since the weights changed."""
        self.wasted = 0
        """Packings in a row that served a single call or none."""

    def renew(self, state: State) -> None:
        """Take weights in another state, not packed."""
        packed: Packing | None = self.packed
        self.packed = None  # first: another thread may look
        if packed is not None:
            self.wasted = self.wasted + 1 if packed.uses <= 1 else 0
        self.state, self.skipped = state, 0

    def fill(self, packed: Packing) -> None:
        """Keep what was packed of the weights in this state."""
        self.generation = _generation
        self.packed = packed

    def pays(self) -> bool:
        """Whether packing now is likely to pay."""
        return self.wasted < WASTED or self.skipped >= 2 ** (self.wasted - WASTED)
