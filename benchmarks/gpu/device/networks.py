"""The SwiftFormers that are checked and timed: timm's, or this library's where timm is missing.

Eager PyTorch is the same network without any kernel of this library.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timm_networks
from benchmarks.gpu.device.results import GRAPHS
from benchmarks.timm_networks import CLASSES
from swiftkernels import fuse_for_inference, models
from swiftkernels.backends import torch_state
from swiftkernels.ops.plan import KeepsPlans
from swiftkernels.testing.engines import OURS
from swiftkernels.utils.text import first_line

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
"""Types of networks by name; float32 is without TF32."""
SIZES = ("xs", "s", "l1", "l3")


@functools.cache
def source() -> str:
    """Where the networks are from: timm, or this library if timm does not import."""
    if importlib.util.find_spec("timm") is None:
        return OURS
    from tests.stubs import import_timm

    try:
        import_timm()
    except Exception as error:  # one that was built for another torch
        print(f"timm does not import: {first_line(error)}")
        return OURS
    return "timm"


class Network:
    """A network on the device in one type, with weights that hide no error.

    Args:
        name: as in timm.
        origin: "timm" or this library.
        dtype: of the weights, one of `DTYPES`.
        device: of the weights.
    """

    def __init__(self, name: str, origin: str, dtype: str, device: torch.device) -> None:
        self.name, self.origin, self.dtype, self.device = name, origin, DTYPES[dtype], device
        if origin == "timm":
            model = timm_networks.make_model(name)
        else:
            torch.manual_seed(0)
            model = getattr(models, name)(num_classes=CLASSES)
            model = timm_networks.with_random_scales(model).eval()
        self.model: nn.Module = model.to(device, self.dtype)

    @functools.cached_property
    def eager(self) -> nn.Module:
        """Without the kernels of this library."""
        model = copy.deepcopy(self.model)
        for part in model.modules():
            if isinstance(part, KeepsPlans):
                part.backend = "reference"
        return model

    @functools.cached_property
    def exact(self) -> nn.Module:
        return copy.deepcopy(self.eager).double()

    @functools.cached_property
    def accelerated(self) -> nn.Module:
        """Its training steps run on the kernels of this library."""
        if self.origin == "timm":
            return timm_networks.accelerated(self.model)
        return self.model  # has the layers of this library

    @functools.cached_property
    def fused(self) -> dict[str, nn.Module]:
        """By engine: `fuse_for_inference`, and the same with CUDA graphs where there are any."""
        fused: dict[str, nn.Module] = {OURS: fuse_for_inference(self.model, graph=False)}
        if not torch_state.why_not_graphs(self.device):
            fused[GRAPHS] = fuse_for_inference(self.model, graph=True)
        return fused

    def images(self, batch: int, height: int, width: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(batch, 3, height, width, generator=generator)
        return drawn.to(self.device, self.dtype)


def why_no_graph(fused: Any, images: Tensor) -> str:
    """Why a network that was fused with `graph=True` runs these images without a graph.

    It captures one at the second call with images of a shape.
    """
    with torch.no_grad():
        for _ in range(3):
            fused(images)
    reasons = {tuple(note.shape): note.reason for note in fused.report.graphs}
    return str(reasons.get(tuple(images.shape), "such images were not captured"))


@functools.lru_cache(maxsize=8)
def network(name: str, origin: str, dtype: str, device: torch.device) -> Network:
    return Network(f"swiftformer_{name}", origin, dtype, device)
