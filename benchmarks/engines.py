"""Additive attention on a CPU in several engines, all with the same weights, and its peers.

An engine is built for one problem (an input of fixed shape) and a number of threads, and gives a
call without arguments. Inputs and outputs of ONNX Runtime and OpenVINO lie in torch's memory: their
calls copy nothing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speedups import OURS
from benchmarks.verification import operator_bound, relative_errors, type_bound
from benchmarks.workloads import STAGES, Stage, stage_tokens
from swiftkernels import AdditiveAttention
from swiftkernels.testing.peers import PEERS

BACKEND = "cpu"
"""Of `AdditiveAttention`, in the engine swiftkernels."""

OPSET = 20
LONGEST_CALL = 3.0
"""Seconds: self-attention is left out where a call could take longer, at `SLOW_FLOPS`."""
SLOW_FLOPS = 1e10
"""Floating-point operations a second, on one slow core."""


@dataclass(frozen=True)
class Size:
    """Tokens and width of an input, and the stages of SwiftFormers that have it."""

    name: str
    tokens: int
    """N"""
    width: int
    """C = D = E"""
    stage: Stage | None = None
    """None: random tokens."""

    def input(self, batch: int, dtype: torch.dtype) -> Tensor:
        """Tokens of photographs or random ones, [B, N, C]."""
        if self.stage is not None:
            return stage_tokens(self.stage, batch, dtype)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, self.tokens, self.width, generator=generator).to(dtype)


def _stage_sizes() -> tuple[Size, ...]:
    shared: dict[tuple[int, int], list[Stage]] = {}
    for stage in STAGES:
        shared.setdefault((stage.tokens, stage.width), []).append(stage)
    return tuple(
        Size("/".join(s.name for s in stages), *key, stages[0]) for key, stages in shared.items()
    )


STAGE_SIZES = _stage_sizes()
LARGE_SIZES = (Size("long", 65536, 64), Size("wide", 4096, 512))
"""Beyond SwiftFormer's images: many narrow tokens, and wide ones. Batch 1 only."""


class Published(nn.Module):
    """The layer of an `AdditiveAttention` as its authors publish it: the formula, no checks.

    Scores are a column [B, N, 1] here. The product with a vector in `reference.py` is the same, but
    OpenVINO's importer fails on it.
    """

    def __init__(self, module: AdditiveAttention) -> None:
        super().__init__()
        self.to_query, self.to_key = module.to_query, module.to_key
        self.w_g = module.w_g  # [E, 1]
        self.proj, self.final = module.proj, module.final
        self.scale_factor = module.scale_factor

    def forward(self, x: Tensor) -> Tensor:
        q = F.normalize(self.to_query(x), dim=-1)  # [B, N, E]
        k = F.normalize(self.to_key(x), dim=-1)
        weights = F.normalize((q @ self.w_g) * self.scale_factor, dim=1)  # [B, N, 1]
        G = (weights * q).sum(dim=1, keepdim=True)  # [B, 1, E]
        return self.final(self.proj(G * k) + q)


class Problem:
    """One input and direction: what every engine gets, and what is exact."""

    def __init__(self, size: Size, batch: int, dtype: torch.dtype, backward: bool) -> None:
        self.size, self.batch, self.dtype, self.backward = size, batch, dtype, backward
        # No leaf of autograd, as in a network.
        self.x = size.input(batch, dtype).clone().requires_grad_(backward).clone()
        generator = torch.Generator().manual_seed(1)
        self.dout = torch.randn(self.x.shape, generator=generator).to(dtype)

    def module(self, layer: str = "eager") -> nn.Module:
        """A new layer, a peer or the operator, with weights that depend on nothing but its kind."""
        torch.manual_seed(0)
        width = self.size.width
        if layer in PEERS:
            module = PEERS[layer](width)
        else:
            backend = BACKEND if layer == OURS else "reference"
            module = AdditiveAttention(width, width, num_heads=1, backend=backend)
            if layer == "published":
                module = Published(module)
        return module.to(self.dtype).eval().requires_grad_(self.backward)

    def run(self, module: nn.Module) -> list[Tensor]:
        """The output and, with a backward, the gradients of x and all parameters.

        Gradients are switched on or off by the caller, once and not in every call that is timed.
        """
        out = module(self.x)
        if not self.backward:
            return [out]
        return [out, *torch.autograd.grad(out, [self.x, *module.parameters()], self.dout)]

    @functools.cached_property
    def exact(self) -> list[Tensor]:
        """The operator in float64 by its definition, from the same rounded weights and tokens."""
        return self.exactly("eager")

    def exactly(self, layer: str) -> list[Tensor]:
        """`layer` in float64, from the same rounded weights and tokens."""
        double = copy.copy(self)
        double.x, double.dout = self.x.detach().double(), self.dout.double()
        double.x.requires_grad_(self.backward)
        return double.run(self.module(layer).double())

    @functools.cached_property
    def eager_errors(self) -> list[float]:
        """Relative errors of the eager layer: output, gradients."""
        return relative_errors(self.run(self.module()), self.exact)

    @functools.cached_property
    def onnx(self) -> bytes:
        """The published layer as an ONNX model."""
        # What torchvision would add is not missed.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                self.module("published"), (self.x,), dynamo=True, opset_version=OPSET, verbose=False
            )
        assert program is not None
        return program.model_proto.SerializeToString()

    def bounds(self, engine: str) -> list[float]:
        """How large the relative errors of `engine` may be."""
        if engine == OURS:
            return [operator_bound(error, self.dtype) for error in self.eager_errors]
        rows = self.size.tokens * (self.batch if self.backward else 1)
        return [type_bound(self.dtype, max(self.size.width, rows))] * len(self.exact)

    def errors(self, engine: str, results: list[Tensor]) -> list[float]:
        """Relative errors of what `engine` gave."""
        return relative_errors(results, self.exactly(engine) if engine in PEERS else self.exact)


Call = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Engine:
    """How to build a call, and what for."""

    build: Callable[[Problem, int], Call]
    """From a problem and a number of threads."""
    backward: bool = True
    half: bool = True
    """Whether it also runs types other than float32."""
    requires: tuple[str, ...] = ()
    """Packages that may be missing."""

    def supports(self, dtype: torch.dtype, backward: bool) -> bool:
        return (self.backward or not backward) and (self.half or dtype == torch.float32)

    def missing(self) -> list[str]:
        """Required packages that are not installed."""
        return [name for name in self.requires if importlib.util.find_spec(name) is None]


def _plain(layer: str) -> Callable[[Problem, int], Call]:
    def build(problem: Problem, threads: int) -> Call:
        module = problem.module(layer)
        return lambda: problem.run(module)

    return build


def _compile(problem: Problem, threads: int) -> Call:
    # Inductor writes the number of threads into its code, and its cache does not know it otherwise.
    options: dict[str, Any] = {"cpp.threads": threads}
    module: Any = torch.compile(problem.module(), dynamic=False, fullgraph=True, options=options)
    return lambda: problem.run(module)


def _compile_max(problem: Problem, threads: int) -> Call:
    import torch._inductor.config  # takes seconds: not in every process that measures memory

    # As mode="max-autotune-no-cudagraphs", which cannot be given beside options.
    options: dict[str, Any] = {
        **torch._inductor.list_mode_options("max-autotune-no-cudagraphs"),
        "freezing": True,
        "autotune_num_choices_displayed": 0,
        "cpp.threads": threads,
    }
    module: Any = torch.compile(problem.module(), dynamic=False, fullgraph=True, options=options)
    # Dynamo looks at the global setting. What tuning reports goes to stderr in any case.
    with torch._inductor.config.patch(freezing=True), contextlib.redirect_stderr(io.StringIO()):
        problem.run(module)
    return lambda: problem.run(module)


def _onnxruntime(problem: Problem, threads: int) -> Call:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Its threads go on waiting in a loop during a run, but not into the next engine's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        problem.onnx, options, providers=["CPUExecutionProvider"]
    )
    x, out = problem.x, torch.empty_like(problem.x)
    binding = session.io_binding()
    for bind, name, tensor in (
        (binding.bind_input, session.get_inputs()[0].name, x),
        (binding.bind_output, session.get_outputs()[0].name, out),
    ):
        bind(name, "cpu", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())

    def call() -> list[Tensor]:
        session.run_with_iobinding(binding)
        return [out]

    return call


def _openvino(problem: Problem, threads: int) -> Call:
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(core.read_model(io.BytesIO(problem.onnx)), "CPU", settings)
    request = compiled.create_infer_request()
    x, out = problem.x, torch.empty_like(problem.x)
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(openvino.Tensor(out.numpy(), shared_memory=True))

    def call() -> list[Tensor]:
        # Less Python than infer(), which gathers the outputs in a dictionary.
        request.start_async()
        request.wait()
        return [out]

    return call


ENGINES = {
    OURS: Engine(_plain(OURS)),
    "eager": Engine(_plain("eager")),
    "published": Engine(_plain("published")),
    "compile": Engine(_compile),
    "compile-max": Engine(_compile_max, backward=False),
    "onnxruntime": Engine(
        _onnxruntime, backward=False, half=False, requires=("onnx", "onnxscript", "onnxruntime")
    ),
    "openvino": Engine(
        _openvino, backward=False, half=False, requires=("onnx", "onnxscript", "openvino")
    ),
    **{peer: Engine(_plain(peer)) for peer in ("mhsa", "separable", "xca", "linear")},
}


def too_slow(engine: str, problem: Problem) -> bool:
    """Whether a call could take more than `LONGEST_CALL` seconds: self-attention is quadratic."""
    if engine != "mhsa":
        return False
    flops = 4 * problem.batch * problem.size.tokens**2 * problem.size.width
    return flops * (3.5 if problem.backward else 1) > LONGEST_CALL * SLOW_FLOPS


def version(package: str) -> str:
    """Of an installed package; "" if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def isa() -> str:
    """The instruction set that the operator's compiled kernels use; "" where there are none."""
    if BACKEND != "cpu":
        return ""
    try:
        library: Any = importlib.import_module("swiftkernels.backends.cpu.library")
        return str(library.loaded().name)
    except ImportError:
        return ""
