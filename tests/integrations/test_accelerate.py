"""`accelerate`: layers of other libraries on these kernels, and nothing else changed."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from swiftkernels import AdditiveAttention, accelerate, warmup
from swiftkernels.integrations import probe
from swiftkernels.integrations.accelerate import Acceleration
from swiftkernels.testing.cases import POOLINGS
from swiftkernels.testing.tolerance import assert_as_good_as_eager
from tests.models.test_public_models import OfficialLayer
from tests.stubs import import_timm


class Fork(nn.Module):
    """An additive attention as in other libraries, in any variant."""

    def __init__(self, dim: int = 12, heads: int = 1, pooling: str = "l2", norms: bool = True):
        super().__init__()
        width = dim * heads
        self.pooling_of_the_fork, self.norms = pooling, norms
        self.scale_factor = dim**-0.5
        self.to_query, self.to_key = nn.Linear(dim, width), nn.Linear(dim, width)
        self.w_g = nn.Parameter(torch.randn(width, 1))
        self.proj, self.final = nn.Linear(width, width), nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.to_query(x), self.to_key(x)
        if self.norms:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = q @ self.w_g * self.scale_factor
        if self.pooling_of_the_fork == "l2":
            weights = F.normalize(scores, dim=1)
        elif self.pooling_of_the_fork == "softmax":
            weights = scores.softmax(dim=1)
        else:
            weights = scores if self.pooling_of_the_fork == "linear" else scores.softmax(dim=-1)
        global_query = (weights * q).sum(dim=1, keepdim=True)
        return self.final(self.proj(global_query * k) + q)


class OnImages(Fork):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x.flatten(2).transpose(1, 2))
        return out.transpose(1, 2).unflatten(2, x.shape[2:])


class Renamed(nn.Module):
    def __init__(self, dim: int = 12) -> None:
        super().__init__()
        self.q, self.k, self.g = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Parameter(randn(dim))
        self.Proj, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k = F.normalize(self.q(x), dim=-1), F.normalize(self.k(x), dim=-1)
        weights = F.normalize(q @ self.g * q.shape[-1] ** -0.5, dim=1).unsqueeze(-1)
        return self.out(self.Proj((weights * q).sum(1, keepdim=True) * k) + q)


NAMES = {"to_query": "q", "to_key": "k", "proj": "Proj", "final": "out", "w_g": "g"}


class Extended(Fork):
    """A layer with a residual connection."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def results(layer: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The output and all gradients of a copy of a layer."""
    layer, x = copy.deepcopy(layer).to(dtype), x.detach().to(dtype).requires_grad_()
    torch.manual_seed(0)  # of stochastic depth
    out = layer(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(out.square().sum(), (x, *parameters))
    return {"output": out.detach(), "x": grads[0], **dict(zip(names, grads[1:], strict=True))}


def assert_accelerated(layer: nn.Module, x: Tensor, **options: Any) -> Acceleration:
    """The accelerated layer has the same outputs and gradients; after `undo`, bit for bit."""
    exact, eager = results(layer, x, torch.float64), results(layer, x, torch.float32)
    done = accelerate(layer, **options)
    assert {found.reason for found in done.layers} == {""}
    for name, t in results(layer, x, torch.float32).items():
        assert_as_good_as_eager(t, eager[name], exact[name], ulps=8, name=name)
    done.undo()
    for name, t in results(layer, x, torch.float32).items():
        assert torch.equal(t, eager[name]), name
    return done


@pytest.mark.parametrize("kind", [Fork, OnImages])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_variant_is_found_and_computed(pooling, norms, kind):
    layer = kind(pooling=pooling, norms=norms, heads=2)
    x = randn(2, 9, 12) if kind is Fork else randn(2, 12, 3, 3)
    ((found,)) = assert_accelerated(layer, x).layers
    layout = "channels_last" if kind is Fork else "channels_first"
    assert found.variant == (pooling, norms, layout)


def test_kernels_run_in_place_of_the_linear_layers(monkeypatch):
    layer, x = Fork(), randn(2, 9, 12)
    accelerate(layer)
    assert not layer.called_parts()
    monkeypatch.setattr(F, "linear", None)  # calling it would fail
    with torch.no_grad():
        assert layer(x).shape == x.shape


def test_forks_with_other_names_are_accelerated():
    x = randn(2, 9, 12)
    with pytest.raises(ValueError, match="holds none"):
        accelerate(Renamed())
    assert_accelerated(Renamed(), x, names=NAMES)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("pooling", ["l2", "sum"])
def test_official_layer_with_both_poolings(pooling, heads):
    layer = OfficialLayer(12, 12, heads, pooling)
    ((found,)) = assert_accelerated(layer, randn(2, 9, 12)).layers
    assert found.kind == "OfficialLayer"
    assert found.variant == (pooling, True, "channels_last")


class OfficialBlock(nn.Module):
    """A block of the official code: the attention of images, as tokens."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn
        self.layer_scale_1 = nn.Parameter(randn(12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.attn(x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]))
        images = tokens.reshape(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
        return x + self.layer_scale_1 * images


@pytest.mark.parametrize("attention", [lambda: OfficialLayer(12, 12, 1, "l2"), Renamed])
def test_models_with_several_attentions(attention):
    """Attentions of the official code and of a fork, with convolutions between them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2), OfficialBlock(attention()),
        nn.Conv2d(12, 12, 3, stride=2), OfficialBlock(attention()),
    )  # fmt: skip
    names = NAMES if attention is Renamed else None
    keys = list(model.state_dict())
    done = assert_accelerated(model, randn(2, 3, 23, 31), names=names)
    assert [found.name for found in done.layers] == ["1.attn", "3.attn"]
    assert list(model.state_dict()) == keys


def test_undo_restores_classes_attributes_and_outputs():
    model = nn.Sequential(Fork(), nn.ReLU(), Fork(pooling="sum"))
    x = randn(2, 9, 12)
    before, attributes = model(x), [dict(vars(m)) for m in model.modules()]
    done = accelerate(model)
    assert isinstance(model[0], Fork)
    assert type(model[0]) is not Fork
    done.undo()
    assert [type(m) for m in model] == [Fork, nn.ReLU, Fork]
    assert [dict(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(model(x), before)
    done.undo()


def test_context_manager_undoes_at_the_end():
    layer, x = Fork(), randn(2, 9, 12)
    before = layer(x)
    with accelerate(layer):
        assert type(layer) is not Fork
    assert type(layer) is Fork
    with pytest.raises(TypeError), accelerate(layer):
        layer(None)
    assert type(layer) is Fork
    assert torch.equal(layer(x), before)


def test_hooks_modes_names_and_optimizers_stay():
    layer, seen = Fork(), []
    names = list(layer.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer.register_forward_hook(lambda *_: seen.append(1))
    layer.eval()
    accelerate(layer)
    assert not seen
    assert not layer.training
    assert list(layer.state_dict()) == names
    before = layer.w_g.detach().clone()
    layer(randn(2, 9, 12)).square().sum().backward()
    optimizer.step()
    assert seen == [1]
    assert not torch.equal(layer.w_g, before)


def test_copies_and_pickles_are_accelerated():
    layer, x = Fork(), randn(2, 9, 12)
    accelerate(layer)
    expected = layer(x)
    memory = io.BytesIO()
    torch.save(layer, memory)
    memory.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(memory, weights_only=False),
    ):
        assert type(other) is type(layer)
        assert torch.equal(other(x), expected)


def test_random_state_and_gradient_mode_stay():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model = Fork()
    torch.manual_seed(3)
    accelerate(model)
    assert torch.equal(torch.rand(1), expected)
    assert model(randn(1, 9, 12)).requires_grad


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Extended, "computes something else"),
        (lambda: AdditiveAttention(12, 12, 1), "has these kernels"),
        (lambda: Fork().to("meta"), "no values yet"),
        (lambda: nn.ModuleDict(dict(Fork().named_children())), "accepts neither"),
    ],
)
def test_other_layers_are_reported_and_not_changed(layer, reason):
    layer = layer()
    if isinstance(layer, nn.ModuleDict):  # the parts of an attention without a forward
        layer.w_g = nn.Parameter(torch.ones(12, 1))
    model = nn.Sequential(layer, Fork())
    done = accelerate(model)
    assert [bool(found.variant) for found in done.layers] == [False, True]
    assert reason in done.layers[0].reason
    assert type(model[0]) is type(layer)
    assert "1 of 2 additive attentions accelerated" in str(done)
    assert f"0: {type(layer).__name__} not changed, " in str(done)


def test_layers_with_ambiguous_weights_are_not_changed():
    layer = Fork()
    nn.init.zeros_(layer.proj.weight)
    (found,) = accelerate(layer).layers
    assert "several poolings" in found.reason


def test_second_acceleration_changes_nothing():
    layer = Fork()
    first, second = accelerate(layer), accelerate(layer)
    assert second.layers[0].reason == "it has these kernels"
    second.undo()
    assert type(layer) is not Fork
    first.undo()
    assert type(layer) is Fork


def test_dtype_and_backend_are_used():
    layer = Fork().to(torch.bfloat16)
    accelerate(layer, backend="reference")
    assert layer(randn(2, 9, 12).bfloat16()).dtype == torch.bfloat16
    assert layer.backend == "reference"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: accelerate(torch.ones(2)), TypeError, "model must be"),
        (lambda: accelerate(nn.Linear(2, 2)), ValueError, "Linear holds none"),
        (lambda: accelerate(Fork(), names={"query": "q"}), ValueError, "names must have keys"),
        (lambda: accelerate(Fork(), backend="gpu"), ValueError, "backend"),
        (lambda: accelerate(Fork(), recompute="yes"), ValueError, "recompute"),
    ],
)
def test_wrong_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_timm_network():
    model = import_timm().create_model("swiftformer_xs", num_classes=3).eval()
    x = randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        done = accelerate(model)
        assert [found.variant for found in done.layers] == [("l2", True, "channels_first")] * 4
        torch.testing.assert_close(model(x), before)
        done.undo()
        assert torch.equal(model(x), before)


def test_transformers_network():
    transformers = pytest.importorskip("transformers")
    config = transformers.SwiftFormerConfig(num_labels=3)
    model = transformers.SwiftFormerForImageClassification(config).eval()
    x = randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x).logits
        done = accelerate(model)
        assert [found.variant for found in done.layers] == [("sum", True, "channels_last")] * 4
        torch.testing.assert_close(model(x).logits, before)
        done.undo()
        assert torch.equal(model(x).logits, before)


def hooked(layer: nn.Module, calls: list[str]) -> nn.Module:
    for part in layer.modules():
        part.register_forward_hook(lambda *_: calls.append("forward"))
        part.register_forward_pre_hook(lambda *_: calls.append("pre"))
    return layer


class Counter(nn.Module):
    """A parametrization that counts in a buffer how often its tensor is read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("reads", torch.zeros(()))

    def forward(self, t: Tensor) -> Tensor:
        self.reads.add_(1)
        return t


ATTACHED: dict[str, Any] = {
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.to_query),
    "old spectral_norm": lambda m: nn.utils.spectral_norm(m.to_query),
    "weight_norm": lambda m: nn.utils.weight_norm(m.final),
    "pruned": lambda m: prune.l1_unstructured(m.to_key, "weight", 0.3),
    "parametrized w_g": lambda m: parametrize.register_parametrization(m, "w_g", Counter()),
    "parametrized part": lambda m: parametrize.register_parametrization(
        m.to_query, "weight", Counter()
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attach", ATTACHED.values(), ids=ATTACHED.keys())
def test_inspection_changes_no_state_and_calls_no_hook(attach, training):
    calls: list[str] = []
    layer = Fork().train(training)
    attach(layer)
    hooked(layer, calls)
    layer(randn(2, 9, 12))
    calls.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append("global"))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    random = torch.get_rng_state()
    try:
        done = accelerate(layer)
    finally:
        handle.remove()
    assert not calls
    assert "1 of 1" in str(done)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert layer.training == training


def test_objects_of_hooks_are_not_copied():
    """The object of a hook that is a method may be large, or impossible to copy."""

    class Trainer:
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

        def hook(self, *_: Any) -> None:
            pass

    layer = Fork()
    layer.to_query.register_forward_hook(Trainer().hook)
    layer.register_full_backward_hook(Trainer().hook)
    assert "1 of 1" in str(accelerate(layer))


def test_layers_with_a_replaced_forward_are_not_changed():
    model = nn.Sequential(Fork(), Fork())
    usual = model[0].forward
    model[0].forward = lambda x: usual(x) * 2
    report = accelerate(model)
    assert report.layers[0].reason == "its forward was replaced"
    assert "1 of 2" in str(report)
    x = randn(2, 9, 12)
    torch.testing.assert_close(model[0](x), usual(x) * 2)


class Refusing(Fork):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("this layer takes nothing in float64")


class NotCopied(Fork):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("this layer cannot be copied")


@pytest.mark.parametrize("strange", [Refusing, NotCopied])
def test_layers_that_cannot_be_run_are_reported_and_the_others_accelerated(strange):
    report = accelerate(nn.Sequential(Fork(), strange(), Fork()))
    assert "2 of 3" in str(report)
    assert report.layers[1].variant is None
    assert strange.__name__ in str(report)
    assert "float64" in report.layers[1].reason or "copied" in report.layers[1].reason


def test_all_layers_are_inspected_before_the_first_one_changes(monkeypatch):
    """An interruption of the inspection leaves the model unchanged."""
    model = nn.Sequential(Fork(), Fork())
    inspect_layer, seen = probe.inspect_layer, []

    def interrupted(*args: Any) -> Any:
        if seen:
            raise KeyboardInterrupt
        seen.append(args)
        return inspect_layer(*args)

    monkeypatch.setattr(probe, "inspect_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model)
    assert [type(m) for m in model] == [Fork, Fork]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_default_device_does_not_matter(device):
    layer, x = Fork(), randn(2, 9, 12)
    expected = layer(x)
    torch.set_default_device(device)
    try:
        assert "1 of 1" in str(accelerate(layer))
        out = layer(x)
    finally:
        torch.set_default_device("cpu")
    torch.testing.assert_close(out, expected)


ORDERS = [
    "".join(order)
    for order in itertools.permutations("apru")
    if order.index("a") < order.index("u") and order.index("p") < order.index("r")
]
"""a: accelerate, u: undo it, p: parametrize, r: remove the parametrization."""


@pytest.mark.parametrize("target", ["w_g", "to_query.weight"])
@pytest.mark.parametrize("order", ORDERS)
def test_acceleration_and_parametrizations_in_any_order(order, target):
    layer, x = Fork(), randn(2, 9, 12)
    module, _, name = target.rpartition(".")
    owner = layer.get_submodule(module)
    done: Any = None
    for step in order:
        if step == "a":
            done = accelerate(layer)
            assert "1 of 1" in str(done)
        elif step == "p":
            parametrize.register_parametrization(owner, name, nn.Tanh())
        elif step == "r":
            parametrize.remove_parametrizations(owner, name)
        else:
            done.undo()
        with torch.no_grad():
            expected = Fork.forward(layer, x)
            for _ in range(2):
                torch.testing.assert_close(layer(x), expected)
        copy.deepcopy(layer)(x)
    assert type(layer) is Fork
    assert set(vars(layer)) == set(vars(Fork()))


def test_layers_with_adapters_are_accelerated_and_reported_as_not_fused():
    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.extra = base, nn.Linear(12, 12)
            self.in_features = base.in_features

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.extra(x)

    layer, x = Fork(), randn(2, 9, 12)
    layer.to_query = Adapter(layer.to_query)
    expected = layer(x)
    ((found,)) = accelerate(layer).layers
    assert found.called == {"to_query": "it is a Adapter"}
    assert "not fused: to_query is called, because it is a Adapter" in str(found)
    torch.testing.assert_close(layer(x), expected)
    layer.to_query = layer.to_query.base_layer  # merged or removed: fused from now on
    assert not layer.called_parts()


@pytest.mark.parametrize("training", [True, False])
def test_warmup_runs_accelerated_layers(training):
    model = nn.Sequential(Fork(), OnImages(), OfficialLayer(12, 12, 1, "l2"))
    with pytest.raises(ValueError, match="accelerate"):
        warmup(model)
    accelerate(model)
    assert warmup(model, training=training) == ["0", "1", "2"]


class WithDropout(Fork):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


class WithGate(Fork):
    """A layer with a gate: its output differs as soon as the gate is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.gate * x


class WithScale(Fork):
    def __init__(self) -> None:
        super().__init__(pooling="softmax")
        del self.scale_factor
        self.scale_factor = nn.Parameter(torch.tensor(12**-0.5))


class InTraining(Fork):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.training else 1)


class WithMask(Fork):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out = super().forward(x)
        return out if mask is None else out * mask.unsqueeze(-1)


class WithEps(Fork):
    """Another eps of the norms, which only tiny tokens show."""

    def __init__(self) -> None:
        super().__init__()
        for part in (self.to_query, self.to_key):
            nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        q = F.normalize(self.to_query(x), dim=-1, eps=1e-3)
        k = F.normalize(self.to_key(x), dim=-1, eps=1e-3)
        weights = F.normalize(q @ self.w_g * self.scale_factor, dim=1)
        return self.final(self.proj((weights * q).sum(dim=1, keepdim=True) * k) + q)


class Cropping(Fork):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :64])


class WithNames(Fork):
    def __init__(self) -> None:
        super().__init__()
        self.names = ["a", "b"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (WithDropout, "more than the parts of an additive attention: drop"),
        (WithGate, "more than the parts of an additive attention: gate"),
        (WithScale, "more than the parts of an additive attention: scale_factor"),
        (WithMask, "arguments mask of its forward"),
        (InTraining, "computes something else"),
        (WithEps, "computes something else"),
        (Cropping, "computes something else"),
        (WithNames, "its own names would be overwritten"),
    ],
)
def test_layers_that_compute_more_are_not_changed(kind, words):
    layer = kind()
    ((found,)) = accelerate(layer).layers
    assert found.variant is None
    assert words in found.reason
    assert type(layer) is kind


@pytest.mark.parametrize("names", [["to_query"], {"to_query": 3}])
def test_names_of_the_wrong_type_raise(names):
    with pytest.raises(TypeError, match="names must map"):
        accelerate(Fork(), names=names)
