"""The fused network, and the report of what became of each block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor, nn

from swiftkernels.fusion.chain import FusedChain, chains_are_plain, plain_chains
from swiftkernels.fusion.find import LeftBlock
from swiftkernels.fusion.graphs import GraphNote, Graphs
from swiftkernels.utils import checks


@dataclass(frozen=True)
class FusedBlock:
    """A block that a chain computes."""

    name: str
    kind: str
    """Its class."""
    steps: tuple[str, ...]
    """What it became: kinds of steps."""
    chain: str
    """Name of the chain in the fused network."""

    def __str__(self) -> str:
        name = self.name or "(the model)"
        return f"{name}: {self.kind}, as {', '.join(self.steps)} in chain {self.chain or '(all)'}"


@dataclass(frozen=True)
class FusionReport:
    """What `fuse_for_inference` did with each block; print it."""

    fused: tuple[FusedBlock, ...]
    left: tuple[LeftBlock, ...]
    """Blocks and layers that run as in the model, and why."""
    folded: tuple[tuple[str, str], ...] = ()
    """Convolutions outside of the chains, and the BatchNorms that were folded into them."""
    graphs: tuple[GraphNote, ...] = ()
    """The shapes of the images so far, and which of them have a CUDA graph, if there are graphs."""

    def __str__(self) -> str:
        chains = len({block.chain for block in self.fused})
        lines = [f"{len(self.fused)} blocks fused, chains: {chains}"]
        lines += [f"  {block}" for block in self.fused]
        if self.folded:
            lines.append("BatchNorms folded into convolutions outside of the chains:")
            lines += [f"  {norm} into {conv}" for conv, norm in self.folded]
        if self.left:
            lines += ["not fused:", *(f"  {block}" for block in self.left)]
        if self.graphs:
            lines += ["CUDA graphs:", *(f"  {note}" for note in self.graphs)]
        return "\n".join(lines)


class FusedNetwork(nn.Module):
    """A network for inference in which chains of blocks run as one program.

    `fuse_for_inference` makes it. The parameters require no gradient. It takes the images only, by
    position or by the name that the model's forward gives them. If one chain computes all of a
    network of this library or of timm, its own forward is not run, nor are hooks that are added to
    its parts later.

    If the model was fused on a CUDA device, and not with `graph=False`, images of a shape and
    strides that came before are answered by a CUDA graph.
    The output is a copy, which later calls leave as it is. Several threads and streams may call the
    network: its graphs are run for one after the other. Graphs are dropped when a weight is written
    or the network is moved. The network runs without a graph, and the report says why, under
    autocast, in a trace, transform or other capture, with hooks, on other devices than CUDA's, for
    more than 16 shapes, and where the capture fails. Copies and pickles have no graphs yet.

    Attributes:
        network: the copy of the model, with a `FusedChain` in the place of the first block of each
            chain, and `Passed` in the place of the others. Only its forward is right: other
            methods, such as `forward_features`, and options that are set later see what chains
            return.
        report: what became of each block, and of the shapes of images (`FusionReport`).

    Raises:
        TypeError, ValueError: a call with other arguments, in training mode, with images of
            another type or device than the weights, or with images that require a gradient.
    """

    def __init__(
        self,
        network: nn.Module,
        report: FusionReport,
        argument: str,
        whole: bool = False,
        graph: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self._report = report
        self._graphs = Graphs() if graph else None
        self._argument = argument
        self._whole = whole
        # In a tuple, or it would be a child module twice.
        self._chains = tuple(part for part in network.modules() if isinstance(part, FusedChain))
        self.eval()

    def forward(self, x: Any = None, /, *others: Any, **named: Any) -> Any:
        """The output of the model for images x [B, C, H, W]."""
        if isinstance(x, torch.fx.Proxy):
            return self._compute(x)
        images = self._checked(x, others, named)
        if torch.compiler.is_compiling() or self._graphs is None or chains_are_plain():
            return self._compute(images)
        if getattr(self, "_is_replica", False):  # of DataParallel: the graphs are another device's
            return self._compute(images)
        return self._graphs.run(self._compute, self._parts(), images)

    def _compute(self, images: Any) -> Any:
        return self._chains[0](images).flatten(1) if self._whole else self.network(images)

    def _parts(self) -> Iterable[nn.Module]:
        """The modules that compute the output."""
        return self._chains[:1] if self._whole else self.network.modules()

    def plain(self, x: Any = None, /, *others: Any, **named: Any) -> Any:
        """The same, with all chains in PyTorch's operators."""
        with plain_chains():
            return self.forward(x, *others, **named)

    @property
    def report(self) -> FusionReport:
        """What became of each block and, where there may be graphs, of the shapes of images."""
        if self._graphs is None:
            return self._report
        return replace(self._report, graphs=self._graphs.notes)

    def release_graphs(self) -> None:
        """Drop the CUDA graphs and free their memory; shapes that come again are captured again."""
        if self._graphs is not None:
            self._graphs.release()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedNetwork:
        self.release_graphs()  # they hold the weights as they were
        return cast(FusedNetwork, super()._apply(fn, recurse))

    def extra_repr(self) -> str:
        chains = len({block.chain for block in self.report.fused})
        return f"{len(self.report.fused)} blocks fused, chains: {chains}"

    def _checked(self, x: Any, others: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
        """The images of a call, if the fused network can answer it."""
        given = dict(named)
        if x is None:
            x = given.pop(self._argument, None)
        elif self._argument in given:
            raise TypeError(f"a fused network takes images once; got {self._argument} twice.")
        defaults = defaults_of(self.network) if given else {}
        for name, value in given.items():
            if name not in defaults or value is not defaults[name]:
                raise TypeError(
                    f"a fused network takes images only; got {name}, a {type(value).__name__}. "
                    "Call the original model with it, or set the option before fusing."
                )
        if others:
            raise TypeError(
                f"a fused network takes images only; got {len(others)} more. Call the original "
                "model with them."
            )
        checks.check_tensor(self._argument, x)
        like, name = self._chains[0].like, self._argument
        if self.training or self.network.training:
            raise ValueError(
                "a fused network must be in evaluation mode, because its BatchNorms are folded; "
                "got one in training mode. Call .eval(), or train the original model and fuse it "
                "again."
            )
        if not x.is_floating_point():
            raise TypeError(
                f"{name} must have the dtype of the weights, {like.dtype}; got {x.dtype}. Convert "
                f"it first: {name}.to({like.dtype})."
            )
        if x.dtype != like.dtype:
            raise TypeError(
                f"{name} must have the dtype of the weights, {like.dtype}; got {x.dtype}. Convert "
                f"it: {name}.to({like.dtype}), or convert the fused network: .to({x.dtype}), which "
                "computes float64 in PyTorch's operators."
            )
        checks.check_device(name, x, "the weights", like)
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{name} must not require a gradient: a fused network is for inference. Call it "
                f"under torch.no_grad(), pass {name}.detach(), or use the original model."
            )
        return cast(Tensor, x)


def defaults_of(network: nn.Module) -> dict[str, Any]:
    """The parameters of a network's forward, and their default values."""
    if isinstance(network, FusedChain):
        return {"x": inspect.Parameter.empty}
    try:
        found = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: p.default for p in found}
