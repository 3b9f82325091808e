"""Exported models: plain operators, dynamic sizes, and the outputs of the model."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swiftkernels import AdditiveAttention, accelerate, export
from swiftkernels.models import SwiftFormer, swiftformer_xs
from swiftkernels.testing.cases import POOLINGS
from swiftkernels.testing.tolerance import assert_as_good_as_eager
from tests import mil

Run = Callable[[Tensor], list[Tensor]]
Loader = Callable[[Path], Run]

IMAGES, TOKENS = (1, 3, 40, 56), (1, 9, 12)


@pytest.fixture(autouse=True)
def fixed_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def onnx() -> ModuleType:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return pytest.importorskip("onnx")


@pytest.fixture
def coremltools() -> ModuleType:
    return pytest.importorskip("coremltools")


def randomised(model: nn.Module) -> nn.Module:
    """With random layer scales and BatchNorm statistics, which would hide errors otherwise."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gamma" in name or "layer_scale" in name:
                p.uniform_(0.5, 1)
            elif p.dim() > 1:
                nn.init.kaiming_normal_(p)
            else:
                p.uniform_(-0.5, 0.5)
        for name, b in model.named_buffers():
            if b.is_floating_point():
                b.uniform_(0.5, 1.5) if "var" in name else b.normal_(0, 0.2)
    return model


def make_model(**options: Any) -> nn.Module:
    """One stage of one block, with every kind of layer."""
    return randomised(SwiftFormer((12,), (1,), num_classes=5, **options))


def make_layer(**options: Any) -> nn.Module:
    return AdditiveAttention(12, 12, 1, **options)


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = copy.deepcopy(model).eval()(x)
    return [t for t in tree_leaves(out) if isinstance(t, Tensor)]


def assert_same(model: nn.Module, run: Run, *shapes: tuple[int, ...]) -> None:
    """The error of the program is at most twice that of the model, and a few ulps."""
    for shape in shapes:
        x = torch.randn(shape)
        ours, eager = run(x), outputs(model, x)
        exact = outputs(copy.deepcopy(model).double(), x.double())
        assert len(ours) == len(eager) == len(exact)
        for tensors in zip(ours, eager, exact, strict=True):
            assert_as_good_as_eager(*tensors, export.ULPS, name=str(shape))


def load_program(path: Path) -> Run:
    program = torch.export.load(path)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    others = [t for t in targets if not t.startswith(("aten.", "<built-in function"))]
    assert targets
    assert not others
    module = program.module()
    return lambda x: tree_leaves(module(x))


def load_script(path: Path) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.load(path)
    kinds = {node.kind() for node in script.inlined_graph.nodes()}
    assert all(kind.startswith(("aten::", "prim::")) for kind in kinds), kinds
    assert "prim::PythonOp" not in kinds
    return lambda x: tree_leaves(script(x))


def load_onnx(path: Path) -> Run:
    import onnx
    import onnxruntime

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [o.domain for o in model.opset_import] in ([""], ["ai.onnx"])
    assert not model.functions
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    return lambda x: [torch.from_numpy(t) for t in session.run(None, {argument.name: x.numpy()})]


def run_mil(exported: export.Exported) -> Run:
    return lambda x: mil.run(exported.program._mil_program, x)


@pytest.mark.parametrize(
    ("shape", "pooling"), [*((TOKENS, pooling) for pooling in POOLINGS), ((1, 12, 5, 7), "l2")]
)
def test_layer_to_torch_export(tmp_path, shape, pooling):
    layer, path = make_layer(pooling=pooling), tmp_path / "layer.pt2"
    done = export.to_torch_export(layer, path, shape)
    others = [(3, 21, 12), (1, 2, 12)] if shape is TOKENS else [(3, 12, 8, 2), (1, 12, 31, 17)]
    assert_same(layer, load_program(path), shape, *others)
    assert len(done.errors) == 2


def test_model_to_torch_export(tmp_path):
    model, path = make_model(), tmp_path / "model.pt2"
    done = export.to_torch_export(model, path, IMAGES)
    assert done.shape == ("batch", 3, "height", "width")
    assert_same(model, load_program(path), IMAGES, (3, 3, 33, 47), (1, 3, 225, 257))
    assert model.training


def test_sizes_without_dynamic_axes_raise_and_export_with_fixed_axes(tmp_path):
    model, path, small = make_model(), tmp_path / "model.pt2", (1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"larger shape, or axes=\{\}"):
        export.to_torch_export(model, path, small)
    assert not path.exists()
    export.to_torch_export(model, path, small, axes={})
    assert_same(model, load_program(path), small)


def test_feature_maps_to_torch_export_and_torchscript(tmp_path):
    model = make_model(features_only=True)
    export.to_torchscript(model, tmp_path / "model.pt", IMAGES)
    assert_same(model, load_script(tmp_path / "model.pt"), IMAGES, (2, 3, 33, 47))
    export.to_torch_export(model, tmp_path / "model.pt2", IMAGES, axes={})
    assert_same(model, load_program(tmp_path / "model.pt2"), IMAGES)


@pytest.mark.parametrize("model", [make_layer, make_model])
def test_torchscript(tmp_path, model):
    model, path = model(), tmp_path / "model.pt"
    shape, *others = (
        (TOKENS, (3, 21, 12), (1, 1, 12))
        if isinstance(model, AdditiveAttention)
        else (IMAGES, (3, 3, 33, 47), (2, 3, 1, 1), (1, 3, 225, 257))
    )
    export.to_torchscript(model, path, shape)
    assert_same(model, load_script(path), shape, *others)


@pytest.mark.parametrize("opset", [17, 18, pytest.param(20, marks=pytest.mark.slow)])
def test_layer_to_onnx(tmp_path, onnx, opset):
    layer, path = make_layer(), tmp_path / "layer.onnx"
    done = export.to_onnx(layer, path, TOKENS, opset=opset)
    assert_same(layer, load_onnx(path), TOKENS, (3, 21, 12), (1, 1, 12))
    (imported,) = done.program.opset_import
    assert imported.version == opset
    (argument,), (output,) = done.program.graph.input, done.program.graph.output
    assert (argument.name, output.name) == ("tokens", "output")
    for value in (argument, output) if opset > 17 else (argument,):
        sizes = value.type.tensor_type.shape.dim
        assert [size.dim_param or size.dim_value for size in sizes] == ["batch", "tokens", 12]


def test_steps_are_reported_if_verbose(tmp_path, onnx, capsys):
    layer, path = make_layer(), tmp_path / "layer.onnx"
    export.to_onnx(layer, path, (2, 9, 12))
    lines = capsys.readouterr().err.splitlines()
    steps = (
        "tracing with torch.export", "translating to ONNX", "checking with onnx.checker",
        "comparing with the model",
    )  # fmt: skip
    assert len(lines) == len(steps)
    for line, step in zip(lines, steps, strict=True):
        assert re.fullmatch(rf"layer\.onnx: {step} \.\.\. \d+ s", line)
    export.to_torchscript(layer, tmp_path / "layer.pt", (2, 9, 12), verbose=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_to_onnx(tmp_path, onnx, pooling):
    layer, path = make_layer(pooling=pooling, qk_norm=pooling != "sum"), tmp_path / "layer.onnx"
    export.to_onnx(layer, path, (1, 12, 5, 7), opset=17)
    assert_same(layer, load_onnx(path), (1, 12, 5, 7), (3, 12, 8, 1))


@pytest.mark.parametrize("opset", [17, pytest.param(18, marks=pytest.mark.slow)])
def test_model_to_onnx(tmp_path, onnx, opset):
    """Unlike torch.export programs, ONNX models also accept feature maps of one pixel."""
    model, path = make_model(), tmp_path / "model.onnx"
    done = export.to_onnx(model, path, IMAGES, opset=opset)
    kinds = [node.op_type for node in done.program.graph.node]
    # The others are folded into the preceding convolutions; these two follow none.
    assert kinds.count("BatchNormalization") == 2
    assert_same(model, load_onnx(path), IMAGES, (3, 3, 33, 47), (2, 3, 1, 1), (1, 3, 225, 257))


def test_feature_maps_to_onnx(tmp_path, onnx):
    model, path = make_model(features_only=True), tmp_path / "model.onnx"
    export.to_onnx(model, path, IMAGES, opset=17)
    assert_same(model, load_onnx(path), IMAGES, (2, 3, 33, 47))


SHAPES: list[tuple[dict[str, Any], list[tuple[int, ...]]]] = [
    ({}, []),
    ({"choices": [(1, 3, 64, 32)]}, [(1, 3, 64, 32)]),
    ({"largest": (4, 3, 90, 120)}, [(4, 3, 90, 120), (2, 3, 41, 101)]),
]

SHOWN = {
    "": "1 x 3 x 40 x 56",
    "choices": "1 x 3 x 40 x 56 or 1 x 3 x 64 x 32",
    "largest": "1..4 x 3 x 40..90 x 56..120",
}


@pytest.mark.parametrize(("options", "others"), SHAPES, ids=["one", "choices", "range"])
def test_model_to_core_ml(tmp_path, coremltools, options, others):
    """The model is evaluated in PyTorch: see tests/mil.py."""
    model, path = make_model(), tmp_path / "model.mlpackage"
    done = export.to_coreml(model, path, IMAGES, **options)
    assert_same(model, run_mil(done), IMAGES, *others)
    taken = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec().description.input
    assert str(done).endswith(f"input {SHOWN[next(iter(options), '')]}, not compared")
    kind = {"choices": "enumeratedShapes", "largest": "shapeRange"}.get(next(iter(options), ""))
    assert taken[0].type.multiArrayType.WhichOneof("ShapeFlexibility") == kind


@pytest.mark.parametrize("pooling", POOLINGS)
def test_layer_to_core_ml(tmp_path, coremltools, pooling):
    layer = make_layer(pooling=pooling, qk_norm=pooling != "linear")
    done = export.to_coreml(layer, tmp_path / "layer.mlpackage", TOKENS, largest=(4, 50, 12))
    assert_same(layer, run_mil(done), TOKENS, (3, 21, 12))


def test_core_ml_in_half_precision_has_norms_in_float32(tmp_path, coremltools):
    done = export.to_coreml(make_layer(), tmp_path / "l.mlpackage", TOKENS, half=True)
    operations = done.program._mil_program.functions["main"].operations
    types = {op.op_type: op.outputs[0].dtype.__name__ for op in operations}
    assert types["reduce_l2_norm"] == types["maximum"] == types["real_div"] == "fp32"
    assert types["linear"] == types["reduce_sum"] == "fp16"


@pytest.mark.parametrize("backend", ["cpu", "aten"])
def test_plain_operators_are_exported_for_any_backend(tmp_path, backend):
    layer = make_layer(backend=backend)
    export.to_torch_export(layer, tmp_path / "layer.pt2", TOKENS, axes={})
    export.to_torchscript(layer, tmp_path / "layer.pt", TOKENS)
    load_program(tmp_path / "layer.pt2")
    load_script(tmp_path / "layer.pt")
    assert layer.backend == backend


def test_modes_of_modules_stay(tmp_path):
    model = make_model().train()
    model.stages.eval()
    before = [module.training for module in model.modules()]
    export.to_torchscript(model, tmp_path / "model.pt", IMAGES)
    assert [module.training for module in model.modules()] == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Unsteady(nn.Module):
    """A trace of it records only one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.shape[0] == 1 else -self.linear(x)


def test_programs_with_other_outputs_are_not_written(tmp_path):
    path = tmp_path / "model.pt"
    with pytest.raises(RuntimeError, match=r"differ from the model.*for an input 2 x 12 x 12"):
        export.to_torchscript(Unsteady(), path, TOKENS)
    assert not path.exists()
    export.to_torchscript(Unsteady(), path, TOKENS, compare=False)
    assert path.exists()


class Repeating(nn.Module):
    """A trace of it records the size as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.linear(x)[:, :1] for _ in range(x.shape[1])], dim=1)


def test_programs_with_outputs_of_other_shapes_are_not_written(tmp_path):
    with pytest.raises(RuntimeError, match=r"outputs of shapes \[\(2, 9, 12\)\] for an"):
        export.to_torchscript(Repeating(), tmp_path / "model.pt", TOKENS)
    assert not (tmp_path / "model.pt").exists()


def test_traces_with_other_outputs_are_not_converted(tmp_path, coremltools):
    path = tmp_path / "model.mlpackage"
    with pytest.raises(RuntimeError, match=r"differ from the model.*for an input 2 x 9 x 12"):
        export.to_coreml(Unsteady(), path, TOKENS, largest=(2, 9, 12))
    assert not path.exists()


def test_result_describes_the_file(tmp_path):
    path = tmp_path / "layer.pt"
    text = str(export.to_torchscript(make_layer(), path, TOKENS))
    assert text.startswith(f"{path}: TorchScript, input batch x tokens x 12, relative error ")
    assert " at 1 x 9 x 12, " in text
    assert "not compared" in str(export.to_torchscript(make_layer(), path, TOKENS, compare=False))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda path: export.to_torch_export("model", path), TypeError, "model must be"),
        (lambda path: export.to_torchscript(make_layer(), path, (9, 12)), ValueError, "shape must"),
        (lambda path: export.to_torchscript(make_layer(), path, (1, 0, 12)), ValueError, "shape"),
        (lambda path: export.to_onnx(make_layer(), path, TOKENS, opset=16), ValueError, "opset"),
        (
            lambda path: export.to_onnx(make_layer().bfloat16(), path, TOKENS),
            ValueError,
            r"float\(\)",
        ),
        (
            lambda path: export.to_torch_export(make_layer(), path, TOKENS, axes={3: "width"}),
            ValueError,
            "axes must map axes",
        ),
        (lambda path: export.to_coreml(make_layer(), path, TOKENS), ValueError, "mlpackage"),
        (
            lambda path: export.to_coreml(make_layer().half(), f"{path}.mlpackage", TOKENS),
            ValueError,
            "in float32 on the CPU",
        ),
    ],
)
def test_wrong_arguments_raise(tmp_path, call, error, message):
    with pytest.raises(error, match=message):
        call(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": [(1, 9, 12)], "largest": (1, 9, 12)}, "exclude each other"),
        ({"choices": [(9, 12)]}, "choices must have 3 axes"),
        ({"largest": (1, 8, 12)}, "must not be smaller"),
        ({"target": "Windows"}, "target must be one of iOS13"),
    ],
)
def test_wrong_arguments_for_core_ml_raise(tmp_path, coremltools, options, message):
    with pytest.raises(ValueError, match=message):
        export.to_coreml(make_layer(), tmp_path / "model.mlpackage", TOKENS, **options)


@pytest.mark.parametrize(
    ("package", "extra", "call"),
    [
        ("onnx", "export", lambda path: export.to_onnx(make_layer(), path, TOKENS)),
        ("coremltools", "coreml", lambda path: export.to_coreml(make_layer(), path, TOKENS)),
    ],
)
def test_missing_packages_raise_with_their_extra(tmp_path, monkeypatch, package, extra, call):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"'\.\[{extra}\]'"):
        call(tmp_path / "model.mlpackage")


@pytest.fixture(params=["timm", "transformers"])
def accelerated(request: pytest.FixtureRequest) -> nn.Module:
    library = request.getfixturevalue(request.param)
    depths, widths = (1, 1, 2, 1), (16, 24, 32, 40)
    if request.param == "timm":
        kind = library.models.swiftformer.SwiftFormer
        model = kind(depths, embed_dims=widths, num_classes=5)
    else:
        config = library.SwiftFormerConfig(depths=depths, embed_dims=widths, num_labels=5)
        model = library.SwiftFormerForImageClassification(config)
    accelerate(randomised(model))
    return model


def test_accelerated_models_to_torchscript(tmp_path, accelerated):
    done = export.to_torchscript(accelerated, tmp_path / "model.pt", (1, 3, 64, 96))
    assert len(done.errors) == 2
    load_script(tmp_path / "model.pt")


@pytest.mark.slow
def test_accelerated_models_to_all_formats(tmp_path, onnx, coremltools, accelerated):
    shape = (1, 3, 64, 96)
    export.to_torch_export(accelerated, tmp_path / "model.pt2", shape)
    load_program(tmp_path / "model.pt2")
    for opset in (17, 18):
        export.to_onnx(accelerated, tmp_path / "model.onnx", shape, opset=opset)
        load_onnx(tmp_path / "model.onnx")
    old_numpy = numpy.lib.NumpyVersion(numpy.__version__) < "2.4.0"
    # With newer numpy, coremltools 9.0 fails on the computation of sizes in transformers.
    if old_numpy or not hasattr(accelerated, "config"):
        done = export.to_coreml(accelerated, tmp_path / "model.mlpackage", shape)
        assert_same(accelerated, run_mil(done), shape)


@pytest.mark.slow
@pytest.mark.parametrize("features_only", [False, True])
def test_xs_to_all_formats(tmp_path, onnx, coremltools, features_only):
    model = randomised(swiftformer_xs(num_classes=5, features_only=features_only))
    shape, others = (1, 3, 64, 96), [(3, 3, 33, 47), (1, 3, 225, 257)]
    export.to_torchscript(model, tmp_path / "model.pt", shape)
    assert_same(model, load_script(tmp_path / "model.pt"), shape, (1, 3, 32, 32), *others)
    export.to_torch_export(model, tmp_path / "model.pt2", shape)
    assert_same(model, load_program(tmp_path / "model.pt2"), shape, *others)
    for opset in (17, 18, 20):
        export.to_onnx(model, tmp_path / "model.onnx", shape, opset=opset)
        assert_same(model, load_onnx(tmp_path / "model.onnx"), shape, (1, 3, 32, 32), *others)
    done = export.to_coreml(
        model, tmp_path / "model.mlpackage", (1, 3, 32, 32), largest=(3, 3, 256, 320)
    )
    assert_same(model, run_mil(done), (1, 3, 32, 32), shape, *others)
