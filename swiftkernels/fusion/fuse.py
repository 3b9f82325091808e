"""`fuse_for_inference`: a network in which chains of blocks run as one program.

All that decides is computed on a copy in float64. One run of it records in which order the blocks
are called and on what (`search`). Then the candidates, from one chain for everything to a chain for
each block, are put into the copy, and the first one that does not change any output is taken.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swiftkernels.backends import torch_state
from swiftkernels.fusion import find
from swiftkernels.fusion.chain import FusedChain
from swiftkernels.fusion.find import LeftBlock, Unit
from swiftkernels.fusion.network import FusedBlock, FusedNetwork, FusionReport, defaults_of
from swiftkernels.fusion.outputs import is_same_output, leaves
from swiftkernels.fusion.search import Fold, Run, Search, first_tensor
from swiftkernels.integrations import probe
from swiftkernels.ops.plan import KeepsPlans
from swiftkernels.utils import checks
from swiftkernels.utils.text import first_line

SIZES = (
    (2, 64, 64), (1, 97, 70), (1, 96, 128), (1, 224, 224), (2, 224, 224), (1, 256, 256),
    (2, 256, 256),
)  # fmt: skip
"""Batch, height and width of the images of the probes: the first two that the model takes. Some
models take one size only, mostly 224 x 224."""
PROBES = 2
"""Inputs on which a candidate is compared with the model."""


def fuse_for_inference(
    model: nn.Module, *, example: Tensor | None = None, graph: bool | None = None
) -> FusedNetwork:
    """A network for inference that computes the same, with chains of its blocks fused.

    For SwiftFormers of this library, timm, transformers, the official code and forks with other
    names, and for networks of convolutions such as RepViT, FastViT, EfficientFormer, ConvNeXt and
    MobileNet: blocks are found by what they compute. Each block is compared with the steps that
    replace it, and the fused network with the model, in float64 on random images; the largest
    chains that change no output are taken. On a CPU a chain runs as one compiled program; on a GPU
    blocks, attention and small convolutions run in Triton kernels; elsewhere all runs in PyTorch's
    operators. Outside of the chains BatchNorms are folded into the convolutions before them.

    Blocks with hooks, replaced forwards, adapters, parametrizations or quantised layers stay as
    they are, and chains end at modules with hooks; the report says why. Hooks are copied as by
    `copy.deepcopy`.

    The model stays unchanged, and none of its hooks is called. The fused network is a copy with the
    weights as they are now; after further training, fuse the model again.

    Args:
        model: in evaluation mode, on images [B, C, H, W].
        example: images that the model takes, if it takes no random images of 64 x 64 and 97 x 70.
        graph: whether shapes of images that repeat are captured in CUDA graphs, which launch all
            kernels at once: see `FusedNetwork`. True needs a model on one CUDA device; None is True
            for such a model, else False.

    Returns:
        The fused network; print its `report`.

    Raises:
        TypeError: model is no module, example no tensor, or graph neither bool nor None.
        ValueError: a model in training mode or without values (device meta), one that no example
            runs on, or one without a block that can be fused; graph=True for a model that is not on
            one CUDA device.

    Example:
        >>> from swiftkernels.models import SwiftFormer
        >>> model = SwiftFormer((16, 24), (1, 2), num_classes=5).eval()
        >>> fused = fuse_for_inference(model)
        >>> fused(torch.randn(2, 3, 40, 56)).shape
        torch.Size([2, 5])
        >>> len(fused.report.fused), len(fused.report.left)
        (8, 0)
    """
    _check(model, example)
    graph = _check_graph(model, graph)
    if find.forward_was_replaced(model):
        kind = type(model).__name__
        raise ValueError(_nothing(model, [LeftBlock("", kind, "its forward was replaced")]))
    with probe.isolated():
        clone = _clone(model)
        _check_values(clone)
        images, exact = _run_on_examples(clone, example)
        values = {name: p.detach().clone() for name, p in clone.named_parameters()}
        find.randomise(clone)
        found = find.find(model, clone)
        random = [clone(x) for x in images]
        search = Search(model, clone, found, images[0])

        def fits(changed: Sequence[Run | Fold]) -> bool:
            """Whether the network gives its outputs, with random parameters and with its own."""
            if not _gives(clone, changed, images, random):
                return False
            with _parameters(clone, values):
                return _gives(clone, changed, images, exact)

        for runs in search.candidates():
            if fits(runs):
                folds = search.folds(runs)
                if folds and not fits([*runs, *folds]):
                    folds = []
                with _parameters(clone, values):
                    return _fused(model, clone, runs, folds, search, graph)
    raise ValueError(_nothing(model, search.left([])))


def _check(model: nn.Module, example: Tensor | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module; got {type(model).__name__}. Pass the network itself."
        )
    if example is not None:
        checks.check_tensor("example", example)
        if example.dim() != 4 or not example.is_floating_point():
            raise ValueError(
                "example must be images [B, C, H, W] of a floating-point type; got shape "
                f"{tuple(example.shape)}, {example.dtype}. Pass a batch that the model takes."
            )
    if any(isinstance(part, FusedChain) for part in model.modules()):
        raise ValueError(
            "model must be a network that is not fused yet; got a fused one. Fuse the original "
            "model again."
        )
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                "model must be in evaluation mode, because the statistics of its BatchNorms are "
                f"folded into the weights; got {name or 'a model'} in training mode. Call "
                "model.eval() first."
            )
        for own, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None and t.is_meta:
                raise ValueError(
                    "model must hold values, which are folded; got "
                    f"{f'{name}.{own}'.lstrip('.')} on device meta. Load the weights first."
                )


def _check_graph(model: nn.Module, graph: bool | None) -> bool:
    """Whether to capture graphs."""
    if not isinstance(graph, bool | None):
        raise TypeError(f"graph must be True, False or None; got {graph!r}.")
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    can = len(devices) == 1 and not torch_state.why_not_graphs(*devices)
    if graph and not can:
        found = ", ".join(sorted(map(str, devices))) or "no device"
        raise ValueError(
            f"graph=True needs a model on one CUDA device; got one on {found}. Move the model "
            "there first, as in model.cuda(), or leave graph out: then chains run on any device."
        )
    return can if graph is None else graph


def _check_values(clone: nn.Module) -> None:
    for name, t in (*clone.named_parameters(), *clone.named_buffers()):
        if t.is_floating_point() and not t.isfinite().all():
            raise ValueError(
                f"model must hold finite values, or its outputs could not be compared; got {name} "
                "with infinity or NaN. Use large numbers, or write them into the fused network."
            )


def _clone(model: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, without hooks, parametrizations and replaced forwards."""
    try:
        clone = probe.copy_in_float64(model).requires_grad_(False)
    except Exception as error:  # weights of an unknown type may raise anything
        raise ValueError(
            "model must hold weights that can be converted to float64, to compare the fused "
            f"network with it; got {type(error).__name__}: {error}. Fuse before layers are "
            "quantised."
        ) from error
    for part in clone.modules():
        if find.forward_was_replaced(part):
            del part.forward
        if isinstance(part, KeepsPlans):
            part.backend = "reference"  # the kernels take no float64
    return clone


def _run_on_examples(clone: nn.Module, example: Tensor | None) -> tuple[list[Tensor], list[Any]]:
    """Images of two sizes, and the outputs of the copied model for them."""
    found: list[Tensor] = []
    outputs: list[Any] = []
    error: Exception | None = None
    for x in _examples(clone, example):
        try:
            out = clone(x)
        except Exception as raised:  # an unknown model may raise anything
            error = raised
            continue
        if not any(isinstance(t, Tensor) and t.numel() for t in leaves(out)):
            raise ValueError(
                "model must return tensors; a copy of it without hooks returned none. Fuse the "
                "part of the model that returns tensors."
            )
        found.append(x)
        outputs.append(out)
        if len(found) == PROBES:
            return found, outputs
    reason = "" if error is None else first_line(error)
    raise ValueError(
        f"example must be images that the model takes; a copy of the model in float64 could not be "
        f"run on {'random images' if example is None else 'it'} ({reason}). Pass "
        "example=images [B, C, H, W], fuse before layers are quantised, or fuse the part of the "
        "model that takes images, as in model.backbone = fuse_for_inference(model.backbone)."
    ) from error


def _examples(clone: nn.Module, example: Tensor | None) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if example is not None:
        batch, channels, height, width = example.shape
        yield example.detach().double().cpu()
        yield random(batch, channels, height + 33, width + 6)
        yield random(batch, channels, height, width)
        return
    convs = [part for part in clone.modules() if isinstance(part, nn.Conv2d)]
    for channels in dict.fromkeys([*(conv.in_channels for conv in convs[:1]), 3]):
        for batch, height, width in SIZES:
            yield random(batch, channels, height, width)


def _gives(
    clone: nn.Module, runs: Sequence[Run | Fold], images: Sequence[Tensor], expected: Sequence[Any]
) -> bool:
    """Whether the network with these chains gives the expected outputs."""
    if not runs:
        return False
    with _replaced(clone, _modules_of(clone, runs)) as network:
        for x, out in zip(images, expected, strict=True):
            try:
                if not is_same_output(network(x), out):
                    return False
            except Exception:  # an unknown network may raise anything
                return False
    return True


def _modules_of(network: nn.Module, runs: Sequence[Run | Fold]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for run in runs:
        found.update(run.modules(network))
    return found


@contextlib.contextmanager
def _replaced(network: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """The network with other modules, by name; at the end it is as before."""
    if "" in modules:
        yield modules[""]
        return
    before = [(part, dict(part._modules)) for part in network.modules()]
    try:
        _replace(network, modules)
        yield network
    finally:
        for part, children in before:
            part._modules.clear()
            part._modules.update(children)


def _replace(network: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Replace modules, by name, wherever the network holds them."""
    new = {id(network.get_submodule(name)): module for name, module in modules.items()}
    for part in list(network.modules()):
        for name, child in list(part._modules.items()):
            if id(child) in new:
                part._modules[name] = new[id(child)]


@contextlib.contextmanager
def _parameters(network: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The network with these values of its parameters; at the end they are as before."""
    own = dict(network.named_parameters())
    before = {name: p.detach().clone() for name, p in own.items()}
    try:
        for name, p in own.items():
            p.copy_(values[name])
        yield
    finally:
        for name, p in own.items():
            p.copy_(before[name])


def _fused(
    model: nn.Module,
    clone: nn.Module,
    runs: Sequence[Run],
    folds: Sequence[Fold],
    search: Search,
    graph: bool,
) -> FusedNetwork:
    """The fused network, with the weights of the copied model in the types of the model."""
    network = copy.deepcopy(model)
    modules: dict[str, nn.Module] = {}
    blocks: list[FusedBlock] = []
    changed: list[Run | Fold] = [*runs, *folds]
    for run in changed:
        like = first_tensor(network.get_submodule(run.names[0]))

        def cast_to(t: Tensor, like: Tensor = like) -> Tensor:
            # Contiguous, and in memory of its own.
            return t.to(like.device, like.dtype, copy=True).contiguous()

        modules.update(run.modules(clone, cast_to))
    for chain in runs:
        for part in chain.parts:
            kinds = tuple(step.kind for step in part.steps(clone))
            if isinstance(part, Unit):
                blocks.append(FusedBlock(part.names[0], part.kind, kinds, chain.names[0]))
                continue
            for name in part.names:
                kind = type(model.get_submodule(name)).__name__
                blocks.append(FusedBlock(name, kind, kinds, chain.names[0]))
    argument = next(iter(defaults_of(network)), "x")
    if "" in modules:
        network = modules[""]
    else:
        _replace(network, modules)
    network.requires_grad_(False)
    pairs = tuple((fold.conv, fold.norm) for fold in folds)
    report = FusionReport(tuple(blocks), tuple(search.left(runs, folds)), pairs)
    return FusedNetwork(network, report, argument, search.is_whole(runs), graph)


def _nothing(model: nn.Module, left: Sequence[LeftBlock]) -> str:
    seen = "".join(f"\n  {block}" for block in left[:20]) or " no blocks"
    return (
        "model must hold blocks that can be fused: [depthwise convolution ->] pointwise "
        "convolution -> activation -> pointwise convolution, with BatchNorms between them or none, "
        "additive attention, or depthwise convolutions next to other layers; in "
        f"{type(model).__name__} were seen:{seen}\n"
        "Remove hooks, merge adapters and "
        "parametrizations, fuse before torch.compile, or use swiftkernels.accelerate(model)."
    )
