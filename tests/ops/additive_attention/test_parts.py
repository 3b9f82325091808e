"""What people attach to the linear layers of an attention takes part in its computation.

Adapters, hooks, weights that hooks make, quantised, offloaded and sharded layers: a part that is
more than a weight and a bias is called, in our layer and in accelerated ones, and the rest is read.
"""

from __future__ import annotations

import collections
import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.mkldnn
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.data import DataLoader

import swiftkernels.models
from swiftkernels import AdditiveAttention, accelerate
from swiftkernels.ops import linear_parts
from swiftkernels.ops.additive_attention.reference import attend
from swiftkernels.ops.additive_attention.weights import Options
from swiftkernels.testing.tolerance import relative_error
from tests.builds import ROOT
from tests.models.test_public_models import OfficialLayer

pytestmark = pytest.mark.filterwarnings("ignore:.*(weight_norm|quantization|ao).*")

WIDTH = 16
PARTS = ("to_query", "to_key", "proj", "final")


def ours(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return AdditiveAttention(WIDTH, WIDTH, 1, **options)


def accelerated() -> nn.Module:
    torch.manual_seed(0)
    layer = OfficialLayer(WIDTH, WIDTH, 1, "l2")
    accelerate(layer)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "ours": ours,
    "cpu": lambda: ours(backend="cpu"),
    "aten": lambda: ours(backend="aten"),
    "reference": lambda: ours(backend="reference"),
    "softmax": lambda: ours(pooling="softmax", qk_norm=False),
    "accelerated": accelerated,
}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
both = pytest.mark.parametrize("make", [ours, accelerated], ids=["ours", "accelerated"])
part_names = pytest.mark.parametrize("part", PARTS)


def name_of(layer: nn.Module, part: str) -> str:
    """The official layer calls one part otherwise."""
    return "Proj" if part == "proj" and isinstance(layer, OfficialLayer) else part


def tokens(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 9, WIDTH)), generator=torch.Generator().manual_seed(1))


def by_calls(layer: Any, x: Tensor) -> Tensor:
    """The definition, with every linear layer called."""
    query, key, proj, final = (getattr(layer, name_of(layer, part)) for part in PARTS)
    options = Options(layer.pooling, getattr(layer, "qk_norm", True), layer.scale_factor, 1e-12)
    return attend(query(x), key(x), layer.w_g.flatten(), proj, final, None, options)


class Adapter(nn.Module):
    """In a linear layer's place; `weight` and `bias` are the base layer's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class AdapterLinear(nn.Linear):
    """A linear layer with a forward of its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.t() @ self.b.t()


class CallableLinear(nn.Linear):
    """Another call around the usual forward."""

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


def doubled(base: nn.Linear) -> nn.Linear:
    made = CallableLinear(base.in_features, base.out_features)
    made.load_state_dict(base.state_dict())
    return made


def with_another_forward(base: nn.Linear) -> nn.Linear:
    usual = base.forward
    base.forward = lambda x: usual(x) + 1  # type: ignore[method-assign]
    return base


def with_hook(register: Callable[[nn.Module], Any]) -> Callable[[nn.Module], nn.Module]:
    def change(base: nn.Module) -> nn.Module:
        register(base)
        return base

    return change


REPLACEMENTS: dict[str, Callable[[Any], nn.Module]] = {
    "adapter": Adapter,
    "adapter of adapter": lambda base: Adapter(Adapter(base)),
    "linear with a forward": AdapterLinear,
    "linear with a call": doubled,
    "sequence": lambda base: nn.Sequential(base, nn.Tanh()),
    "forward of the instance": with_another_forward,
    "forward hook": with_hook(lambda m: m.register_forward_hook(lambda m, i, o: 2 * o)),
    "hook with kwargs": with_hook(
        lambda m: m.register_forward_hook(lambda m, a, k, o: o + 1, with_kwargs=True)
    ),
    "pre-hook": with_hook(lambda m: m.register_forward_pre_hook(lambda m, i: (i[0] + 1,))),
}
replacements = pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS.keys())


def assert_called(layer: nn.Module, x: Tensor, tolerance: float = 1e-6) -> None:
    """The layer computes the definition with its parts called, with and without gradients."""
    expected = by_calls(layer, x)
    out = layer(x)
    assert relative_error(out, expected) <= tolerance
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(layer(x), expected) <= tolerance
    trained = [p for p in layer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.square().sum(), trained, allow_unused=True)
    right = torch.autograd.grad(expected.square().sum(), trained, allow_unused=True)
    for g, r in zip(grads, right, strict=True):
        assert (g is None) == (r is None)
        if r is not None:
            assert relative_error(g, r) <= 10 * tolerance


@layers
@part_names
@replacements
def test_whatever_takes_the_place_of_a_linear_layer_is_called(make, part, replace):
    layer, x = make(), tokens()
    with torch.no_grad():
        plain = [layer(x) for _ in range(2)][1]
    name = name_of(layer, part)
    original = getattr(layer, name)
    setattr(layer, name, replace(original))
    if isinstance(layer, swiftkernels.ops.additive_attention.layer.AttentionForward):
        assert list(layer.called_parts()) == [name]
    assert_called(layer, x)
    setattr(layer, name, copy.deepcopy(nn.Linear(WIDTH, WIDTH)))
    getattr(layer, name).load_state_dict(
        {k: v for k, v in original.state_dict().items() if k in ("weight", "bias")}
    )
    if replace not in (REPLACEMENTS["sequence"],):
        with torch.no_grad():
            assert torch.equal([layer(x) for _ in range(2)][1], plain)  # by the kernels again


@both
def test_an_adapter_gets_a_gradient_beside_frozen_weights(make):
    layer, x = make().requires_grad_(False), tokens()
    layer.to_key = Adapter(layer.to_key)
    out = layer(x)
    assert out.requires_grad
    out.sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {
        "to_key.a.weight",
        "to_key.b.weight",
    }


@pytest.mark.parametrize("layout", ["channels_first", "auto", "channels_last"])
def test_parts_are_called_for_images_masks_and_residuals(layout):
    layer = ours(layout=layout, backend="auto")
    x = tokens(2, 3, 5, WIDTH) if layout == "channels_last" else tokens(2, WIDTH, 3, 5)
    mask = torch.arange(2 * 15).view(2, 3, 5) % 4 > 0
    expected = layer(x, mask, residual_scale=layer.final.bias)
    weights = layer(x, return_weights=True)
    layer.to_query.register_forward_hook(lambda m, i, o: None)
    layer.final.register_forward_hook(lambda m, i, o: None)
    torch.testing.assert_close(layer(x, mask, residual_scale=layer.final.bias), expected)
    for found, right in zip(layer(x, return_weights=True), weights, strict=True):
        torch.testing.assert_close(found, right)


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward pre": lambda m, f: m.register_forward_pre_hook(f),
    "forward pre, kwargs": lambda m, f: m.register_forward_pre_hook(f, with_kwargs=True),
    "forward": lambda m, f: m.register_forward_hook(f),
    "forward, always": lambda m, f: m.register_forward_hook(f, always_call=True),
    "full backward": lambda m, f: m.register_full_backward_hook(f),
    "full backward pre": lambda m, f: m.register_full_backward_pre_hook(f),
}


@both
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS.keys())
def test_every_kind_of_hook_runs_once_a_call_and_not_after_its_removal(make, register):
    layer, x, calls = make(), tokens(), []
    layer(x).sum().backward()
    for part in PARTS:
        module = getattr(layer, name_of(layer, part))
        handle = register(module, lambda m, *_, part=part: calls.append(part))
        layer(x).sum().backward()
        assert calls == [part]
        calls.clear()
        handle.remove()
        assert not layer.called_parts()
    with torch.no_grad():
        layer(x)
    assert not calls


@both
def test_hooks_in_a_new_dictionary_run(make):
    layer, x, calls = make(), tokens(), []
    layer(x)
    layer.final._forward_hooks = collections.OrderedDict()
    layer(x)
    layer.final.register_forward_hook(lambda *_: calls.append(1))
    layer(x)
    assert calls == [1]


@both
@pytest.mark.parametrize("when", ["forward_pre_hook", "forward_hook", "full_backward_hook"])
def test_hooks_of_all_modules_see_the_parts(make, when):
    layer, seen = make(), []
    register = getattr(nn.modules.module, f"register_module_{when}")
    handle = register(lambda m, *_: seen.append(m))
    try:
        layer(tokens()).sum().backward()
    finally:
        handle.remove()
    for part in PARTS:
        assert getattr(layer, name_of(layer, part)) in seen
    assert not layer.called_parts()


def test_a_linear_layer_whose_forward_was_patched_for_all_is_called(monkeypatch):
    layer, x, calls = ours(), tokens(), []
    expected = layer(x)
    usual = nn.Linear.forward

    def counting(self: nn.Linear, x: Tensor) -> Tensor:
        calls.append(self)
        return usual(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    torch.testing.assert_close(layer(x), expected)
    assert calls == [layer.to_query, layer.to_key, layer.proj, layer.final]


BAKED: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.3),
    "weight_norm, parametrized": parametrizations.weight_norm,
    "spectral_norm, parametrized": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@layers
@part_names
@pytest.mark.parametrize("bake", BAKED.values(), ids=BAKED.keys())
def test_weights_that_are_made_anew_are_current(make, part, bake):
    layer, x = make().eval(), tokens()
    with torch.no_grad():
        layer(x)
        module = getattr(layer, name_of(layer, part))
        bake(module)
        for _ in range(3):
            for p in module.parameters():
                p.add_(torch.randn_like(p) / 10)
            assert relative_error(layer(x), by_calls(layer, x)) <= 1e-6


@pytest.mark.parametrize("backend", ["auto", "aten"])
@pytest.mark.parametrize("hooked", [None, "to_key", "final"])
@part_names
def test_a_parametrization_is_computed_once_a_call(part, hooked, backend):
    layer, x = ours(backend=backend).train(), tokens()
    parametrizations.spectral_norm(layer.get_submodule(part))
    if hooked:
        layer.get_submodule(hooked).register_forward_hook(lambda *_: None)
    twin = copy.deepcopy(layer)
    layer(x)
    twin.get_submodule(part)(x)  # one step of the power iteration
    u, once = (m.get_submodule(part).parametrizations.weight[0]._u for m in (layer, twin))
    torch.testing.assert_close(u, once)


@both
def test_dynamic_quantisation(make):
    model = nn.Sequential(make()).eval()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    x = tokens()
    with torch.no_grad():
        assert relative_error(quantised(x), model(x)) < 0.1


@both
def test_quantisation_aware_training_sees_and_rounds(make):
    layer, x = make(), tokens()
    layer.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    torch.ao.quantization.prepare_qat(layer, inplace=True)
    out = layer(x)
    for part in PARTS:
        assert (getattr(layer, name_of(layer, part)).activation_post_process.scale != 1).all()
    out.sum().backward()
    assert layer.final.weight.grad is not None


class Int8Weight(Tensor):
    """A weight of eight bits that only linear layers know how to use."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> Int8Weight:
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.rounded = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is F.linear:
            x, weight, bias = (*args, *(kwargs or {}).values())
            return F.linear(x, weight.rounded.float() * weight.scale, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} of an eight-bit weight")


@both
@part_names
def test_weights_of_a_tensor_subclass(make, part):
    layer, x = make().requires_grad_(False), tokens()
    before = layer(x)
    module = getattr(layer, name_of(layer, part))
    module.weight = nn.Parameter(Int8Weight(module.weight.detach()), requires_grad=False)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert 1e-6 < relative_error(layer(x), before) < 0.05


@both
def test_weights_that_a_hook_brings_and_takes_away(make):
    """As offloading does: between calls the parts have no values."""
    layer, x = make().requires_grad_(False), tokens()
    expected = layer(x)
    for part in PARTS:
        module = getattr(layer, name_of(layer, part))
        values = copy.deepcopy(module.state_dict())
        module.to("meta")
        module.register_forward_pre_hook(
            lambda m, i, values=values: m.load_state_dict(values, assign=True) and None
        )
        module.register_forward_hook(lambda m, i, o: m.to("meta") and None)
    for _ in range(2):
        torch.testing.assert_close(layer(x), expected)


def test_weights_that_are_attributes_are_read():
    """As in the replicas of DataParallel, and in a model whose parameters are one flat tensor."""
    layer, x = ours().requires_grad_(False), tokens()
    expected = layer(x)
    for part in PARTS:
        module = getattr(layer, part)
        weight = module._parameters.pop("weight")
        module.weight = weight.detach().clone()
    assert not layer.called_parts()
    for factor in (1, 2):
        layer.final.weight.mul_(factor)
        torch.testing.assert_close(layer(x), by_calls(layer, x))
    assert not torch.allclose(layer(x), expected)


def test_sharded_linear_layers(tmp_path):
    """One unit for each of them: the values are there during their calls alone."""
    script = f"""
import copy, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from swiftkernels import AdditiveAttention
dist.init_process_group("gloo", init_method="file://{tmp_path}/rendezvous", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
layer, x = AdditiveAttention(16, 16, 1), torch.randn(2, 9, 16)
expected = layer(x)
for part in (layer.to_query, layer.to_key, layer.proj, layer.final):
    fully_shard(part, mesh=mesh)
out = layer(x)
torch.testing.assert_close(out, expected)
out.sum().backward()
assert type(layer.final.weight.grad).__name__ == "DTensor"
print(len(layer.called_parts()))
dist.destroy_process_group()
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "4"  # some versions of Gloo write before


@pytest.mark.parametrize("part", ["attn", "layer_scale_1", "drop_path", "linear", "layer_scale_2"])
def test_hooks_in_a_block_of_our_model_see_what_they_are_to_see(part):
    """In inference the attention scales and adds its output itself, unless somebody looks."""
    model = swiftkernels.models.SwiftFormer((8, 16), (1, 2), num_classes=3).eval()
    block, x = model.stages[1].blocks[1], tokens(2, 16, 5, 5)
    nn.init.normal_(block.layer_scale_1.gamma)
    expected, seen = block(x), []
    local = block.local_representation(x)
    branch = block.attn(local)
    after = local + block.layer_scale_1.gamma * branch
    right = {
        "attn": (local, branch),
        "layer_scale_1": (branch, branch * block.layer_scale_1.gamma),
        "drop_path": (branch * block.layer_scale_1.gamma,) * 2,
        "linear": (after, block.linear(after)),
        "layer_scale_2": (block.linear(after), block.layer_scale_2(block.linear(after))),
    }[part]
    handle = block.get_submodule(part).register_forward_hook(
        lambda m, args, out: seen.append((args[0], out))
    )
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(seen[0], right)
    handle.remove()
    block.attn = nn.Identity()  # somebody's own
    torch.testing.assert_close(
        block(x),
        local * (1 + block.layer_scale_1.gamma)
        + block.linear(local * (1 + block.layer_scale_1.gamma)) * block.layer_scale_2.gamma,
    )


def test_the_reason_is_told_in_words():
    layer = ours()
    layer.to_key = Adapter(layer.to_key)
    layer.final.register_forward_hook(lambda *_: None)
    text = str(swiftkernels.doctor(layer))
    assert text.splitlines() == [
        "0 of 1 additive attentions run fused",
        "  (the model): AdditiveAttention, not fused: to_key is called, because it is a Adapter; "
        "final is called, because it has hooks",
    ]


def test_the_doctor_of_a_model():
    model = nn.Sequential(ours(), ours(backend="reference"), OfficialLayer(8, 8, 1, "l2"))
    model.append(ours().double())
    before = copy.deepcopy(model.state_dict())
    first, second, third, fourth = swiftkernels.doctor(model).attentions
    assert (first.backend, first.reason) == ("cpu", "")
    assert "was requested" in second.reason
    assert "swiftkernels.accelerate" in third.reason
    assert "got float64" in fourth.reason
    accelerate(model)
    assert swiftkernels.doctor(model).attentions[2].reason == ""
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got int"):
        swiftkernels.doctor(3)


# What PyTorch's tools do with a whole layer.


@pytest.fixture(params=["ours", "images", "no norms", "softmax", "accelerated", "timm-like"])
def layer_and_input(request) -> Iterator[tuple[nn.Module, Tensor]]:
    if request.param == "images":
        yield ours(layout="channels_first"), tokens(2, WIDTH, 3, 5)
    elif request.param == "no norms":
        yield ours(qk_norm=False, pooling="linear"), tokens(2, WIDTH, 3, 5)
    elif request.param == "softmax":
        yield ours(pooling="softmax"), tokens()
    elif request.param == "accelerated":
        yield accelerated(), tokens()
    else:
        yield ours(pooling="sum", layout="channels_last"), tokens(2, 3, 5, WIDTH)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("root", [True, False])
def test_script_and_fx_give_the_plain_formula(layer_and_input, root):
    layer, x = layer_and_input
    model = layer.eval() if root else nn.Sequential(layer, nn.GELU()).eval()
    kinds = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    for convert in (torch.jit.script, torch.fx.symbolic_trace):
        converted = convert(model)
        assert relative_error(converted(x), model(x)) <= 1e-6
        assert list(converted.state_dict()) == keys
        converted(x).sum().backward()
        assert all(p.grad is not None for p in converted.parameters())
        model.zero_grad()
    graph = torch.fx.symbolic_trace(model).graph
    prefix = "" if root else "0."
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    assert {prefix + name_of(layer, part) for part in PARTS} <= called
    assert [type(m) for m in model.modules()] == kinds  # the model stays what it is


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_script_takes_masks_and_residuals():
    layer, x = ours(pooling="softmax"), tokens(2, WIDTH, 3, 5)
    mask = torch.arange(2 * 15).view(2, 3, 5) % 4 > 0
    scripted = torch.jit.script(layer)
    out = scripted(x, mask, residual_scale=layer.final.bias)
    torch.testing.assert_close(out, layer(x, mask, residual_scale=layer.final.bias))
    with pytest.raises(Exception, match="return_weights must be False"):
        scripted(x, return_weights=True)


def test_a_traced_layer_refuses_what_it_was_traced_without():
    layer, x = ours(), tokens()
    traced = torch.fx.symbolic_trace(layer)
    with pytest.raises(ValueError, match="mask must be None"):
        traced(x, torch.ones(2, 9, dtype=torch.bool))


@both
def test_conversion_to_mkldnn(make):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no MKLDNN")
    layer, x = make().eval().requires_grad_(False), tokens()
    expected = layer(x)
    converted = torch.utils.mkldnn.to_mkldnn(copy.deepcopy(nn.Sequential(layer)))
    torch.testing.assert_close(converted(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "aten"])
@pytest.mark.parametrize("shape", [(1, 3, WIDTH), (1, WIDTH, 2, 2)])
def test_batched_gradients(backend, shape):
    found = []
    for chosen in ("reference", backend):
        layer, x = ours(backend=chosen).double() if backend == "aten" else ours(), tokens(*shape)
        layer.backend, x = chosen, x.to(layer.w_g.dtype)
        jacobian = torch.autograd.functional.jacobian(layer, x, vectorize=True)
        hessian = torch.autograd.functional.hessian(
            lambda t, m=layer: m(t).square().sum(), x, vectorize=True
        )
        leaf = x.clone().requires_grad_()
        out, weights = layer(leaf), list(layer.parameters())
        ones = torch.eye(out.numel())[:5].view(5, *out.shape).to(out.dtype)
        batched = torch.autograd.grad(out, [leaf, *weights], ones, is_grads_batched=True)
        found.append([jacobian, hessian, *batched])
    for right, got in zip(*found, strict=True):
        assert relative_error(got, right) <= 1e-5


def test_parameters_can_be_swapped():
    layer, x = ours(), tokens()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            layer(x)
        layer.load_state_dict({name: t + 0.1 for name, t in layer.state_dict().items()})
        assert relative_error(layer(x), by_calls(layer, x)) <= 1e-6
        layer.double()
        assert relative_error(layer(x.double()), by_calls(layer, x.double())) <= 1e-12
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    other = nn.Parameter(layer.w_g.detach() + 1)
    torch.utils.swap_tensors(layer.w_g, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_residual_scale_under_autocast_is_as_written_out(dtype, scale_dtype, grad):
    layer, x = ours(), tokens(2, WIDTH, 3, 5).to(dtype)
    gamma = nn.Parameter(torch.full((WIDTH, 1, 1), 0.5, dtype=scale_dtype))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            right, out = x + gamma * layer(x), layer(x, residual_scale=gamma)
            assert out.dtype == right.dtype
            torch.testing.assert_close(out, right, rtol=1e-2, atol=1e-2)
    with pytest.raises(TypeError, match="residual_scale must have the dtype of x"):
        layer(x.float(), residual_scale=gamma.double())


def test_parts_are_read_with_workers_of_a_data_loader():
    """A fork in the middle: hooks registered before it are there after it."""
    layer = ours().requires_grad_(False)
    layer.final.register_forward_hook(lambda m, i, o: o + 1)
    data = [tokens(9, WIDTH)] * 2
    expected = layer(torch.stack(data))
    collate = lambda items: layer(torch.stack(items))  # noqa: E731
    loaded = list(DataLoader(data, 2, num_workers=1, collate_fn=collate))  # type: ignore[arg-type]
    torch.testing.assert_close(loaded[0], expected)


def test_plain_linear_layers_are_recognised_at_once():
    part: Any = nn.Linear(3, 3)
    assert linear_parts.plain_parameters([part, part]) == [part._parameters] * 2
    others: list[Any] = [AdapterLinear(nn.Linear(WIDTH, WIDTH)), None]
    for change in (REPLACEMENTS["forward hook"], REPLACEMENTS["forward of the instance"]):
        others.append(change(nn.Linear(3, 3)))
        assert linear_parts.why_called(others[-1])
    for other in others:
        assert linear_parts.plain_parameters([part, other]) == []
