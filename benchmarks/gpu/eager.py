"""Counts what PyTorch's operators read and write, one kernel each, without running them.

Meta tensors have no data, so any size takes milliseconds:

    with EagerTraffic() as traffic:
        module(torch.empty(8, 3136, 48, device="meta"))
    traffic.launches, traffic.bytes

Every operator that is neither a view nor an allocation counts as one kernel, which reads the
distinct elements of its inputs and writes its outputs. Some operators are several kernels on a GPU,
and kernels may read an input twice: the counts are underestimates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_NO_KERNEL = {
    "_reshape_alias",
    "_unsafe_view",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
}
"""Views that PyTorch does not mark as views, and allocations."""

_FILLS = ("zero", "ones", "full", "fill", "scalar_tensor", "new_zeros", "new_ones", "new_full")
_MATMULS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv")


class Operator(NamedTuple):
    """A kernel of PyTorch."""

    name: str
    read: int
    """Bytes"""
    written: int
    """Bytes"""
    flops: int
    """Of matrix products, 2 per multiply-add."""
    shapes: tuple[torch.Size, ...]
    """Of the inputs."""

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def is_matmul(self) -> bool:
        return self.name.rstrip("_") in _MATMULS


class EagerTraffic(TorchDispatchMode):
    """Records the PyTorch operators inside this context that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name in _NO_KERNEL:
            return out
        # An output that is given is not read, unless it is an input, too.
        given = {key: t for key, t in (kwargs or {}).items() if key != "out"}
        inputs = [t for t in tree_leaves((args, given)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name.startswith(_FILLS):
            inputs = []
        elif name == "copy_":
            inputs = inputs[1:]
        formula = flop_registry.get(func._overloadpacket)
        self.operators.append(
            Operator(
                name,
                sum(map(distinct_bytes, inputs)),
                sum(map(distinct_bytes, outputs)),
                formula(*args, **(kwargs or {}), out_val=out) if formula else 0,
                tuple(t.shape for t in inputs),
            )
        )
        return out

    @property
    def launches(self) -> int:
        return len(self.operators)

    @property
    def matmuls(self) -> int:
        """Launches that are one matrix product, or a batch of them."""
        return sum(operator.is_matmul for operator in self.operators)

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(operator.bytes for operator in self.operators)

    @property
    def flops(self) -> int:
        return sum(operator.flops for operator in self.operators)


def distinct_bytes(t: Tensor) -> int:
    """Bytes of the elements of t; an expanded axis (stride 0) counts once.

    Example:
        >>> distinct_bytes(torch.zeros(4, 1).expand(4, 9))
        16
    """
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * t.element_size()


def count(module: nn.Module, x: Tensor, backward: bool) -> EagerTraffic:
    """The operators of one call of the module; both are on the device "meta".

    With `backward` also those of the gradients of x and of all parameters.
    """
    with torch.set_grad_enabled(backward), _FusedAttention(), EagerTraffic() as traffic:
        out = module(x.detach().requires_grad_(backward))
    if backward:
        dout = torch.empty_like(out)
        with traffic:
            out.backward(dout)
        module.zero_grad()
    return traffic


class _FusedAttention(TorchFunctionMode):
    """Scaled dot-product attention as the fused kernel of a GPU.

    For meta tensors PyTorch would choose the form that writes all N x N scores.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        if kwargs or len(args) != 3:
            raise NotImplementedError("only attention(q, k, v), without further arguments")
        if args[0].dtype == torch.float32:
            efficient = torch.ops.aten._scaled_dot_product_efficient_attention
            return efficient(*args, None, torch.is_grad_enabled())[0]
        return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
