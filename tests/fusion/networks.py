"""Small SwiftFormers of all libraries, with weights that show every part in the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.models import SwiftFormer
from swiftkernels.models.segmentation import SemanticFPN
from tests.models.test_public_models import OfficialLayer
from tests.stubs import import_timm

WIDTHS, DEPTHS = (8, 12, 16, 20), (2, 1, 2, 1)


def prepared(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with random weights, scales and BatchNorm statistics."""
    generator = torch.Generator().manual_seed(3)

    def random(t: Tensor, low: float, high: float) -> None:
        t.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                if part.running_mean is not None:
                    random(part.running_mean, -0.5, 0.5)
                    random(part.running_var, 0.5, 2.0)
                if part.weight is not None:
                    random(part.weight, 0.5, 1.5)
                    random(part.bias, -0.5, 0.5)
            elif isinstance(part, (nn.Conv2d, nn.Linear)):
                bound = part.weight[0].numel() ** -0.5
                random(part.weight, -bound, bound)
                if part.bias is not None:
                    random(part.bias, -0.2, 0.2)
        for name, p in model.named_parameters():
            if "scale" in name or name.endswith("gamma"):
                random(p, 0.3, 1.0)
    return model.eval()


def ours(**options: Any) -> nn.Module:
    return prepared(SwiftFormer(WIDTHS, DEPTHS, **{"num_classes": 5, **options}))


def of_timm(**options: Any) -> nn.Module:
    timm = import_timm()
    options = {"num_classes": 5, "layers": DEPTHS, "embed_dims": WIDTHS, **options}
    return prepared(timm.create_model("swiftformer_xs", **options))


def config_of_transformers(transformers: Any, **options: Any) -> Any:
    sizes = {"depths": list(DEPTHS), "embed_dims": list(WIDTHS), "num_labels": 5}
    return transformers.SwiftFormerConfig(**{**sizes, **options})


def of_transformers(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = config_of_transformers(transformers, **options)
    return prepared(transformers.SwiftFormerForImageClassification(config))


class OfficialEncoder(nn.Module):
    """A convolutional encoder, or the local representation, in the form of the official code."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.pwconv1, self.pwconv2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)
        self.act, self.drop_path = nn.GELU(), nn.Identity()
        self.layer_scale = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x)))))
        return x + self.drop_path(self.layer_scale * branch)


class OfficialMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.fc1, self.act, self.fc2 = (
            nn.Conv2d(dim, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, dim, 1),
        )
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(self.norm1(x))))))


class OfficialBlock(nn.Module):
    def __init__(self, dim: int, pooling: str) -> None:
        super().__init__()
        self.local_representation = OfficialEncoder(dim, dim)
        self.attn = OfficialLayer(dim, dim, 1, pooling)
        self.linear = OfficialMlp(dim, 4 * dim)
        self.drop_path = nn.Identity()
        self.layer_scale_1 = nn.Parameter(1e-5 * torch.ones(dim, 1, 1))
        self.layer_scale_2 = nn.Parameter(1e-5 * torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.local_representation(x)
        batch, dim, height, width = x.shape
        tokens = self.attn(x.permute(0, 2, 3, 1).reshape(batch, height * width, dim))
        images = tokens.reshape(batch, height, width, dim).permute(0, 3, 1, 2)
        x = x + self.drop_path(self.layer_scale_1 * images)
        return x + self.drop_path(self.layer_scale_2 * self.linear(x))


class OfficialDownsampling(nn.Module):
    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


def stem(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width // 2, 3, stride=2, padding=1), nn.BatchNorm2d(width // 2),
        nn.ReLU(),
        nn.Conv2d(width // 2, width, 3, stride=2, padding=1), nn.BatchNorm2d(width),
        nn.ReLU(),
    )  # fmt: skip


class Official(nn.Module):
    """The form of the official network: stages and downsamplings in one list, two heads."""

    def __init__(self, pooling: str = "l2", fork_feat: bool = False, classes: int = 5) -> None:
        super().__init__()
        self.fork_feat = fork_feat
        self.patch_embed = stem(3, WIDTHS[0])
        parts: list[nn.Module] = []
        for i, (dim, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
            if i:
                parts.append(OfficialDownsampling(WIDTHS[i - 1], dim))
            encoders = [OfficialEncoder(dim, 4 * dim) for _ in range(depth - 1)]
            parts.append(nn.Sequential(*encoders, OfficialBlock(dim, pooling)))
        self.network = nn.ModuleList(parts)
        if fork_feat:
            for i, dim in enumerate(WIDTHS):
                self.add_module(f"norm{2 * i}", nn.BatchNorm2d(dim))
        else:
            self.norm = nn.BatchNorm2d(WIDTHS[-1])
            self.head = nn.Linear(WIDTHS[-1], classes)
            self.dist_head = nn.Linear(WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> Any:
        x = self.patch_embed(x)
        maps = []
        for i, block in enumerate(self.network):
            x = block(x)
            if self.fork_feat and i % 2 == 0:
                maps.append(getattr(self, f"norm{i}")(x))
        if self.fork_feat:
            return maps
        pooled = self.norm(x).flatten(2).mean(-1)
        both = self.head(pooled), self.dist_head(pooled)
        return both if self.training else (both[0] + both[1]) / 2


class RenamedAttention(nn.Module):
    """Additive attention of which no part has a known name, in another order."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.out, self.mix = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.k, self.q = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.score = nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).mT
        q, k = F.normalize(self.q(x), dim=-1), F.normalize(self.k(x), dim=-1)
        weights = (q @ self.score * q.shape[-1] ** -0.5).softmax(dim=1).unsqueeze(-1)
        return self.out(self.mix((weights * q).sum(1, keepdim=True) * k) + q).mT


class RenamedMixer(nn.Module):
    """A convolutional block with other names, a kernel of 5, linear layers, no layer scale."""

    def __init__(self, dim: int, hidden: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.spatial = nn.Conv2d(dim, dim, 5, padding="same", groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)
        self.function = act

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.bn(self.spatial(x)).permute(0, 2, 3, 1)
        return self.down(self.function(self.up(pixels))).permute(0, 3, 1, 2) + x


class RenamedChannels(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(dim), nn.Conv2d(dim, 2 * dim, 1), nn.Hardswish(),
            nn.Conv2d(2 * dim, dim, 1, bias=False),
        )  # fmt: skip
        self.weight = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.weight


class RenamedBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.channels = RenamedChannels(dim)
        self.tokens = RenamedAttention(dim)
        self.mixer = RenamedMixer(dim, 3 * dim, F.silu)
        self.strength = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(x)
        images = self.tokens(x).unflatten(2, x.shape[2:])
        x = x + self.strength.view(-1, 1, 1) * images
        return x + self.channels(x)


class Renamed(nn.Module):
    """A fork: other names, another order of the parts, one head, another way to the mean."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.begin = stem(3, 8)
        self.classify = nn.Linear(12, classes)
        self.last = nn.BatchNorm2d(12)
        self.body = nn.ModuleList(
            [RenamedMixer(8, 16, F.gelu), RenamedBlock(8), OfficialDownsampling(8, 12),
             RenamedMixer(12, 24, F.relu), RenamedBlock(12)]
        )  # fmt: skip

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.begin(pictures)
        for part in self.body:
            x = part(x)
        return self.classify(F.adaptive_avg_pool2d(self.last(x), 1).flatten(1))


def segmentation() -> nn.Module:
    backbone = SwiftFormer(WIDTHS, DEPTHS, features_only=True)
    return prepared(SemanticFPN(backbone, num_classes=3, channels=8, width=32))
