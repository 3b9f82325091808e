"""`register`: let transformers build its SwiftFormers with the kernels of this library."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import nn

from swiftkernels.integrations import probe
from swiftkernels.integrations.accelerate import Undoable, accelerated_class
from swiftkernels.integrations.probe import LayerSpec, Variant
from swiftkernels.ops.types import Backend
from swiftkernels.utils import checks

ATTENTION = "SwiftFormerEfficientAdditiveAttention"
"""The class in transformers."""
PROBE_WIDTH = 5
"""Width of the layer that is built to find out what the class computes."""


class Registration(Undoable):
    """What `register` did; `undo` ends it for models that are built afterwards.

    Attributes:
        variant: what the attention computes, in transformers and in the models built from now on.
    """

    def __init__(self, variant: Variant, undo: Callable[[], None]) -> None:
        super().__init__([undo])
        self.variant = variant

    def __str__(self) -> str:
        return f"transformers builds {ATTENTION} with these kernels, {self.variant}"


def register(*, backend: Backend = "auto", recompute: bool | None = None) -> Registration:
    """Let transformers build its SwiftFormers with the kernels of this library from now on.

    Adds a class to the patch mapping of transformers (5 or newer) for the attention of SwiftFormer.
    `from_pretrained` and `from_config` use the mapping, and constructors do inside
    `transformers.monkey_patching.apply_patches()`; other calls of a constructor do not. The class
    is a subclass of the attention in transformers, with its parameters and outputs. A layer of
    transformers is run once to find out what it computes. For existing models use `accelerate`.

    This affects the whole process until `undo`. Models that were built in the meantime keep the
    kernels.

    Args:
        backend: backend of the layers.
        recompute: `recompute` of the layers, see `AdditiveAttention`.

    Returns:
        A report; print it. It has a method `undo()` and is a context manager.

    Raises:
        ImportError: transformers is not installed, or has no patch mapping.
        ValueError: a wrong argument; the class is already in the mapping; or it computes something
            else.

    Example:
        >>> with register():  # doctest: +SKIP
        ...     model = AutoModelForImageClassification.from_pretrained("MBZUAI/swiftformer-xs")
    """
    checks.check_option("backend", backend, get_args(Backend))
    checks.check_option("recompute", recompute, (None, True, False))
    try:
        patching: Any = importlib.import_module("transformers.monkey_patching")
        modeling: Any = importlib.import_module(
            "transformers.models.swiftformer.modeling_swiftformer"
        )
        kind = getattr(modeling, ATTENTION)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"register needs transformers 5 or newer, with its patch mapping ({error}): pip "
            "install -U transformers. swiftkernels.accelerate(model) works with any version."
        ) from error
    if ATTENTION in patching.get_patch_mapping():
        raise ValueError(
            f"{ATTENTION} is already in the patch mapping of transformers. Remove it first: call "
            ".undo() of its registration, or unregister_patch_mapping."
        )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        example = kind(None, PROBE_WIDTH)
    names = probe.part_names(example)
    spec, reason = (
        probe.inspect_layer(example, names) if names else (None, "its parts have other names")
    )
    if names is None or spec is None:
        raise ValueError(
            f"{ATTENTION} of the installed transformers cannot be replaced: {reason}. Install the "
            "version that this library was tested with, or use its models without register."
        )
    variant, accelerated = spec.variant, accelerated_class(kind, names)

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        in_dims, token_dim = probe.widths(self, names)
        own = LayerSpec(variant, in_dims, probe.score_scale(self, token_dim))
        vars(self).update(own.attributes(backend, recompute))

    # A subclass of its own, because `accelerate` gives the class `accelerated` to other layers.
    registered: type[nn.Module] = type(accelerated.__name__, (accelerated,), {"__init__": build})
    patching.register_patch_mapping({ATTENTION: registered})

    def undo() -> None:
        if patching.get_patch_mapping().get(ATTENTION) is registered:
            patching.unregister_patch_mapping([ATTENTION])

    return Registration(variant, undo)
