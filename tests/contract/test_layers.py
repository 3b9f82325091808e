"""Every layer of an operator, and layers of other libraries that run on the same kernels."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from swiftkernels import accelerate, weights_changed
from swiftkernels.ops import operators
from swiftkernels.ops.operator import Operator
from tests.contract.cases import INTERPRETED, Implementation, assert_close, draw, implementations
from tests.models.test_public_models import OfficialLayer

WIDTH = 16

STEP = 4 if INTERPRETED else 1
"""Of the parameters, one in so many is written."""


class Layer(NamedTuple):
    """How to make a layer, and what it runs on."""

    name: str
    make: Callable[[str, int], nn.Module]
    """From the name of a backend and the width."""
    operator: Operator
    backend: str
    device: torch.device
    tokens_only: bool = False

    def __str__(self) -> str:
        return self.name

    def build(
        self, backend: str = "", dtype: torch.dtype = torch.float32, width: int = WIDTH
    ) -> nn.Module:
        """In evaluation mode, the same at every call."""
        torch.manual_seed(0)
        return self.make(backend or self.backend, width).to(self.device, dtype).eval()

    def inputs(self, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> list[Tensor]:
        """Tokens, and what else the operator takes: images."""
        implementation = Implementation(self.operator, self.backend, self.device)
        found: dict[int, Tensor] = {}
        for variant in ("", *self.operator.variants):
            call = draw(implementation, dtype, (2, 6, width, width), variant)
            if call is not None:
                found.setdefault(call.inputs[0].dim(), call.inputs[0])
            if self.tokens_only:
                break
        return list(found.values())


def accelerated(backend: str, width: int) -> nn.Module:
    layer = OfficialLayer(width, width, 1, "l2")
    accelerate(layer)
    layer.backend = backend
    return layer


def layers() -> list[Layer]:
    """Every layer on every backend, and on the definition."""
    found = []
    for i in implementations():
        make = i.operator.layer
        if make is not None:
            for backend in (i.backend,) if INTERPRETED else (i.backend, "reference"):
                found.append(
                    Layer(
                        f"{make.__name__}-{backend}",
                        lambda backend, width, make=make: make(width, backend=backend),
                        i.operator,
                        backend,
                        i.device,
                    )
                )
    if INTERPRETED:
        return found
    attention = operators()["additive_self_attention"]
    found += [
        Layer(f"accelerated-{i.backend}", accelerated, i.operator, i.backend, i.device, True)
        for i in implementations()
        if i.operator is attention
    ]
    return list({str(layer): layer for layer in found}.values())


every_layer = pytest.mark.parametrize("layer", layers(), ids=str)


def outputs(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """In inference, where layers pack their weights."""
    with torch.no_grad():
        return [module(x) for x in inputs]


def assert_current(layer: Layer, module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs are those of a layer that was just made with the same weights."""
    fresh = layer.build(dtype=next(module.parameters()).dtype)
    fresh.load_state_dict(module.state_dict())
    found = outputs(module, inputs)
    for ours, expected in zip(found, outputs(fresh, inputs), strict=True):
        assert torch.equal(ours, expected)
    return found


@every_layer
def test_outputs_and_gradients_are_those_of_the_definition(layer: Layer) -> None:
    dtype = torch.float32
    module, exact = layer.build(), layer.build("reference", torch.float64)
    for x in layer.inputs(dtype):
        results = []
        for m, t in ((module, x), (exact, x.double())):
            t = t.detach().requires_grad_()
            wanted = dict(m.named_parameters()) | {"x": t}
            for _ in range(2):  # the second call by a plan
                out = m(t)
            grads = torch.autograd.grad(out.square().mean(), list(wanted.values()))
            results.append({"output": out} | dict(zip(wanted, grads, strict=True)))
        for name, t in results[0].items():
            expected = results[1][name]
            error = (t.double() - expected).abs().max() / expected.abs().max()
            assert error < 100 * torch.finfo(dtype).eps, (name, error)


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_save(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_layer
@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_save][::STEP])
def test_copies_compute_the_same_and_share_nothing(layer: Layer, copy_of: Any) -> None:
    module, inputs = layer.build(), layer.inputs()
    expected = outputs(module, inputs)
    module(inputs[0]).sum().backward()
    copied = copy_of(module)
    assert repr(copied) == repr(module)
    for ours, before in zip(outputs(copied, inputs), expected, strict=True):
        assert torch.equal(ours, before)
    with torch.no_grad():
        for p in copied.parameters():
            p.add_(0.5)
    for ours, before in zip(outputs(module, inputs), expected, strict=True):
        assert torch.equal(ours, before)
    assert not torch.equal(outputs(copied, inputs)[0], expected[0])


@every_layer
def test_plans_are_in_no_state(layer: Layer) -> None:
    module, new = layer.build(), layer.build()
    outputs(module, layer.inputs())
    assert module.state_dict().keys() == new.state_dict().keys()
    assert "_plan_cache" not in copy.deepcopy(module).__dict__
    assert pickled_bytes(module) == pickled_bytes(new)


def pickled_bytes(module: nn.Module) -> int:
    """The length of a pickle without the tensors, whose length depends on their addresses."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, part: Any) -> str | None:
            return "tensor" if isinstance(part, Tensor) else None

    file = io.BytesIO()
    Pickler(file).dump(module)
    return len(file.getvalue())


WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    "in place": lambda p: p.mul_(1.5),
    "through .data": lambda p: p.data.mul_(1.5),
    "new data": lambda p: setattr(p, "data", p.data * 1.5),
    "by numpy": lambda p: p.data.cpu().numpy().__imul__(1.5),
}


@every_layer
@pytest.mark.parametrize("write", list(WRITES)[:: 2 if INTERPRETED else 1])
def test_written_weights_are_noticed(layer: Layer, write: str) -> None:
    module, inputs = layer.build(), layer.inputs()
    before = outputs(module, inputs)
    for p in list(module.parameters())[::STEP]:
        for _ in range(2 if INTERPRETED else 3):
            outputs(module, inputs)
        with torch.no_grad():
            WRITES[write](p)
        assert_current(layer, module, inputs)
    assert not torch.equal(outputs(module, inputs)[0], before[0])


@every_layer
@pytest.mark.parametrize("report", ["invalidate", "weights_changed"])
def test_a_single_element_is_noticed_once_it_is_reported(layer: Layer, report: str) -> None:
    """Written past PyTorch's version counters, in a layer too wide to be compared as a whole."""
    width = WIDTH if INTERPRETED else 320
    module, fresh = layer.build(width=width), layer.build(width=width)
    inputs = layer.inputs(width=width)[:1]
    for p, theirs in list(zip(module.parameters(), fresh.parameters(), strict=True))[::STEP]:
        for seed in range(1 if INTERPRETED else 4):
            for _ in range(2):
                outputs(module, inputs)
            generator = torch.Generator().manual_seed(seed)
            element = int(torch.randint(p.numel(), (), generator=generator))
            for t in (p, theirs):
                t.data.view(-1)[element] += 8
            if report == "invalidate":
                module.invalidate()
            else:
                weights_changed()
            (ours,) = outputs(module, inputs)
            fresh.invalidate()
            (expected,) = outputs(fresh, inputs)
            assert torch.equal(ours, expected)


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_layer_in_another_dtype(layer: Layer, dtype: torch.dtype) -> None:
    """Its plans for the first dtype do not serve the second."""
    implementation = Implementation(layer.operator, layer.backend, layer.device)
    if layer.backend != "reference" and not implementation.takes(dtype):
        return
    module, inputs = layer.build(), layer.inputs()
    before = outputs(module, inputs)
    with pytest.raises((TypeError, RuntimeError), match=r"dtype|type"):
        module(inputs[0].to(dtype))
    module.to(dtype)
    for out in assert_current(layer, module, [x.to(dtype) for x in inputs]):
        assert out.dtype == dtype
    module.to(torch.float32).load_state_dict(layer.build().state_dict())
    for ours, expected in zip(outputs(module, inputs), before, strict=True):
        assert torch.equal(ours, expected)


@every_layer
def test_inputs_in_turn(layer: Layer) -> None:
    """Of other sizes, memory formats and modes: a plan serves only its kind of call."""
    module, reference = layer.build(), layer.build("reference")
    inputs = layer.inputs()
    inputs += [x[:1] for x in inputs] + [x.mT.contiguous().mT for x in inputs]
    for _ in range(2):
        for x in inputs:
            for training in (False, True):
                with torch.set_grad_enabled(training):
                    out = module(x)
                    assert out.requires_grad == training
                    assert_close(out.detach(), reference(x).detach())


@every_layer
def test_a_layer_on_the_meta_device(layer: Layer) -> None:
    """Where no kernels run, as in models that are built before their weights are loaded."""
    module = layer.build()
    real = outputs(module, layer.inputs())
    module.backend = "auto"
    module.to("meta")
    for x, expected in zip(layer.inputs(), real, strict=True):
        x = x.to("meta").requires_grad_()
        out = module(x)
        assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
        out.sum().backward()
        assert x.grad is not None
        assert (x.grad.shape, x.grad.device) == (x.shape, x.device)
