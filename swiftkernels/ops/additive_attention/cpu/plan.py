"""Inference on a CPU: in the fastest form with packed weights, or with weights not packed."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import Parameter

from swiftkernels.backends import cache
from swiftkernels.backends.cpu import library
from swiftkernels.backends.cpu.library import CANCELLATION, DONE, STALE
from swiftkernels.backends.cpu.packing import Packed, packed_weights
from swiftkernels.backends.layouts import output_like, tokens_of
from swiftkernels.ops.additive_attention.cpu import config, launch, packing
from swiftkernels.ops.additive_attention.cpu.packing import PLAIN
from swiftkernels.ops.additive_attention.weights import Options, Weights
from swiftkernels.ops.plan import Plan, Plans


def inference_plan(
    x: Tensor,
    weights: Weights,
    mask: Tensor | None,
    options: Options,
    residual_scale: Tensor | None,
    plans: Plans,
) -> Plan:
    """The plan for inputs like x.

    Only parameters are packed. Packing does not pay for weights that are computed at every call,
    such as those of a parametrization.
    """
    matrices = (weights.query_weight, weights.key_weight, weights.proj_weight, weights.final_weight)
    if all(type(w) is Parameter for w in matrices):
        n_tokens = x.shape[1] if x.dim() == 3 else x.shape[2] * x.shape[3]
        fastest = config.form(n_tokens, weights.in_dims, weights.width, options.qk_norm)
        for form in (fastest, PLAIN):
            slot = plans.slot((form, options, x.dtype), (*weights, residual_scale))
            packed = _packed(slot, weights, residual_scale, options, form, x.dtype)
            if packed is None:
                break
            if not packed.cancels:
                return PackedPlan(x, weights.token_dim, form, slot, residual_scale is not None)
    return RawPlan(options)


def _packed(
    slot: cache.Slot,
    weights: Weights,
    scale: Tensor | None,
    options: Options,
    form: int,
    dtype: torch.dtype,
) -> Packed | None:
    of_type = functools.partial(packing.rounded, dtype=dtype)
    return packed_weights(
        launch.kernels(),
        slot,
        cache.present((*weights, scale)),
        lambda packer: packing.pack(packer, of_type(weights), scale, options, form),
    )


class PackedPlan:
    """Runs the forward with packed weights.

    Its guards are the state of the weights and, in the kernels, their fingerprint. With a
    residual_scale the output is x + residual_scale * attention(x), with the strides of x.
    """

    __slots__ = (
        "_adds_input", "_batch", "_empty", "_form", "_n_tokens", "_out", "_out_strides", "_slot",
        "_x_strides",
    )  # fmt: skip

    lasting = True

    def __init__(
        self, x: Tensor, token_dim: int, form: int, slot: cache.Slot, adds_input: bool
    ) -> None:
        self._form, self._slot, self._adds_input = form, slot, adds_input
        shape, strides = output_like(x, token_dim)
        if adds_input:
            like = torch.empty_like(x)
            shape, strides = tuple(like.shape), like.stride()
        self._out = shape, strides
        self._empty = 0 in shape
        tokens, out_tokens = tokens_of(x.shape, x.stride()), tokens_of(shape, strides)
        assert tokens is not None, "the caller passes images with gaps as tokens"
        assert out_tokens is not None, "an image without gaps has an output without gaps"
        self._batch, self._n_tokens, _, self._x_strides = tokens
        self._out_strides = out_tokens[3]

    def __call__(
        self, x: Tensor, weights: Weights, mask: Tensor | None, residual_scale: Tensor | None
    ) -> Tensor | None:
        packed: Packed | None = self._slot.find(cache.present((*weights, residual_scale)))
        if packed is None or packed.cancels:
            return None
        out = torch.empty_strided(*self._out, dtype=x.dtype, device="cpu")
        if self._empty:
            return out
        call = launch.call_fields(
            self._batch, self._n_tokens, self._form, x, self._x_strides, out, self._out_strides,
            self._adds_input, mask,
        )  # fmt: skip
        status = launch.kernels().swiftkernels_additive_forward(packed.fields, call)
        if status == STALE:
            self._slot.renew()
            return None
        if status == CANCELLATION:
            packed.cancels = True
            return None
        if status != DONE:
            library.check(status)
        packed.uses += 1
        return out


class RawPlan:
    """Runs the forward of training: in the plain form, with weights that are not packed."""

    lasting = False

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(
        self, x: Tensor, weights: Weights, mask: Tensor | None, residual_scale: Tensor | None
    ) -> Tensor:
        rounded = packing.rounded(weights, x.dtype)
        out, _ = launch.forward((x,), rounded, mask, self._options, "nothing")
        if residual_scale is None:
            return out
        scale = residual_scale.flatten()
        if x.dim() == 4:
            scale = scale.view(-1, 1, 1)
        return torch.add(x, out.mul_(scale), out=torch.empty_like(x))
