"""Fused kernels for SwiftFormer's efficient additive attention (arXiv 2303.15446)."""

from swiftkernels._warmup import warmup
from swiftkernels.diagnosis import doctor
from swiftkernels.functional import (
    AttentionOutput,
    additive_attention,
    additive_self_attention,
)
from swiftkernels.guard import weights_changed
from swiftkernels.modules import AdditiveAttention
from swiftkernels.patch import accelerate, register

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
