"""How large the error of a result may be.

The rule: the error may be twice that of the eager definition in the same dtype on the same device,
plus a few ulp. Both errors are against the definition in float64, computed from the same rounded
inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

ULPS = 4
"""Units in the last place that `budget` adds to twice the eager error."""

EXACT = 1e-12
"""Relative error between two float64 computations of one formula in different orders."""

ROUNDINGS = 16
"""More successive roundings than any layer in the benchmarks has; see `type_bound`."""


def relative_error(a: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest exact value.

    NaN if `a` contains NaN; 0 if both tensors are all zero, or empty.

    Example:
        >>> relative_error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0]))
        0.25
    """
    assert a.shape == exact.shape, f"shape {tuple(a.shape)} instead of {tuple(exact.shape)}"
    if a.numel() == 0:
        return 0.0
    exact = exact.double()
    difference, largest = (a.double() - exact).abs().max(), exact.abs().max()
    return (difference / largest).item() if difference != 0 else 0.0


def relative_errors(results: Iterable[Tensor], exact: Iterable[Tensor]) -> list[float]:
    """`relative_error` of each pair, computed on the device of the exact tensor."""
    pairs = zip(results, exact, strict=True)
    return [relative_error(result.detach().to(e.device), e) for result, e in pairs]


def budget(eager_error: float, dtype: torch.dtype, ulps: float = ULPS) -> float:
    """The largest allowed relative error where the eager definition has `eager_error`.

    Example:
        >>> budget(1e-6, torch.float32) < 3e-6
        True
    """
    return 2 * eager_error + ulps * torch.finfo(dtype).eps


def type_bound(dtype: torch.dtype, length: int) -> float:
    """The largest relative error that the dtype explains, for code without an eager equivalent.

    Allows `ROUNDINGS` roundings to the dtype, and sums of up to `length` terms accumulated in
    float32 or better, in which rounding errors grow with the square root of the length.

    Example:
        >>> type_bound(torch.float32, 49) < type_bound(torch.float32, 3136) < 1e-3
        True
    """
    accumulation = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return ROUNDINGS * (torch.finfo(dtype).eps + length**0.5 * accumulation)


def assert_exact(
    ours: Mapping[str, Tensor], exact: Mapping[str, Tensor], tolerance: float = EXACT
) -> None:
    """Every named tensor equals the exact one of that name, in float64, up to rounding."""
    assert ours.keys() == exact.keys()
    errors = {name: relative_error(ours[name], exact[name]) for name in exact}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def assert_as_good_as_eager(
    ours: Tensor, eager: Tensor, exact: Tensor, ulps: float = ULPS, name: str = "output"
) -> None:
    """error(ours) <= 2 error(eager) + `ulps` ulp of the dtype, both against the float64 `exact`."""
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype} instead of {eager.dtype}"
    error, eager_error = relative_error(ours, exact), relative_error(eager, exact)
    bound = budget(eager_error, ours.dtype, ulps)
    assert error <= bound, f"{name}: error {error:.3g}, eager's {eager_error:.3g}"
