"""SwiftFormer (arXiv 2303.15446, section 4): convolutional encoders, one attention a stage.

Shapes: B images, C channels of a stage, H x W its feature map. Everything works on [B, C, H, W] of
any size; there is no position encoding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swiftkernels import checks
from swiftkernels.modules import AdditiveAttention

WIDTHS_AND_DEPTHS = {
    "xs": ((48, 56, 112, 220), (3, 3, 6, 4)),
    "s": ((48, 64, 168, 224), (3, 3, 9, 6)),
    "l1": ((48, 96, 192, 384), (4, 3, 10, 5)),
    "l3": ((64, 128, 320, 512), (4, 4, 12, 6)),
}
"""Table 1 of the paper: channels and blocks of the four stages."""

LAYER_SCALE = 1e-5
"""Where the scales of attention and MLP start; those of the convolutions start at 1."""


class Logits(NamedTuple):
    """What training gives with `distillation`: the two heads' outputs, [B, num_classes] each."""

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
        """x [B, ...]: 0 for a share `rate` of the images, x / (1 - rate) for the others."""
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)
        return x * (kept / keep)

    def extra_repr(self) -> str:
        return f"{self.rate:g}"


class LayerScale(nn.Module):
    """A learned factor for each channel of [B, C, H, W] (arXiv 2103.17239)."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ConvEncoder(nn.Module):
    """x + scale * pointwise(GELU(pointwise(BatchNorm(depthwise(x)))))

    With `hidden_dim` = 4 C the convolutional encoder of the paper, with C the local representation
    at the head of its SwiftFormer encoder.
    """

    def __init__(self, dim: int, hidden_dim: int, drop_path: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.pwconv1 = nn.Conv2d(dim, hidden_dim, 1)
        self.act = nn.GELU()
        self.pwconv2 = nn.Conv2d(hidden_dim, dim, 1)
        self.layer_scale = LayerScale(dim, 1.0)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x)))))
        return x + self.drop_path(self.layer_scale(branch))


class Mlp(nn.Module):
    """Pointwise convolutions behind a BatchNorm, C -> hidden_dim -> C."""

    def __init__(self, dim: int, hidden_dim: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(self.norm1(x))))))


class SwiftFormerEncoder(nn.Module):
    """The last block of a stage: local representation, additive attention, MLP."""

    def __init__(
        self, dim: int, mlp_ratio: float, drop: float, drop_path: float, pooling: str, backend: str
    ) -> None:
        super().__init__()
        self.local_representation = ConvEncoder(dim, dim, 0.0)
        self.attn = AdditiveAttention(
            dim, dim, 1, pooling=pooling, backend=backend, layout="channels_first"
        )
        self.linear = Mlp(dim, int(dim * mlp_ratio), drop)
        self.layer_scale_1 = LayerScale(dim, LAYER_SCALE)
        self.layer_scale_2 = LayerScale(dim, LAYER_SCALE)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local_representation(x)
        if self.training and self.drop_path.rate > 0:
            x = x + self.drop_path(self.layer_scale_1(self.attn(x)))
        else:
            x = self.attn(x, residual_scale=self.layer_scale_1.gamma)
        return x + self.drop_path(self.layer_scale_2(self.linear(x)))


class Downsample(nn.Module):
    """To half the height and width, rounded up, and another width: convolution and BatchNorm."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class Stage(nn.Module):
    """A downsampling, but in the first stage, and blocks of one width."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        """[B, C, H, W] -> the stage's map; `again`: blocks are computed again in the backward."""
        x = self.downsample(x)
        if not again:
            return self.blocks(x)
        for block in self.blocks:
            x = _checkpointed(block, x)
        return x


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), of which x alone is kept for the backward."""
    if torch.compiler.is_compiling():  # which computes again without side effects
        return checkpoint(block, x, use_reentrant=False)
    contexts = contextlib.nullcontext(), _WithoutStatistics(block)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: contexts)


class _WithoutStatistics:
    """A context in which a forward is not another batch for BatchNorm's running statistics."""

    def __init__(self, block: nn.Module) -> None:
        self.norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]

    def __enter__(self) -> None:
        self.before = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *error: object) -> None:
        for norm, (momentum, batches) in zip(self.norms, self.before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


class SwiftFormer(nn.Module):
    """SwiftFormer, with the parameter names of timm.

    Args:
        widths, depths: channels and blocks of every stage; the last block of each is the one with
            the attention.
        num_classes: 0 leaves the heads out: the output is the pooled features [B, C].
        in_chans: channels of the images.
        mlp_ratio: hidden width of encoders and MLPs, in widths.
        drop_rate: dropout before the heads and in the MLPs.
        drop_path_rate: of the last block; it grows from 0 at the first.
        distillation: two heads; in training their outputs come as a pair (`Logits`), else their
            mean. False: one head.
        features_only: no heads; the output is a list of the stages' feature maps, each behind a
            BatchNorm of its own, at 1/4, 1/8, 1/16 and 1/32 of the images' size.
        pooling: of the attention, part of the identity of a checkpoint: "l2" for the official code
            since July 2023 and timm, "sum" before and for transformers.
        backend: of the attention.

    Attributes:
        grad_checkpointing: compute the blocks again in the backward rather than keep what they
            made.
        feature_channels, feature_strides: of the stages.

    Shapes:
        images [B, in_chans, H, W] of any height and width and memory format -> [B, num_classes].

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
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        distillation: bool = True,
        features_only: bool = False,
        pooling: str = "l2",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_sizes(widths, depths, num_classes, in_chans)
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= rate < 1:
                raise ValueError(
                    f"{name} must be a probability below 1; got {rate}. 0 switches it off."
                )
        self.num_classes = num_classes
        self.feature_channels = tuple(widths)
        self.feature_strides = tuple(4 * 2**i for i in range(len(widths)))
        self.grad_checkpointing = False
        self.distillation = distillation

        first = widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, first // 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(first // 2),
            nn.ReLU(),
            nn.Conv2d(first // 2, first, 3, stride=2, padding=1),
            nn.BatchNorm2d(first),
            nn.ReLU(),
        )
        total = sum(depths)
        stages: list[Stage] = []
        block = 0
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                rate = drop_path_rate * block / max(1, total - 1)
                block += 1
                if j < depth - 1:
                    blocks.append(ConvEncoder(width, int(width * mlp_ratio), rate))
                else:
                    blocks.append(
                        SwiftFormerEncoder(width, mlp_ratio, drop_rate, rate, pooling, backend)
                    )
            downsample = nn.Identity() if i == 0 else Downsample(widths[i - 1], width)
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_norms: nn.ModuleList | None = None
        if features_only:
            self.feature_norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        else:
            last = widths[-1]
            self.norm = nn.BatchNorm2d(last)
            self.head_drop = nn.Dropout(drop_rate)
            self.head = nn.Linear(last, num_classes) if num_classes else nn.Identity()
            if distillation:
                self.head_dist = nn.Linear(last, num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor | Logits | list[Tensor]:
        """Class scores, a pair of them in training with distillation, or feature maps."""
        if self.feature_norms is not None:
            maps = self.forward_features(images)
            return [norm(x) for norm, x in zip(self.feature_norms, maps, strict=True)]
        x = self.norm(self.forward_features(images)[-1])
        x = self.head_drop(x.mean(dim=(2, 3)))
        if not self.distillation:
            return self.head(x)
        if self.training and self.num_classes:
            return Logits(self.head(x), self.head_dist(x))
        return (self.head(x) + self.head_dist(x)) / 2

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The stages' feature maps [B, C, H / stride, W / stride], not normalised."""
        x = self.stem(images)
        again = self.grad_checkpointing and torch.is_grad_enabled()
        maps = []
        for stage in self.stages:
            x = stage(x, again)
            maps.append(x)
        return maps


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
    if not isinstance(num_classes, int) or num_classes < 0:
        raise ValueError(
            f"num_classes must be an int of at least 0; got {num_classes!r}. 0 leaves the heads "
            "out."
        )


def _initialise(module: nn.Module) -> None:
    """As the official code: truncated normal weights of 0.02, no biases."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
