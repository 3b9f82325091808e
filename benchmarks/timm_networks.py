"""Networks of timm in every engine: built, verified, and timed in turn.

All engines of a network have the weights of timm's model and the same images. Their outputs are
compared with float64. timm is needed (torchvision may be missing); runtimes are optional.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import swiftkernels
from swiftkernels.backends import devices
from swiftkernels.testing import engines, harness
from swiftkernels.testing.engines import OURS, Call
from swiftkernels.testing.timing import Timing, clock_name, measure_in_turn, process_and_wall_time
from swiftkernels.testing.tolerance import relative_error
from swiftkernels.utils.text import first_line

CLASSES = 1000
MIN_ROUNDS = 5
TOLERANCE = 100 * torch.finfo(torch.float32).eps
"""Largest relative error of an output. An engine that rounded to bfloat16 or TF32 would exceed it:
their relative precision is 2^-8 and 2^-11."""
VERSIONS = ("timm", "onnxruntime", "openvino", "ai-edge-litert", "ncnn")
"""Packages of which the version is written down."""

Row = dict[str, Any]


class Network:
    """A model in evaluation mode and its images, the same for all engines.

    Args:
        name: timm's name.
        model: the network; by default timm's.
        side: height and width of the images.
        exact: of another form of the network: the output of the first and the last image.
    """

    def __init__(
        self,
        name: str,
        batch: int,
        side: int,
        model: nn.Module | None = None,
        exact: Tensor | None = None,
    ) -> None:
        self.name, self.side = name, side
        self.images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
        self.model = make_model(name) if model is None else model
        self._exact = exact

    @property
    def exact(self) -> Tensor:
        """The output for the first and the last image in float64."""
        if self._exact is None:
            images = ends(self.images).double()
            (self._exact,) = call_of(copy.deepcopy(self.model).double(), images)()
        return self._exact

    @functools.cached_property
    def onnx(self) -> bytes:
        return engines.onnx_model(self.model, self.images)

    def new_output(self) -> Tensor:
        return torch.empty(len(self.images), CLASSES)

    def error(self, call: Call) -> float:
        """The relative error of an engine's output.

        Raises:
            RuntimeError: the error is too large.
        """
        error = relative_error(ends(call()[0]), self.exact)
        if not error <= TOLERANCE:
            raise RuntimeError(f"its output has a relative error of {error:.1e}")
        return error


def ends(batch: Tensor) -> Tensor:
    """The first and the last image or output."""
    return batch[:: max(1, len(batch) - 1)]


def make_model(name: str, **options: Any) -> nn.Module:
    """timm's model in evaluation mode, `with_random_scales`."""
    from tests.stubs import import_timm

    torch.manual_seed(0)
    model: nn.Module = import_timm().create_model(name, num_classes=CLASSES, **options)
    return with_random_scales(model).eval()


def with_random_scales(model: nn.Module) -> nn.Module:
    """The model with random scales of residual branches and statistics of BatchNorms.

    Models start with scales of zero or 1e-5 and with trivial statistics, which hide errors.
    """
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            small = key.endswith(("weight", "gamma")) and tensor.abs().max() < 1e-3
            if small or "layer_scale" in key or "running_var" in key:
                tensor.uniform_(0.5, 1.5)
            elif "running_mean" in key:
                tensor.normal_(0, 0.1)
    return model


def merged(model: nn.Module) -> nn.Module:
    """A copy whose branches are merged by its own methods, which some networks have."""
    merge: Callable[[nn.Module], nn.Module] = importlib.import_module(
        "timm.utils"
    ).reparameterize_model
    return merge(model).eval()  # merged convolutions start in training mode


def folded(model: nn.Module, images: Tensor) -> nn.Module | None:
    """A copy with merged branches and folded BatchNorms; None if there are none.

    timm merges the branches of networks that are made for it, such as FastViT and RepViT. Then each
    BatchNorm that alone reads the output of a convolution is folded into it.
    """
    result = merged(model)
    uses = _Uses()
    outputs: dict[int, tuple[str, Tensor]] = {}
    pairs: dict[str, tuple[str, Tensor]] = {}

    def remember(name: str, _: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        outputs[id(out)] = name, out  # kept alive, so that no later tensor has its id
        uses.counts[id(out)] = 0  # of an earlier tensor

    def pair(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if found := outputs.get(id(inputs[0])):
            pairs[name] = found

    handles = []
    for name, part in result.named_modules():
        if isinstance(part, nn.Conv2d):
            handles.append(part.register_forward_hook(functools.partial(remember, name)))
        elif isinstance(part, nn.BatchNorm2d):
            handles.append(part.register_forward_pre_hook(functools.partial(pair, name)))
    with uses:
        call_of(result, images[:1])()
    for handle in handles:
        handle.remove()
    for norm_name, (conv_name, out) in pairs.items():
        if uses.counts[id(out)] > 1:
            continue
        norm: Any = result.get_submodule(norm_name)
        conv: Any = result.get_submodule(conv_name)
        result.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        # timm's BatchNorms hold the activation behind them.
        behind = [part for name in ("drop", "act") if (part := getattr(norm, name, None))]
        result.set_submodule(norm_name, nn.Sequential(*behind))
    return result if result.state_dict().keys() != model.state_dict().keys() else None


class _Uses(TorchDispatchMode):
    """Counts how many operators read each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        read = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self.counts.update(read)
        return func(*args, **(kwargs or {}))


def accelerated(model: nn.Module) -> nn.Module:
    """A copy of the model, accelerated."""
    model = copy.deepcopy(model)
    swiftkernels.accelerate(model)
    return model


def call_of(module: nn.Module, images: Tensor) -> Call:
    """The forward of a module."""

    @torch.no_grad()
    def call() -> list[Tensor]:
        return [module(images)]

    return call


def in_channels_last(module: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy of a module, and its images, in channels_last memory format."""
    model: Any = copy.deepcopy(module)
    images = images.contiguous(memory_format=torch.channels_last)
    return model.to(memory_format=torch.channels_last), images


def _channels_last(network: Network) -> Call:
    return call_of(*in_channels_last(network.model, network.images))


def _compile(mode: str, network: Network) -> Call:
    with torch.no_grad():
        return engines.compile_frozen(
            network.model, lambda made: call_of(made, network.images), mode
        )


def _onnxruntime(network: Network) -> Call:
    return engines.onnxruntime_call(network.onnx, network.images, network.new_output())


def _openvino(network: Network) -> Call:
    return engines.openvino_call(network.onnx, network.images, network.new_output())


MODULES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "timm": lambda model: model,
    "accelerated": accelerated,
    OURS: swiftkernels.fuse_for_inference,
}
"""Engines that are modules."""
BUILT: dict[str, Callable[[Network], Call]] = {
    "channels_last": _channels_last,
    "compile": functools.partial(_compile, "default"),
    "compile-max": functools.partial(_compile, "max-autotune-no-cudagraphs"),
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "litert": lambda network: engines.litert_call(network.model, network.images),
    "ncnn": lambda network: engines.ncnn_call(network.model, network.images),
}
"""Other engines, of a forward only."""


def build(network: Network, engine: str) -> Call:
    """The forward of a network in an engine."""
    if engine in MODULES:
        return call_of(MODULES[engine](network.model), network.images)
    return BUILT[engine](network)


def build_all(
    wanted: Iterable[str],
    make: Callable[[str], tuple[Call, float]],
    show: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Call], dict[str, float], list[str]]:
    """Calls and errors of those engines that work, and what failed.

    `make` returns the call of an engine and the relative error of its output; `show` gets the name
    of the engine that is being built.
    """
    torch.compiler.reset()  # old graphs would count for the limit of recompilations
    gc.collect()
    calls, errors, failures = {}, {}, []
    for name in wanted:
        show(name)
        try:
            calls[name], errors[name] = make(name)
        except Exception as error:  # of a compiler, for example; the others are measured
            failures.append(f"{name}: {first_line(error)}")
    return calls, errors, failures


def time_all(calls: Mapping[str, Call], seconds: float) -> dict[str, Row]:
    """Times of the calls, taken in turn: columns of a row for each."""
    rows: dict[str, Row] = {}
    for name, found in measure_in_turn(calls, process_and_wall_time, seconds, MIN_ROUNDS).items():
        rows[name] = {"rounds": len(found)}
        for clock, samples in zip(("process", "wall"), zip(*found, strict=True), strict=True):
            rows[name] |= Timing(samples).columns(f"{clock}_")
    return rows


def problem_columns(network: Network, direction: str = "forward") -> Row:
    """The columns that all engines of a problem share."""
    return {
        "batch": len(network.images),
        "side": network.side,
        "dtype": "float32",
        "direction": direction,
        "threads": torch.get_num_threads(),
        "clock": clock_name("cpu"),
    }


def machine() -> Row:
    """Hardware and versions."""
    return {
        "device": devices.name(torch.device("cpu")),
        "isa": harness.isa(),
        "torch": torch.__version__,
        **{package: harness.version(package) for package in VERSIONS},
    }


def installed(names: Sequence[str]) -> list[str]:
    """The engines that can run here; the others are printed."""
    present = []
    for name in names:
        if missing := engines.missing(engines.RUNTIMES.get(name, ())):
            print(f"Without {name}. To add it: pip install {' '.join(missing)}")
        else:
            present.append(name)
    return present
