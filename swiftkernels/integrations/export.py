"""Models for other runtimes: torch.export programs, ONNX, TorchScript, Core ML.

Each function takes a SwiftFormer of this library, one made elsewhere and accelerated, or a single
attention layer; it exports the model as it is in evaluation, in plain operators, runs the result
beside the model, and writes the file only if they agree. The model stays as it was.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from swiftkernels.ops.additive_attention.layer import AttentionForward, in_evaluation
from swiftkernels.testing.tolerance import budget, relative_error
from swiftkernels.utils import checks, files
from swiftkernels.utils.extras import need
from swiftkernels.utils.progress import timed

IMAGES = (1, 3, 224, 224)
AXES = {3: {0: "batch", 1: "tokens"}, 4: {0: "batch", 2: "height", 3: "width"}}
"""What may vary in tokens [B, N, C] and images [B, C, H, W]."""
ULPS = 16
"""Rounding steps granted to a whole network in another runtime, beside twice its own error."""
FIRST_ONNX_OPSET = 18
"""Of PyTorch's present exporter; the one before also writes 17."""

Run = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Exported:
    """What was written, and how near it comes to the model; print it."""

    path: Path
    format: str
    shape: tuple[int | str, ...]
    """Of the input; axes that may vary have names."""
    program: Any
    """In memory: an ExportedProgram, ModelProto, ScriptModule or MLModel."""
    errors: Mapping[tuple[int, ...], float]
    """Relative error of the outputs against the model in float64, by the input's shape; empty if
    they were not compared."""
    choices: tuple[tuple[int, ...], ...] = ()
    """Further shapes of the input, of Core ML."""

    def __str__(self) -> str:
        errors = (f"{error:.1e} at {_times(shape)}" for shape, error in self.errors.items())
        compared = f"relative error {', '.join(errors)}" if self.errors else "not compared"
        shapes = " or ".join(map(_times, (self.shape, *self.choices)))
        return f"{self.path}: {self.format}, input {shapes}, {compared}"


def to_torch_export(
    model: nn.Module,
    path: str | Path,
    shape: Sequence[int] = IMAGES,
    *,
    axes: Mapping[int, str] | None = None,
    compare: bool = True,
    verbose: bool = True,
) -> Exported:
    """Write a program of `torch.export` (.pt2); `torch.export.load(path).module()` runs it.

    Args:
        model: any module that takes one tensor, images [B, C, H, W] or tokens [B, N, C].
        path: of the file.
        shape: of an input to export with.
        axes: the axes of it that may vary, and their names; by default all but the channels. {}:
            none. In a program of `torch.export` an axis that may vary is never of size 1, in no
            feature map either: a SwiftFormer takes heights and widths above 32, or with axes={}
            the one size. The batch is exempt.
        compare: run model and program on random inputs, of `shape` and, where axes may vary, of a
            larger one.
        verbose: say on stderr what goes on, and how long each step took.

    Raises:
        TypeError, ValueError: a wrong argument, or a model that cannot be exported so.
        RuntimeError: the program computes something else than the model.
        OSError: the file could not be written; an older one is as it was.

    Example:
        >>> from swiftkernels.models import swiftformer_xs
        >>> print(to_torch_export(swiftformer_xs(), "xs.pt2"))  # doctest: +SKIP
        xs.pt2: torch.export, input batch x 3 x height x width, relative error ...
    """
    job = _Job(model, path, shape, axes, verbose)
    with _plain(model), job.step("tracing with torch.export"):
        program = _torch_program(model, job)
    errors = job.compare(_leaves_of(program.module())) if compare else {}
    with files.replacing(job.path) as file:
        torch.export.save(program, file)
    return job.done("torch.export", program, errors)


def to_onnx(
    model: nn.Module,
    path: str | Path,
    shape: Sequence[int] = IMAGES,
    *,
    axes: Mapping[int, str] | None = None,
    opset: int = FIRST_ONNX_OPSET,
    compare: bool = True,
    verbose: bool = True,
) -> Exported:
    """Write an ONNX model, with operators of the standard alone, for any runtime.

    It is checked by onnx.checker and compared in ONNX Runtime. The input is called "images" or
    "tokens", the output "output", several of them "output_0", "output_1", ...

    Args:
        model, path, shape, axes, compare, verbose: as in `to_torch_export`; but the limit of axes
            to sizes above 1 holds for `shape` alone.
        opset: 17 takes PyTorch's older exporter, which is deprecated, but whose models run in older
            runtimes; from 20 on GELU is one operator.

    Raises:
        TypeError, ValueError, RuntimeError, OSError: as in `to_torch_export`.
        ImportError: a package is missing: pip install 'swiftkernels[export]'.
    """
    job = _Job(model, path, shape, axes, verbose)
    checks.check_positive("opset", opset)
    if opset < FIRST_ONNX_OPSET - 1:
        raise ValueError(f"opset must be at least {FIRST_ONNX_OPSET - 1}; got {opset}.")
    if job.dtype not in (torch.float32, torch.float16):
        raise ValueError(f"model must be in float32 or float16; got {job.dtype}: model.float().")
    onnx = need("onnx", "export", "ONNX")
    need("onnxscript", "export", "ONNX")
    with _plain(model), _quietly():
        proto = _onnx_model(onnx, job, opset)
    with job.step("checking with onnx.checker"):
        onnx.checker.check_model(proto, full_check=True)
    domains = {node.domain for node in proto.graph.node} | {f.domain for f in proto.functions}
    written = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    if domains - {"", "ai.onnx"} or written != opset:
        raise RuntimeError(
            f"PyTorch {torch.__version__} wrote opset {written} with the domains "
            f"{sorted(domains)} where opset {opset} of the standard was asked for. Take another "
            "opset."
        )
    errors = job.compare(_onnx_runtime(proto)) if compare else {}
    with files.replacing(job.path) as file:
        onnx.save(proto, file)
    return job.done(f"ONNX opset {written}", proto, errors)


def to_torchscript(
    model: nn.Module,
    path: str | Path,
    shape: Sequence[int] = IMAGES,
    *,
    compare: bool = True,
    verbose: bool = True,
) -> Exported:
    """Write a TorchScript trace, frozen, for LibTorch; all axes but the channels may vary.

    PyTorch deprecates TorchScript in favour of torch.export: for programs that are there already.

    Args:
        model, path, shape, compare, verbose: as in `to_torch_export`.

    Raises:
        TypeError, ValueError, RuntimeError, OSError: as in `to_torch_export`.
    """
    job = _Job(model, path, shape, None, verbose)
    with _plain(model), _quietly(), job.step("tracing with torch.jit"):
        script = torch.jit.freeze(_trace(job))
    errors = job.compare(_leaves_of(script)) if compare else {}
    with _quietly(), files.replacing(job.path) as file:
        torch.jit.save(script, file)
    return job.done("TorchScript", script, errors)


def to_coreml(
    model: nn.Module,
    path: str | Path,
    shape: Sequence[int] = IMAGES,
    *,
    choices: Sequence[Sequence[int]] = (),
    largest: Sequence[int] | None = None,
    half: bool = False,
    target: str = "iOS16",
    verbose: bool = True,
) -> Exported:
    """Write a Core ML model (.mlpackage) by coremltools; it runs on Apple's systems alone.

    So what is compared with the model here is the trace that it is made of. Several sizes cost
    speed: the Neural Engine likes `choices` better than `largest`.

    Args:
        model, path: as in `to_torch_export`; the path ends in .mlpackage.
        shape: of the input.
        choices: further shapes that it takes.
        largest: it takes all shapes from `shape` to this one.
        half: compute in float16, but for the norms of queries and keys, whose squares would
            overflow and whose eps would be 0 there. Those do not run on the Neural Engine then.
        target: the oldest system, a name of `coremltools.target`.
        verbose: as in `to_torch_export`.

    Raises:
        TypeError, ValueError, RuntimeError, OSError: as in `to_torch_export`.
        ImportError: coremltools is missing: pip install 'swiftkernels[coreml]'.
    """
    job = _Job(model, path, shape, {}, verbose, is_folder=True)
    if job.path.suffix != ".mlpackage":
        raise ValueError(f"path must end in .mlpackage; got {job.path}.")
    if job.dtype != torch.float32 or job.device.type != "cpu":
        raise ValueError(
            f"model must be in float32 on the CPU; got {job.dtype} on {job.device}: "
            "model.float().cpu(). half=True computes in float16."
        )
    coremltools = need("coremltools", "coreml", "Core ML")
    if not hasattr(coremltools.target, target):
        raise ValueError(f"target must be a name of coremltools.target; got {target!r}.")
    taken, named = _coreml_shape(coremltools, job.shape, choices, largest)
    with _plain(model), _quietly(), job.step("tracing with torch.jit"):
        trace, outputs = _trace(job), job.output_names()
    job.compare(_leaves_of(trace), [*choices, *([] if largest is None else [largest])])
    types: Any = coremltools.precision.FLOAT32
    if half:
        types = coremltools.transform.FP16ComputePrecision(op_selector=_may_be_half)
    program = coremltools.convert(  # which shows its own progress
        trace,
        inputs=[coremltools.TensorType(name=job.input_name, shape=taken)],
        outputs=[coremltools.TensorType(name=name) for name in outputs],
        convert_to="mlprogram",
        minimum_deployment_target=getattr(coremltools.target, target),
        compute_precision=types,
        skip_model_load=True,
    )
    with files.replacing_folder(job.path) as folder:
        try:
            program.save(str(folder))
        except RuntimeError as error:  # what its C++ raises where files cannot be written
            raise OSError(f"{job.path} could not be written: {error}") from error
    written = f"Core ML for {target} in {'float16 but for norms' if half else 'float32'}"
    return Exported(job.path, written, named, program, {}, tuple(map(tuple, choices)))


class _Job:
    """One model to export: its input, and what its outputs have to be."""

    def __init__(
        self,
        model: nn.Module,
        path: str | Path,
        shape: Sequence[int],
        axes: Mapping[int, str] | None,
        verbose: bool,
        is_folder: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
        self.shape = tuple(shape)
        if len(self.shape) not in AXES:
            raise ValueError(
                f"shape must be [B, C, H, W] of images or [B, N, C] of tokens; got {self.shape}."
            )
        for size in self.shape:
            checks.check_positive("shape", size)
        self.axes = dict(AXES[len(self.shape)] if axes is None else axes)
        if not set(self.axes) <= set(range(len(self.shape))):
            raise ValueError(
                f"axes must be a mapping from axes of shape, 0 to {len(self.shape) - 1}, to names; "
                f"got {axes}."
            )
        check = files.check_folder if is_folder else files.check_file
        self.model, self.path = model, check("path", path)
        checks.check_option("verbose", verbose, (True, False))
        self.quiet = not verbose
        self.input_name = "images" if len(self.shape) == 4 else "tokens"
        like = next(model.parameters(), torch.empty(0))
        self.dtype, self.device = like.dtype, like.device

    def step(self, text: str) -> contextlib.AbstractContextManager[None]:
        """Says that a step of the export goes on, and how long it took."""
        return timed(f"{self.path.name}: {text}", self.quiet)

    def input(self, shape: Sequence[int]) -> Tensor:
        """Random, but the same every time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

    def example(self) -> Tensor:
        # torch.export takes a size of 1 for a constant.
        batch, *rest = self.shape
        return self.input([max(batch, 2) if 0 in self.axes else batch, *rest])

    def output_names(self) -> list[str]:
        n = len(_leaves_of(self.model)(self.input(self.shape)))
        return ["output"] if n == 1 else [f"output_{i}" for i in range(n)]

    def compare(
        self, run: Run, others: Sequence[Sequence[int]] | None = None
    ) -> dict[tuple[int, ...], float]:
        """The errors of what was exported, at the shape and others, by default a larger one.

        Raises where they are not those of rounding.
        """
        if others is None:
            others = [[n + n // 4 + 1 if i in self.axes else n for i, n in enumerate(self.shape)]]
        errors = {}
        with _plain(self.model), self.step("comparing with the model"):
            double = copy.deepcopy(self.model).double()
            for shape in dict.fromkeys((self.shape, *map(tuple, others))):
                x = self.input(shape)
                results = run(x), _leaves_of(self.model)(x), _leaves_of(double)(x.double())
                shapes = [[tuple(t.shape) for t in tensors] for tensors in results]
                if shapes[0] != shapes[2]:
                    raise RuntimeError(
                        f"the exported program gives outputs of shapes {shapes[0]} where the model "
                        f"gives {shapes[2]}, at input {_times(shape)}. Nothing was written."
                    )
                errors[shape] = 0.0
                for ours, theirs, exact in zip(*results, strict=True):
                    error, own = relative_error(ours, exact), relative_error(theirs, exact)
                    errors[shape] = max(error, errors[shape])
                    if not error <= budget(own, self.dtype, ULPS):
                        raise RuntimeError(
                            "the exported program computes something else: relative error "
                            f"{error:.2g} at input {_times(shape)}, where the model makes "
                            f"{own:.2g}. Nothing was written."
                        )
        return errors

    def done(
        self, format_name: str, program: Any, errors: Mapping[tuple[int, ...], float]
    ) -> Exported:
        named = tuple(self.axes.get(axis, n) for axis, n in enumerate(self.shape))
        return Exported(self.path, format_name, named, program, errors)


class _Flat(nn.Module):
    """A model with a tensor or a tuple of tensors for output: no lists, no output classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        leaves = _leaves_of(self.model)(x)
        return leaves[0] if len(leaves) == 1 else tuple(leaves)


def _leaves_of(model: Callable[[Tensor], Any]) -> Run:
    """The model with a list of its output tensors for output."""
    return lambda x: [t for t in pytree.tree_leaves(model(x)) if isinstance(t, Tensor)]


def _torch_program(model: nn.Module, job: _Job) -> torch.export.ExportedProgram:
    # DYNAMIC, not AUTO: an axis that turns out to be fixed is an error.
    free = dict.fromkeys(job.axes, torch.export.Dim.DYNAMIC)
    try:
        program = torch.export.export(
            model, (job.example(),), dynamic_shapes=(free,) if free else None, strict=False
        )
    except Exception as error:
        raise _not_exportable(job, str(error)) from error
    ranges = program.range_constraints.values()
    if any(bool(sizes.upper < sys.maxsize // 2) for sizes in ranges):
        raise _not_exportable(job, "it would take no larger ones")
    return program


def _not_exportable(job: _Job, reason: str) -> ValueError:
    free = f" with free {', '.join(job.axes.values())}" if job.axes else ""
    kind = type(job.model).__name__
    return ValueError(
        f"{kind} could not be exported from an input {_times(job.shape)}{free}: {reason}.\n"
        "Axes that may vary need more than one element in every feature map: of a SwiftFormer, "
        "height and width above 32. Take a larger shape, or axes={} for this one alone."
    )


def _onnx_model(onnx: Any, job: _Job, opset: int) -> Any:
    names: dict[str, Any] = {
        "input_names": [job.input_name],
        "output_names": job.output_names(),
        "opset_version": opset,
        "dynamo": opset >= FIRST_ONNX_OPSET,
    }
    if opset < FIRST_ONNX_OPSET:
        free = {job.input_name: job.axes} if job.axes else None
        text = "tracing and translating to ONNX"
        with tempfile.TemporaryDirectory() as folder, job.step(text):
            file = Path(folder) / "model.onnx"
            torch.onnx.export(_Flat(job.model), (job.example(),), file, dynamic_axes=free, **names)
            return onnx.load(file)
    with job.step("tracing with torch.export"):
        traced = _torch_program(_Flat(job.model), job)
    with job.step("translating to ONNX"):
        program = torch.onnx.export(traced, (job.example(),), verbose=False, **names)
        assert program is not None
        proto = program.model_proto
    _rename_axes(proto.graph, job.axes)
    return proto


def _rename_axes(graph: Any, axes: Mapping[int, str]) -> None:
    """Give the input's axes their names, in all shapes that they appear in alone."""
    sizes = graph.input[0].type.tensor_type.shape.dim
    names = {sizes[axis].dim_param: name for axis, name in axes.items()}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in names:
                size.dim_param = names[size.dim_param]


def _onnx_runtime(proto: Any) -> Run:
    onnxruntime = need("onnxruntime", "export", "Comparing ONNX (compare=True)")
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> list[Tensor]:
        outputs = session.run(None, {name: x.cpu().numpy()})
        return [torch.from_numpy(t).to(x.device) for t in outputs]

    return run


def _trace(job: _Job) -> torch.jit.ScriptModule:
    script: torch.jit.ScriptModule = torch.jit.trace(
        _Flat(job.model), job.input(job.shape), check_trace=False
    )
    return script


def _coreml_shape(
    coremltools: Any,
    shape: tuple[int, ...],
    choices: Sequence[Sequence[int]],
    largest: Sequence[int] | None,
) -> tuple[Any, tuple[int | str, ...]]:
    """What coremltools is to know of the shapes, and what people are."""
    if choices and largest is not None:
        raise ValueError("choices and largest exclude each other; got both.")
    for name, others in (("choices", choices), ("largest", () if largest is None else (largest,))):
        for other in others:
            if len(other) != len(shape):
                raise ValueError(f"{name} must have shapes like {shape}; got {tuple(other)}.")
    if largest is not None:
        axes = list(zip(shape, largest, strict=True))
        if any(low > high for low, high in axes):
            raise ValueError(f"largest must not be below shape, {shape}; got {tuple(largest)}.")
        ranges = [
            low if low == high else coremltools.RangeDim(low, high, low) for low, high in axes
        ]
        named = tuple(low if low == high else f"{low}..{high}" for low, high in axes)
        return coremltools.Shape(ranges), named
    if choices:
        every = [shape, *map(tuple, choices)]
        return coremltools.EnumeratedShapes(every, default=shape), shape
    return shape, shape


def _may_be_half(op: Any) -> bool:
    return op.op_type not in ("reduce_l2_norm", "maximum", "real_div")


@contextlib.contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, without gradients, its attention in PyTorch's operators whatever
    its backend is; afterwards every module is as before."""
    layers = [module for module in model.modules() if isinstance(module, AttentionForward)]
    backends = [layer.backend for layer in layers]
    try:
        for layer in layers:
            layer.backend = "reference"
        with in_evaluation(model), torch.no_grad():
            yield
    finally:
        for layer, backend in zip(layers, backends, strict=True):
            layer.backend = backend


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what PyTorch says of its tracers: that shapes become constants (those that do not
    vary), that they are deprecated, that torchvision is not there."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _times(shape: Sequence[int | str]) -> str:
    return " x ".join(map(str, shape))
