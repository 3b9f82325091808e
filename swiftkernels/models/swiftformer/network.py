"""SwiftFormer (arXiv 2303.15446, section 4): convolutional encoders, one attention a stage.

Shapes: B images, C channels of a stage, H x W its feature map. Everything works on [B, C, H, W] of
any size; there is no position encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swiftkernels.models.feature_info import FeatureInfo, Indices, take_indices
from swiftkernels.models.recompute import recomputed
from swiftkernels.ops.additive_attention.layer import AdditiveAttention
from swiftkernels.ops.linear_parts import is_untouched
from swiftkernels.utils import checks
from swiftkernels.utils.images import DEVIATION, MEAN

WIDTHS_AND_DEPTHS = {
    "xs": ((48, 56, 112, 220), (3, 3, 6, 4)),
    "s": ((48, 64, 168, 224), (3, 3, 9, 6)),
    "l1": ((48, 96, 192, 384), (4, 3, 10, 5)),
    "l3": ((64, 128, 320, 512), (4, 4, 12, 6)),
}
"""Table 1 of the paper: channels and blocks of the four stages."""

LAYER_SCALE = 1e-5
"""Where the scales of attention and MLP start; those of the convolutions start at 1."""

ActLayer = Callable[[], nn.Module]
"""An activation's class, such as nn.GELU."""


class Logits(NamedTuple):
    """What distilled training gives: the two heads' outputs, [B, num_classes] each."""

    head: Tensor
    """To be trained on the labels."""
    head_dist: Tensor
    """To be trained on a teacher's predictions."""


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops a residual branch of whole images in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W]: 0 for a share `rate` of the images, x / (1 - rate) for the others."""
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        kept = x.new_empty([x.shape[0], 1, 1, 1]).bernoulli_(keep)
        return x * (kept / keep)

    def extra_repr(self) -> str:
        return f"{self.rate:g}"


class LayerScale(nn.Module):
    """A learned factor for each channel of [B, C, H, W] (arXiv 2103.17239)."""

    def __init__(self, dim: int, start: float, **factory: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), float(start), **factory))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ConvEncoder(nn.Module):
    """x + scale * pointwise(act(pointwise(BatchNorm(depthwise(x)))))

    With `hidden_dim` = 4 C the convolutional encoder of the paper, with C the local representation
    at the head of its SwiftFormer encoder.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop_path: float,
        act_layer: ActLayer,
        use_layer_scale: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.norm = nn.BatchNorm2d(dim, **factory)
        self.pwconv1 = nn.Conv2d(dim, hidden_dim, 1, **factory)
        self.act = act_layer()
        self.pwconv2 = nn.Conv2d(hidden_dim, dim, 1, **factory)
        self.layer_scale = LayerScale(dim, 1.0, **factory) if use_layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x)))))
        return x + self.drop_path(self.layer_scale(branch))


class Mlp(nn.Module):
    """Pointwise convolutions behind a BatchNorm, C -> hidden_dim -> C."""

    def __init__(
        self, dim: int, hidden_dim: int, drop: float, act_layer: ActLayer, **factory: Any
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim, **factory)
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **factory)
        self.act = act_layer()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(self.norm1(x))))))


class SwiftFormerEncoder(nn.Module):
    """The last block of a stage: local representation, additive attention, MLP."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float,
        drop_path: float,
        act_layer: ActLayer,
        use_layer_scale: bool,
        layer_scale_init_value: float,
        pooling: str,
        backend: str,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.local_representation = ConvEncoder(
            dim, dim, 0.0, act_layer, use_layer_scale, **factory
        )
        self.attn = AdditiveAttention(
            dim, dim, 1, pooling=pooling, backend=backend, layout="channels_first", **factory
        )
        self.linear = Mlp(dim, hidden_dim, drop, act_layer, **factory)
        self.layer_scale_1: nn.Module = nn.Identity()
        self.layer_scale_2: nn.Module = nn.Identity()
        if use_layer_scale:
            self.layer_scale_1 = LayerScale(dim, layer_scale_init_value, **factory)
            self.layer_scale_2 = LayerScale(dim, layer_scale_init_value, **factory)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local_representation(x)
        if torch.jit.is_scripting():
            x = x + self.drop_path(self.layer_scale_1(self.attn(x)))
        elif self._adds_in_attention():
            x = self.attn(x, residual_scale=self.layer_scale_1.gamma)
        else:
            x = x + self.drop_path(self.layer_scale_1(self.attn(x)))
        return x + self.drop_path(self.layer_scale_2(self.linear(x)))

    def _adds_in_attention(self) -> bool:
        """Whether the attention may scale and add its output: nobody looks at what is between."""
        between = (self.attn, self.layer_scale_1, self.drop_path)
        kinds = (AdditiveAttention, LayerScale, DropPath)
        for module, kind in zip(between, kinds, strict=True):
            if type(module) is not kind or not is_untouched(module):
                return False
        return not (self.training and self.drop_path.rate > 0)


class Downsample(nn.Module):
    """To half the height and width, rounded up, and another width: convolution and BatchNorm."""

    def __init__(self, dim: int, out_dim: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **factory)
        self.norm = nn.BatchNorm2d(out_dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class Stage(nn.Module):
    """A downsampling, except in the first stage, and blocks of one width.

    Attributes:
        grad_checkpointing: recompute the blocks in the backward instead of keeping what they made.
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


class SwiftFormer(nn.Module):
    """SwiftFormer, with the parameter names and the methods of timm's.

    Args:
        widths, depths: channels and blocks of every stage; the last block of each is the one with
            the attention.
        num_classes: 0 leaves the heads out: the output is the pooled features [B, C].
        in_chans: channels of the images.
        mlp_ratio: hidden width of encoders and MLPs, in widths.
        act_layer: class of the activations in encoders and MLPs.
        drop_rate: dropout before the heads.
        proj_drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth of the last block; it grows from 0 at the first.
        use_layer_scale: False leaves all layer scales out.
        layer_scale_init_value: where the layer scales of attention and MLP start.
        global_pool: "avg": the mean over the last map, before the heads. "": the whole map, for
            num_classes=0.
        distillation: two heads, whose mean is the output; after `set_distilled_training()` their
            outputs come in training as a pair (`Logits`). False: one head.
        features_only: no heads; the output is a list of the stages' feature maps, each behind a
            BatchNorm of its own, at 1/4, 1/8, 1/16 and 1/32 of the images' size.
        out_indices: with `features_only`, the stages whose maps are given, in ascending order: an
            int n for the last n, a sequence of numbers (negative ones count from the end), or None
            for all. The stages after the last of them are not built.
        pooling: of the attention, part of the identity of a checkpoint: "l2" for the official code
            since July 2023 and timm, "sum" before and for transformers.
        backend: of the attention.
        device, dtype: of the parameters.

    Attributes:
        num_features, head_hidden_size: channels of the last map.
        feature_info: channels, strides and names of the stages, in a list of dicts with accessors
            (`swiftkernels.models.feature_info.FeatureInfo`).
        grad_checkpointing: whether blocks are recomputed in the backward, `set_grad_checkpointing`.
        feature_channels, feature_strides: of the maps that `features_only` gives.
        pretrained_cfg, default_cfg: how the public weights were trained: size of the images, crop,
            mean and deviation of the colours, and names of the first convolution and the heads, by
            the keys of timm.

    Shapes:
        images [B, in_chans, H, W] of any height and width and memory format -> [B, num_classes].

    Raises:
        TypeError, ValueError: a wrong argument.

    Example:
        >>> model = SwiftFormer((16, 24), (1, 2), num_classes=5).eval()
        >>> model(torch.randn(2, 3, 40, 56)).shape
        torch.Size([2, 5])
    """

    __jit_unused_properties__ = ("grad_checkpointing",)

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        act_layer: ActLayer = nn.GELU,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        use_layer_scale: bool = True,
        layer_scale_init_value: float = LAYER_SCALE,
        global_pool: str = "avg",
        distillation: bool = True,
        features_only: bool = False,
        out_indices: Indices = None,
        pooling: str = "l2",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(widths, depths, num_classes, in_chans)
        rates = {
            "drop_rate": drop_rate,
            "proj_drop_rate": proj_drop_rate,
            "drop_path_rate": drop_path_rate,
        }
        for name, rate in rates.items():
            checks.check_number(name, rate)
            if not 0 <= rate < 1:
                raise ValueError(
                    f"{name} must be a probability below 1; got {rate}. 0 switches it off."
                )
        checks.check_number("mlp_ratio", mlp_ratio, positive=True)
        checks.check_option("use_layer_scale", use_layer_scale, (True, False))
        checks.check_option("distillation", distillation, (True, False))
        checks.check_option("features_only", features_only, (True, False))
        checks.check_number("layer_scale_init_value", layer_scale_init_value)
        if not callable(act_layer) or isinstance(act_layer, nn.Module):
            raise TypeError(
                f"act_layer must be a class of activations; got {type(act_layer).__name__}. Pass "
                "nn.GELU, or a function that makes one."
            )
        if out_indices is not None and not features_only:
            raise ValueError(
                f"out_indices must be None without features_only=True; got {out_indices}. "
                "forward_intermediates gives maps of a classifier."
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        taken = sorted(set(take_indices(out_indices, len(widths), "out_indices")))
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
            taken,
        )
        self.feature_channels = tuple(self.feature_info.channels())
        self.feature_strides = tuple(self.feature_info.reduction())
        self.pretrained_cfg = _pretrained_cfg(widths, depths, distillation, features_only)
        self.default_cfg = self.pretrained_cfg

        first = widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, first // 2, 3, stride=2, padding=1, **factory),
            nn.BatchNorm2d(first // 2, **factory),
            nn.ReLU(),
            nn.Conv2d(first // 2, first, 3, stride=2, padding=1, **factory),
            nn.BatchNorm2d(first, **factory),
            nn.ReLU(),
        )
        total = sum(depths)
        stages: list[Stage] = []
        for i in range(taken[-1] + 1):
            width, depth = widths[i], depths[i]
            hidden = int(width * mlp_ratio)
            before = sum(depths[:i])
            rate_of = [drop_path_rate * (before + j) / max(1, total - 1) for j in range(depth)]
            blocks: list[nn.Module] = [
                ConvEncoder(width, hidden, rate, act_layer, use_layer_scale, **factory)
                for rate in rate_of[:-1]
            ]
            blocks.append(
                SwiftFormerEncoder(
                    width,
                    hidden,
                    proj_drop_rate,
                    rate_of[-1],
                    act_layer,
                    use_layer_scale,
                    layer_scale_init_value,
                    pooling,
                    backend,
                    **factory,
                )
            )
            downsample = Downsample(widths[i - 1], width, **factory) if i else nn.Identity()
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.apply(_initialise)
        last = widths[taken[-1]]
        self.num_features = self.head_hidden_size = last
        self.feature_norms: nn.ModuleDict | None = None
        if features_only:
            self.feature_norms = nn.ModuleDict(
                {str(i): nn.BatchNorm2d(widths[i], **factory) for i in taken}
            )
        else:
            self.norm: nn.Module = nn.BatchNorm2d(last, **factory)
            self.head_drop = nn.Dropout(drop_rate)
            self.head = self._new_head(**factory)
            self.head_dist = self._new_head(**factory) if distillation else None

    # forward and forward_head have no return types: TorchScript compiles the branch that a model
    # takes, and infers its type.
    def forward(self, x: Tensor):  # type: ignore[no-untyped-def]
        """Class scores, a pair of them in distilled training, or a list of feature maps."""
        if self.feature_norms is not None:
            maps = self._stage_maps(x, len(self.stages))
            out: list[Tensor] = []
            for index, norm in self.feature_norms.items():
                out.append(norm(maps[int(index)]))
            return out
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> the last map [B, C, H / 32, W / 32], normalised."""
        if self.feature_norms is not None:
            return self.forward(x)[-1]
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False):  # type: ignore[no-untyped-def]
        """What `forward` gives from the map of `forward_features`.

        Args:
            x: [B, C, H, W].
            pre_logits: stop before the heads: [B, C], or with global_pool="" the map.

        Raises:
            ValueError: heads on a map that is not pooled, or a model with `features_only`.
        """
        self._check_heads()
        if self.global_pool == "avg":
            x = x.mean(dim=(2, 3))
        elif self.num_classes > 0 and not pre_logits:
            raise ValueError(
                "global_pool must be 'avg' for class scores; got ''. reset_classifier(num_classes, "
                "'avg') sets it, pre_logits=True gives the map."
            )
        x = self.head_drop(x)
        if pre_logits:
            return x
        if self.head_dist is None:
            return self.head(x)
        if self.distilled_training and self.training and not torch.jit.is_scripting():
            return Logits(self.head(x), self.head_dist(x))
        return (self.head(x) + self.head_dist(x)) / 2

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of some stages, in ascending order.

        Args:
            x: images [B, in_chans, H, W].
            indices: the stages: an int n for the last n, a sequence of numbers (negative ones count
                from the end), or None for all.
            norm: apply the BatchNorm to the last stage's map, as `forward_features` does. With
                `features_only`: to every map that has one.
            stop_early: skip the stages after the last one of `indices`.
            output_fmt: "NCHW".
            intermediates_only: return the maps only.

        Returns:
            The maps [B, C, H / stride, W / stride], as a list. Without `intermediates_only` a pair:
            the output of `forward_features` (or, if stages were skipped, the map of the last stage
            that ran) and the list.

        Raises:
            TypeError, ValueError: a wrong argument.

        Example:
            >>> model = SwiftFormer((16, 24), (1, 2)).eval()
            >>> last, maps = model.forward_intermediates(torch.randn(2, 3, 64, 64))
            >>> last.shape, [m.shape[1:] for m in maps]
            (torch.Size([2, 24, 8, 8]), [torch.Size([16, 16, 16]), torch.Size([24, 8, 8])])
        """
        checks.check_option("output_fmt", output_fmt, ("NCHW",))
        count = len(self.stages)
        taken = take_indices(indices, count)
        end = max(taken) + 1 if stop_early else count
        maps = self._stage_maps(x, end)
        if self.feature_norms is None:
            norms = {count - 1: self.norm}
        else:
            norms = {int(index): module for index, module in self.feature_norms.items()}
        # Each BatchNorm runs once at most: in training it updates its statistics.
        wanted = {*(taken if norm else ()), *(() if intermediates_only else (count - 1,))}
        normed = [norms[i](m) if i in wanted and i in norms else m for i, m in enumerate(maps)]
        found = [normed[i] if norm else maps[i] for i in sorted(set(taken))]
        return found if intermediates_only else (normed[-1], found)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] | None = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove, in place, what `forward_intermediates` with these indices does not need.

        The stages after the last one of `indices` are removed, and with them the BatchNorm and the
        heads, which have the width of the last stage.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: remove the BatchNorm of the last map even if the last stage stays.
            prune_head: remove heads and pooling even if the last stage stays.

        Returns:
            The numbers of the stages in `indices`, counted from the start.

        Raises:
            TypeError, ValueError: a wrong argument, or a model with `features_only`.
        """
        self._check_heads()
        taken = take_indices(indices, len(self.stages))
        last = max(taken)
        shorter = last < len(self.stages) - 1
        del self.stages[last + 1 :]
        if shorter or prune_norm:
            self.norm = nn.Identity()
        if shorter or prune_head:
            self.num_features = self.head_hidden_size = self.feature_info.channels(last)
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> Any:
        """The heads: the pair (head, head_dist), or with distillation=False the only one.

        Raises:
            ValueError: a model with `features_only`.
        """
        self._check_heads()
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model fresh heads, for other classes.

        Args:
            num_classes: 0 leaves the heads out.
            global_pool: "avg" or "" as in the constructor; None leaves it as it is.

        Raises:
            TypeError, ValueError: a wrong argument, or a model with `features_only`.
        """
        self._check_heads()
        _check_classes(num_classes)
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = self._new_head(device=like.device, dtype=like.dtype)
        if self.head_dist is not None:
            self.head_dist = self._new_head(device=like.device, dtype=like.dtype)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return the two heads' outputs in training as a pair, `Logits`, instead of their mean.

        Raises:
            ValueError: a model without two heads.
        """
        if enable and getattr(self, "head_dist", None) is None:
            raise ValueError(
                "distilled training needs the two heads of a model with distillation=True, "
                f"features_only=False; this one has distillation={self.distillation}, "
                f"features_only={self.feature_norms is not None}."
            )
        self.distilled_training = enable

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward instead of keeping what they made: less memory."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @property
    def grad_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward. Can be assigned."""
        return any(stage.grad_checkpointing for stage in self.stages)

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        self.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that no optimizer should decay, beyond biases and norms: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group the parameters by depth, for the layer decay of timm's optimizers.

        Args:
            coarse: groups are stages instead of blocks.
        """
        stages: list[tuple[str, tuple[int, ...] | None]]
        if coarse:
            stages = [(r"^stages\.(\d+)", None), (r"^feature_norms\.(\d+)", None)]
        else:
            stages = [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                # timm's code for: in the group of the parameters before.
                (r"^feature_norms\.(\d+)", (99999,)),
                (r"^norm", (99999,)),
            ]
        return {"stem": r"^stem", "blocks": stages}

    def _stage_maps(self, images: Tensor, count: int) -> list[Tensor]:
        """The maps of the first `count` stages, before any BatchNorm of the whole model."""
        x = self.stem(images)
        maps: list[Tensor] = []
        for i, stage in enumerate(self.stages):
            if i < count:
                x = stage(x)
                maps.append(x)
        return maps

    def _new_head(self, **factory: Any) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, self.num_classes, **factory)
        return head.apply(_initialise).train(self.training)

    def _check_heads(self) -> None:
        if self.feature_norms is not None:
            raise ValueError(
                "a model with features_only=True has no heads, and its maps are chosen by "
                "out_indices. Make it with features_only=False; forward_intermediates gives maps."
            )


def swiftformer_xs(**options: Any) -> SwiftFormer:
    """SwiftFormer-XS, 3.5 million parameters; options as of `SwiftFormer`."""
    return SwiftFormer(*WIDTHS_AND_DEPTHS["xs"], **options)


def swiftformer_s(**options: Any) -> SwiftFormer:
    """SwiftFormer-S, 6.1 million parameters; options as of `SwiftFormer`."""
    return SwiftFormer(*WIDTHS_AND_DEPTHS["s"], **options)


def swiftformer_l1(**options: Any) -> SwiftFormer:
    """SwiftFormer-L1, 12.1 million parameters; options as of `SwiftFormer`."""
    return SwiftFormer(*WIDTHS_AND_DEPTHS["l1"], **options)


def swiftformer_l3(**options: Any) -> SwiftFormer:
    """SwiftFormer-L3, 28.5 million parameters; options as of `SwiftFormer`."""
    return SwiftFormer(*WIDTHS_AND_DEPTHS["l3"], **options)


def _check_sizes(
    widths: Sequence[int], depths: Sequence[int], num_classes: int, in_chans: int
) -> None:
    if len(widths) == 0 or len(widths) != len(depths):
        raise ValueError(
            f"widths and depths must have one number for each stage; got {tuple(widths)} and "
            f"{tuple(depths)}."
        )
    for name, numbers in (("widths", widths), ("depths", depths), ("in_chans", (in_chans,))):
        for number in numbers:
            checks.check_positive(name, number)
    _check_classes(num_classes)


def _check_classes(num_classes: int) -> None:
    if not isinstance(num_classes, int) or num_classes < 0:
        raise ValueError(
            f"num_classes must be an int of at least 0; got {num_classes!r}. 0 leaves the heads "
            "out."
        )


def _checked_pool(global_pool: str) -> str:
    checks.check_option("global_pool", global_pool, ("avg", ""))
    return global_pool


def _pretrained_cfg(
    widths: Sequence[int], depths: Sequence[int], distillation: bool, features_only: bool
) -> dict[str, Any]:
    """How the public weights were trained, and where they are, by the keys of timm."""
    sizes = tuple(widths), tuple(depths)
    config: dict[str, Any] = {
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "crop_mode": "center",
        "mean": MEAN,
        "std": DEVIATION,
        "num_classes": 1000,
        "pool_size": None,
        "first_conv": "stem.0",
        "classifier": ("head", "head_dist") if distillation else "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/Amshaker/SwiftFormer",
        "paper_ids": "arXiv:2303.15446",
    }
    for name, known in WIDTHS_AND_DEPTHS.items():
        if sizes == known:
            config["architecture"] = f"swiftformer_{name}"
            config["tag"] = "dist_in1k"
            config["hf_hub_id"] = f"timm/swiftformer_{name}.dist_in1k"
    if features_only:
        del config["num_classes"], config["classifier"]
    return config


def _initialise(module: nn.Module) -> None:
    """As the official code: truncated normal weights of 0.02, no biases."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
