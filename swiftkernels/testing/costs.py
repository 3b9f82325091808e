"""What a call costs besides time: memory kept for the backward, peak memory of a GPU, FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def saved_bytes(forward: Callable[[], Tensor], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward after `forward`, without those of `exclude`.

    Every storage counts once and in full, because a saved view keeps all of it in memory. Pass the
    parameters and the input as `exclude`: they stay in memory anyway.
    """
    ignored = {t.untyped_storage().data_ptr() for t in exclude}
    # Storages are kept until the end: another could get the address of a freed one.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak memory of a GPU during a call, beyond what was allocated before it."""
    module = torch.get_device_module(device)
    module.synchronize(device)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    call()
    module.synchronize(device)
    return int(module.max_memory_allocated(device) - before)


def flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in `call`, 2 per MAC."""
    # PyTorch counts the products of a fused attention on CUDA only, those of the parts everywhere.
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=formulas) as counter,
    ):
        call()
    return counter.get_total_flops()


def _convolution_backward_flops(
    dout_shape: torch.Size, x_shape: torch.Size, weight_shape: torch.Size, *rest: Any, **_: Any
) -> int:
    """The FLOPs of the forward for each gradient; PyTorch's own formula ignores the groups."""
    needs = rest[-1]  # gradients of x, weight, bias
    positions = dout_shape[0] * math.prod(dout_shape[2:])
    return 2 * positions * math.prod(weight_shape) * sum(needs[:2])
