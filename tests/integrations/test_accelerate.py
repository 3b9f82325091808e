"""`accelerate`: other people's layers with these kernels, and everything else as it was."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from swiftkernels import AdditiveAttention, accelerate, warmup
from swiftkernels.integrations import accelerate as acceleration
from swiftkernels.integrations.accelerate import TRANSFORMERS, Acceleration, register
from swiftkernels.ops.additive_attention.layer import AttentionForward
from swiftkernels.testing.cases import POOLINGS
from swiftkernels.testing.tolerance import assert_as_good_as_eager
from tests.models.test_public_models import OfficialLayer
from tests.stubs import import_timm


class Fork(nn.Module):
    """An additive attention as others write it, in any variant."""

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
    """One that does something more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def results(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    layer, x = copy.deepcopy(layer).to(dtype), x.to(dtype).requires_grad_()
    out = layer(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(out.square().sum(), (x, *parameters))
    return {"output": out.detach(), "x": grads[0], **dict(zip(names, grads[1:], strict=True))}


def assert_accelerated(layer: nn.Module, x: Tensor, **options: Any) -> Acceleration:
    """The layer computes what it did, no worse, by the kernels; and after `undo` bit for bit."""
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
def test_every_variant_is_told_and_computed(pooling, norms, kind):
    layer = kind(pooling=pooling, norms=norms, heads=2)
    x = randn(2, 9, 12) if kind is Fork else randn(2, 12, 3, 3)
    ((found,)) = assert_accelerated(layer, x).layers
    layout = "channels_last" if kind is Fork else "channels_first"
    assert found.variant == (pooling, norms, layout)


def test_the_kernels_are_what_runs(monkeypatch):
    layer, x = Fork(), randn(2, 9, 12)
    accelerate(layer)
    assert not layer.called_parts()
    monkeypatch.setattr(F, "linear", None)  # whoever calls it fails
    with torch.no_grad():
        assert layer(x).shape == x.shape


def test_forks_with_other_names():
    x = randn(2, 9, 12)
    with pytest.raises(ValueError, match="holds none"):
        accelerate(Renamed())
    assert_accelerated(Renamed(), x, names=NAMES)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("pooling", ["l2", "sum"])
def test_the_official_layer_before_and_after_its_change_of_pooling(pooling, heads):
    layer = OfficialLayer(12, 12, heads, pooling)
    ((found,)) = assert_accelerated(layer, randn(2, 9, 12)).layers
    assert found.kind == "OfficialLayer"
    assert found.variant == (pooling, True, "channels_last")


class OfficialBlock(nn.Module):
    """The attention among images, as blocks of the official code call it."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn
        self.layer_scale_1 = nn.Parameter(randn(12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.attn(x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]))
        images = tokens.reshape(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
        return x + self.layer_scale_1 * images


@pytest.mark.parametrize("attention", [lambda: OfficialLayer(12, 12, 1, "l2"), Renamed])
def test_whole_models_of_the_official_code_and_of_forks(attention):
    """Parts with other names, others of theirs, and convolutions between."""
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


def test_undo_leaves_nothing_behind():
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


def test_as_a_context_manager_it_ends_with_the_block():
    layer, x = Fork(), randn(2, 9, 12)
    before = layer(x)
    with accelerate(layer):
        assert type(layer) is not Fork
    assert type(layer) is Fork
    with pytest.raises(TypeError), accelerate(layer):
        layer(None)
    assert type(layer) is Fork
    assert torch.equal(layer(x), before)


def test_what_others_hold_of_the_layer_stays():
    layer, seen = Fork(), []
    names = list(layer.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer.register_forward_hook(lambda *_: seen.append(1))
    layer.eval()
    accelerate(layer)
    assert not seen  # the probe is silent
    assert not layer.training
    assert list(layer.state_dict()) == names
    before = layer.w_g.detach().clone()
    layer(randn(2, 9, 12)).square().sum().backward()
    optimizer.step()
    assert seen == [1]
    assert not torch.equal(layer.w_g, before)


def test_copies_and_pickles_are_accelerated_too():
    layer, x = Fork(), randn(2, 9, 12)
    accelerate(layer)
    expected = layer(x)
    memory = io.BytesIO()
    torch.save(layer, memory)
    memory.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(memory, weights_only=False),
    ):
        assert type(twin) is type(layer)
        assert torch.equal(twin(x), expected)


def test_random_numbers_and_gradient_mode_stay():
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
        (lambda: nn.ModuleDict(dict(Fork().named_children())), "neither"),
    ],
)
def test_others_are_left_alone_and_named(layer, reason):
    layer = layer()
    if isinstance(layer, nn.ModuleDict):  # the parts of an attention, and no forward
        layer.w_g = nn.Parameter(torch.ones(12, 1))
    model = nn.Sequential(layer, Fork())
    done = accelerate(model)
    assert [bool(found.variant) for found in done.layers] == [False, True]
    assert reason in done.layers[0].reason
    assert type(model[0]) is type(layer)
    assert "1 of 2 additive attentions accelerated" in str(done)
    assert f"0: {type(layer).__name__} left alone, " in str(done)


def test_weights_that_tell_no_variant_are_left_alone():
    layer = Fork()
    nn.init.zeros_(layer.proj.weight)
    (found,) = accelerate(layer).layers
    assert "several poolings" in found.reason


def test_a_second_time_finds_nothing_to_do():
    layer = Fork()
    first, second = accelerate(layer), accelerate(layer)
    assert second.layers[0].reason == "it has these kernels"
    second.undo()
    assert type(layer) is not Fork
    first.undo()
    assert type(layer) is Fork


def test_half_precision_and_backends_are_honoured():
    layer = Fork().to(torch.bfloat16)
    accelerate(layer, backend="reference")
    assert layer(randn(2, 9, 12).bfloat16()).dtype == torch.bfloat16
    assert layer.backend == "reference"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: accelerate(torch.ones(2)), TypeError, "model must be"),
        (lambda: accelerate(nn.Linear(2, 2)), ValueError, "Linear holds none"),
        (lambda: accelerate(Fork(), names={"query": "q"}), ValueError, "names must map"),
        (lambda: accelerate(Fork(), backend="gpu"), ValueError, "backend"),
        (lambda: accelerate(Fork(), recompute="yes"), ValueError, "recompute"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_timm():
    model = import_timm().create_model("swiftformer_xs", num_classes=3).eval()
    x = randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        done = accelerate(model)
        assert [found.variant for found in done.layers] == [("l2", True, "channels_first")] * 4
        torch.testing.assert_close(model(x), before)
        done.undo()
        assert torch.equal(model(x), before)


def test_transformers():
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


def accelerated(model: nn.Module) -> list[AttentionForward]:
    return [m for m in model.modules() if isinstance(m, AttentionForward)]


def test_transformers_builds_with_the_kernels_while_registered(transformers, tmp_path):
    config = transformers.SwiftFormerConfig(num_labels=3)
    plain = transformers.SwiftFormerForImageClassification(config).eval()
    plain.save_pretrained(tmp_path)
    build, auto = type(plain).from_pretrained, transformers.AutoModelForImageClassification
    x = randn(1, 3, 64, 64)
    with register(backend="reference") as done:
        model, fresh = build(tmp_path).eval(), auto.from_config(config)
        assert not accelerated(type(plain)(config))  # a bare constructor is left alone
    assert str(done).endswith("with these kernels, pooling sum")
    assert not accelerated(build(tmp_path))
    assert len(accelerated(fresh)) == 4
    assert len(warmup(fresh)) == 4
    assert list(model.state_dict()) == list(plain.state_dict())
    for layer, theirs in zip(
        accelerated(model), plain.swiftformer.encoder.network[::2], strict=True
    ):
        assert isinstance(layer, type(theirs.blocks[-1].attn))
        assert (layer.pooling, layer.backend) == ("sum", "reference")
    with torch.no_grad():
        expected = plain(x).logits
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(accelerated(twin)) == 4
            torch.testing.assert_close(twin(x).logits, expected)


def test_a_registration_ends_once_and_only_itself(transformers):
    patching = pytest.importorskip("transformers.monkey_patching")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = register()
    assert torch.equal(torch.rand(1), expected)
    with pytest.raises(ValueError, match="is in the patch mapping of transformers already"):
        register()
    first.undo()
    assert TRANSFORMERS not in patching.get_patch_mapping()
    with register():
        first.undo()
        assert TRANSFORMERS in patching.get_patch_mapping()
        patching.unregister_patch_mapping([TRANSFORMERS])


def test_another_attention_of_transformers_is_not_registered(transformers, monkeypatch):
    modeling = transformers.models.swiftformer.modeling_swiftformer

    class Other(Extended):
        def __init__(self, config: object, dim: int) -> None:
            super().__init__(dim)

    monkeypatch.setattr(modeling, TRANSFORMERS, Other)
    with pytest.raises(ValueError, match="is left alone: it computes something else"):
        register()


def test_registering_needs_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.monkey_patching", None)
    with pytest.raises(ImportError, match="register needs transformers 5 or newer"):
        register()
    with pytest.raises(ValueError, match="backend"):
        register(backend="gpu")


# Looking without touching.


def hooked(layer: nn.Module, calls: list[str]) -> nn.Module:
    for part in layer.modules():
        part.register_forward_hook(lambda *_: calls.append("forward"))
        part.register_forward_pre_hook(lambda *_: calls.append("pre"))
    return layer


class Counter(nn.Module):
    """A parametrization with a buffer that changes whenever its tensor is read."""

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
def test_the_probe_changes_no_state_calls_no_hook_and_draws_no_number(attach, training):
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


def test_hooks_of_objects_are_not_copied():
    """A hook that is a method brings its object, which may be large or impossible to copy."""

    class Trainer:
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

        def hook(self, *_: Any) -> None:
            pass

    layer = Fork()
    layer.to_query.register_forward_hook(Trainer().hook)
    layer.register_full_backward_hook(Trainer().hook)
    assert "1 of 1" in str(accelerate(layer))


def test_a_layer_with_a_forward_of_its_own_is_left_alone():
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
def test_layers_that_cannot_be_probed_are_named_and_the_others_accelerated(strange):
    report = accelerate(nn.Sequential(Fork(), strange(), Fork()))
    assert "2 of 3" in str(report)
    assert report.layers[1].variant is None
    assert strange.__name__ in str(report)
    assert "float64" in report.layers[1].reason or "copied" in report.layers[1].reason


def test_all_layers_are_judged_before_the_first_one_changes(monkeypatch):
    """An interruption in the middle leaves the model as it was."""
    model = nn.Sequential(Fork(), Fork())
    look, seen = acceleration._look, []

    def interrupted(*args: Any) -> Any:
        if seen:
            raise KeyboardInterrupt
        seen.append(args)
        return look(*args)

    monkeypatch.setattr(acceleration, "_look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model)
    assert [type(m) for m in model] == [Fork, Fork]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_does_not_matter(device):
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
"""a: accelerate, u: undo that, p: parametrize, r: remove the parametrization."""


@pytest.mark.parametrize("target", ["w_g", "to_query.weight"])
@pytest.mark.parametrize("order", ORDERS)
def test_acceleration_and_parametrizations_come_and_go_in_any_order(order, target):
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


def test_a_layer_with_adapters_is_accelerated_and_said_not_to_be_fused():
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
    layer.to_query = layer.to_query.base_layer  # merged or taken off: fused from now on
    assert not layer.called_parts()


@pytest.mark.parametrize("training", [True, False])
def test_warmup_knows_accelerated_layers(training):
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
    """It computes something else as soon as its gate is trained."""

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
    """Another lower bound of the norms, which shows with small tokens alone."""

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
def test_layers_that_do_more_are_left_alone(kind, words):
    layer = kind()
    ((found,)) = accelerate(layer).layers
    assert found.variant is None
    assert words in found.reason
    assert type(layer) is kind


@pytest.mark.parametrize("names", [["to_query"], {"to_query": 3}])
def test_names_of_a_wrong_type(names):
    with pytest.raises(TypeError, match="names must map"):
        accelerate(Fork(), names=names)
