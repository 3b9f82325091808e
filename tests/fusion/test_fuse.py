"""`fuse_for_inference`: the same outputs, the largest chains, and the model unchanged."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from swiftkernels import accelerate, fuse_for_inference
from swiftkernels.fusion.chain import FusedChain, Passed
from swiftkernels.fusion.fuse import FusedNetwork
from swiftkernels.models import swiftformer_xs
from swiftkernels.testing.tolerance import assert_as_good_as_eager
from tests.fusion import networks
from tests.stubs import import_timm

SIZES = [(1, 33, 57), (2, 32, 32)]

WHOLE = {
    "ours": networks.ours,
    "one class, one channel": lambda: networks.ours(num_classes=1, in_chans=1),
    "one head, four channels": lambda: networks.ours(distillation=False, in_chans=4),
    "no layer scale": lambda: networks.ours(use_layer_scale=False),
    "sum pooling": lambda: networks.ours(pooling="sum"),
    "relu": lambda: networks.ours(act_layer=nn.ReLU),
    "timm": networks.of_timm,
    "transformers": networks.of_transformers,
    "official": networks.Official,
    "official, sum pooling": lambda: networks.Official("sum"),
    "renamed": networks.Renamed,
}
"""Classifiers that become one chain, with their heads."""

IN_PARTS = {
    "ours, no classes": (lambda: networks.ours(num_classes=0), 1),
    "ours, features": (lambda: networks.ours(features_only=True), 4),
    "ours, features of two stages": (
        lambda: networks.ours(features_only=True, out_indices=(1, 3)), 2
    ),
    "timm, features": (lambda: networks.of_timm(features_only=True, num_classes=0), 4),
    "timm, map": (lambda: networks.of_timm(num_classes=0, global_pool=""), 1),
    "transformers, hidden states": (
        lambda: networks.of_transformers(output_hidden_states=True), 5
    ),
    "official, features": (lambda: networks.Official(fork_feat=True), 4),
    "segmentation": (networks.segmentation, 4),
}  # fmt: skip
"""Networks with other outputs, and the number of their chains."""


def chains(fused: nn.Module) -> list[FusedChain]:
    return [part for part in fused.modules() if isinstance(part, FusedChain)]


def images(model: nn.Module, batch: int, height: int, width: int) -> Tensor:
    channels = next(part for part in model.modules() if isinstance(part, nn.Conv2d)).in_channels
    generator = torch.Generator().manual_seed(height)
    return torch.randn(batch, channels, height, width, generator=generator)


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    values = out.values() if isinstance(out, dict) else out
    return [t for value in values for t in tensors(value)]


def assert_same(fused: nn.Module, model: nn.Module, tolerance: float = 1e-10) -> None:
    """The same outputs in float64, at several sizes."""
    fused, model = copy.deepcopy(fused).double(), copy.deepcopy(model).double()
    for batch, height, width in SIZES:
        x = images(model, batch, height, width).double()
        with torch.no_grad():
            found, expected = fused(x), model(x)
        assert type(found) is type(expected)
        for a, b in zip(tensors(found), tensors(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def in_float64(model: nn.Module) -> nn.Module:
    return networks.prepared(model).double()


@pytest.mark.parametrize("name", WHOLE)
def test_classifiers_become_one_chain(name):
    model = in_float64(WHOLE[name]())
    fused = fuse_for_inference(model)
    assert_same(fused, model)
    ((chain,)) = chains(fused)
    kinds = [step.kind for step in chain.steps]
    assert kinds[0] == "stem"
    assert kinds[-2:] == ["pool", "linear"]
    assert fused.report.left == ()
    assert all(not p.requires_grad for p in fused.parameters())


@pytest.mark.parametrize("name", IN_PARTS)
def test_chains_end_where_maps_are_used(name):
    make, count = IN_PARTS[name]
    model = in_float64(make())
    fused = fuse_for_inference(model)
    assert_same(fused, model)
    assert len(chains(fused)) == count


def test_accelerated_networks_are_fused():
    model = in_float64(networks.Official())
    accelerate(model)
    fused = fuse_for_inference(model)
    assert len(chains(fused)) == 1
    assert_same(fused, model)


def test_networks_of_an_explicit_backend_are_fused():
    model = networks.ours(backend="cpu")
    assert len(chains(fuse_for_inference(model))) == 1


def extra_small(library: str) -> nn.Module:
    if library == "timm":
        return networks.prepared(import_timm().create_model("swiftformer_xs"))
    return networks.prepared(swiftformer_xs())


@pytest.mark.parametrize("library", ["ours", "timm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_of_the_paper_are_as_accurate_as_before(library, dtype):
    model = extra_small(library).to(dtype)
    fused = fuse_for_inference(model)
    assert {t.dtype for t in fused.state_dict().values()} == {dtype}
    x = images(model, 4, 65, 97).to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert_as_good_as_eager(fused(x), model(x), exact, ulps=8)


def test_initial_layer_scales_hide_nothing():
    """Blocks whose scales of 1e-5 hide the order of attention and MLP from a plain comparison."""

    class Parallel(networks.OfficialBlock):
        def forward(self, x: Tensor) -> Tensor:
            x = self.local_representation(x)
            tokens = self.attn(x.flatten(2).mT).mT.reshape(x.shape)
            return x + self.layer_scale_1 * tokens + self.layer_scale_2 * self.linear(x)

    block = Parallel(8, "l2")
    fused = fuse_for_inference(nn.Sequential(networks.OfficialEncoder(8, 8), block).eval())
    assert [type(step).__name__ for chain in chains(fused) for step in chain.steps] == [
        "ConvMlp", "ConvMlp", "ConvMlp",
    ]  # fmt: skip
    (left,) = [left for left in fused.report.left if left.name == "1.attn"]
    assert left.reason == "it is an additive attention whose block has another form"


def test_report_names_blocks_chains_and_reasons():
    model = networks.ours()
    model.stages[1].blocks[0].attn.register_forward_hook(lambda *_: None)
    report = fuse_for_inference(model).report
    by_name = {block.name: block for block in report.fused}
    assert by_name["stem"].kind == "Sequential"
    assert by_name["stages.0.blocks.1"].steps == ("conv_mlp", "attention", "conv_mlp")
    assert by_name["stages.0.blocks.1"].chain == "stem"
    assert by_name["stages.2.downsample"].chain == "stages.2.downsample"
    assert by_name["stages.1.blocks.0.local_representation"].chain == "stem"
    text = str(report)
    assert "stages.0.blocks.0: ConvEncoder, as conv_mlp in chain stem" in text
    assert "stages.1.blocks.0.attn: AdditiveAttention, it has hooks" in text


def untouched_state(model: nn.Module) -> Any:
    state = {name: (t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    modules = {name: (type(part), part.training) for name, part in model.named_modules()}
    grads = [p.requires_grad for p in model.parameters()]
    return state, modules, grads


@pytest.mark.parametrize("make", [networks.ours, networks.of_transformers])
def test_model_stays_unchanged(make):
    model, calls = make(), []
    model.register_forward_hook(lambda *_: calls.append("hook"))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append("global"))
    before, rng = untouched_state(model), torch.get_rng_state()
    try:
        fused = fuse_for_inference(model)
    finally:
        handle.remove()
    after = untouched_state(model)
    assert calls == []
    assert torch.equal(torch.get_rng_state(), rng)
    assert before[1:] == after[1:]
    for name, (t, version) in before[0].items():
        assert torch.equal(t, after[0][name][0])
        assert version == after[0][name][1]
    addresses = {t.data_ptr() for t in model.state_dict().values()}
    assert addresses.isdisjoint(t.data_ptr() for t in fused.state_dict().values() if t.numel())


def test_hooks_on_stages_see_what_they_saw():
    """A chain does not cross the border of a module with hooks."""
    model, seen = in_float64(networks.ours()), []
    model.stages[1].register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    fused = fuse_for_inference(model)
    assert len(chains(fused)) == 3
    x = images(model, 2, 33, 57).double()
    with torch.no_grad():
        model(x)
        fused(x)
    assert len(seen) == 4
    torch.testing.assert_close(seen[2], seen[0])
    torch.testing.assert_close(seen[3], seen[1])


class Adapter(nn.Module):
    """A low-rank adapter around a layer, with an update of zero as at the start of training."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, width = base, base.weight.shape[1]
        self.down, self.up = nn.Linear(width, 2), nn.Linear(2, base.weight.shape[0])
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Quantised(nn.Module):
    """A linear layer with a weight of 8 bits."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        scale = base.weight.detach().abs().max() / 127
        self.register_buffer("codes", (base.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.codes.to(x.dtype) * self.scale.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def with_hook(block: nn.Module) -> None:
    block.attn.proj.register_forward_hook(lambda *_: None)


def with_adapter(block: nn.Module) -> None:
    block.attn.proj = Adapter(block.attn.proj).eval()


def with_quantised(block: nn.Module) -> None:
    block.attn.proj = Quantised(block.attn.proj).eval()


def with_parametrization(block: nn.Module) -> None:
    parametrizations.weight_norm(block.attn.proj)
    block.eval()


def with_forward(block: nn.Module) -> None:
    block.attn.forward = lambda x: 2 * x


LEFT = {
    with_hook: "its part proj has hooks",
    with_adapter: "its part proj is a Adapter",
    with_quantised: "its part proj is a Quantised",
    with_parametrization: "its part proj is parametrized",
    with_forward: "its forward was replaced",
}


@pytest.mark.parametrize("change", LEFT)
def test_blocks_that_are_more_than_their_weights_are_left(change):
    model = networks.ours()
    change(model.stages[1].blocks[0])
    fused = fuse_for_inference(model)
    reasons = {block.name: block.reason for block in fused.report.left}
    assert reasons == {"stages.1.blocks.0.attn": LEFT[change]}
    assert len(chains(fused)) == 3  # before, behind, and the MLP, of which another block adds x
    x = images(model, 2, 33, 57)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_batchnorm_before_a_padded_convolution_is_left():
    class First(networks.OfficialEncoder):
        def forward(self, x: Tensor) -> Tensor:
            branch = self.pwconv2(self.act(self.pwconv1(self.dwconv(self.norm(x)))))
            return x + self.layer_scale * branch

    model = nn.Sequential(networks.OfficialEncoder(8, 16), First(8, 16))
    report = fuse_for_inference(networks.prepared(model)).report
    assert [block.name for block in report.fused] == ["0", "1.dwconv"]
    assert "in front of a padded depthwise convolution" in report.left[0].reason


def test_shared_blocks_are_fused_alone():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = networks.OfficialEncoder(8, 16)
            self.b = networks.OfficialEncoder(8, 16)
            self.same = self.b

        def forward(self, x: Tensor) -> Tensor:
            return self.same(self.a(self.b(x)))

    model = in_float64(Twice())
    fused = fuse_for_inference(model, example=torch.randn(1, 8, 9, 9))
    assert_same_on(fused, model, torch.randn(2, 8, 13, 7).double())
    assert [block.chain for block in fused.report.fused] == ["b", "a"]


def assert_same_on(fused: nn.Module, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))


def test_single_blocks_are_fused():
    block = in_float64(networks.OfficialBlock(8, "l2"))
    fused = fuse_for_inference(block, example=torch.randn(1, 8, 9, 9))
    assert isinstance(fused.network, FusedChain)
    assert_same_on(fused, block, torch.randn(2, 8, 13, 7).double())


def test_heads_that_are_not_averaged_stay():
    class Both(networks.Official):
        def forward(self, x: Tensor) -> Any:
            x = self.patch_embed(x)
            for block in self.network:
                x = block(x)
            pooled = self.norm(x).mean((2, 3))
            return {"a": self.head(pooled), "b": self.dist_head(pooled)}

    model = in_float64(Both())
    fused = fuse_for_inference(model)
    assert_same(fused, model)
    assert [block.name for block in fused.report.left] == ["norm", "head", "dist_head"]


class Skipping(networks.Official):
    """The output of the stem is used twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.network[0](x)
        for block in self.network[1:]:
            x = block(x)
        return self.head(self.norm(x).mean((2, 3)))


class InPlace(networks.Official):
    """The output of the first stage is changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.network[0](self.patch_embed(x))
        x.add_(1)
        for block in self.network[1:]:
            x = block(x)
        return self.head(self.norm(x).mean((2, 3)))


class WithoutGraph(networks.Official):
    """No gradient shows which maps are used."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = networks.Official(), networks.Renamed()

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * self.right(x)


class Mirrored(nn.Module):
    """One network for two images."""

    def __init__(self) -> None:
        super().__init__()
        self.same = networks.Official()

    def forward(self, x: Tensor) -> Tensor:
        return self.same(x) + self.same(x.flip(3))


@pytest.mark.parametrize(
    ("make", "starts"),
    [
        (Mirrored, ["same.patch_embed"]),
        (Skipping, ["patch_embed", "network.0.0", "network.1"]),
        (InPlace, ["patch_embed", "network.1"]),
        (
            lambda: WithoutGraph(fork_feat=True),
            [
                "patch_embed",
                "network.0.0",
                "network.2.0",
                "network.4.0",
                "network.6.0",
            ],
        ),
        (Towers, ["left.patch_embed", "right.begin"]),
    ],
)
def test_chains_of_unusual_networks(make, starts):
    """No chain is longer than what the network does with the outputs of its blocks allows."""
    model = in_float64(make())
    fused = fuse_for_inference(model)
    assert_same(fused, model)
    found = list(dict.fromkeys(block.chain for block in fused.report.fused))
    assert found == starts


def test_sizes_that_a_network_takes_are_found():
    class Multiples(networks.Official):
        def forward(self, x: Tensor) -> Any:
            assert x.shape[2] % 32 == x.shape[3] % 32 == 0
            return super().forward(x)

    assert len(chains(fuse_for_inference(in_float64(Multiples())))) == 1

    class OneSize(networks.Official):
        def forward(self, x: Tensor) -> Any:
            assert x.shape[2:] == (40, 48)
            return super().forward(x)

    model = in_float64(OneSize())
    with pytest.raises(ValueError, match="example must be images that the model takes"):
        fuse_for_inference(model)
    assert len(chains(fuse_for_inference(model, example=torch.randn(1, 3, 40, 48)))) == 1


def test_outputs_that_cannot_be_compared_are_refused():
    class Image:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Wrapped(networks.Official):
        def forward(self, x: Tensor) -> Any:
            return [Image(super().forward(x))]

    with pytest.raises(ValueError, match=r"must return tensors.*got a Image"):
        fuse_for_inference(in_float64(Wrapped()))

    class Collecting(networks.Official):
        """As a network of which the output is what hooks have collected."""

        def forward(self, x: Tensor) -> Any:
            super().forward(x)
            return []

    with pytest.raises(ValueError, match="without hooks returned none"):
        fuse_for_inference(in_float64(Collecting()))


def test_other_arguments_are_refused():
    model = networks.of_transformers()
    fused, x = fuse_for_inference(model), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fused(pixel_values=x).logits, model(x).logits)
        fused(x, labels=None)
        for option in ({"output_hidden_states": True}, {"labels": torch.tensor([1])}):
            with pytest.raises(TypeError, match=r"takes images only; got .*original model"):
                fused(x, **option)
        with pytest.raises(TypeError, match="takes images only; got 1 more"):
            fused(x, None)
        with pytest.raises(TypeError, match=r"pixel_values must be a torch\.Tensor; got NoneType"):
            fused()


def test_wrong_images_are_refused():
    fused = fuse_for_inference(networks.ours())
    x = torch.randn(1, 3, 33, 33)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (x.numpy(), TypeError, "x must be a torch.Tensor; got ndarray"),
        (x.long(), TypeError, r"dtype of the weights, torch.float32; got torch.int64.*Convert"),
        (
            x.double(),
            TypeError,
            r"got torch.float64.*convert the fused network: \.to",
        ),
        (x.bfloat16(), TypeError, "got torch.bfloat16"),
        (x.to("meta"), ValueError, "device of the weights, cpu; got meta"),
        (x.clone().requires_grad_(), ValueError, "must not require a gradient.*no_grad"),
        (x[:, :2], ValueError, r"must have shape \[B, 3, H, W\]; got \(1, 2, 33, 33\)"),
    ]
    for images_, error, message in wrong:
        with pytest.raises(error, match=message):
            fused(images_)
    with torch.no_grad():
        fused(x.clone().requires_grad_())
    fused.train()
    with pytest.raises(ValueError, match=r"evaluation mode.*Call \.eval\(\)"):
        fused(x)


def test_models_that_cannot_be_fused_are_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got str"):
        fuse_for_inference("xs")
    with pytest.raises(ValueError, match=r"evaluation mode.*Call model\.eval\(\)"):
        fuse_for_inference(networks.ours().train())
    with pytest.raises(ValueError, match=r"got stem\.0\.weight on device meta"):
        fuse_for_inference(networks.ours().to("meta"))
    with pytest.raises(ValueError, match=r"converted to float64.*Uninitialized"):
        fuse_for_inference(nn.Sequential(nn.LazyConv2d(4, 1)).eval())
    with pytest.raises(
        ValueError, match=r"(?s)must hold blocks that can be fused: .*pointwise.*in Sequential"
    ):
        fuse_for_inference(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval())
    with pytest.raises(TypeError, match=r"example must be a torch\.Tensor"):
        fuse_for_inference(networks.ours(), example=3)
    with pytest.raises(ValueError, match=r"example must be images \[B, C, H, W\]"):
        fuse_for_inference(networks.ours(), example=torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match=r"could not be run.*model\.backbone = "):
        fuse_for_inference(networks.ours(), example=torch.randn(1, 2, 64, 64))


def test_replaced_forward_of_the_network_is_left():
    model = networks.ours()
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="its forward was replaced"):
        fuse_for_inference(model)


def test_state_dict_brings_new_weights():
    x = torch.randn(1, 3, 40, 40)
    first, second = networks.ours(), networks.ours()
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(1.1)
        fused, other = fuse_for_inference(first), fuse_for_inference(second)
        assert not torch.equal(fused(x), other(x))
        slots = [chain.slot for chain in chains(fused)]
        fused.load_state_dict(other.state_dict())
        assert torch.equal(fused(x), other(x))
        assert all(a is not chain.slot for a, chain in zip(slots, chains(fused), strict=True))
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        copies = [
            copy.deepcopy(fused),
            pickle.loads(pickle.dumps(fused)),
            torch.load(file, weights_only=False),
        ]
        for one in copies:
            assert torch.equal(one(x), fused(x))
            assert str(one.report) == str(fused.report)
            assert chains(one)[0].slot is not chains(fused)[0].slot


def test_several_threads_call_one_network():
    fused = fuse_for_inference(networks.ours())
    inputs = [torch.randn(1, 3, 32 + 8 * i, 40) for i in range(4)]
    expected = [fused(x) for x in inputs]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = fused(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], out) for i, out in enumerate(expected))


def test_fused_networks_show_what_they_are():
    fused = fuse_for_inference(networks.ours())
    assert isinstance(fused, FusedNetwork)
    passed = [part for part in fused.modules() if isinstance(part, Passed)]
    assert "computed by stem" in repr(passed[0])
    assert "stem -> conv_mlp -> conv_mlp -> attention" in repr(fused)
    assert "network.stem.conv_mlp1_depthwise_weight" in fused.state_dict()


def with_observer(part):
    part.register_forward_hook(lambda module, args, out: out * 2)


def with_other_forward(part):
    part.forward = lambda x: x * 2


@pytest.mark.parametrize("change", [with_observer, with_other_forward])
@pytest.mark.parametrize("name", ["head_drop", "stages.0.downsample"])
def test_changed_layers_without_weights_are_not_passed_over(name, change):
    model = networks.ours()
    change(model.get_submodule(name))
    x = images(model, 2, 33, 57)
    with torch.no_grad():
        torch.testing.assert_close(fuse_for_inference(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_is_behind_an_unknown_stem_is_fused():
    model = networks.ours()
    width = networks.WIDTHS[0]
    model.stem = nn.Sequential(nn.Conv2d(3, width, 7, 4, 3), nn.BatchNorm2d(width), nn.GELU())
    fused = fuse_for_inference(model.eval())
    assert len(chains(fused)) == 1
    x = images(model, 2, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


class Clamped(nn.Module):
    """Does to images what those of the probes do not show."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x.clamp(-9, 9))


def test_the_forward_of_other_networks_is_run():
    model = Clamped(networks.ours()).eval()
    x = 100 * torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fuse_for_inference(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_another_default_device_does_not_matter():
    model = networks.ours()
    fused = fuse_for_inference(model)
    x = images(model, 1, 40, 40)
    with torch.no_grad(), torch.device("meta"):
        out = fused(x)
    with torch.no_grad():
        assert torch.equal(out, fused(x))


def test_functional_call_uses_its_weights_and_only_then():
    model = networks.ours()
    fused = fuse_for_inference(model)
    x = images(model, 1, 40, 40)
    doubled = {name: 2 * t for name, t in fused.named_buffers()}
    with torch.no_grad():
        before = fused(x)
        changed = torch.func.functional_call(fused, doubled, (x,))
        after = fused(x)
    assert not torch.allclose(before, changed)
    assert torch.equal(before, after)


def test_a_fused_network_is_not_fused_again():
    with pytest.raises(ValueError, match="not fused yet; got a fused one"):
        fuse_for_inference(fuse_for_inference(networks.ours()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_have_to_be_finite(value):
    model = networks.ours()
    with torch.no_grad():
        model.head.bias[1] = value
    with pytest.raises(ValueError, match=r"got head\.bias with infinity or NaN"):
        fuse_for_inference(model)


def test_images_are_passed_once():
    model = networks.ours()
    x = images(model, 1, 40, 40)
    with pytest.raises(TypeError, match="got x twice"):
        fuse_for_inference(model)(x, x=x)
