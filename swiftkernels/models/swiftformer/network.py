"""SwiftFormer (arXiv 2303.15446, section 4): convolutional blocks, one attention in each stage.

Shapes: B images, C channels of a stage, H x W its feature map. All modules take [B, C, H, W] of
any height and width; there are no position embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swiftkernels.models.feature_info import Indices, take_indices
from swiftkernels.models.network import GlobalPool, Network, Stage, check_classes, options_of
from swiftkernels.ops.additive_attention.layer import AdditiveAttention
from swiftkernels.ops.conv_mlp.layer import (
    ConvMlpForward,
    Form,
    activation_name,
    block_backend,
    skipped_parts,
)
from swiftkernels.ops.linear_parts import is_untouched
from swiftkernels.ops.types import Backend, Pooling
from swiftkernels.utils import checks
from swiftkernels.utils.images import DEVIATION, MEAN

WIDTHS_AND_DEPTHS = {
    "xs": ((48, 56, 112, 220), (3, 3, 6, 4)),
    "s": ((48, 64, 168, 224), (3, 3, 9, 6)),
    "l1": ((48, 96, 192, 384), (4, 3, 10, 5)),
    "l3": ((64, 128, 320, 512), (4, 4, 12, 6)),
}
"""Table 1 of the paper: channels and number of blocks of the four stages."""

LAYER_SCALE = 1e-5
"""Initial layer scale of attention and MLP; that of the convolutions is 1."""

ActLayer = Callable[[], nn.Module]
"""Class of an activation, such as nn.GELU."""


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops a residual branch, image by image, in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W]: 0 with probability `rate` for each image, else x / (1 - rate)."""
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        kept = x.new_empty([x.shape[0], 1, 1, 1]).bernoulli_(keep)
        return x * (kept / keep)

    def extra_repr(self) -> str:
        return f"{self.rate:g}"


class LayerScale(nn.Module):
    """A learned factor for each channel of [B, C, H, W] (arXiv 2103.17239)."""

    def __init__(self, dim: int, initial: float, **factory: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), float(initial), **factory))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ConvEncoder(ConvMlpForward):
    """x + scale * pointwise(act(pointwise(BatchNorm(depthwise(x)))))

    With `hidden_dim` = 4 C the convolutional encoder of the paper; with `hidden_dim` = C the local
    representation, the first part of its SwiftFormer encoder.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop_path: float,
        act_layer: ActLayer,
        use_layer_scale: bool,
        backend: Backend,
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
        self.backend = block_backend(backend)
        self.form = Form(
            "pwconv1", "pwconv2", "dwconv", "norm", "layer_scale.gamma", "drop_path",
            activation_name(self.act), True, skipped_parts(self, "act", "layer_scale"),
        )  # fmt: skip

    def _call_parts(self, x: Tensor) -> Tensor:
        branch = self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x)))))
        return x + self.drop_path(self.layer_scale(branch))


class Mlp(ConvMlpForward):
    """A BatchNorm and two pointwise convolutions, C -> hidden_dim -> C."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float,
        act_layer: ActLayer,
        backend: Backend,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim, **factory)
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **factory)
        self.act = act_layer()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **factory)
        self.drop = nn.Dropout(drop)
        self.backend = block_backend(backend)
        # A dropout between the convolutions has to be called.
        activation = activation_name(self.act) if drop == 0 else ""
        self.form = Form(
            "fc1", "fc2", "", "norm1", "", "", activation, False, skipped_parts(self, "act", "drop")
        )

    def _call_parts(self, x: Tensor) -> Tensor:
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
        pooling: Pooling,
        backend: Backend,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.local_representation = ConvEncoder(
            dim, dim, 0.0, act_layer, use_layer_scale, backend, **factory
        )
        self.attn = AdditiveAttention(
            dim, dim, 1, pooling=pooling, backend=backend, layout="channels_first", **factory
        )
        self.linear = Mlp(dim, hidden_dim, drop, act_layer, backend, **factory)
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
            gamma: Any = self.layer_scale_1.gamma
            x = self.attn(x, residual_scale=gamma)
        else:
            x = x + self.drop_path(self.layer_scale_1(self.attn(x)))
        return x + self.drop_path(self.layer_scale_2(self.linear(x)))

    def _adds_in_attention(self) -> bool:
        """Whether the attention may scale its output and add x to it.

        Not if a hook or another class of module has to see the values in between.
        """
        between = (self.attn, self.layer_scale_1, self.drop_path)
        kinds = (AdditiveAttention, LayerScale, DropPath)
        for module, kind in zip(between, kinds, strict=True):
            if type(module) is not kind or not is_untouched(module):
                return False
        return not (self.training and self.drop_path.rate > 0)


class Downsample(nn.Module):
    """A convolution of stride 2 and a BatchNorm: half the height and width, rounded up."""

    def __init__(self, dim: int, out_dim: int, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **factory)
        self.norm = nn.BatchNorm2d(out_dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class SwiftFormer(Network):
    """SwiftFormer (arXiv 2303.15446), with the parameter names and the methods of timm's.

    `swiftformer_xs`, `swiftformer_s`, `swiftformer_l1` and `swiftformer_l3` are the sizes of the
    paper. The methods are those of `swiftkernels.models.network.Network`.

    Args:
        widths: channels of the stages.
        depths: number of blocks of the stages; the last block of each holds the attention.
        num_classes: outputs of the heads. 0: no heads, the output is the pooled features [B, C].
        in_chans: channels of the images.
        mlp_ratio: hidden width of convolutional blocks and MLPs, as a multiple of their width.
        act_layer: class of the activations in convolutional blocks and MLPs.
        drop_rate: dropout before the heads.
        proj_drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth of the last block; the rate grows linearly from 0 at the
            first block.
        use_layer_scale: False builds no layer scales.
        layer_scale_init_value: initial layer scale of attention and MLP.
        global_pool: "avg": the heads get the mean over the last feature map. "": no pooling, only
            with num_classes=0; the output is the feature map.
        distillation: build two heads, of which the mean is the output; in training, after
            `set_distilled_training()`, the output is the pair (`Logits`). False: one head.
        features_only: build no heads; the output is a list of feature maps, at 1/4, 1/8, 1/16 and
            1/32 of the size of the images, each behind its own BatchNorm.
        out_indices: with `features_only`, the stages that give feature maps, in ascending order: an
            int n for the last n, a sequence of numbers (negative numbers count from the end), or
            None for all. Stages after the last of them are not built.
        pooling: pooling of the attention. It belongs to a checkpoint: "l2" for the official code
            since July 2023 and for timm, "sum" for the official code before and for transformers.
        backend: backend of the attention, and of the blocks where they have it ("auto", "cpu");
            else these call PyTorch's layers.
        device, dtype: of the parameters.

    Attributes:
        num_features, head_hidden_size: channels of the last feature map.
        feature_info: channels, strides and names of the stages, a list of dicts with accessors
            (`swiftkernels.models.feature_info.FeatureInfo`).
        feature_channels, feature_strides: of the feature maps that `features_only` returns.
        grad_checkpointing: whether blocks are recomputed in the backward
            (`set_grad_checkpointing`).
        pretrained: what `from_pretrained` read: report, config.json and class names; only the
            networks that it returns have this attribute.
        pretrained_cfg, default_cfg: how the public weights were trained, by the keys of timm: size
            and crop of the images, mean and deviation of their channels, names of the first
            convolution and of the heads.

    Shapes:
        images [B, in_chans, H, W], any height, width and memory format -> [B, num_classes].

    Raises:
        TypeError, ValueError: a wrong argument.

    Example:
        >>> model = SwiftFormer((16, 24), (1, 2), num_classes=5).eval()
        >>> model(torch.randn(2, 3, 40, 56)).shape
        torch.Size([2, 5])
    """

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
        global_pool: GlobalPool = "avg",
        distillation: bool = True,
        features_only: bool = False,
        out_indices: Indices = None,
        pooling: Pooling = "l2",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
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
                    f"{name} must be a probability below 1; got {rate}. 0 disables it."
                )
        checks.check_number("mlp_ratio", mlp_ratio, positive=True)
        checks.check_option("use_layer_scale", use_layer_scale, (True, False))
        checks.check_option("distillation", distillation, (True, False))
        checks.check_option("features_only", features_only, (True, False))
        checks.check_number("layer_scale_init_value", layer_scale_init_value)
        if not callable(act_layer) or isinstance(act_layer, nn.Module):
            raise TypeError(
                f"act_layer must be a class of activations; got {type(act_layer).__name__}. Pass "
                "nn.GELU, or a function that returns an activation."
            )
        if out_indices is not None and not features_only:
            raise ValueError(
                f"out_indices must be None without features_only=True; got {out_indices}. "
                "forward_intermediates returns the feature maps of a classifier."
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        chosen = sorted(set(take_indices(out_indices, len(widths), "out_indices")))
        first = widths[0]
        stem = nn.Sequential(
            nn.Conv2d(in_chans, first // 2, 3, stride=2, padding=1, **factory),
            nn.BatchNorm2d(first // 2, **factory),
            nn.ReLU(),
            nn.Conv2d(first // 2, first, 3, stride=2, padding=1, **factory),
            nn.BatchNorm2d(first, **factory),
            nn.ReLU(),
        )
        total = sum(depths)
        stages: list[Stage] = []
        for i in range(chosen[-1] + 1):
            width, depth = widths[i], depths[i]
            hidden = int(width * mlp_ratio)
            before = sum(depths[:i])
            drop_paths = [drop_path_rate * (before + j) / max(1, total - 1) for j in range(depth)]
            blocks: list[nn.Module] = [
                ConvEncoder(width, hidden, rate, act_layer, use_layer_scale, backend, **factory)
                for rate in drop_paths[:-1]
            ]
            blocks.append(
                SwiftFormerEncoder(
                    width,
                    hidden,
                    proj_drop_rate,
                    drop_paths[-1],
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
        super().__init__(
            stem,
            stages,
            widths,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            global_pool=global_pool,
            distillation=distillation,
            features_only=features_only,
            out_indices=chosen,
            pretrained_cfg=_pretrained_cfg(widths, depths, distillation, features_only),
            **factory,
        )


@options_of(SwiftFormer)
def swiftformer_xs(**options: Any) -> SwiftFormer:
    """SwiftFormer-XS, 3.5 million parameters. Arguments as in `SwiftFormer`, except the sizes."""
    return SwiftFormer(*WIDTHS_AND_DEPTHS["xs"], **options)


@options_of(SwiftFormer)
def swiftformer_s(**options: Any) -> SwiftFormer:
    """SwiftFormer-S, 6.1 million parameters. Arguments as in `SwiftFormer`, except the sizes."""
    return SwiftFormer(*WIDTHS_AND_DEPTHS["s"], **options)


@options_of(SwiftFormer)
def swiftformer_l1(**options: Any) -> SwiftFormer:
    """SwiftFormer-L1, 12.1 million parameters. Arguments as in `SwiftFormer`, except the sizes."""
    return SwiftFormer(*WIDTHS_AND_DEPTHS["l1"], **options)


@options_of(SwiftFormer)
def swiftformer_l3(**options: Any) -> SwiftFormer:
    """SwiftFormer-L3, 28.5 million parameters. Arguments as in `SwiftFormer`, except the sizes."""
    return SwiftFormer(*WIDTHS_AND_DEPTHS["l3"], **options)


def _check_sizes(
    widths: Sequence[int], depths: Sequence[int], num_classes: int, in_chans: int
) -> None:
    if len(widths) == 0 or len(widths) != len(depths):
        raise ValueError(
            f"widths and depths must have one number for each stage; got {tuple(widths)} and "
            f"{tuple(depths)}. Pass two sequences of the same length."
        )
    for name, numbers in (("widths", widths), ("depths", depths), ("in_chans", (in_chans,))):
        for number in numbers:
            checks.check_positive(name, number)
    check_classes(num_classes)


def _pretrained_cfg(
    widths: Sequence[int], depths: Sequence[int], distillation: bool, features_only: bool
) -> dict[str, Any]:
    """How the public weights were trained and where they are, by the keys of timm."""
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
