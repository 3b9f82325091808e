"""Checks of arguments: each message says which, what was expected, what came and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_option(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} must be one of {choices}; got {value!r}.")


def check_positive(name: str, value: int, remedy: str = "") -> None:
    """Raise unless `value` is an integer of at least 1; `remedy` is a sentence: what to do."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(
            f"{name} must be an int; got {type(value).__name__}. Convert it: int({name})."
        )
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}. {remedy}".rstrip())


def check_number(name: str, value: float, positive: bool = False) -> None:
    """Raise unless `value` is a finite number, and greater than 0 where it has to be `positive`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(
            f"{name} must be a float; got {type(value).__name__}. Convert it: float({name})."
        )
    # Comparisons alone: math.isfinite would break graphs of torch.compile.
    if not (0 if positive else -math.inf) < value < math.inf:
        expected = "positive and finite" if positive else "finite"
        raise ValueError(f"{name} must be {expected}; got {value}. Leave it out for the default.")


def check_tensor(name: str, t: object) -> None:
    """Raise unless t is a tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor; got {type(t).__name__}. "
            f"Convert it: torch.as_tensor({name})."
        )


def check_weight(name: str, t: Tensor, meaning: str) -> None:
    """Raise unless t is a matrix with elements."""
    check_tensor(name, t)
    if t.dim() != 2 or t.numel() == 0:
        raise ValueError(
            f"{name} must be a matrix {meaning}; got shape {tuple(t.shape)}. "
            "Pass the weight of a torch.nn.Linear, or one laid out like it."
        )


def check_pointwise(name: str, t: Tensor) -> None:
    """Raise unless t is a matrix with elements, or that of a 1x1 convolution."""
    check_tensor(name, t)
    if t.dim() not in (2, 4) or t.shape[2:] not in ((), (1, 1)) or t.numel() == 0:
        raise ValueError(
            f"{name} must be a matrix, or that of a 1x1 convolution; got shape {tuple(t.shape)}. "
            "Pass the weight of a torch.nn.Linear or torch.nn.Conv2d."
        )


def check_floating(name: str, t: Tensor) -> None:
    """Raise unless t is a tensor of a type that the operators take."""
    check_tensor(name, t)
    if t.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float64, float32, float16 or bfloat16; got {t.dtype}. "
            f"Convert it first: {name}.to(torch.float32)."
        )
    if t.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got {t.layout}. Convert it: .to_dense().")


def check_tokens(name: str, x: Tensor, width: int, width_name: str) -> None:
    """Raise unless x is a floating-point [B, N, width]."""
    check_floating(name, x)
    if x.dim() != 3:
        raise ValueError(
            f"{name} must have 3 dimensions [B, N, {width}] (batch, tokens, {width_name}); got "
            f"shape {tuple(x.shape)}. Images [B, C, H, W] go through AdditiveAttention, or "
            f"{name}.flatten(2).transpose(1, 2)."
        )
    if x.shape[-1] != width:
        raise ValueError(
            f"{name} must be {width} wide in its last dimension ({width_name}); got shape "
            f"{tuple(x.shape)}. Check in_dims/token_dim, or the order of the axes."
        )


def check_shape(
    name: str,
    t: Tensor,
    shape: tuple[int, ...],
    meaning: str,
    remedy: str = "Check that all weights come from one layer.",
) -> None:
    """Raise unless t is a tensor of exactly that shape."""
    check_tensor(name, t)
    if t.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape} ({meaning}); got {tuple(t.shape)}. {remedy}"
        )


def check_alike(like_name: str, like: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Raise unless every tensor has the dtype and the device of `like`."""
    for name, t in others.items():
        if t is not None:
            check_dtype(name, t, like_name, like)
            check_device(name, t, like_name, like)


def check_dtype(name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless t has the dtype of `like`."""
    if t.dtype != like.dtype:
        raise TypeError(
            f"{name} must have the dtype of {like_name}, {like.dtype}; got {t.dtype}. "
            f"Convert one of them with .to(), or run under torch.autocast."
        )


def check_device(name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless t is on the device of `like`."""
    if t.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {like_name}, {like.device}; got {t.device}. "
            f"Move it: .to({str(like.device)!r})."
        )


def check_mask(mask: Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    """Raise unless mask is None or a bool tensor of that shape, [B, N], on that device."""
    if mask is None:
        return
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be bool (True = the token takes part); got {mask.dtype}. "
            "Convert it: mask.bool() (for additive -inf masks: mask == 0)."
        )
    if mask.shape != torch.Size(shape):
        raise ValueError(
            f"mask must have shape [B, N] = {tuple(shape)}; got {tuple(mask.shape)}. "
            "One value per token and batch element: expand or reshape it."
        )
    if mask.device != device:
        raise ValueError(
            f"mask must be on the device of the input, {device}; got {mask.device}. "
            f"Move it: mask.to({str(device)!r})."
        )
