"""The linear layers of an attention: the kernels read the weights of some, others are called.

To read the weight and the bias of a linear layer is the same as to call it only if a call does
nothing else. A part with a forward of its own (an adapter, a quantised layer), with hooks, or with
a weight that is not a plain tensor is called instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import Linear, Parameter
from torch.nn.utils.parametrize import is_parametrized

from swiftkernels.backends import torch_state

_LINEAR_FORWARD, _MODULE_CALL = Linear.forward, nn.Module.__call__
_FORWARDS: dict[type[nn.Module], Any] = {kind: kind.forward for kind in (Linear, nn.Conv2d)}
_PLAIN = (Parameter, Tensor)
_PLAIN_BIASES = (Parameter, type(None))


def plain_parameters(parts: Iterable[Any], kind: type[nn.Module] = Linear) -> list[dict[str, Any]]:
    """The parameters of parts that are all plain `nn.Linear`: a fast check for the usual case.

    If one part is not, the list is empty; `why_called` decides whether it has to be called. `kind`
    is the class of the parts, `nn.Linear` or `nn.Conv2d`.
    """
    found: list[dict[str, Any]] = []
    if kind.forward is not _FORWARDS[kind] or torch_state.has_global_hooks():
        return found
    for part in parts:
        if type(part) is not kind:
            return []
        own = part.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return []
        parameters = own["_parameters"]
        bias = parameters.get("bias", ())
        if type(parameters.get("weight")) is not Parameter or type(bias) not in _PLAIN_BIASES:
            return []
        found.append(parameters)
    return found


def is_pointwise(convolution: nn.Conv2d) -> bool:
    """Whether a 2-D convolution is a linear layer of every pixel."""
    c = convolution
    sizes = (c.kernel_size, c.stride, c.padding, c.groups)
    return sizes == ((1, 1), (1, 1), (0, 0), 1)


def why_called(part: Any) -> str:
    """Why a part has to be called; empty if its weight and bias may be read instead.

    Those of parametrized linear layers may be read: a read computes the weight, and a call does
    nothing else. `why_weights_are_called` checks the weight itself.
    """
    kind = type(part)
    if getattr(kind, "forward", None) is not _LINEAR_FORWARD or kind.__call__ is not _MODULE_CALL:
        return f"it is a {kind.__name__}"
    return _why_touched(part)


def why_not_plain(part: Any, kind: type[nn.Module]) -> str:
    """Why `plain_parameters` refuses a part; empty if it does not."""
    if type(part) is not kind:
        return f"it is a {type(part).__name__}"
    return _why_touched(part) or why_weights_are_called(part.weight, part.bias)


def is_untouched(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's forward and nothing else."""
    return not _why_touched(module)


def _why_touched(module: nn.Module) -> str:
    if "forward" in vars(module):
        return "its forward was replaced"
    if torch_state.has_hooks(module):
        return "it has hooks"
    if torch_state.has_global_hooks():
        return "hooks of all modules are registered"
    return ""


def why_weights_are_called(weight: object, bias: object) -> str:
    """Why a part with this weight and bias has to be called; empty if the kernels can read them."""
    for name, t in (("weight", weight), ("bias", bias)):
        if type(t) not in _PLAIN and not (t is None and name == "bias"):
            return f"its {name} is a {type(t).__name__}"
    return ""


def called(module: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """The parts of a module that have to be called, and why; computes no weights."""
    found = {}
    for name in names:
        part: Any = module._modules[name]
        why = why_called(part)
        if not why and not is_parametrized(part):
            why = why_weights_are_called(part.weight, part.bias)
        if why:
            found[name] = why
    return found


def listed(called: Mapping[str, str]) -> str:
    """A sentence about the parts that are called, and why."""
    return "; ".join(f"{name} is called, because {why}" for name, why in called.items())
