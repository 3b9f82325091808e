"""Fused kernels for efficient attention and convolutional blocks in vision networks."""

import importlib
import typing

from swiftkernels.utils import command

command.end_quietly_in_imports()  # before PyTorch is imported

from swiftkernels.backends.cache import weights_changed
from swiftkernels.ops.additive_attention.api import (
    AttentionOutput,
    additive_attention,
    additive_self_attention,
)
from swiftkernels.ops.additive_attention.layer import AdditiveAttention

if typing.TYPE_CHECKING:
    from swiftkernels.fusion.fuse import fuse_for_inference
    from swiftkernels.integrations import export as export
    from swiftkernels.integrations.accelerate import accelerate
    from swiftkernels.integrations.transformers import register
    from swiftkernels.integrations.warmup import warmup
    from swiftkernels.ops.conv_mlp.layer import ConvMlp
    from swiftkernels.ops.conv_mlp.op import conv_mlp
    from swiftkernels.ops.separable_attention.layer import SeparableAttention
    from swiftkernels.ops.separable_attention.op import separable_attention
    from swiftkernels.tools.doctor import doctor

__version__ = "0.2.0"

__all__ = [
    "AdditiveAttention",
    "AttentionOutput",
    "ConvMlp",
    "SeparableAttention",
    "accelerate",
    "additive_attention",
    "additive_self_attention",
    "conv_mlp",
    "doctor",
    "fuse_for_inference",
    "register",
    "separable_attention",
    "warmup",
    "weights_changed",
]


# Imported at their first use: they would take a third of the time of `import swiftkernels`.
_MODULES = {
    "ConvMlp": "swiftkernels.ops.conv_mlp.layer",
    "SeparableAttention": "swiftkernels.ops.separable_attention.layer",
    "accelerate": "swiftkernels.integrations.accelerate",
    "conv_mlp": "swiftkernels.ops.conv_mlp.op",
    "doctor": "swiftkernels.tools.doctor",
    "fuse_for_inference": "swiftkernels.fusion.fuse",
    "register": "swiftkernels.integrations.transformers",
    "separable_attention": "swiftkernels.ops.separable_attention.op",
    "warmup": "swiftkernels.integrations.warmup",
}


def __getattr__(name: str) -> typing.Any:
    if name == "export":
        return importlib.import_module("swiftkernels.integrations.export")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
