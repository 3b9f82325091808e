"""Fused kernels for efficient attention in vision networks, forward and backward."""

import importlib
import typing

from swiftkernels.backends.cache import weights_changed
from swiftkernels.integrations.accelerate import accelerate
from swiftkernels.integrations.transformers import register
from swiftkernels.integrations.warmup import warmup
from swiftkernels.ops.additive_attention.api import (
    AttentionOutput,
    additive_attention,
    additive_self_attention,
)
from swiftkernels.ops.additive_attention.layer import AdditiveAttention
from swiftkernels.tools.doctor import doctor

if typing.TYPE_CHECKING:
    from swiftkernels.fusion.fuse import fuse_for_inference
    from swiftkernels.integrations import export as export
    from swiftkernels.ops.separable_attention.layer import SeparableAttention
    from swiftkernels.ops.separable_attention.op import separable_attention

__version__ = "0.2.0"

__all__ = [
    "AdditiveAttention",
    "AttentionOutput",
    "SeparableAttention",
    "accelerate",
    "additive_attention",
    "additive_self_attention",
    "doctor",
    "fuse_for_inference",
    "register",
    "separable_attention",
    "warmup",
    "weights_changed",
]


# Imported at their first use: registering an operator takes a quarter of `import swiftkernels`.
_MODULES = {
    "SeparableAttention": "swiftkernels.ops.separable_attention.layer",
    "fuse_for_inference": "swiftkernels.fusion.fuse",
    "separable_attention": "swiftkernels.ops.separable_attention.op",
}


def __getattr__(name: str) -> typing.Any:
    if name == "export":
        return importlib.import_module("swiftkernels.integrations.export")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
