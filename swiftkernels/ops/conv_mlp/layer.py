"""`ConvMlp`: the convolutional block and the MLP of SwiftFormer as an `nn.Module`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from swiftkernels.backends import torch_state
from swiftkernels.backends.layouts import in_channels_last
from swiftkernels.ops import folding, linear_parts
from swiftkernels.ops.conv_mlp.op import BACKENDS, CONV_MLP, check, conv_mlp
from swiftkernels.ops.conv_mlp.reference import ACTIVATIONS
from swiftkernels.ops.conv_mlp.weights import KERNEL_SIZES, Options, Weights
from swiftkernels.ops.linear_parts import is_untouched
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
IMAGES = 4
"""Axes of x [B, C, H, W]."""

_AROUND = ("layer_scale", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
"""What a block has besides the weights of the operator."""

Settings = tuple[Any, ...]
"""The class of a module and its numbers and strings, such as the rate of a dropout."""


class Form(NamedTuple):
    """What a block computes, and the names of its parts, such as "mlp.fc1"; "" for none.

    The output is drop(scale * second(activation(first(norm(depthwise(x)))))), and x is added if
    `residual`.
    """

    first: str
    second: str
    depthwise: str
    norm: str
    scale: str
    """A parameter, one number for each channel."""
    drop: str
    """A module that changes its input only in training, such as stochastic depth."""
    activation: str
    """A key of `reference.ACTIVATIONS`."""
    residual: bool
    skipped: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Modules that are not called, such as the activation. If one changes, all parts are called."""


def settings_of(part: nn.Module) -> Settings:
    """What `Form.skipped` records of a module."""
    kinds = (bool, int, float, str)
    own = [item for item in vars(part).items() if type(item[1]) in kinds and item[0] != "training"]
    return (type(part), *own)


def has_settings(part: nn.Module, settings: Settings) -> bool:
    """Whether `settings_of(part)` still are `settings`.

    Where attributes cannot be listed, one that was added is not noticed.
    """
    if torch_state.lists_attributes():
        return settings_of(part) == settings
    own, (kind, *items) = vars(part), settings
    return type(part) is kind and all(
        type(own.get(name)) is type(value) and own.get(name) == value for name, value in items
    )


def skipped_parts(block: nn.Module, *names: str) -> tuple[tuple[str, Settings], ...]:
    """`Form.skipped` of parts as they are now."""
    return tuple((name, settings_of(block.get_submodule(name))) for name in names)


def block_backend(backend: str) -> str:
    """The backend of blocks in a network whose attentions have this backend."""
    return backend if backend in BACKENDS else "reference"


def activation_name(part: nn.Module) -> str:
    """The name of a module of PyTorch in `reference.ACTIVATIONS`; "" if it is none of them."""
    if type(part) is nn.GELU:
        return "gelu" if part.approximate == "none" else "gelu_tanh"
    return _ACTIVATION_MODULES.get(type(part), "")


_ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}


class ConvMlpForward(KeepsPlans, nn.Module):
    """The forward of the block, for modules that have its parts under the names in `form`.

    In training the kernels replace the layers from `first` to `second`, without gradients and in
    evaluation all layers. A part that is more than a layer with weights (an adapter, a quantised
    layer, one with hooks or parametrizations) is called.
    """

    if TYPE_CHECKING:  # TorchScript would read these annotations
        form: Form | None
        """None: all parts are called."""
        backend: str

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]; errors as in `conv_mlp`."""
        # TorchScript compiles only the first branch.
        if torch.jit.is_scripting():
            return self._call_parts(x)
        else:  # noqa: RET505
            return self._fuse(x)

    def _call_parts(self, x: Tensor) -> Tensor:
        """The block in its own code: it calls the parts. TorchScript can compile it."""
        raise NotImplementedError

    def _fuse(self, x: Tensor) -> Tensor:
        pair = self._pair()
        if pair is None or not isinstance(x, Tensor) or x.dim() != IMAGES:
            return self._call_parts(x)
        around = self._around()
        if around is not None and not needs_gradient(x, *pair, *around):
            return self._infer(x, (*around[:2], *pair, *around[2:]))
        backend = self._choose_backend(x, pair)
        if backend == "reference":
            return self._call_parts(x)
        return self.compose(x, backend)

    def _choose_backend(self, x: Tensor, pair: tuple[Tensor | None, ...]) -> str:
        checks.check_floating("x", x)
        weight: Any = pair[0]
        return CONV_MLP.choose_backend(self.backend, x, weight.shape[1])

    def compose(self, x: Tensor, backend: str) -> Tensor:
        """The output, with a backend for the layers from `first` to `second`."""
        form = self._form()
        # The kernels return this format, and in it PyTorch's layers are fastest.
        out = x = in_channels_last(x)
        for name in (form.depthwise, form.norm):
            if (part := self._part(name)) is not None:
                out = part(out)
        first, second = map(self._part, (form.first, form.second))
        scale = self._scale()
        out = conv_mlp(
            out, None, None, first.weight, first.bias, second.weight, second.bias,
            None if scale is None else scale.flatten(), activation=form.activation,
            residual=False, backend=backend,
        )  # fmt: skip
        if (drop := self._part(form.drop)) is not None:
            out = drop(out)
        return out + x if form.residual else out

    def _infer(self, x: Tensor, tensors: tuple[Tensor | None, ...]) -> Tensor:
        """The output as one operator, with folded weights."""
        key = call_key(x, tensors, None, None, self.backend, self.form)
        plan = None if key is None else self._plans().by_key.get(key)
        out = None if plan is None else plan(x, tensors, None, None)
        return self._infer_anew(x, tensors, key) if out is None else out

    def _infer_anew(self, x: Tensor, tensors: tuple[Tensor | None, ...], key: Any) -> Tensor:
        """The output by a new plan, which is kept, or by the operator with weights folded now."""
        backend = self._choose_backend(x, tensors[2:6])
        if backend == "reference":
            return self._call_parts(x)
        form = self._form()
        options = Options(form.activation, form.residual)
        if (
            backend == "triton"
            and torch_state.nothing_listens()
            and torch_state.is_plain(x, *tensors)
        ):
            return self._infer_by_triton(x, tensors, options, key)
        if backend == "cpu" and key is not None:
            check(x, Weights(*tensors[:6]), options)  # type: ignore[arg-type]
            plans, pack = self._plans(), CONV_MLP.implementation("cpu").packed_plan
            while plan := pack(x, tensors, self._folded, x.shape[1], options, plans):
                out: Tensor | None = plan(x, tensors, None, None)
                if out is not None:
                    plans.keep(key, plan)
                    return out  # else the weights were written meanwhile: pack them again
        return conv_mlp(x, *self._folded(), **options._asdict(), backend=self.backend)

    def _infer_by_triton(
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
        eps = getattr(self._part(self._form().norm), "eps", 0.0)
        plan = kernels.InferencePlan(x, (*weights, *around), eps, options)
        if key is not None:
            self._plans().keep(key, plan)
        out: Tensor = plan(x, (*weights, *around), None, None)
        return out

    def _form(self) -> Form:
        assert self.form is not None
        return self.form

    def _part(self, path: str) -> Any:
        """A part by its path; None if there is none."""
        found: Any = self
        for name in path.split("."):
            found = found._modules.get(name) if found is not None else None
        return found

    def _scale(self) -> Any:
        """The layer scale, which may be any object under its name; None if there is none."""
        owner, _, name = self._form().scale.rpartition(".")
        found = self._part(owner) if owner else self
        return None if found is None else found._parameters.get(name)

    def _pair(self) -> tuple[Tensor | None, ...] | None:
        """Weights and biases of `first` and `second`; None if parts have to be called."""
        form = self.form
        if form is None or not form.activation:
            return None
        pair = self._part(form.first), self._part(form.second)
        found = linear_parts.plain_parameters(pair, nn.Conv2d)
        if not found or not all(map(linear_parts.is_pointwise, pair)):
            return None
        if type(self._scale()) not in (Parameter, type(None)):
            return None
        for name, settings in form.skipped:
            part = self._part(name)
            if part is None or not has_settings(part, settings) or not is_untouched(part):
                return None
        first, second = found
        return first["weight"], first["bias"], second["weight"], second["bias"]

    def why_called(self) -> str:
        """Why the block calls all its parts; empty if kernels replace `first` to `second`.

        Example:
            >>> block = ConvMlp(48)
            >>> handle = block.pwconv2.register_forward_hook(lambda *_: None)
            >>> block.why_called()
            'pwconv2 is called, because it has hooks'
        """
        if self._pair() is not None:
            return ""
        form = self.form
        if form is None or not form.activation:
            return "no kernel computes its activation, or a dropout stands behind it"
        why = {}
        for name in (form.first, form.second):
            part = self._part(name)
            why[name] = linear_parts.why_not_plain(part, nn.Conv2d)
            if not why[name] and not linear_parts.is_pointwise(part):
                why[name] = "it is no pointwise convolution"
        for name, settings in form.skipped:
            part = self._part(name)
            if part is None or not has_settings(part, settings):
                why[name] = "it was changed"
            elif not is_untouched(part):
                why[name] = "it has hooks, or its forward was replaced"
        called = {name: reason for name, reason in why.items() if reason}
        return linear_parts.listed(called) or f"its {form.scale} is no plain parameter"

    def _around(self) -> tuple[Tensor | None, ...] | None:
        """Weight and bias of `depthwise`, the scale, parameters and statistics of `norm`.

        None if one of these parts has to be called, or `drop` drops.
        """
        form = self._form()
        depthwise, norm, drop = map(self._part, (form.depthwise, form.norm, form.drop))
        if drop is not None and (drop.training or not is_untouched(drop)):
            return None
        own: tuple[Any, ...] = (None, None)
        if depthwise is not None:
            found = linear_parts.plain_parameters([depthwise], nn.Conv2d)
            if not found or not _is_depthwise(depthwise):
                return None
            own = found[0]["weight"], found[0]["bias"]
        of_norm: tuple[Any, ...] = (None,) * 4
        if norm is not None:
            if not _is_affine(norm):
                return None
            of_norm = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return (*own, self._scale(), *of_norm)

    def _folded(self) -> Weights:
        """The weights with BatchNorm and layer scale, in the type of the parameters."""
        form = self._form()
        depthwise = depthwise_bias = None
        first, second, convolution, norm = map(
            self._part, (form.first, form.second, form.depthwise, form.norm)
        )
        weight1, bias1 = folding.weight_and_bias(first)
        weight1 = weight1.flatten(1)
        if convolution is None:
            weight1, bias1 = folding.norm_before(weight1, bias1, norm)
        else:
            depthwise, depthwise_bias = folding.norm_behind(
                *folding.weight_and_bias(convolution), norm
            )
        weight2, bias2 = folding.weight_and_bias(second)
        weight2 = weight2.flatten(1)
        if (parameter := self._scale()) is not None:
            scale = parameter.detach().double().flatten()
            weight2, bias2 = folding.scaled(weight2, scale), bias2 * scale
        found = (depthwise, depthwise_bias, weight1, bias1, weight2, bias2)
        dtype = first.weight.dtype
        return Weights(*[None if w is None else w.to(dtype) for w in found])  # type: ignore[arg-type]


class ConvMlp(ConvMlpForward):
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
        backend: "auto", "triton", "cpu" or "reference". Only "auto" chooses; the others never
            fall back.
        device, dtype: of the parameters.

    In evaluation (of the BatchNorm), where no gradient is wanted, it is one operator: BatchNorm and
    layer scale are folded into the weights, once for all calls until a parameter changes. In
    training the layers from pwconv1 to pwconv2 are one operator, which keeps its input for the
    backward and no hidden channels. With backend="reference" all parts are called. They are called
    too if one of the two is more than a convolution (an adapter, a quantised layer, one with hooks
    or parametrizations).

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
        x [B, C, H, W]; the output is the same, in channels_last memory format if a kernel ran.

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
        self.backend = backend
        self.form = Form(
            "pwconv1", "pwconv2", "dwconv", "norm", "layer_scale", "", activation, residual
        )
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

    def _call_parts(self, x: Tensor) -> Tensor:
        out = x if self.dwconv is None else self.dwconv(x)
        out = out if self.norm is None else self.norm(out)
        out = self.pwconv2(ACTIVATIONS[self._form().activation](self.pwconv1(out)))
        out = out if self.layer_scale is None else out * self.layer_scale
        return x + out if self._form().residual else out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for theirs, ours in _NAMES.items():
            for name in [n for n in state_dict if f"{n}.".startswith(f"{prefix}{theirs}.")]:
                ending = name.removeprefix(f"{prefix}{theirs}")
                state_dict.setdefault(f"{prefix}{ours}{ending}", state_dict.pop(name))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        options = f"activation={self._form().activation!r}, residual={self._form().residual}"
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
        and is_untouched(norm)
    )
