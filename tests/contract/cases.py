"""What the contract tests run: implementations, random arguments, and the rule for errors."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from swiftkernels.backends import devices, torch_state
from swiftkernels.backends.cpu import library
from swiftkernels.ops import operators, plan
from swiftkernels.ops.operator import Call, Operator
from swiftkernels.testing.tolerance import EXACT, budget, relative_error
from swiftkernels.utils.checks import DTYPES

INTERPRETED = torch_state.interpreting()
"""Whether Triton's interpreter runs the kernels: ten thousand times slower than they are."""

SIZE = (2, 10, 12, 16) if INTERPRETED else (3, 42, 20, 12)
"""Batch, tokens, width of the input, width of the output."""

THREADS = (1,) if INTERPRETED else (1, 2, 3)

DRAWS = 7
"""Random arguments that a median is taken over."""

VANISHING = 1e-9
"""Of the largest gradient: below this, rounding is all that is left of a gradient that is zero."""

Change = Callable[[Call], "Call | None"]


class Implementation(NamedTuple):
    """A backend of an operator on a device."""

    operator: Operator
    backend: str
    device: torch.device
    isa: str = ""
    """The CPU library to use; empty: the best."""

    def __str__(self) -> str:
        device = "" if self.device.type == "cpu" else self.device.type
        return "-".join(filter(None, (self.operator.name, self.backend, self.isa, device)))

    @property
    def kernels(self) -> Any:
        """The module of the backend."""
        return self.operator.implementation(self.backend)

    def multiplies_by_torch(self, name: str) -> bool:
        """Whether the output, or the gradient of that name, is a matrix product of PyTorch's.

        These choose the order of sums by batch and threads.
        """
        torch_gradients = self.operator.backends[self.backend].torch_gradients
        return self.backend == "aten" or (torch_gradients and name != "output")

    def takes(self, dtype: torch.dtype) -> bool:
        x = torch.empty(1, 1, 16, dtype=dtype, device=self.device)
        return not self.operator.why_not(self.backend, x, 16)

    @property
    def widest(self) -> torch.dtype:
        """The first of the dtypes that it takes."""
        return next(dtype for dtype in DTYPES if self.takes(dtype))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Its CPU library in place of the one that was chosen."""
        if not self.isa:
            yield
            return
        _forget_library()
        with mock.patch.object(library, "loaded", return_value=library.load(self.isa)):
            yield
        _forget_library()


def _forget_library() -> None:
    """Clear what operators keep of a library: its functions, packed weights, the choice of form."""
    plan._known.clear()
    for name, module in list(sys.modules.items()):
        if name.startswith(("swiftkernels.ops.", "swiftkernels.backends.cpu.packing")):
            for value in list(vars(module).values()):
                if getattr(value, "__module__", "") == name and hasattr(value, "cache_clear"):
                    value.cache_clear()


def implementations(isas: bool = False) -> list[Implementation]:
    """What runs in this process; `isas`: with every CPU library that was built and runs here."""
    found = []
    for operator in operators().values():
        for device in (torch.device("cpu"), *devices.gpus()[:1]):
            for backend in operator.backends:
                implementation = Implementation(operator, backend, device)
                # In the interpreter's process only what it interprets is new.
                elsewhere = INTERPRETED and backend != "triton"
                if elsewhere or not any(map(implementation.takes, DTYPES)):
                    continue
                runs = [isa for isa, runs in library.available().items() if runs]
                if isas and backend == "cpu":
                    found += [implementation._replace(isa=isa) for isa in runs]
                else:
                    found.append(implementation)
    return found


def typed(isas: bool = False) -> list[tuple[Implementation, torch.dtype]]:
    """Every implementation with every dtype that it takes."""
    return [(i, dtype) for i in implementations(isas) for dtype in DTYPES if i.takes(dtype)]


def ids(value: object) -> str | None:
    """Names of parameters in the reports of pytest."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, (Implementation, tuple)) else None


def cast(call: Call, to: torch.dtype | torch.device) -> Call:
    """The arguments in another dtype or on another device."""

    def moved(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(to)

    mask = moved(call.mask) if isinstance(to, torch.device) else call.mask
    weights = type(call.weights)(*map(moved, call.weights))
    inputs = tuple(t.to(to) for t in call.inputs)
    return call._replace(inputs=inputs, weights=weights, mask=mask)


def on_inputs(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda call: call._replace(inputs=tuple(map(change, call.inputs)))


def without_biases(call: Call) -> Call:
    """Without the tensors that may be missing."""
    return call._replace(weights=call.weights._replace(**dict.fromkeys(biases(call))))


def biases(call: Call) -> list[str]:
    """Names of the weights that may be missing: vectors called so."""
    return [name for name in call.weights._fields if "bias" in name]


def draw(
    implementation: Implementation,
    dtype: torch.dtype | None = None,
    size: tuple[int, int, int, int] = SIZE,
    variant: str = "",
    seed: int = 0,
) -> Call | None:
    """Random arguments, the same at every call; None if the backend does not take the variant."""
    torch.manual_seed(seed)
    operator = implementation.operator
    call: Call | None = operator.example(*size)._replace(backend=implementation.backend)
    if variant:
        assert call is not None
        call = operator.variants[variant](call)
    if call is None:
        return None
    dtype = implementation.widest if dtype is None else dtype
    return cast(cast(call, dtype), implementation.device)


def some_variants(operator: Operator) -> tuple[str, ...]:
    """The plain example and all variants; in the interpreter the former alone."""
    return ("",) if INTERPRETED else ("", *operator.variants)


def names(operator: Operator) -> tuple[str, ...]:
    """Of the tensors, in the order of `Call.tensors`."""
    return (*operator.inputs, *operator.weights._fields)


def with_tensors(call: Call, tensors: list[Tensor | None]) -> Call:
    """The call on other tensors, in the order of `Call.tensors`."""
    count = len(call.inputs)
    return call._replace(
        inputs=tuple(tensors[:count]),  # type: ignore[arg-type]
        weights=type(call.weights)(*tensors[count:]),
    )


def definition(operator: Operator) -> Callable[[Call], Tensor]:
    """The definition as a function of a call."""
    return lambda call: operator.reference(*call.inputs, call.weights, call.mask, call.options)


def public(operator: Operator) -> Callable[[Call], Tensor]:
    """The public function of an operator as a function of a call."""
    function = operator.function

    def run(call: Call) -> Tensor:
        mask = {} if call.mask is None else {"mask": call.mask}
        return function(
            *call.inputs, *call.weights, backend=call.backend, **mask, **call.options._asdict()
        )

    return run


def random_dout(operator: Operator, call: Call, seed: int = 0) -> Tensor:
    """A random gradient of the output."""
    shape, _ = operator.output_like(call.inputs[0], call.weights.token_dim)
    x = call.inputs[0]
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)


def gradients(
    run: Callable[[Call], Tensor], operator: Operator, call: Call, dout: Tensor | None = None
) -> dict[str, Tensor]:
    """The output, and the gradients of all tensors by name."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in call.tensors()]
    out = run(with_tensors(call, leaves))
    dout = random_dout(operator, call) if dout is None else dout
    wanted = {n: t for n, t in zip(names(operator), leaves, strict=True) if t is not None}
    found = torch.autograd.grad(out, list(wanted.values()), dout.to(out.dtype))
    return {"output": out.detach(), **dict(zip(wanted, found, strict=True))}


def check(implementation: Implementation, dtype: torch.dtype | None = None, **options: Any) -> None:
    """Output and gradients: error <= 2 x error of eager + few ulp, both against float64.

    The options are those of `measure`.
    """
    pairs = measure(implementation, dtype, **options)
    assert not beyond(pairs, dtype or implementation.widest)


def measure(
    implementation: Implementation,
    dtype: torch.dtype | None = None,
    *,
    size: tuple[int, int, int, int] = SIZE,
    variant: str = "",
    change: Change = lambda call: call,
    run: Callable[[Call], Tensor] | None = None,
    dout: Callable[[Tensor], Tensor] = lambda t: t,
) -> dict[str, list[tuple[float, float]]]:
    """Errors of output and gradients by name, ours and eager's, of one draw or several.

    Where one draw of the arguments is beyond its bound, the median over several counts: a gradient
    of a few numbers may by chance be several times as exact by either, and rounding may decide on
    which side of a kink of the definition a number is.

    Args:
        change: of the arguments.
        run: what to check; the operator by default.
        dout: change of the gradient of the output.
    """
    operator = implementation.operator
    pairs: dict[str, list[tuple[float, float]]] = {}
    for seed in range(DRAWS):
        call = draw(implementation, dtype, size, variant, seed)
        call = None if call is None else change(call)
        if call is None:
            break
        gradient = dout(random_dout(operator, call, seed))
        found = errors(operator, call, run or operator, gradient)
        for name, pair in found.items():
            pairs.setdefault(name, []).append(pair)
        if seed == 0 and not beyond(pairs, call.inputs[0].dtype):
            break
    return pairs


def errors(
    operator: Operator,
    call: Call,
    run: Callable[[Call], Tensor],
    dout: Tensor,
    zeros_are_exact: bool = True,
) -> dict[str, tuple[float, float]]:
    """Of output and gradients by name: our error, and that of eager.

    Without `zeros_are_exact`, gradients that are zero may have rounding errors, as those that are
    nearly zero.
    """
    eager = gradients(definition(operator), operator, call, dout)
    exact = gradients(definition(operator), operator, cast(call, torch.float64), dout)
    ours = gradients(run, operator, call, dout)
    for name, t in ours.items():
        assert (t.dtype, t.shape) == (eager[name].dtype, eager[name].shape), name
    largest = max((exact[n].abs().max() for n in exact if n in operator.weights._fields), default=0)
    above = 0.0 if zeros_are_exact else -1.0
    return {name: _errors(ours[name], eager[name], exact[name], largest, above) for name in ours}


def _errors(
    ours: Tensor, eager: Tensor, exact: Tensor, largest: Tensor | int, above: float
) -> tuple[float, float]:
    if exact.numel() and above < exact.abs().max() < VANISHING * largest:
        # Zero but for the rounding of float64: measured by the largest gradient of a weight.
        return tuple((t.double().abs().max() / largest).item() for t in (ours, eager))  # type: ignore[return-value]
    return relative_error(ours, exact), relative_error(eager, exact)


def beyond(
    pairs: Mapping[str, list[tuple[float, float]]], dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    """By name: the median error and its bound, where it is beyond."""
    found = bounded(pairs, dtype)
    return {name: found[name] for name, (error, bound) in found.items() if not error <= bound}


def bounded(
    pairs: Mapping[str, list[tuple[float, float]]], dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    """By name: the median error, and its bound."""
    found = {}
    for name, each in pairs.items():
        error, eager = (statistics.median(column) for column in zip(*each, strict=True))
        found[name] = (error, EXACT if dtype == torch.float64 else budget(eager, dtype))
    return found


def assert_close(ours: Tensor, expected: Tensor) -> None:
    """Equal up to a few roundings of their dtype."""
    assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
    bound = EXACT if ours.dtype == torch.float64 else 16 * torch.finfo(ours.dtype).eps
    assert relative_error(ours, expected) <= bound


def parameters(call: Call) -> Call:
    """With parameters for weights, which the CPU kernels pack."""
    weights = (None if w is None else nn.Parameter(w, requires_grad=False) for w in call.weights)
    return call._replace(weights=type(call.weights)(*weights))
