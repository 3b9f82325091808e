"""What the tests share: tensors of sensible magnitude, all gradients of a call, error budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

POOLINGS = ("l2", "softmax", "sum", "linear")

SELF_NAMES = (
    "x",
    "query_weight",
    "query_bias",
    "key_weight",
    "key_bias",
    "w_g",
    "proj_weight",
    "proj_bias",
    "final_weight",
    "final_bias",
)
"""The tensors of `additive_self_attention`, in its order."""

QUERY_KEY_NAMES = ("q", "k", *SELF_NAMES[5:])
"""The tensors of `additive_attention`, in its order."""

EXACT = 1e-12
"""Relative error left to two float64 computations of the same thing in another order."""


def make_tensors(
    batch: int,
    n_tokens: int,
    in_dims: int,
    token_dim: int,
    num_heads: int = 1,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor | None]:
    """x and the nine weights, in the order of `SELF_NAMES`; the biases are None without `bias`.

    Drawn in float64 and rounded to `dtype`: one seed gives the same numbers in every type.
    """
    generator = torch.Generator().manual_seed(seed)
    width = token_dim * num_heads

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (values * std).to(dtype)

    def bias_of(n: int) -> Tensor | None:
        values = normal(n, std=0.2)
        return values if bias else None

    return [
        normal(batch, n_tokens, in_dims),
        normal(width, in_dims, std=in_dims**-0.5),
        bias_of(width),
        normal(width, in_dims, std=in_dims**-0.5),
        bias_of(width),
        normal(width),
        normal(width, width, std=width**-0.5),
        bias_of(width),
        normal(token_dim, width, std=width**-0.5),
        bias_of(token_dim),
    ]


def make_query_key_tensors(*args: int, **kwargs: object) -> list[Tensor | None]:
    """q, k and the five weights, in the order of `QUERY_KEY_NAMES`; arguments of `make_tensors`."""
    x, wq, bq, wk, bk, *weights = make_tensors(*args, **kwargs)  # type: ignore[arg-type]
    q = torch.nn.functional.linear(x, wq, bq)
    k = torch.nn.functional.linear(x, wk, bk)
    return [q, k, *weights]


def make_mask(batch: int, n_tokens: int, seed: int = 0) -> Tensor:
    """A bool mask [B, N] with about a third masked, and at least one token kept in every item."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, n_tokens, generator=generator) > 1 / 3
    mask[:, 0] = True
    return mask


def convert(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Every tensor in another dtype."""
    return [None if t is None else t.to(dtype) for t in tensors]


def forward_backward(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    names: Sequence[str],
    dout: Tensor | None = None,
) -> dict[str, Tensor]:
    """The output of function(*tensors), and under their names the gradients of all tensors.

    `dout` is the gradient of the output; without it a fixed random one.
    """
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    if dout is None:
        generator = torch.Generator().manual_seed(1)
        dout = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    wanted = {name: t for name, t in zip(names, leaves, strict=True) if t is not None}
    grads = torch.autograd.grad(output, list(wanted.values()), dout.to(output.dtype))
    return {"output": output.detach(), **dict(zip(wanted, grads, strict=True))}


def relative_error(a: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest exact value; NaN where `a` has one, 0 where all are 0."""
    assert a.shape == exact.shape, f"shape {tuple(a.shape)} instead of {tuple(exact.shape)}"
    if a.numel() == 0:
        return 0.0
    exact = exact.double()
    difference, largest = (a.double() - exact).abs().max(), exact.abs().max()
    return (difference / largest).item() if difference != 0 else 0.0


def assert_exact(
    ours: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float = EXACT
) -> None:
    """Every named tensor equals the exact one, in float64, to rounding."""
    assert ours.keys() == exact.keys()
    errors = {name: relative_error(ours[name], exact[name]) for name in exact}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def assert_as_good_as_eager(
    ours: Tensor, eager: Tensor, exact: Tensor, ulps: float = 4, name: str = "output"
) -> None:
    """error(ours) <= 2 error(eager) + a few ulp of the dtype, both against the float64 `exact`."""
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype} instead of {eager.dtype}"
    error, eager_error = relative_error(ours, exact), relative_error(eager, exact)
    bound = 2 * eager_error + ulps * torch.finfo(ours.dtype).eps
    assert error <= bound, f"{name}: error {error:.3g}, eager's {eager_error:.3g}"
