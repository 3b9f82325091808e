"""What the benchmarks compare: a problem, and the engines that solve it.

A problem is one input of an operator with a dtype, a device and a direction. An engine is a layer
and a way to run it: this library's kernels, eager PyTorch, compilers, runtimes, and other
attentions (peers). A new engine or peer is a new entry of `ENGINES`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftkernels.ops.additive_attention.benchmark import BENCHMARK as ADDITIVE_ATTENTION
from swiftkernels.ops.benchmark import Benchmark, Size
from swiftkernels.ops.separable_attention.layer import SeparableAttention
from swiftkernels.testing.peers import PEERS
from swiftkernels.testing.tolerance import budget, relative_errors, type_bound

OURS = "swiftkernels"

OPSET = 20
"""The opset of ONNX models."""

LONGEST_CALL = 3.0
"""Seconds; engines that take longer for one call are not measured."""

SLOW_FLOPS = 2e10
"""Floating-point operations a second of a slow CPU core, to estimate self-attention's time."""

EXACT_SCORES = 1 << 24
"""Most N x N scores of self-attention that are computed in float64 at a time."""

RUNTIMES = {
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "litert": ("litert_torch", "ai_edge_litert"),
    "ncnn": ("pnnx", "ncnn"),
}
"""The packages of each runtime that models are converted for; each may be missing."""

Call = Callable[[], list[Tensor]]
"""Returns the output and, with a backward, the gradients of x and all parameters."""

Make = Callable[["Problem"], nn.Module]
"""Makes a layer for a problem."""


class Problem:
    """One input and direction of an operator, the same for all engines, and the exact results.

    Args:
        size: N and C of the input.
        batch: B.
        dtype: of input and weights.
        backward: whether gradients are computed too.
        device: of input and weights.
        tokens: the input; by default random.
        benchmark: the operator as it is measured.
        backend: of the operator, in the engine "swiftkernels".
    """

    def __init__(
        self,
        size: Size,
        batch: int,
        dtype: torch.dtype,
        backward: bool,
        device: torch.device | str = "cpu",
        *,
        tokens: Tensor | None = None,
        benchmark: Benchmark = ADDITIVE_ATTENTION,
        backend: str = "auto",
    ) -> None:
        self.size, self.batch, self.dtype, self.backward = size, batch, dtype, backward
        self.device, self.benchmark, self.backend = torch.device(device), benchmark, backend
        shape = benchmark.shape(size, batch)
        drawn, dout = (
            torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
        )
        x = (drawn if tokens is None else tokens).to(device, dtype).clone()
        with torch.enable_grad():
            # The clone of a leaf, as inside a network: autograd accumulates no gradient in it.
            self.x = x.requires_grad_(backward).clone()
        self.dout = dout.to(device, dtype)
        self._exact: dict[Make, list[Tensor]] = {}
        self._eager_errors: dict[Make, list[float]] = {}

    def module(self, make: Make) -> nn.Module:
        """A new layer; the weights of all layers of one operator are the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = make(self)
        return module.to(self.device, self.dtype).eval().requires_grad_(self.backward)

    def call(self, module: nn.Module) -> Call:
        """The call of a module on this input; gradients must be enabled if there is a backward."""
        return _call(module, self.x, self.dout, self.backward)

    def exact(self, make: Make) -> list[Tensor]:
        """The results of a layer in float64, from the same rounded numbers."""
        if make not in self._exact:
            self._exact[make] = self._compute_exact(make)
        return self._exact[make]

    def _compute_exact(self, make: Make) -> list[Tensor]:
        # Intel's GPUs may lack float64.
        device = torch.device("cpu") if self.device.type == "xpu" else self.device
        module = self.module(make).to(device, torch.float64)
        # In chunks of the batch, because self-attention would not fit in memory.
        chunk = max(1, EXACT_SCORES // max(1, self.size.tokens) ** 2)
        parts = []
        for x, dout in zip(self.x.split(chunk), self.dout.split(chunk), strict=True):
            leaf = x.detach().to(device, torch.float64).requires_grad_(self.backward)
            results = _call(module, leaf, dout.to(device, torch.float64), self.backward)()
            parts.append([t.detach() for t in results])
        # Output and gradient of x are per batch element, gradients of weights are sums over them.
        return [
            torch.cat(tensors) if i < 1 + self.backward else torch.stack(tensors).sum(0)
            for i, tensors in enumerate(zip(*parts, strict=True))
        ]

    def eager_errors(self, make: Make) -> list[float]:
        """Relative errors of a layer run by eager PyTorch in the problem's dtype."""
        if make not in self._eager_errors:
            results = self.call(self.module(make))()
            self._eager_errors[make] = relative_errors(results, self.exact(make))
        return self._eager_errors[make]

    def least_bytes(self, module: nn.Module) -> int:
        """Bytes of input, output and weights, each once; with a backward, also their gradients."""
        tensors = [self.x, self.dout, *module.parameters()]
        return sum(t.nbytes for t in tensors) * (1 + self.backward)


def _call(module: nn.Module, x: Tensor, dout: Tensor, backward: bool) -> Call:
    if not backward:
        return lambda: [module(x)]
    leaves = [x, *module.parameters()]

    def forward_and_backward() -> list[Tensor]:
        out = module(x)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    return forward_and_backward


def missing(packages: Sequence[str]) -> list[str]:
    """The packages of these that are not installed.

    Example:
        >>> missing(["torch", "no_such_package"])
        ['no_such_package']
    """
    return [name for name in packages if importlib.util.find_spec(name) is None]


@dataclass(frozen=True)
class Engine:
    """A layer, how to run it, and how to judge its results."""

    layer: Make
    definition: Make | None = None
    """The eager layer with the same weights that defines the exact results; None: `layer`."""
    build: Callable[[Problem, nn.Module], Call] = Problem.call
    """How to run the layer; it may compile."""
    fused: bool = False
    """Whether it is a kernel of this library, judged by `budget`; others by `type_bound`."""
    backward: bool = True
    half: bool = True
    """Whether it runs dtypes other than float32."""
    quadratic: bool = False
    """Whether its time grows with the square of N."""
    requires: tuple[str, ...] = ()
    """Packages that may be missing."""

    def supports(self, dtype: torch.dtype, backward: bool) -> bool:
        return (self.backward or not backward) and (self.half or dtype == torch.float32)

    def missing(self) -> list[str]:
        """Required packages that are not installed."""
        return missing(self.requires)

    def too_slow(self, problem: Problem) -> bool:
        """Whether a call on a CPU could take more than `LONGEST_CALL`, by an estimate."""
        if not self.quadratic or problem.device.type != "cpu":
            return False
        flops = 4 * problem.batch * problem.size.tokens**2 * problem.size.width
        return flops * (3.5 if problem.backward else 1) > LONGEST_CALL * SLOW_FLOPS

    def exact(self, problem: Problem) -> list[Tensor]:
        """The exact results."""
        return problem.exact(self.definition or self.layer)

    def bounds(self, problem: Problem) -> list[float]:
        """The largest relative error that each result may have."""
        if self.fused:
            errors = problem.eager_errors(self.definition or self.layer)
            return [budget(error, problem.dtype) for error in errors]
        rows = problem.size.tokens * (problem.batch if problem.backward else 1)
        bound = type_bound(problem.dtype, max(problem.size.width, rows))
        return [bound] * len(self.exact(problem))


def _fused(problem: Problem) -> nn.Module:
    return problem.benchmark.layer(problem.size.width, problem.backend)


def _eager(problem: Problem) -> nn.Module:
    return problem.benchmark.layer(problem.size.width, "reference")


def _published(problem: Problem) -> nn.Module:
    return problem.benchmark.published(_eager(problem))


def _peer(make: Callable[[int], nn.Module]) -> Make:
    return lambda problem: make(problem.size.width)


def _separable(backend: str) -> Make:
    return lambda problem: SeparableAttention(problem.size.width, backend=backend)


def compiled(module: nn.Module, **options: Any) -> nn.Module:
    """The module, to be compiled for the shapes of its first call and the present threads."""
    # Inductor writes the number of threads into its code, but not into the key of its cache.
    options = {"cpp.threads": torch.get_num_threads(), **options}
    made: Any = torch.compile(module, dynamic=False, fullgraph=True, options=options)
    return cast(nn.Module, made)


def compile_frozen(
    module: nn.Module, call_of: Callable[[nn.Module], Call], mode: str = "default"
) -> Call:
    """The call of a module that is compiled here, with its weights as constants."""
    import torch._inductor.config  # here, because it takes seconds and memory

    # torch.compile accepts either a mode or options.
    options: dict[str, Any] = {
        **torch._inductor.list_mode_options(mode),
        "freezing": True,
        "autotune_num_choices_displayed": 0,
    }
    call = call_of(compiled(module, **options))
    # Dynamo reads the global setting. Tuning prints to stderr in any case.
    with torch._inductor.config.patch(freezing=True), contextlib.redirect_stderr(io.StringIO()):
        call()
    return call


def onnx_model(module: nn.Module, x: Tensor) -> bytes:
    """A module as an ONNX model, for inputs of the shape of x."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about missing torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, (x,), dynamo=True, opset_version=OPSET, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def onnxruntime_call(model: bytes, x: Tensor, out: Tensor) -> Call:
    """Run an ONNX model from x to out. Both are in torch's memory: the call copies nothing."""
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its threads may wait in a loop during a run, but not while the next engine is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    float32 = x.numpy().dtype.type
    binding = session.io_binding()
    for bind, name, tensor in (
        (binding.bind_input, session.get_inputs()[0].name, x),
        (binding.bind_output, session.get_outputs()[0].name, out),
    ):
        bind(name, "cpu", 0, float32, tuple(tensor.shape), tensor.data_ptr())

    def call() -> list[Tensor]:
        session.run_with_iobinding(binding)
        return [out]

    return call


def openvino_call(model: bytes, x: Tensor, out: Tensor) -> Call:
    """Run an ONNX model from x to out. Both are in torch's memory: the call copies nothing."""
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    read = core.read_model(io.BytesIO(model))
    request = core.compile_model(read, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(openvino.Tensor(out.numpy(), shared_memory=True))

    def call() -> list[Tensor]:
        # Less Python than infer(), which collects the outputs in a dictionary.
        request.start_async()
        request.wait()
        return [out]

    return call


def litert_call(module: nn.Module, x: Tensor) -> Call:
    """Run a module in LiteRT, converted for the shape of x. Only the output is copied."""
    litert_torch: Any = importlib.import_module("litert_torch")
    interpreters: Any = importlib.import_module("ai_edge_litert.interpreter")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as silent:
        # It prints its steps.
        silent.enter_context(contextlib.redirect_stdout(io.StringIO()))
        silent.enter_context(contextlib.redirect_stderr(io.StringIO()))
        path = Path(folder, "model.tflite")
        litert_torch.convert(module, (x,)).export(str(path))
        model = path.read_bytes()
    interpreter = interpreters.Interpreter(model_content=model, num_threads=torch.get_num_threads())
    interpreter.allocate_tensors()
    (output,) = interpreter.get_output_details()
    # It stays in the interpreter's memory from call to call.
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x.numpy())

    def call() -> list[Tensor]:
        interpreter.invoke()
        return [torch.from_numpy(interpreter.get_tensor(output["index"]))]

    return call


def ncnn_call(module: nn.Module, x: Tensor) -> Call:
    """Run a module, converted by pnnx for one input of the shape of x, in ncnn, in float32.

    Raises:
        ValueError: x has several batch elements, which ncnn does not know.
    """
    if len(x) > 1:
        raise ValueError(f"x must be one batch element, as ncnn takes no batches; got {len(x)}.")
    pnnx: Any = importlib.import_module("pnnx")
    ncnn: Any = importlib.import_module("ncnn")
    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{option}", False)
    with tempfile.TemporaryDirectory() as folder:
        # pnnx warns that it cannot convert normalize over the last of two axes, and converts it to
        # something else.
        with mock.patch.object(F, "normalize", _normalize), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(module, x).save(str(Path(folder, "model.pt")))
        shape = ",".join(map(str, x.shape))
        command = [pnnx.EXEC_PATH, "model.pt", f"inputshape=[{shape}]f32", "fp16=0"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        net.load_param(str(Path(folder, "model.ncnn.param")))
        net.load_model(str(Path(folder, "model.ncnn.bin")))
    mat = ncnn.Mat(x[0].numpy())

    def call() -> list[Tensor]:
        extractor = net.create_extractor()
        extractor.input("in0", mat)
        return [torch.from_numpy(extractor.extract("out0")[1].numpy().copy()).unsqueeze(0)]

    return call


def _normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Tensor:
    """`F.normalize` in products and sums."""
    return x * torch.rsqrt((x * x).sum(dim, keepdim=True) + eps**2)


def _compile(problem: Problem, module: nn.Module) -> Call:
    return problem.call(compiled(module))


def _compile_max(problem: Problem, module: nn.Module) -> Call:
    return compile_frozen(module, problem.call, "max-autotune-no-cudagraphs")


@functools.lru_cache(maxsize=1)  # both runtimes get the model of one problem, one after the other
def _onnx(problem: Problem) -> bytes:
    """The published layer as an ONNX model."""
    return onnx_model(problem.module(_published), problem.x)


def _onnxruntime(problem: Problem, _: nn.Module) -> Call:
    return onnxruntime_call(_onnx(problem), problem.x, torch.empty_like(problem.x))


def _openvino(problem: Problem, _: nn.Module) -> Call:
    return openvino_call(_onnx(problem), problem.x, torch.empty_like(problem.x))


ENGINES = {
    OURS: Engine(_fused, _eager, fused=True),
    "eager": Engine(_eager),
    "published": Engine(_published, _eager),
    "compile": Engine(_eager, build=_compile),
    "compile-max": Engine(_eager, build=_compile_max, backward=False),
    "onnxruntime": Engine(
        _published, _eager, _onnxruntime, backward=False, half=False,
        requires=RUNTIMES["onnxruntime"],
    ),
    "openvino": Engine(
        _published, _eager, _openvino, backward=False, half=False,
        requires=RUNTIMES["openvino"],
    ),
    **{name: Engine(_peer(make), quadratic=name == "mhsa") for name, make in PEERS.items()},
    "separable_fused": Engine(_separable("auto"), _separable("reference"), fused=True),
}  # fmt: skip
"""The engines by their names in commands and CSV files."""

COMPARED_PEERS = ("mhsa", "separable", "separable_fused", "xca", "linear")
"""The peers that commands compare with by default."""
