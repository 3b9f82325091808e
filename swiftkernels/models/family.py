"""Families of networks: what checkpoints, training and the command line need to know of one.

A family is a folder of `swiftkernels/models` and one entry in `FOLDERS`. The `__init__.py` of the
folder defines `FAMILY`, a `Family`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from swiftkernels.models.network import Network
from swiftkernels.ops.types import Pooling
from swiftkernels.utils.text import shown

POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

FOLDERS = ("swiftformer",)
"""Folders of the families."""

Source = Literal["official", "timm", "transformers"]
"""Implementations of which checkpoints are read and written."""
SOURCES: tuple[Source, ...] = get_args(Source)


class Implementation(NamedTuple):
    """A public implementation of a family."""

    pooling: Pooling
    """The pooling that it computes."""
    reason: str
    """Where this pooling comes from, for reports."""
    runnable: tuple[Pooling, ...]
    """Poolings of which it can run the weights."""
    weights_only: bool = False
    """Whether its files hold the state dict itself, not a dict with an entry for it."""


@dataclass(frozen=True, eq=False)
class Family:
    """A family of networks."""

    name: str
    """The start of the model types in its configurations, such as "swiftformer"."""
    network: type[Network]
    """The class of its networks."""
    build: Callable[..., Network]
    """Options -> network."""
    constructors: Mapping[str, Callable[..., Network]]
    """Name of a model -> function that builds it."""
    recipes: Mapping[str, Mapping[str, Any]]
    """Name of a model -> published options of `swiftkernels.training.Recipe`, where they differ
    from the defaults."""
    own_names: Source
    """The implementation of which the networks have the parameter names."""
    implementations: Mapping[Source, Implementation]
    derived_options: tuple[str, ...]
    """Options of the network that follow from its weights and cannot be chosen when loading."""
    fixed_config: Mapping[str, Any]
    """Entries of a configuration that no tensor shows, with the only supported values."""
    guess_source: Callable[[Mapping[str, Tensor]], Source | None]
    """State dict -> the implementation that has all its names, or None."""
    convert: Callable[[Mapping[str, Tensor], Source, Source], dict[str, Tensor]]
    """State dict, source, target -> the same tensors under the names of the target. Raises
    ValueError for names that the source does not have."""
    architecture: Callable[[Mapping[str, Tensor], str], dict[str, Any]]
    """State dict by own names, its name for errors -> options of the network with these weights.
    Raises ValueError if tensors that determine an option are missing or have the wrong shape."""
    adapt: Callable[[dict[str, Tensor], Mapping[str, Tensor]], list[str]]
    """Weights, state dict of a network -> notes for the report; changes the weights in place where
    the network has no counterpart for them."""
    complete: Callable[[dict[str, Tensor], Source], dict[str, Tensor]]
    """Weights, target -> weights with the tensors that only networks of the target have."""
    explain_mismatch: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], str]
    """Weights, state dict of a network -> why they do not fit, as sentences; empty if unknown."""

    def check_config(self, config: Mapping[str, Any], path: Path) -> None:
        """Raise ValueError if a configuration has a value that the networks do not support."""
        for name, value in self.fixed_config.items():
            if config.get(name, value) != value:
                raise ValueError(
                    f"{shown(path)} must have {name} = {value!r}, the only value that "
                    f"swiftkernels.models supports; got {shown(repr(config[name]))}. Use the model "
                    "of transformers, with swiftkernels.accelerate."
                )


@functools.cache
def families() -> tuple[Family, ...]:
    """All families, in the order of `FOLDERS`."""
    modules = [importlib.import_module(f"swiftkernels.models.{folder}") for folder in FOLDERS]
    return tuple(module.FAMILY for module in modules)


def family_of(model: object) -> Family:
    """The family of a network.

    Raises:
        TypeError: it is none of this library's networks.
    """
    for family in families():
        if isinstance(model, family.network):
            return family
    known = " or ".join(family.network.__name__ for family in families())
    raise TypeError(
        f"model must be a {known} of swiftkernels.models, without wrappers; got a "
        f"{type(model).__module__}.{type(model).__name__}. For the models of other libraries use "
        "convert_state_dict, which renames their weights, or swiftkernels.accelerate."
    )


def constructors() -> dict[str, Callable[..., Network]]:
    """The constructors of all families, by the names of the models."""
    return {name: make for family in families() for name, make in family.constructors.items()}


def listed(keys: Sequence[str], most: int = 5) -> str:
    """The first keys, for a message, and how many more there are.

    Example:
        >>> listed(["a", "b", "c", "d"], most=2)
        'a, b and 2 more'
    """
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(map(shown, keys[:most])) + more
