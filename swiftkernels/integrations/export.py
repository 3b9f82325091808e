"""Export of models for other runtimes: torch.export programs, ONNX, TorchScript, Core ML.

Each function takes a network of this library, an accelerated network of another library, or a
single attention layer. The model is exported in eval mode, in plain operators. Before the file is
written, the exported program is run and compared with the model; if they differ, no file is
written. The model stays unchanged.
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

from swiftkernels.ops.additive_attention.layer import in_evaluation
from swiftkernels.ops.plan import KeepsPlans
from swiftkernels.testing.tolerance import budget, relative_error
from swiftkernels.utils import checks, files
from swiftkernels.utils.extras import need
from swiftkernels.utils.progress import timed

IMAGES = (1, 3, 224, 224)
AXES = {3: {0: "batch", 1: "tokens"}, 4: {0: "batch", 2: "height", 3: "width"}}
"""Dynamic axes of tokens [B, N, C] and images [B, C, H, W], by the number of axes."""
ULPS = 16
"""Allowed error of an exported network, in ulps, in addition to twice the error of the model."""
FIRST_ONNX_OPSET = 18
"""Lowest opset of PyTorch's present exporter; its predecessor also writes 17."""

Run = Callable[[Tensor], Sequence[Tensor]]
"""A model or program as a function from its input to its output tensors."""


@dataclass(frozen=True)
class Exported:
    """An exported file and its error; print it."""

    path: Path
    format: str
    shape: tuple[int | str, ...]
    """Shape of the input, with names for dynamic axes."""
    program: Any
    """The program in memory: an ExportedProgram, ModelProto, ScriptModule or MLModel."""
    errors: Mapping[tuple[int, ...], float]
    """Shape of an input -> relative error of the outputs against the model in float64; empty if
    they were not compared."""
    choices: tuple[tuple[int, ...], ...] = ()
    """Further shapes of the input (Core ML)."""

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
        path: path of the file.
        shape: shape of the example input.
        axes: dynamic axes of the input and their names; default: all except the channels, {}: none.
            In a program of `torch.export` the size of a dynamic axis, except the batch, must be
            above 1 in all feature maps. So a SwiftFormer takes heights and widths above 32, or with
            axes={} exactly those of `shape`.
        compare: compare model and program on random inputs of `shape` and, with dynamic axes, of a
            larger shape.
        verbose: report on stderr each step and how long it took.

    Raises:
        TypeError, ValueError: a wrong argument, or a model that cannot be exported with these axes.
        RuntimeError: the outputs of the program differ from those of the model.
        OSError: the file could not be written; an older file is unchanged.

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
    """Write an ONNX model, with standard operators only, for any runtime.

    The model is checked by onnx.checker and compared in ONNX Runtime. Its input is named "images"
    or "tokens", its output "output", or "output_0", "output_1", ... if there are several.

    Args:
        model, path, shape, axes, compare, verbose: as in `to_torch_export`; but only `shape` needs
            sizes above 1, the inputs of the ONNX model do not.
        opset: 17 uses PyTorch's older, deprecated exporter, for older runtimes; from 20 on GELU is
            one operator.

    Raises:
        TypeError, ValueError, RuntimeError, OSError: as in `to_torch_export`.
        ImportError: a package is missing (in a clone: pip install '.[export]').
    """
    job = _Job(model, path, shape, axes, verbose)
    checks.check_positive("opset", opset)
    if opset < FIRST_ONNX_OPSET - 1:
        raise ValueError(
            f"opset must be at least {FIRST_ONNX_OPSET - 1}; got {opset}. Pass 17 or more."
        )
    if job.dtype not in (torch.float32, torch.float16):
        raise ValueError(
            f"model must be in float32 or float16; got {job.dtype}. Convert it: model.float()."
        )
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
            f"{sorted(domains)}; expected opset {opset} with the standard domain only. Pass "
            "another opset."
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
    """Write a frozen TorchScript trace for LibTorch; all axes except the channels are dynamic.

    PyTorch deprecates TorchScript in favour of torch.export. Use it only for existing programs.

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
    """Write a Core ML model (.mlpackage) with coremltools.

    Core ML runs only on Apple's systems. So the trace from which coremltools converts is compared
    with the model, not the result. More than one input shape costs speed; the Neural Engine
    supports `choices` better than `largest`.

    Args:
        model, path: as in `to_torch_export`; the path ends in .mlpackage.
        shape: shape of the input.
        choices: further shapes of the input.
        largest: accept all shapes from `shape` to this one.
        half: compute in float16, except the norms of queries and keys: in float16 their squares
            would overflow and eps would be 0. The norms then do not run on the Neural Engine.
        target: the oldest supported system, a name of `coremltools.target`.
        verbose: as in `to_torch_export`.

    Raises:
        TypeError, ValueError, RuntimeError, OSError: as in `to_torch_export`.
        ImportError: coremltools is missing (in a clone: pip install '.[coreml]').
    """
    job = _Job(model, path, shape, {}, verbose, is_folder=True)
    if job.path.suffix != ".mlpackage":
        raise ValueError(f"path must end in .mlpackage; got {job.path}. Change its suffix.")
    if job.dtype != torch.float32 or job.device.type != "cpu":
        raise ValueError(
            f"model must be in float32 on the CPU; got {job.dtype} on {job.device}. Convert it: "
            "model.float().cpu(); half=True then computes in float16."
        )
    coremltools = need("coremltools", "coreml", "Core ML")
    if not hasattr(coremltools.target, target):
        known = ", ".join(kind.name for kind in coremltools.target)
        raise ValueError(f"target must be one of {known}; got {target!r}.")
    taken, named = _coreml_shape(coremltools, job.shape, choices, largest)
    with _plain(model), _quietly(), job.step("tracing with torch.jit"):
        trace, outputs = _trace(job), job.output_names()
    job.compare(_leaves_of(trace), [*choices, *([] if largest is None else [largest])])
    types: Any = coremltools.precision.FLOAT32
    if half:
        types = coremltools.transform.FP16ComputePrecision(op_selector=_may_be_half)
    program = coremltools.convert(  # it shows its own progress
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
        except RuntimeError as error:  # from its C++ code, if a file cannot be written
            raise OSError(f"{job.path} could not be written: {error}") from error
    written = f"Core ML for {target} in {'float16 with norms in float32' if half else 'float32'}"
    return Exported(job.path, written, named, program, {}, tuple(map(tuple, choices)))


class _Job:
    """A model to export, its input, and the comparison of its outputs."""

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
                "shape must be [B, C, H, W] for images or [B, N, C] for tokens; got "
                f"{self.shape}. Add the missing axes."
            )
        for size in self.shape:
            checks.check_positive("shape", size)
        self.axes = dict(AXES[len(self.shape)] if axes is None else axes)
        if not set(self.axes) <= set(range(len(self.shape))):
            raise ValueError(
                f"axes must map axes of shape, 0 to {len(self.shape) - 1}, to names; got {axes}. "
                "Pass {} for none."
            )
        check = files.check_folder if is_folder else files.check_file
        self.model, self.path = model, check("path", path)
        checks.check_option("verbose", verbose, (True, False))
        self.quiet = not verbose
        self.input_name = "images" if len(self.shape) == 4 else "tokens"
        like = next(model.parameters(), torch.empty(0))
        self.dtype, self.device = like.dtype, like.device

    def step(self, text: str) -> contextlib.AbstractContextManager[None]:
        """A context that reports a step of the export and how long it took."""
        return timed(f"{self.path.name}: {text}", self.quiet)

    def input(self, shape: Sequence[int]) -> Tensor:
        """A random input, the same in every call."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

    def example(self) -> Tensor:
        # torch.export treats a size of 1 as a constant.
        batch, *rest = self.shape
        return self.input([max(batch, 2) if 0 in self.axes else batch, *rest])

    def output_names(self) -> list[str]:
        n = len(_leaves_of(self.model)(self.input(self.shape)))
        return ["output"] if n == 1 else [f"output_{i}" for i in range(n)]

    def compare(
        self, run: Run, others: Sequence[Sequence[int]] | None = None
    ) -> dict[tuple[int, ...], float]:
        """The errors of an exported program at `shape` and other shapes, by default a larger one.

        Raises:
            RuntimeError: an error is larger than rounding explains.
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
                        f"the exported program gives outputs of shapes {shapes[0]} for an input "
                        f"{_times(shape)}, the model {shapes[2]}. No file was written."
                    )
                errors[shape] = 0.0
                for ours, theirs, exact in zip(*results, strict=True):
                    error, own = relative_error(ours, exact), relative_error(theirs, exact)
                    errors[shape] = max(error, errors[shape])
                    if not error <= budget(own, self.dtype, ULPS):
                        raise RuntimeError(
                            "the outputs of the exported program differ from the model: relative "
                            f"error {error:.2g} for an input {_times(shape)}, where the model has "
                            f"{own:.2g}. No file was written."
                        )
        return errors

    def done(
        self, format_name: str, program: Any, errors: Mapping[tuple[int, ...], float]
    ) -> Exported:
        named = tuple(self.axes.get(axis, n) for axis, n in enumerate(self.shape))
        return Exported(self.path, format_name, named, program, errors)


class _Flat(nn.Module):
    """A model with a tensor or a tuple of tensors as output, not a list or another class."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        leaves = _leaves_of(self.model)(x)
        return leaves[0] if len(leaves) == 1 else tuple(leaves)


def _leaves_of(model: Callable[[Tensor], Any]) -> Run:
    """The model as a function that returns the list of its output tensors."""
    return lambda x: [t for t in pytree.tree_leaves(model(x)) if isinstance(t, Tensor)]


def _torch_program(model: nn.Module, job: _Job) -> torch.export.ExportedProgram:
    # DYNAMIC, not AUTO, raises an error for an axis that is not dynamic after all.
    free = dict.fromkeys(job.axes, torch.export.Dim.DYNAMIC)
    try:
        program = torch.export.export(
            model, (job.example(),), dynamic_shapes=(free,) if free else None, strict=False
        )
    except Exception as error:
        raise _not_exportable(job, str(error)) from error
    ranges = program.range_constraints.values()
    if any(bool(sizes.upper < sys.maxsize // 2) for sizes in ranges):
        raise _not_exportable(job, "the program would accept no larger sizes")
    return program


def _not_exportable(job: _Job, reason: str) -> ValueError:
    free = f" with dynamic {', '.join(job.axes.values())}" if job.axes else ""
    kind = type(job.model).__name__
    return ValueError(
        f"{kind} could not be exported from an input {_times(job.shape)}{free}: {reason}.\n"
        "Dynamic axes must have more than one element in every feature map; a SwiftFormer needs "
        "height and width above 32. Pass a larger shape, or axes={} for exactly this shape."
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
    """Name the dynamic axes of the input, wherever a dimension is just one of them."""
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
    """The shapes for coremltools, and the shape for the report."""
    if choices and largest is not None:
        raise ValueError("choices and largest exclude each other; got both. Pass one of them.")
    for name, others in (("choices", choices), ("largest", () if largest is None else (largest,))):
        for other in others:
            if len(other) != len(shape):
                raise ValueError(
                    f"{name} must have {len(shape)} axes, like shape {shape}; got {tuple(other)}."
                )
    if largest is not None:
        axes = list(zip(shape, largest, strict=True))
        if any(low > high for low, high in axes):
            raise ValueError(
                f"largest must not be smaller than shape, {shape}; got {tuple(largest)}. Pass the "
                "smallest sizes as shape."
            )
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
    """The model in eval mode, without gradients, with the layers of this library in PyTorch's.

    Afterwards modes and backends are restored.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, KeepsPlans)]
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
    """Suppresses warnings of PyTorch's exporters.

    They warn of constant shapes (of axes that are not dynamic), deprecation, missing torchvision.
    """
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
