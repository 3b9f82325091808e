"""Kinds of layers, recognised by what they hold and compute."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from swiftkernels.backends import torch_state
from swiftkernels.fusion.find import probes
from swiftkernels.fusion.steps import ACTIVATIONS
from swiftkernels.ops import folding


def why_left(module: nn.Module) -> str:
    """Why a module and its parts cannot be read instead of called; empty if they can."""
    for name, part in module.named_modules():
        which = f"its part {name}" if name else "it"
        if forward_was_replaced(part):
            return f"the forward of {which} was replaced"
        if torch_state.has_hooks(part):
            return f"{which} has hooks"
        if is_parametrized(part):
            return f"{which} is parametrized"
        for own, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and type(tensor) not in (nn.Parameter, Tensor, nn.Buffer):
                return f"{own} of {which} is a {type(tensor).__name__}"
    return ""


def forward_was_replaced(part: nn.Module) -> bool:
    """Whether a module has another forward than those that its class defines.

    A class may choose among methods of its own, as `self.forward = self.forward_fast` does.
    """
    forward = vars(part).get("forward")
    if forward is None:
        return False
    function = getattr(forward, "__func__", None)
    return not (
        function is not None
        and forward.__self__ is part
        and getattr(type(part), function.__name__, None) is function
    )


def is_conv(part: nn.Module) -> bool:
    """Whether a module is a plain 2d convolution."""
    return (
        isinstance(part, nn.Conv2d)
        and type(part).forward is nn.Conv2d.forward
        and type(part)._conv_forward is nn.Conv2d._conv_forward
        and _holds_only(part, "weight", "bias")
        and part.padding_mode == "zeros"
        and part.dilation == (1, 1)
        and part.kernel_size[0] == part.kernel_size[1]
        and part.stride[0] == part.stride[1]
        and padding_of(part) is not None
    )


def padding_of(conv: nn.Conv2d) -> int | None:
    """Rows and columns of zeros around the image; None if they are not the same on all sides."""
    k = conv.kernel_size[0]
    if isinstance(conv.padding, str):
        return {"valid": 0, "same": k // 2 if k % 2 else None}[conv.padding]
    return conv.padding[0] if conv.padding[0] == conv.padding[1] else None


def is_linear(part: nn.Module) -> bool:
    """Whether a module computes F.linear with its weight and bias, and holds nothing else."""
    if not isinstance(part, nn.Linear) or not _holds_only(part, "weight", "bias"):
        return False
    if type(part).forward is nn.Linear.forward:
        return True
    try:  # a class derived from nn.Linear may compute the same, as that of timm does
        x = probes.random_input(3, part.in_features).to(part.weight)
        return probes.is_near(part(x), nn.Linear.forward(part, x))
    except Exception:  # an unknown module may raise anything
        return False


def is_norm(part: nn.Module) -> bool:
    """Whether a module is a plain BatchNorm of images, with statistics."""
    return norm_activation(part) == "none"


def norm_activation(part: nn.Module) -> str | None:
    """The activation behind the BatchNorm that a module is; None if it is something else."""
    own = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    if (
        not isinstance(part, (nn.BatchNorm2d, nn.SyncBatchNorm))
        or not {*part._parameters, *part._buffers} <= own
        or part.running_mean is None
        or part.running_var is None
        or any(tensors_of(child) for child in part.children())
    ):
        return None
    if type(part).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward):
        return "none" if not part._modules else None
    x = 30 * probes.random_input(2, part.num_features, 7, 5)
    out = probes.output(part, x)
    scale, shift = (t.view(-1, 1, 1) for t in folding.affine(part))
    return None if out is None else activation_between(x * scale + shift, out)


def activation_of(part: nn.Module) -> str | None:
    """The name of an activation in `ACTIVATIONS`, "none" for identities; None if unknown."""
    x = torch.linspace(-8, 8, 2 * 3 * 4 * 5, dtype=torch.float64).reshape(2, 3, 4, 5)
    out = probes.output(part, x)
    return None if out is None else activation_between(x, out)


def activation_between(x: Tensor, out: Tensor) -> str | None:
    """The name of the activation that makes `out` of x; None if there is none."""
    for name, function in ACTIVATIONS.items():
        if probes.is_near(out, function(x)):
            return name
    return None


def is_scale(t: Tensor) -> bool:
    """Whether a tensor is [C] in any shape, with C > 1 or one axis that is not the last."""
    return t.is_floating_point() and t.numel() > 0 and t.numel() == max(t.shape, default=0)


def holds_weights(part: nn.Module) -> bool:
    """Whether a layer has weights, and not only a scale."""
    tensors = list(part.parameters())
    return len(tensors) > 1 or not all(map(is_scale, tensors))


def width(layer: nn.Module, axis: int) -> int:
    """Channels of the input (axis -1) or output (axis 0) of a pointwise or linear layer."""
    return cast(Tensor, layer.weight).flatten(1).shape[axis]


def parameter(module: nn.Module, path: str) -> Tensor:
    """A parameter or buffer by its name in a module."""
    owner, _, name = path.rpartition(".")
    return cast(Tensor, getattr(module.get_submodule(owner), name))


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module itself."""
    own: dict[str, Any] = {**module._parameters, **module._buffers}
    return {name: t for name, t in own.items() if t is not None}


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def _holds_only(part: nn.Module, *names: str) -> bool:
    return not part._modules and {*part._parameters, *part._buffers} <= {*names}
