"""The part of a network that all families share: stages, heads, feature maps, checkpointing.

Shapes: B images, C channels of a stage, H x W its feature map.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Literal,
    NamedTuple,
    ParamSpec,
    TypeVar,
    overload,
)

import torch
from torch import Tensor, nn

from swiftkernels.models.feature_info import FeatureInfo, Indices, take_indices
from swiftkernels.models.recompute import recomputed
from swiftkernels.utils import checks

if TYPE_CHECKING:
    from swiftkernels.models.hub import Pretrained

P = ParamSpec("P")
N = TypeVar("N")

GlobalPool = Literal["avg", ""]
"""How the last feature map becomes the input of the heads: its mean, or not at all."""

HEADS = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
"""Parameters of the heads."""


class Logits(NamedTuple):
    """Output of distilled training: the logits of both heads, [B, num_classes] each."""

    head: Tensor
    """Trained on the labels."""
    head_dist: Tensor
    """Trained on the predictions of a teacher."""


class Stage(nn.Module):
    """A downsampling (none in the first stage), then blocks of one width.

    Attributes:
        grad_checkpointing: recompute the blocks in the backward instead of storing activations.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return recomputed(self.blocks, x)
        return self.blocks(x)


class Network(nn.Module):
    """A stem, stages, a BatchNorm and classification heads, with the methods of timm's networks.

    A family derives its network from this class and documents the arguments. `initialise` sets the
    weights of stem and stages.

    Args:
        stem: images [B, in_chans, H, W] -> [B, C, H / 4, W / 4].
        stages: each halves height and width, except the first.
        widths: channels of the stages.
        num_classes, in_chans, drop_rate, global_pool, distillation, features_only, device, dtype:
            as in `swiftkernels.models.SwiftFormer`.
        out_indices: numbers of the stages that give feature maps, ascending.
        pretrained_cfg: how the public weights were trained, by the keys of timm.

    Attributes:
        num_features, head_hidden_size: channels of the last feature map.
        feature_info: channels, strides and names of the stages
            (`swiftkernels.models.feature_info.FeatureInfo`).
        feature_channels, feature_strides: of the feature maps that `features_only` returns.
        grad_checkpointing: whether blocks are recomputed in the backward.
        pretrained: what `from_pretrained` read (report, config.json, class names); only the
            networks that it returns have this attribute.
        pretrained_cfg, default_cfg: as the argument.
    """

    __jit_unused_properties__ = ("grad_checkpointing",)
    if TYPE_CHECKING:  # TorchScript reads the annotations that a class has at run time
        pretrained: Pretrained

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        widths: Sequence[int],
        *,
        num_classes: int,
        in_chans: int,
        drop_rate: float,
        global_pool: GlobalPool,
        distillation: bool,
        features_only: bool,
        out_indices: Sequence[int],
        pretrained_cfg: dict[str, Any],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = 0 if features_only else num_classes
        self.in_chans = in_chans
        self.global_pool = _checked_pool(global_pool)
        self.distillation = distillation
        self.distilled_training = False
        self.feature_info = FeatureInfo(
            [
                {"num_chs": width, "reduction": 4 * 2**i, "module": f"stages.{i}"}
                for i, width in enumerate(widths)
            ],
            out_indices,
        )
        self.feature_channels: tuple[int, ...] = tuple(self.feature_info.channels())
        self.feature_strides: tuple[int, ...] = tuple(self.feature_info.reduction())
        self.pretrained_cfg = pretrained_cfg
        self.default_cfg = pretrained_cfg

        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.apply(initialise)
        last = widths[out_indices[-1]]
        self.num_features = self.head_hidden_size = last
        self.feature_norms: nn.ModuleDict | None = None
        if features_only:
            self.feature_norms = nn.ModuleDict(
                {str(i): nn.BatchNorm2d(widths[i], **factory) for i in out_indices}
            )
        else:
            self.norm: nn.Module = nn.BatchNorm2d(last, **factory)
            self.head_drop = nn.Dropout(drop_rate)
            self.head = self._new_head(num_classes, **factory)
            self.head_dist = self._new_head(num_classes, **factory) if distillation else None

    # forward and forward_head have no return types: TorchScript compiles the branch that a network
    # takes, and infers the type from it.
    def forward(self, x: Tensor):  # type: ignore[no-untyped-def]
        """Logits [B, num_classes], a pair of them in distilled training, or feature maps."""
        if self.feature_norms is not None:
            maps = self._stage_maps(x, len(self.stages))
            out: list[Tensor] = []
            for index, norm in self.feature_norms.items():
                out.append(norm(maps[int(index)]))
            return out
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> the last feature map, behind its BatchNorm."""
        if self.feature_norms is not None:
            return self.forward(x)[-1]
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False):  # type: ignore[no-untyped-def]
        """Pooling and heads: the output of `forward` from that of `forward_features`.

        Args:
            x: feature map [B, C, H, W].
            pre_logits: return the input of the heads: [B, C], or with global_pool="" the map.

        Raises:
            ValueError: heads without pooling, or a network with `features_only`.
        """
        self._check_heads()
        if self.global_pool == "avg":
            x = x.mean(dim=(2, 3))
        elif self.num_classes > 0 and not pre_logits:
            raise ValueError(
                "global_pool must be 'avg' for logits; got ''. Call reset_classifier(num_classes, "
                "'avg'), or pass pre_logits=True for the feature map."
            )
        x = self.head_drop(x)
        if pre_logits:
            return x
        if self.head_dist is None:
            return self.head(x)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return Logits(self.head(x), self.head_dist(x))
        return (self.head(x) + self.head_dist(x)) / 2

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW"] = "NCHW",
        intermediates_only: Literal[False] = False,
    ) -> tuple[Tensor, list[Tensor]]: ...

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW"] = "NCHW",
        *,
        intermediates_only: Literal[True],
    ) -> list[Tensor]: ...

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]: ...

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of some stages, in ascending order.

        Args:
            x: images [B, in_chans, H, W].
            indices: the stages: an int n for the last n, a sequence of numbers (negative numbers
                count from the end), or None for all.
            norm: apply the BatchNorm to the map of the last stage, as `forward_features` does. With
                `features_only`: to every map that has one.
            stop_early: skip the stages after the last one of `indices`.
            output_fmt: "NCHW".
            intermediates_only: return only the maps.

        Returns:
            The maps [B, C, H / stride, W / stride], as a list. Without `intermediates_only` a pair:
            the output of `forward_features` (if stages were skipped: the map of the last stage
            that ran) and the list.

        Raises:
            TypeError, ValueError: a wrong argument.

        Example:
            >>> from swiftkernels.models import SwiftFormer
            >>> model = SwiftFormer((16, 24), (1, 2)).eval()
            >>> last, maps = model.forward_intermediates(torch.randn(2, 3, 64, 64))
            >>> last.shape, [m.shape[1:] for m in maps]
            (torch.Size([2, 24, 8, 8]), [torch.Size([16, 16, 16]), torch.Size([24, 8, 8])])
        """
        checks.check_option("output_fmt", output_fmt, ("NCHW",))
        count = len(self.stages)
        chosen = take_indices(indices, count)
        end = max(chosen) + 1 if stop_early else count
        maps = self._stage_maps(x, end)
        if self.feature_norms is None:
            norms = {count - 1: self.norm}
        else:
            norms = {int(index): module for index, module in self.feature_norms.items()}
        # Each BatchNorm runs at most once: in training it updates its statistics.
        wanted = {*(chosen if norm else ()), *(() if intermediates_only else (count - 1,))}
        normed = [norms[i](m) if i in wanted and i in norms else m for i, m in enumerate(maps)]
        found = [normed[i] if norm else maps[i] for i in sorted(set(chosen))]
        return found if intermediates_only else (normed[-1], found)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] | None = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove, in place, the modules that `forward_intermediates` does not need.

        The stages after the last one of `indices` are removed. If there are any, the BatchNorm and
        the heads, which have the width of the last stage, are removed too.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: remove the BatchNorm even if the last stage stays.
            prune_head: remove heads and pooling even if the last stage stays.

        Returns:
            The numbers of the stages in `indices`, counted from the first stage.

        Raises:
            TypeError, ValueError: a wrong argument, or a network with `features_only`.
        """
        self._check_heads()
        chosen = take_indices(indices, len(self.stages))
        last = max(chosen)
        shorter = last < len(self.stages) - 1
        del self.stages[last + 1 :]
        if shorter or prune_norm:
            self.norm = nn.Identity()
        if shorter or prune_head:
            self.num_features = self.head_hidden_size = self.feature_info.channels(last)
            self.reset_classifier(0, "")
        return chosen

    def get_classifier(self) -> Any:
        """The heads: the pair (head, head_dist), or with distillation=False the single head.

        Raises:
            ValueError: a network with `features_only`.
        """
        self._check_heads()
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Replace the heads by new ones, for other classes.

        Args:
            num_classes: 0 removes the heads.
            global_pool: "avg" or "", as in the constructor; None keeps the present value.

        Raises:
            TypeError, ValueError: a wrong argument, or a network with `features_only`.
        """
        self._check_heads()
        check_classes(num_classes)
        pool = self.global_pool if global_pool is None else _checked_pool(global_pool)
        like = next(self.parameters())
        count = 1 if self.head_dist is None else 2
        # Heads of many classes may exceed the memory: nothing has changed then.
        head, *others = (
            self._new_head(num_classes, device=like.device, dtype=like.dtype) for _ in range(count)
        )
        self.global_pool, self.num_classes = pool, num_classes
        self.head = head
        if others:
            self.head_dist = others[0]

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training, return the outputs of both heads (`Logits`) instead of their mean.

        Raises:
            ValueError: a network without two heads.
        """
        if enable and getattr(self, "head_dist", None) is None:
            raise ValueError(
                "set_distilled_training needs two heads: a network with distillation=True and "
                f"features_only=False; got distillation={self.distillation}, "
                f"features_only={self.feature_norms is not None}."
            )
        self.distilled_training = enable

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward instead of storing their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @property
    def grad_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward; can be assigned."""
        return any(stage.grad_checkpointing for stage in self.stages)

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        self.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, besides biases and norms, that should not decay: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates as in timm.

        Args:
            coarse: one group a stage, not one a block.
        """
        stages: list[tuple[str, tuple[int, ...] | None]]
        if coarse:
            stages = [(r"^stages\.(\d+)", None), (r"^feature_norms\.(\d+)", None)]
        else:
            stages = [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                # timm reads 99999 as: in the group of the preceding parameters.
                (r"^feature_norms\.(\d+)", (99999,)),
                (r"^norm", (99999,)),
            ]
        return {"stem": r"^stem", "blocks": stages}

    def _stage_maps(self, images: Tensor, count: int) -> list[Tensor]:
        """The outputs of the first `count` stages, before the final BatchNorms."""
        x = self.stem(images)
        maps: list[Tensor] = []
        for i, stage in enumerate(self.stages):
            if i < count:
                x = stage(x)
                maps.append(x)
        return maps

    def _new_head(self, num_classes: int, **factory: Any) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes, **factory)
        return head.apply(initialise).train(self.training)

    def _check_heads(self) -> None:
        if self.feature_norms is not None:
            raise ValueError(
                "a network with features_only=True has no heads, and out_indices chooses its "
                "feature maps. Build it with features_only=False and use forward_intermediates."
            )


def options_of(
    network: Callable[Concatenate[Sequence[int], Sequence[int], P], N],
) -> Callable[[Callable[..., N]], Callable[P, N]]:
    """Decorator for a function that builds a network of one size.

    Gives the function the signature of the network without the first two parameters, widths and
    depths: for type checkers, editors and `help`.
    """

    def decorate(function: Callable[..., N]) -> Callable[P, N]:
        options = list(inspect.signature(network).parameters.values())[2:]
        # inspect.signature, and so help and Sphinx, read this attribute.
        own = inspect.signature(function)
        vars(function)["__signature__"] = own.replace(parameters=options)
        return function

    return decorate


def check_backbone(backbone: object) -> None:
    """Raise unless `backbone` is a network with `features_only=True`."""
    if getattr(backbone, "feature_norms", None) is None:
        raise ValueError(
            "backbone must be a network made with features_only=True; got "
            f"{type(backbone).__name__} without feature maps."
        )


def check_classes(num_classes: int) -> None:
    """Raise unless `num_classes` is an integer of at least 0."""
    if not isinstance(num_classes, int) or num_classes < 0:
        raise ValueError(
            f"num_classes must be an int of at least 0; got {num_classes!r}. 0 builds no heads."
        )


def initialise(module: nn.Module) -> None:
    """As in the official code: weights from a truncated normal of deviation 0.02, biases 0."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _checked_pool(global_pool: GlobalPool) -> GlobalPool:
    checks.check_option("global_pool", global_pool, ("avg", ""))
    return global_pool
