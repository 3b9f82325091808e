"""`ConvMlp`: the convolutional block and the MLP of SwiftFormer as an `nn.Module`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from swiftkernels.backends import torch_state
from swiftkernels.ops import folding, linear_parts
from swiftkernels.ops.conv_mlp.op import BACKENDS, CONV_MLP, check, conv_mlp
from swiftkernels.ops.conv_mlp.reference import ACTIVATIONS
from swiftkernels.ops.conv_mlp.weights import KERNEL_SIZES, Options, Weights
from swiftkernels.ops.operator import needs_gradient
from swiftkernels.ops.plan import KeepsPlans, call_key
from swiftkernels.utils import checks

_NAMES = {
    "norm1": "norm",
    "fc1": "pwconv1",
    "fc2": "pwconv2",
    "depth_wise_conv": "dwconv",
    "point_wise_conv1": "pwconv1",
    "point_wise_conv2": "pwconv2",
    "layer_scale.gamma": "layer_scale",
}
"""Names in other implementations, and those here."""

_AROUND = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "layer_scale")
"""What the layer has besides the weights of the operator."""


class ConvMlp(KeepsPlans, nn.Module):
    """x + layer_scale * pwconv2(activation(pwconv1(norm(dwconv(x))))), a block of SwiftFormer.

    Args:
        channels: C of input and output.
        hidden: channels between the pointwise convolutions; 4 C by default.
        kernel_size: of the depthwise convolution, 3, 5 or 7; None: there is none.
        activation: "gelu", "gelu_tanh", "relu", "silu", "hardswish" or "none".
        residual: whether x is added.
        layer_scale: initial factor of every channel of the branch; None: there is none.
        norm: whether a BatchNorm precedes pwconv1.
        bias: whether the convolutions have biases.
        backend: of evaluation without gradients: "auto", "triton", "cpu" or "reference". Only
            "auto" chooses; the others never fall back.
        device, dtype: of the parameters.

    In evaluation (of the BatchNorm), where no gradient is wanted, it is one operator: BatchNorm and
    layer scale are folded into the weights, once for all calls until a parameter changes. Else the
    parts are called, as they are with backend="reference". They are called too if one of them is
    more than a convolution or a BatchNorm2d (an adapter, a quantised layer, one with hooks or
    parametrizations).

    It loads the state dicts of two parts of SwiftFormers, here with the names of timm's, those of
    transformers' and the official ones too:

    ====================  ==================================================  =====================
    there                 here                                                names
    ====================  ==================================================  =====================
    ``ConvEncoder``       ``ConvMlp(C, hidden)``                              the same
    ``Mlp``               ``ConvMlp(C, hidden, None, residual=False,          ``norm1``, ``fc1``,
                          layer_scale=None)``                                 ``fc2``
    ====================  ==================================================  =====================

    Shapes:
        x [B, C, H, W]; the output is the same, in channels_last memory format if it is fused.

    Example:
        >>> block = ConvMlp(48, 192).eval().requires_grad_(False)
        >>> block(torch.randn(2, 48, 14, 14)).shape
        torch.Size([2, 48, 14, 14])
    """

    dwconv: nn.Conv2d | None
    norm: nn.BatchNorm2d | None
    layer_scale: Parameter | None

    def __init__(
        self,
        channels: int,
        hidden: int | None = None,
        kernel_size: int | None = 3,
        activation: str = "gelu",
        residual: bool = True,
        layer_scale: float | None = 1.0,
        norm: bool = True,
        bias: bool = True,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_positive("channels", channels, "Pass the width of the images.")
        hidden = 4 * channels if hidden is None else hidden
        checks.check_positive("hidden", hidden, "Leave it out for 4 * channels.")
        checks.check_option("kernel_size", kernel_size, (*KERNEL_SIZES, None))
        checks.check_option("activation", activation, tuple(ACTIVATIONS))
        checks.check_option("backend", backend, BACKENDS)
        self.activation, self.residual, self.backend = activation, residual, backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_module("dwconv", None)
        if kernel_size is not None:
            padding = kernel_size // 2
            self.dwconv = nn.Conv2d(
                channels, channels, kernel_size, 1, padding, 1, channels, bias, **factory
            )
        self.register_module("norm", nn.BatchNorm2d(channels, **factory) if norm else None)
        self.pwconv1 = nn.Conv2d(channels, hidden, 1, bias=bias, **factory)
        self.pwconv2 = nn.Conv2d(hidden, channels, 1, bias=bias, **factory)
        self.register_parameter("layer_scale", None)
        if layer_scale is not None:
            checks.check_number("layer_scale", layer_scale)
            scale = torch.full((channels, 1, 1), float(layer_scale), **factory)
            self.layer_scale = Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]; errors as in `conv_mlp`."""
        tensors = self._plain_tensors()
        if tensors is None or not isinstance(x, Tensor) or needs_gradient(x, *tensors):
            return self._call_parts(x)
        key = call_key(x, tensors, None, None, self.backend, self.activation, self.residual)
        plan = None if key is None else self._plans().by_key.get(key)
        out = None if plan is None else plan(x, tensors, None, None)
        return self._fused(x, tensors, key) if out is None else out

    def _fused(self, x: Tensor, tensors: tuple[Tensor | None, ...], key: Any) -> Tensor:
        """The output by a new plan, which is kept, or by the operator with weights folded now."""
        checks.check_floating("x", x)
        backend = CONV_MLP.choose_backend(self.backend, x, self.pwconv1.in_channels)
        if backend == "reference":
            return self._call_parts(x)
        options = Options(self.activation, self.residual)
        plain = torch_state.nothing_listens() and torch_state.is_plain(x, *tensors)
        if backend == "triton" and plain:
            return self._by_triton(x, tensors, options, key)
        if backend == "cpu" and key is not None:
            check(x, Weights(*tensors[:6]), options)  # type: ignore[arg-type]
            plans, pack = self._plans(), CONV_MLP.implementation("cpu").packed_plan
            while plan := pack(x, tensors, self._folded, x.shape[1], options, plans):
                out: Tensor | None = plan(x, tensors, None, None)
                if out is not None:
                    plans.keep(key, plan)
                    return out  # else the weights were written meanwhile: pack them again
        return conv_mlp(x, *self._folded(), **options._asdict(), backend=self.backend)

    def _by_triton(
        self, x: Tensor, tensors: tuple[Tensor | None, ...], options: Options, key: Any
    ) -> Tensor:
        """The output by a kernel that reads the tensors as they are, so that nothing is folded."""
        weights, around = tensors[:6], tensors[6:]
        if (dtype := torch_state.autocast_dtype(x)) is not None:
            x, weights = x.to(dtype), tuple(None if w is None else w.to(dtype) for w in weights)
        check(x, Weights(*weights), options)  # type: ignore[arg-type]
        for name, t in zip(_AROUND, around, strict=True):
            if t is not None:
                checks.check_device(name, t, "x", x)
        kernels = CONV_MLP.implementation("triton")
        eps = getattr(self.norm, "eps", 0.0)
        plan = kernels.InferencePlan(x, (*weights, *around), eps, options)
        if key is not None:
            self._plans().keep(key, plan)
        out: Tensor = plan(x, (*weights, *around), None, None)
        return out

    def _plain_tensors(self) -> tuple[Tensor | None, ...] | None:
        """The parameters, and the statistics of the BatchNorm; None if parts have to be called.

        The first six are those of `Weights`, without BatchNorm and scale.
        """
        modules, scale = self._modules, self._parameters.get("layer_scale", ())
        depthwise, norm = modules["dwconv"], modules["norm"]
        pointwise: Any = (modules["pwconv1"], modules["pwconv2"])
        parts = pointwise if depthwise is None else (*pointwise, depthwise)
        found = linear_parts.plain_parameters(parts, nn.Conv2d)
        if not found or not all(map(linear_parts.is_pointwise, pointwise)):
            return None
        if type(scale) not in (Parameter, type(None)) or not _is_depthwise(depthwise):
            return None
        around: tuple[Any, ...] = (None,) * 4
        if norm is not None:
            if not _is_affine(norm):
                return None
            n: Any = norm
            around = (n.weight, n.bias, n.running_mean, n.running_var)
        first, second, *third = found
        w, b = (third[0]["weight"], third[0]["bias"]) if third else (None, None)
        return (
            w, b, first["weight"], first["bias"], second["weight"], second["bias"], *around, scale,
        )  # fmt: skip

    def _folded(self) -> Weights:
        """The weights with BatchNorm and layer scale, in the type of the parameters."""
        depthwise = depthwise_bias = None
        weight1, bias1 = folding.weight_and_bias(self.pwconv1)
        weight1 = weight1.flatten(1)
        if self.dwconv is None:
            weight1, bias1 = folding.norm_before(weight1, bias1, self.norm)
        else:
            depthwise, depthwise_bias = folding.norm_behind(
                *folding.weight_and_bias(self.dwconv), self.norm
            )
        weight2, bias2 = folding.weight_and_bias(self.pwconv2)
        weight2 = weight2.flatten(1)
        if self.layer_scale is not None:
            scale = self.layer_scale.detach().double().flatten()
            weight2, bias2 = folding.scaled(weight2, scale), bias2 * scale
        found = (depthwise, depthwise_bias, weight1, bias1, weight2, bias2)
        dtype = self.pwconv1.weight.dtype
        return Weights(*[None if w is None else w.to(dtype) for w in found])  # type: ignore[arg-type]

    def _call_parts(self, x: Tensor) -> Tensor:
        out = x if self.dwconv is None else self.dwconv(x)
        out = out if self.norm is None else self.norm(out)
        out = self.pwconv2(ACTIVATIONS[self.activation](self.pwconv1(out)))
        out = out if self.layer_scale is None else out * self.layer_scale
        return x + out if self.residual else out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for theirs, ours in _NAMES.items():
            for name in [n for n in state_dict if f"{n}.".startswith(f"{prefix}{theirs}.")]:
                ending = name.removeprefix(f"{prefix}{theirs}")
                state_dict.setdefault(f"{prefix}{ours}{ending}", state_dict.pop(name))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        options = f"activation={self.activation!r}, residual={self.residual}"
        scaled = "" if self.layer_scale is None else "layer_scale, "
        return f"{scaled}{options}, backend={self.backend!r}"


def _is_depthwise(convolution: Any) -> bool:
    """Whether the operator computes a depthwise convolution; None is one too."""
    c = convolution
    if c is None:
        return True
    k = c.kernel_size[0]
    sizes = (c.kernel_size, c.stride, c.padding, c.dilation, c.groups, c.padding_mode)
    expected = ((k, k), (1, 1), (k // 2, k // 2), (1, 1), c.in_channels, "zeros")
    return k in KERNEL_SIZES and sizes == expected and c.in_channels == c.out_channels


def _is_affine(norm: Any) -> bool:
    """Whether a norm is a BatchNorm2d that uses its statistics, with nothing around its call."""
    return (
        type(norm) is nn.BatchNorm2d
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
        and linear_parts.is_untouched(norm)
    )
