"""The compiled CPU kernels of conv_mlp."""

from __future__ import annotations

import struct
from typing import Any

from swiftkernels.backends.cpu import library
from swiftkernels.backends.cpu.packing import FINGERPRINT, Packer

# The structs of csrc/abi.h; of `struct PackedWeights` without the `Fingerprint` at its end.
_PACKED_WEIGHTS = struct.Struct("7q5P")
_CALL = struct.Struct("5qP4qP4q")

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "hardswish")
"""In the order of their codes, `Activation` in backends/cpu/csrc/activation.h."""

BLOCK = 128
"""Most hidden channels that are computed together; their tile stays in the second-level cache."""

library.register_interface(
    "conv_mlp",
    {
        "revision": 1,
        "sizeof(PackedWeights)": _PACKED_WEIGHTS.size + FINGERPRINT.size,
        "sizeof(Call)": _CALL.size,
        **{name: code for code, name in enumerate(ACTIVATIONS)},
    },
)


def pack(packer: Packer, w: Any) -> bytes:
    """`struct PackedWeights` without its fingerprint."""
    hidden, in_dims = w.weight1.shape
    out_dims = w.weight2.shape[0]
    blocks = -(-hidden // BLOCK)
    block = -(-hidden // blocks // packer.lanes) * packer.lanes
    parts = []
    for at in range(0, hidden, block):
        parts += [w.weight1[at : at + block].t(), w.weight2[:, at : at + block].t()]
    kernel, depthwise, depthwise_bias = 0, 0, 0
    if w.depthwise_weight is not None:
        kernel = w.depthwise_weight.shape[-1]
        depthwise = packer.rows(w.depthwise_weight.reshape(in_dims, -1).t())
        depthwise_bias = packer.vector(w.depthwise_bias, in_dims)
    return _PACKED_WEIGHTS.pack(
        in_dims, hidden, out_dims, kernel, ACTIVATIONS.index(w.activation), w.residual, block,
        depthwise, depthwise_bias, packer.matrices(parts), packer.vector(w.bias1, hidden),
        packer.vector(w.bias2, out_dims),
    )  # fmt: skip
