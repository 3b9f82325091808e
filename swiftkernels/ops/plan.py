"""Plans: the decisions that calls with the same shapes, types and options share.

To check the arguments, choose a backend and pack the weights takes longer than the kernels need for
a small image. A plan is the result of these decisions: guards and code. A layer keeps its plans by
`call_key`. If the guards of a plan fail, it returns None, and the caller makes a new plan.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from swiftkernels.backends import cache, torch_state
from swiftkernels.backends.layouts import from_tokens, to_tokens
from swiftkernels.ops.operator import Call, Operator, needs_gradient

MAX_PLANS = 64
"""Plans kept for a layer."""


class Plan(Protocol):
    """Guards and code for calls with the same key."""

    @property
    def lasting(self) -> bool:
        """Whether later calls with the same key may use it."""

    def __call__(
        self, x: Tensor, weights: Any, mask: Tensor | None, residual_scale: Tensor | None
    ) -> Tensor | None:
        """The output; None if the guards fail."""


class Plans:
    """The plans for one set of weights, and these weights packed for inference."""

    __slots__ = ("_slots", "by_key")

    def __init__(self) -> None:
        self.by_key: dict[Hashable, Plan] = {}
        self._slots: dict[Hashable, cache.Slot] = {}

    def keep(self, key: Hashable, plan: Plan) -> None:
        """Keep a plan for later calls with the same key."""
        if plan.lasting:
            if len(self.by_key) >= MAX_PLANS:
                self.by_key.clear()
            self.by_key[key] = plan

    def slot(self, key: Hashable, weights: Sequence[Tensor | None]) -> cache.Slot:
        """The slot of the weights packed in the way of that key; some may be None."""
        key = key, tuple([w is None for w in weights])
        found = self._slots.get(key)
        if found is None:
            if len(self._slots) >= MAX_PLANS:  # options that change at every call
                self._slots.clear()
            found = self._slots[key] = cache.Slot()
        return found


def run(make: Callable[[], Plan], *arguments: Any) -> tuple[Tensor, Plan]:
    """The output by a new plan, and the plan.

    The kernels may refuse packed weights: the weights were written meanwhile, or their values need
    another form. Then the next plan differs.
    """
    while True:
        plan = make()
        out = plan(*arguments)
        if out is not None:
            return out, plan


def call_key(
    x: Tensor,
    weights: Sequence[Tensor | None],
    mask: Tensor | None,
    scale: Tensor | None,
    *options: Hashable,
) -> Hashable | None:
    """The key of the plan for a call; None if no other call can use that plan.

    Args:
        x: the input.
        weights: plain tensors or parameters.
        mask: a mask of the tokens.
        scale: the scale of the residual branch.
        options: of the layer.
    """
    if (
        type(x) is not Tensor
        or not torch_state.nothing_listens()
        or torch_state.any_autocast()
        or x.layout is not torch.strided
        or x.is_neg()
        or x._is_zerotensor()
    ):
        return None
    needs_grad = torch.is_grad_enabled() and needs_gradient(x, *weights)
    key = (x.shape, x.stride(), x.dtype, x.device, needs_grad, options)
    if mask is None and scale is None:
        return key
    if not torch_state.is_plain(mask, scale):
        return None
    others = (
        None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in (mask, scale)
    )
    return (*key, *others, needs_gradient(scale))


class KeepsPlans:
    """A layer of this library: keeps its plans, which copies, pickles and state dicts do not
    contain.
    """

    if TYPE_CHECKING:  # TorchScript would read this annotation
        backend: str
        """"auto", or the backend that the layer has to use."""

    def _plans(self) -> Plans:
        """The plans and packed weights of the calls so far."""
        plans: Plans | None = self.__dict__.get("_plan_cache")
        if plans is None:
            plans = self.__dict__["_plan_cache"] = Plans()
        return plans

    def invalidate(self) -> None:
        """Drop the packed weights and the plans; the next call makes new ones.

        This is needed only after writes that PyTorch does not count and a sample of the bytes may
        miss. `swiftkernels.weights_changed` does it for all layers.

        Example:
            >>> attention = AdditiveAttention(64)
            >>> attention.final.weight.data[3, 5] = 0.25
            >>> attention.invalidate()
        """
        self.__dict__.pop("_plan_cache", None)

    def __getstate__(self) -> Any:
        """The state without plans, which are valid for this process and these addresses only."""
        inherited = getattr(super(), "__getstate__", None)  # Python 3.10 has none
        state = self.__dict__ if inherited is None else inherited()
        if isinstance(state, dict) and "_plan_cache" in state:
            state = {name: value for name, value in state.items() if name != "_plan_cache"}
        return state


# Plain classes: torch.compile of torch 2.10 cannot call an instance of a named tuple.


class OperatorPlan:
    """Calls an operator: for training, and where a backend has no plan for inference.

    Args:
        operator, options, backend: what to call.
        keep: what a forward keeps, if a backward can follow.
        trains: whether a gradient is known to be needed, in eager mode.
        dtype: to cast the weights to, under autocast.
        places: of the weights, as a guard; None if the plan is used only once.
    """

    def __init__(
        self,
        operator: Operator,
        options: Any,
        backend: str,
        keep: str,
        trains: bool,
        dtype: torch.dtype | None,
        places: cache.State | None,
    ) -> None:
        self.operator, self.options, self.backend = operator, options, backend
        self.keep, self.trains, self.dtype, self.places = keep, trains, dtype, places
        self.lasting = places is not None

    def __call__(
        self, x: Tensor, weights: Any, mask: Tensor | None, residual_scale: Tensor | None
    ) -> Tensor | None:
        assert residual_scale is None, "only a backend's plan for inference adds x"
        if self.places is not None and self.places != cache.places(cache.present(weights)):
            return None
        if self.dtype is not None:
            weights = type(weights)(*[None if w is None else w.to(self.dtype) for w in weights])
        if self.backend == "reference":
            return self.operator.reference(x, weights, mask, self.options)
        call = Call((x,), weights, mask, self.options, self.backend, self.keep)
        return self.operator.differentiable(call) if self.trains else self.operator(call)


class ViewingPlan:
    """Views x as tokens for another plan; it may also cast x, and add x to the output.

    Args:
        plan: for the tokens.
        channels_first: the order of the axes of x.
        dtype: to cast x to, under autocast.
        adds: whether to apply the residual_scale and add x here; else the other plan does it.
    """

    def __init__(
        self, plan: Plan, channels_first: bool, dtype: torch.dtype | None, adds: bool
    ) -> None:
        self.plan, self.channels_first, self.dtype, self.adds = plan, channels_first, dtype, adds
        self.lasting = plan.lasting

    def __call__(
        self, x: Tensor, weights: Any, mask: Tensor | None, residual_scale: Tensor | None
    ) -> Tensor | None:
        tokens = to_tokens(x, self.channels_first)
        given = tokens if self.dtype is None else tokens.to(self.dtype)
        out = self.plan(given, weights, mask, None if self.adds else residual_scale)
        if out is None:
            return None
        if self.adds and residual_scale is not None:
            out = tokens + residual_scale.flatten() * out
        return from_tokens(out, x.shape, self.channels_first)


def make_plan(
    operator: Operator,
    x: Tensor,
    weights: Any,
    matrices: Sequence[Tensor],
    options: Any,
    backend: str,
    plans: Plans | None,
) -> Plan:
    """Choose the backend, pack the weights; for operators of x alone, without a mask.

    Args:
        operator, x, weights, options, backend: as checked; `weights` has the property `width`.
        matrices: of the weights: the plans for weights that are passed to a function are found by
            the first and the last.
        plans: of a layer; its next calls may use the plan. None: the plan is used only once.
    """
    chosen = operator.choose_backend(backend, x, weights.width)
    needs_grad = needs_gradient(x, *weights)
    infers = (
        chosen == "cpu"
        and not needs_grad
        and torch_state.nothing_listens()
        and torch_state.is_plain(x, *weights)
    )
    if infers:
        plan: Plan | None = operator.implementation("cpu").inference_plan(
            x, weights, None, options, None, plans or plans_of(matrices)
        )
        if plan is not None:
            return plan
    # Weights that are not packed now may be packed at the next call, which needs a new plan.
    once = infers or plans is None
    places = None if once else cache.places(cache.present(weights))
    trains = needs_grad and not once
    return OperatorPlan(operator, options, chosen, "statistics", trains, None, places)


_known: dict[tuple[int, int], tuple[list[weakref.ref[Any]], Plans]] = {}
"""By the addresses of the first and the last matrix, as layers may share one of them."""


def plans_of(matrices: Sequence[Tensor]) -> Plans:
    """The plans for weights that are passed to a function, kept as long as their memory exists.

    They are found by weak references to the storages, of which PyTorch keeps one object each.
    References to the tensors would prevent `torch.utils.swap_tensors`.
    """
    place = matrices[0].data_ptr(), matrices[-1].data_ptr()
    storages = [m.untyped_storage() for m in matrices]
    known = _known.get(place)
    if known is not None and all(r() is s for r, s in zip(known[0], storages, strict=True)):
        return known[1]
    plans, everything = Plans(), _known  # a local, because at exit the global may be gone

    def forget(_: object) -> None:
        if place in everything and everything[place][1] is plans:
            del everything[place]

    _known[place] = [weakref.ref(s, forget) for s in storages], plans
    return plans
