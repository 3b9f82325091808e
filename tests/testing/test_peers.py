"""The peers of the benchmarks: against formulas in NumPy, timm's and transformers' classes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from swiftkernels.testing.peers import (
    MDTA,
    PEERS,
    MultiHeadSelfAttention,
)
from swiftkernels.testing.peers.heads import choose_heads
from tests.stubs import import_timm

Array = NDArray[np.float64]

# Formulas: one batch element [N, C] and one head at a time; p holds the peer's parameters.


def softmax(scores: Array, axis: int) -> Array:
    e = np.exp(scores - scores.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def unit_columns(m: Array) -> Array:
    return m / np.sqrt((m**2).sum(0))


def layer(p: dict[str, Array], name: str, x: Array) -> Array:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def qkv_heads(rows: Array, heads: int) -> list[list[Array]]:
    """[N, 3C] -> q, k, v of every head, [N, d] each: all of q comes first, then k, then v."""
    q, k, v = np.split(rows, 3, axis=1)
    return [[np.split(t, heads, axis=1)[h] for t in (q, k, v)] for h in range(heads)]


def mhsa_formula(p: dict[str, Array], x: Array, heads: int) -> Array:
    outs = []
    for q, k, v in qkv_heads(layer(p, "qkv", x), heads):
        outs.append(softmax(q @ k.T / math.sqrt(q.shape[1]), 1) @ v)
    return layer(p, "proj", np.hstack(outs))


def transposed_attention(p: dict[str, Array], rows: Array, heads: int) -> Array:
    outs = []
    for h, (q, k, v) in enumerate(qkv_heads(rows, heads)):
        scores = unit_columns(q).T @ unit_columns(k) * p["temperature"][h]
        outs.append(v @ softmax(scores, 1).T)
    return np.hstack(outs)


def xca_formula(p: dict[str, Array], x: Array, heads: int) -> Array:
    return layer(p, "proj", transposed_attention(p, layer(p, "qkv", x), heads))


def mdta_formula(
    p: dict[str, Array], x: Array, heads: int, grid: tuple[int, int] | None = None
) -> Array:
    height, width = grid or (math.isqrt(len(x)),) * 2
    p = {n: a[:, :, 0, 0] if n in ("qkv.weight", "proj.weight") else a for n, a in p.items()}
    image = layer(p, "qkv", x).reshape(height, width, -1)
    mixed = np.empty_like(image)
    for row in range(height):
        for col in range(width):
            total = p["depthwise.bias"].copy()
            for i in range(max(0, row - 1), min(height, row + 2)):
                for j in range(max(0, col - 1), min(width, col + 2)):
                    total += p["depthwise.weight"][:, 0, i - row + 1, j - col + 1] * image[i, j]
            mixed[row, col] = total
    return layer(p, "proj", transposed_attention(p, mixed.reshape(len(x), -1), heads))


def separable_formula(p: dict[str, Array], x: Array, heads: int) -> Array:
    rows = layer(p, "qkv", x)
    dim = x.shape[1]
    scores = softmax(rows[:, 0], 0)
    context = sum(s * row[1 : 1 + dim] for s, row in zip(scores, rows, strict=True))
    return layer(p, "proj", np.maximum(rows[:, 1 + dim :], 0) * context)


def separable_fused_formula(p: dict[str, Array], x: Array, heads: int) -> Array:
    names = {"qkv_proj": "qkv", "out_proj": "proj"}
    renamed = {}
    for name, value in p.items():
        part, kind = name.split(".")
        renamed[f"{names[part]}.{kind}"] = value[..., 0, 0] if kind == "weight" else value
    return separable_formula(renamed, x, heads)


def linear_formula(p: dict[str, Array], x: Array, heads: int) -> Array:
    def phi(t: Array) -> Array:
        return np.where(t > 0, t + 1, np.exp(np.minimum(t, 0)))

    outs = []
    for q, k, v in qkv_heads(layer(p, "qkv", x), heads):
        weights = phi(q) @ phi(k).T  # [N, N]: what the linear form never makes
        outs.append(weights @ v / (weights.sum(1, keepdims=True) + 1e-6))
    return layer(p, "proj", np.hstack(outs))


def fastformer_formula(p: dict[str, Array], x: Array, heads: int) -> Array:
    width = x.shape[1] // heads
    q, k = layer(p, "query", x), layer(p, "key", x)

    def pooled(rows: Array, scorer: Array) -> Array:
        means = []
        for h in range(heads):
            a = softmax(rows @ scorer[h] / math.sqrt(width), 0)
            means.append(a @ rows[:, h * width : (h + 1) * width])
        return np.concatenate(means)

    keys = k * pooled(q, p["query_score.weight"])
    return layer(p, "transform", q * pooled(keys, p["key_score.weight"])) + q


FORMULAS: dict[str, Callable[..., Array]] = {
    "mhsa": mhsa_formula,
    "xca": xca_formula,
    "mdta": mdta_formula,
    "separable": separable_formula,
    "separable_fused": separable_fused_formula,
    "linear": linear_formula,
    "fastformer": fastformer_formula,
}


def make_peer(name: str, dim: int, num_heads: int | None = None) -> nn.Module:
    """A peer in float64 with all its parameters, temperatures too, away from special values."""
    torch.manual_seed(0)
    kwargs = {} if name.startswith("separable") else {"num_heads": num_heads}
    peer = PEERS[name](dim, **kwargs).double()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return peer


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_close(ours: Tensor, expected: Tensor) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()


def check_against_formula(
    name: str, peer: nn.Module, x: Tensor, heads: int, **grid: object
) -> None:
    parameters = {n: p.detach().numpy() for n, p in peer.named_parameters()}
    expected = np.stack([FORMULAS[name](parameters, one, heads, **grid) for one in x.numpy()])
    assert_close(peer(x, **grid), torch.from_numpy(expected))


@pytest.mark.parametrize(("dim", "heads"), [(37, 1), (66, 3)])
@pytest.mark.parametrize("n_tokens", [1, 49])
@pytest.mark.parametrize("name", PEERS)
def test_peer_follows_its_formula(name: str, n_tokens: int, dim: int, heads: int) -> None:
    check_against_formula(name, make_peer(name, dim, heads), tokens(3, n_tokens, dim), heads)


@pytest.mark.parametrize("name", sorted(set(PEERS) - {"mdta"}))
def test_peer_follows_its_formula_on_tokens_without_a_grid(name: str) -> None:
    check_against_formula(name, make_peer(name, 66, 3), tokens(2, 65, 66), 3)


def test_mdta_takes_an_oblong_grid() -> None:
    check_against_formula("mdta", make_peer("mdta", 66, 3), tokens(2, 35, 66), 3, grid=(5, 7))


def test_mdta_refuses_tokens_that_fit_no_grid() -> None:
    peer = make_peer("mdta", 8)
    with pytest.raises(ValueError, match="35 tokens are not a square"):
        peer(tokens(1, 35, 8))
    with pytest.raises(ValueError, match=r"N = 35; got \(6, 6\)"):
        peer(tokens(1, 35, 8), grid=(6, 6))


@pytest.mark.parametrize("n_tokens", [1, 49])
@pytest.mark.parametrize("name", PEERS)
def test_every_parameter_gets_a_gradient(name: str, n_tokens: int) -> None:
    peer, x = make_peer(name, 66), tokens(2, n_tokens, 66).requires_grad_()
    peer(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    for parameter in peer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        # One token weighs 1 whatever its score, so scores have no gradient there.
        assert n_tokens == 1 or parameter.grad.count_nonzero() > 0


@pytest.mark.parametrize("name", PEERS)
def test_empty_batch_gives_an_empty_output_and_zero_gradients(name: str) -> None:
    peer, x = make_peer(name, 66), tokens(0, 49, 66).requires_grad_()
    out = peer(x)
    assert out.shape == (0, 49, 66)
    out.sum().backward()
    assert all(p.grad is None or p.grad.count_nonzero() == 0 for p in peer.parameters())


def test_batch_elements_do_not_mix() -> None:
    x = tokens(3, 49, 66)
    for name in PEERS:
        peer = make_peer(name, 66)
        assert_close(peer(x)[1:2], peer(x[1:2]))


def test_default_heads_divide_every_width_of_swiftformer() -> None:
    for dim in (48, 56, 64, 96, 112, 128, 168, 192, 220, 224, 320, 384, 512, 7):
        heads = choose_heads(dim, None)
        assert dim % heads == 0
        assert heads == 1 or dim // heads >= 32
    with pytest.raises(ValueError, match="num_heads must divide dim = 48; got 5"):
        choose_heads(48, 5)


@pytest.mark.parametrize("heads", [1, 3])
def test_mhsa_equals_timm(heads: int) -> None:
    import_timm()
    layers = pytest.importorskip("timm.layers")
    peer = MultiHeadSelfAttention(66, heads).double()
    theirs = layers.Attention(66, heads, qkv_bias=True).double()
    theirs.load_state_dict(peer.state_dict())
    x = tokens(2, 49, 66)
    assert_close(peer(x), theirs(x))


@pytest.mark.parametrize("heads", [1, 3])
def test_xca_equals_timm(heads: int) -> None:
    import_timm()
    xcit = pytest.importorskip("timm.models.xcit")
    peer = make_peer("xca", 66, heads)
    theirs = xcit.XCA(66, heads, qkv_bias=True).double()
    theirs.load_state_dict(peer.state_dict())
    x = tokens(2, 49, 66)
    assert_close(peer(x), theirs(x))


def test_mdta_with_an_idle_convolution_equals_xca_of_timm() -> None:
    import_timm()
    xcit = pytest.importorskip("timm.models.xcit")
    peer = make_peer("mdta", 66, 3)
    assert isinstance(peer, MDTA)
    nn.init.dirac_(peer.depthwise.weight, groups=3 * 66)
    nn.init.zeros_(peer.depthwise.bias)
    theirs = xcit.XCA(66, 3, qkv_bias=True).double()
    state = {n: t for n, t in peer.state_dict().items() if not n.startswith("depthwise")}
    theirs.load_state_dict({n: t.squeeze() if t.dim() == 4 else t for n, t in state.items()})
    x = tokens(2, 49, 66)
    assert_close(peer(x), theirs(x))
