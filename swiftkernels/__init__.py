"""Fused kernels for SwiftFormer's efficient additive attention (arXiv 2303.15446)."""

from swiftkernels.backends.cache import weights_changed
from swiftkernels.integrations.accelerate import accelerate, register
from swiftkernels.integrations.warmup import warmup
from swiftkernels.ops.additive_attention.api import (
    AttentionOutput,
    additive_attention,
    additive_self_attention,
)
from swiftkernels.ops.additive_attention.layer import AdditiveAttention
from swiftkernels.tools.doctor import doctor

__version__ = "0.1.0"

__all__ = [
    "AdditiveAttention",
    "AttentionOutput",
    "accelerate",
    "additive_attention",
    "additive_self_attention",
    "doctor",
    "register",
    "warmup",
    "weights_changed",
]
