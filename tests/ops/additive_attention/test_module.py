"""`AdditiveAttention`: parameters, axis orders, masks, sizes at the edge."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swiftkernels import AdditiveAttention, AttentionOutput, additive_self_attention
from swiftkernels.ops.additive_attention import reference
from swiftkernels.ops.additive_attention.weights import Options, Weights
from swiftkernels.testing.cases import POOLINGS, make_mask
from swiftkernels.testing.tolerance import EXACT, relative_error

IN_DIMS, TOKEN_DIM, NUM_HEADS = 6, 5, 2
BATCH, HEIGHT, WIDTH = 2, 3, 4
BACKENDS = ("aten", "reference")


def make_attention(**kwargs: object) -> AdditiveAttention:
    """A small float64 layer, the same at every call."""
    torch.manual_seed(0)
    return AdditiveAttention(IN_DIMS, TOKEN_DIM, NUM_HEADS, dtype=torch.float64, **kwargs)


def make_tokens(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (BATCH, HEIGHT * WIDTH, IN_DIMS)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def definition(
    attention: AdditiveAttention,
    tokens: Tensor,
    mask: Tensor | None = None,
    pooling: str = "l2",
    qk_norm: bool = True,
) -> Tensor:
    """The definition with the layer's own weights on tokens [B, N, C]."""
    a = attention
    weights = Weights(
        a.to_query.weight, a.to_query.bias, a.to_key.weight, a.to_key.bias, a.w_g,
        a.proj.weight, a.proj.bias, a.final.weight, a.final.bias,
    )  # fmt: skip
    options = Options(pooling, qk_norm, TOKEN_DIM**-0.5, 1e-12)
    return reference.additive_self_attention(tokens, weights, mask, options)


def test_the_width_alone_makes_a_layer_of_that_width():
    attention = AdditiveAttention(64, device="meta")
    assert (attention.in_dims, attention.token_dim, attention.num_heads) == (64, 64, 1)
    assert attention.scale_factor == 64**-0.5
    assert (attention.pooling, attention.qk_norm, attention.eps) == ("l2", True, 1e-12)
    assert (attention.layout, attention.backend) == ("auto", "auto")


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        AdditiveAttention(8, 8, 1, "sum")


def test_parameters_have_the_published_names_and_shapes():
    shapes = {name: tuple(p.shape) for name, p in make_attention().named_parameters()}
    assert shapes == {
        "w_g": (10, 1),
        "to_query.weight": (10, 6),
        "to_query.bias": (10,),
        "to_key.weight": (10, 6),
        "to_key.bias": (10,),
        "proj.weight": (10, 10),
        "proj.bias": (10,),
        "final.weight": (5, 10),
        "final.bias": (5,),
    }
    assert not list(make_attention().buffers())


def test_without_bias_no_layer_has_one():
    attention = make_attention(bias=False)
    names = {name for name, _ in attention.named_parameters()}
    assert names == {"w_g", *(f"{n}.weight" for n in ("to_query", "to_key", "proj", "final"))}
    x = make_tokens()
    assert relative_error(attention(x), definition(attention, x)) <= EXACT


def test_device_and_dtype_reach_every_parameter():
    attention = AdditiveAttention(8, 4, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in attention.parameters()} == {("meta", torch.bfloat16)}
    out = attention(torch.empty(2, 8, 3, 3, device="meta", dtype=torch.bfloat16))
    assert (out.shape, out.device.type, out.dtype) == ((2, 4, 3, 3), "meta", torch.bfloat16)


def test_extra_repr_tells_the_variant():
    attention = AdditiveAttention(8, 4, 3, pooling="sum", qk_norm=False, backend="aten")
    head = repr(attention).splitlines()[1].strip()
    assert head == (
        "8, 4, num_heads=3, pooling='sum', qk_norm=False, layout='auto', backend='aten'"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_constructor_options_choose_the_variant(pooling, qk_norm, backend):
    attention = make_attention(pooling=pooling, qk_norm=qk_norm, backend=backend)
    x, mask = make_tokens(), make_mask(BATCH, HEIGHT * WIDTH)
    expected = definition(attention, x, mask, pooling, qk_norm)
    assert relative_error(attention(x, mask=mask), expected) <= EXACT


def test_eps_reaches_the_norms():
    attention = make_attention(eps=1e3)
    x = make_tokens()
    q = attention.to_query(x) / 1e3
    _, weights, _ = attention(x, return_weights=True)
    scores = (q @ attention.w_g).squeeze(2) * attention.scale_factor
    assert relative_error(weights, scores / 1e3) <= EXACT


# Each layout: how tokens [B, N, C] become its input, and how its output becomes tokens [B, N, D].
LAYOUTS = {
    "tokens": ("auto", lambda t: t, lambda y: y),
    "images": (
        "auto",
        lambda t: t.transpose(1, 2).unflatten(2, (HEIGHT, WIDTH)).contiguous(),
        lambda y: y.flatten(2).transpose(1, 2),
    ),
    "images in channels_last memory": (
        "auto",
        lambda t: (
            t.transpose(1, 2)
            .unflatten(2, (HEIGHT, WIDTH))
            .contiguous(memory_format=torch.channels_last)
        ),
        lambda y: y.flatten(2).transpose(1, 2),
    ),
    "volumes": (
        "auto",
        lambda t: t.transpose(1, 2).unflatten(2, (HEIGHT, 2, WIDTH // 2)).contiguous(),
        lambda y: y.flatten(2).transpose(1, 2),
    ),
    "channels_first images": (
        "channels_first",
        lambda t: t.transpose(1, 2).unflatten(2, (HEIGHT, WIDTH)).contiguous(),
        lambda y: y.flatten(2).transpose(1, 2),
    ),
    "channels_first sequences": (
        "channels_first",
        lambda t: t.transpose(1, 2).contiguous(),
        lambda y: y.transpose(1, 2),
    ),
    "channels_last tokens": ("channels_last", lambda t: t, lambda y: y),
    "channels_last images": (
        "channels_last",
        lambda t: t.unflatten(1, (HEIGHT, WIDTH)),
        lambda y: y.flatten(1, 2),
    ),
    "channels_last images, permuted": (
        "channels_last",
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2).unflatten(1, (HEIGHT, WIDTH)),
        lambda y: y.flatten(1, 2),
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_outputs_and_gradients(name, backend):
    layout, arrange, tokens_of = LAYOUTS[name]
    attention = make_attention(layout=layout, backend=backend)
    tokens = make_tokens()
    dout = make_tokens(BATCH, HEIGHT * WIDTH, TOKEN_DIM, seed=2)
    wanted = (tokens.requires_grad_(), *attention.parameters())
    expected = definition(attention, tokens)
    exact = torch.autograd.grad(expected, wanted, dout)

    x = arrange(tokens)
    out = attention(x)
    assert out.dim() == x.dim()
    assert out.shape[1 if out.shape[1] == TOKEN_DIM else -1] == TOKEN_DIM
    ours = torch.autograd.grad(tokens_of(out), wanted, dout)
    assert relative_error(tokens_of(out), expected) <= EXACT
    for grad, exact_grad in zip(ours, exact, strict=True):
        assert relative_error(grad, exact_grad) <= EXACT


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_image_output_is_dense_with_adjacent_channels(memory_format):
    x = make_tokens(BATCH, IN_DIMS, HEIGHT, WIDTH).contiguous(memory_format=memory_format)
    out = make_attention()(x)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["auto", "channels_last"])
def test_mask_may_have_the_shape_of_the_image(layout, backend):
    attention = make_attention(layout=layout, backend=backend)
    x = make_tokens(BATCH, IN_DIMS, HEIGHT, WIDTH)
    if layout == "channels_last":
        x = x.movedim(1, -1)
    flat = make_mask(BATCH, HEIGHT * WIDTH)
    out = attention(x, mask=flat.view(BATCH, HEIGHT, WIDTH))
    assert torch.equal(out, attention(x, flat))
    assert not torch.equal(out, attention(x))
    transposed = flat.view(BATCH, HEIGHT, WIDTH).transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(out, attention(x, mask=transposed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_return_weights_gives_those_of_the_definition(pooling, qk_norm, backend):
    attention = make_attention(pooling=pooling, qk_norm=qk_norm, backend=backend)
    x, mask = make_tokens(), make_mask(BATCH, HEIGHT * WIDTH)
    result = attention(x, mask=mask, return_weights=True)
    assert isinstance(result, AttentionOutput)
    assert torch.equal(result.output, attention(x, mask=mask))
    q = attention.to_query(x)
    if qk_norm:
        q = F.normalize(q, dim=-1)
    options = Options(pooling, qk_norm, TOKEN_DIM**-0.5, 1e-12)
    weights, G = reference.global_query(q, attention.w_g.flatten(), mask, options)
    assert relative_error(result.weights, weights) <= EXACT
    assert relative_error(result.global_query, G) <= EXACT
    assert not result.weights[~mask].any()
    assert result.output.requires_grad
    assert not result.weights.requires_grad
    assert not result.global_query.requires_grad


def test_return_weights_keeps_the_axes_of_an_image_output():
    x = make_tokens(BATCH, IN_DIMS, HEIGHT, WIDTH)
    output, weights, G = make_attention()(x, return_weights=True)
    assert output.shape == (BATCH, TOKEN_DIM, HEIGHT, WIDTH)
    assert weights.shape == (BATCH, HEIGHT * WIDTH)
    assert G.shape == (BATCH, TOKEN_DIM * NUM_HEADS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_returned_weights_of_a_zero_row_are_finite_in_half_precision(dtype):
    """eps = 1e-12 is 0 in float16, and 0 / 0 would be NaN."""
    attention = AdditiveAttention(IN_DIMS, TOKEN_DIM, bias=False, backend="aten", dtype=dtype)
    x = make_tokens().to(dtype)
    x[0, 3] = 0
    output, weights, G = attention(x, return_weights=True)
    assert (output.dtype, weights.dtype, G.dtype) == (dtype, torch.float32, torch.float32)
    assert all(t.isfinite().all() for t in (output, weights, G))
    assert weights[0, 3] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_single_token_is_attended_like_many(pooling, backend):
    attention = make_attention(pooling=pooling, backend=backend)
    x = make_tokens(3, 1, IN_DIMS).requires_grad_()
    wanted = (x, attention.proj.weight, attention.to_key.bias)
    expected = definition(attention, x, pooling=pooling)
    out = attention(x)
    assert relative_error(out, expected) <= EXACT
    dout = make_tokens(3, 1, TOKEN_DIM)
    exact = torch.autograd.grad(expected, wanted, dout)
    for grad, exact_grad in zip(torch.autograd.grad(out, wanted, dout), exact, strict=True):
        assert relative_error(grad, exact_grad) <= EXACT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pooling", ["l2", "softmax"])
def test_no_tokens_are_refused_where_weights_are_normalised_over_them(pooling, backend):
    attention = make_attention(pooling=pooling, backend=backend)
    with pytest.raises(ValueError, match=r"needs at least one; got 0 tokens.*'sum' or 'linear'"):
        attention(make_tokens(2, 0, IN_DIMS))


def test_layer_equals_the_functional_form():
    attention = make_attention(pooling="linear", backend="aten")
    x, mask = make_tokens(), make_mask(BATCH, HEIGHT * WIDTH)
    layers = (attention.to_query, attention.to_key, attention.proj, attention.final)
    wq, bq, wk, bk, wp, bp, wf, bf = (t for layer in layers for t in (layer.weight, layer.bias))
    out = additive_self_attention(
        x, wq, bq, wk, bk, attention.w_g, wp, bp, wf, bf,
        mask=mask, pooling="linear", backend="aten",
    )  # fmt: skip
    assert torch.equal(attention(x, mask), out)


@pytest.mark.parametrize("backend", ["aten", "auto", "reference"])
def test_returned_weights_are_float32_under_autocast(backend):
    attention = make_attention(backend=backend).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, weights, G = attention(make_tokens().float(), return_weights=True)
    assert (output.dtype, weights.dtype, G.dtype) == (torch.bfloat16, torch.float32, torch.float32)
