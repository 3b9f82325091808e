"""Description and choice of feature maps, as timm's `feature_info` and `indices`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, overload

Indices = int | Sequence[int] | None
"""Stages: an int for the last n, numbers (negative numbers count from the end), None for all."""


def take_indices(indices: Indices, count: int, name: str = "indices") -> list[int]:
    """The numbers of the stages that `indices` names, in its order.

    Args:
        indices: an int n for the last n stages, a sequence of numbers (negative numbers count from
            the end), or None for all.
        count: number of stages.
        name: of the argument, for error messages.

    Raises:
        TypeError: numbers that are not ints.
        ValueError: no stage, or a stage that does not exist.

    Example:
        >>> take_indices(2, 4), take_indices((0, -1), 4)
        ([2, 3], [0, 3])
    """
    if indices is None:
        return list(range(count))
    numbers = (indices,) if isinstance(indices, int) else tuple(indices)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in numbers):
        raise TypeError(f"{name} must be an int, a sequence of ints or None; got {indices!r}.")
    if isinstance(indices, int):
        if not 1 <= indices <= count:
            raise ValueError(
                f"{name} must be from 1 to {count} if it is an int, the last n stages; got "
                f"{indices}. To choose a single stage, pass a sequence: {name}=({indices},)."
            )
        return list(range(count - indices, count))
    if not numbers or not all(-count <= i < count for i in numbers):
        raise ValueError(
            f"{name} must name stages from {-count} to {count - 1}; got {numbers}. None takes all."
        )
    return [i % count for i in numbers]


class FeatureInfo(list[dict[str, Any]]):
    """A list with a dict for each stage, and accessors for the stages that give feature maps.

    The dicts have the keys of timm: "num_chs" (channels), "reduction" (stride with respect to the
    image) and "module" (name of the stage). The accessors take `idx`: a number for the value of one
    stage; a sequence of numbers, or None for the stages in `out_indices`, for a list of values.

    Args:
        stages: the dicts.
        out_indices: the stages that give feature maps, as in `take_indices`.

    Example:
        >>> stages = [{"num_chs": 8, "reduction": 4, "module": "stages.0"},
        ...           {"num_chs": 16, "reduction": 8, "module": "stages.1"}]
        >>> info = FeatureInfo(stages, (-1,))
        >>> info.channels(), info.reduction(0), len(info), info[0]["module"]
        ([16], 4, 2, 'stages.0')
    """

    def __init__(self, stages: Sequence[dict[str, Any]], out_indices: Indices = None) -> None:
        super().__init__(stages)
        self.out_indices = tuple(take_indices(out_indices, len(self), "out_indices"))

    @property
    def info(self) -> list[dict[str, Any]]:
        """The dicts of all stages."""
        return list(self)

    def from_other(self, out_indices: Indices) -> FeatureInfo:
        """A copy with other `out_indices`."""
        return FeatureInfo(copy.deepcopy(self.info), out_indices)

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """The value of a key for one stage, or the list of its values."""
        if isinstance(idx, int):
            return self[idx][key]
        return [self[i][key] for i in (self.out_indices if idx is None else idx)]

    def get_dicts(
        self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None
    ) -> Any:
        """The dict of one stage, or the list of dicts, with all keys or only `keys`."""
        if isinstance(idx, int):
            return {key: self[idx][key] for key in (self[idx] if keys is None else keys)}
        return [self.get_dicts(keys, i) for i in (self.out_indices if idx is None else idx)]

    @overload
    def channels(self, idx: int) -> int: ...

    @overload
    def channels(self, idx: Sequence[int] | None = None) -> list[int]: ...

    def channels(self, idx: int | Sequence[int] | None = None) -> int | list[int]:
        """The channels of the feature maps."""
        return self.get("num_chs", idx)

    @overload
    def reduction(self, idx: int) -> int: ...

    @overload
    def reduction(self, idx: Sequence[int] | None = None) -> list[int]: ...

    def reduction(self, idx: int | Sequence[int] | None = None) -> int | list[int]:
        """The strides of the feature maps with respect to the image."""
        return self.get("reduction", idx)

    @overload
    def module_name(self, idx: int) -> str: ...

    @overload
    def module_name(self, idx: Sequence[int] | None = None) -> list[str]: ...

    def module_name(self, idx: int | Sequence[int] | None = None) -> str | list[str]:
        """The names of the stages."""
        return self.get("module", idx)
