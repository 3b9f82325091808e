"""The two operators of additive attention: from tokens, and from given queries and keys."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from swiftkernels.backends import torch_state
from swiftkernels.backends.cpu import library
from swiftkernels.backends.layouts import as_image, as_tokens
from swiftkernels.ops.additive_attention import reference
from swiftkernels.ops.additive_attention.triton import config
from swiftkernels.ops.additive_attention.weights import Options, OutputWeights, Weights
from swiftkernels.ops.operator import Backend, Call, Operator
from swiftkernels.ops.types import Pooling


def why_not_triton(x: Tensor, width: int) -> str:
    """Why the Triton kernels cannot take x; empty if they can."""
    reason = torch_state.why_not_triton(x.device)
    max_width = config.max_width(x.dtype)
    if not reason and width > max_width:
        return f"takes token_dim * num_heads up to {max_width} in {x.dtype}; got {width}"
    return reason


def why_not_cpu(x: Tensor, width: int) -> str:
    """Why the compiled CPU kernels cannot take x; empty if they can."""
    return library.why_not_for(x)


def _eager(tokens: Tensor, width: int) -> str:
    """The backend for tokens [B, N, C] that no kernels take.

    Measured on a CPU: "aten" is faster where the eager layer is limited by memory, that is for many
    narrow tokens. Elsewhere the larger products of the eager layer are faster.
    """
    chunk: int = SELF_ATTENTION.implementation("aten").CHUNK_BYTES
    enough = (2 if torch.is_grad_enabled() else 5) * chunk
    pays = tokens.shape[1] >= 8 * width and tokens.nbytes >= enough
    return "aten" if pays else "reference"


def _definition(x: Tensor, weights: Weights, mask: Tensor | None, options: Options) -> Tensor:
    """The definition for tokens and for images, as the kernels take both."""
    if x.dim() == 3:
        return reference.additive_self_attention(x, weights, mask, options)
    out = reference.additive_self_attention(as_tokens(x), weights, mask, options)
    return as_image(out, x.shape[2:])


def _flops(shapes: Mapping[str, Sequence[int]]) -> int:
    token_dim, width = shapes["final_weight"]
    in_dims = shapes["query_weight"][1] if "query_weight" in shapes else 0
    return width * (2 * in_dims + width + token_dim)


def _example(batch: int, n_tokens: int, in_dims: int, token_dim: int, num_heads: int = 1) -> Call:
    """A layer on random tokens."""
    C, D, E = in_dims, token_dim, token_dim * num_heads

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns) / columns**0.5

    weights = Weights(
        matrix(E, C), torch.randn(E), matrix(E, C), torch.randn(E), torch.randn(E, 1),
        matrix(E, E), torch.randn(E), matrix(D, E), torch.randn(D),
    )  # fmt: skip
    options = Options("l2", True, D**-0.5, 1e-12)
    x = torch.randn(batch, n_tokens, C)
    return Call((x,), weights, None, options, "auto", "statistics")


def _query_key_example(batch: int, n_tokens: int, in_dims: int, token_dim: int) -> Call:
    call = _example(batch, n_tokens, in_dims, token_dim)
    queries = torch.randn(2, batch, n_tokens, token_dim)
    return call._replace(inputs=tuple(queries), weights=OutputWeights(*call.weights[4:]))


def _variant(pooling: Pooling, qk_norm: bool, masked: bool, call: Call) -> Call:
    """With other options, and with a mask of which every batch element keeps a token."""
    options = call.options._replace(pooling=pooling, qk_norm=qk_norm)
    if not masked:
        return call._replace(options=options)
    mask = torch.rand(call.inputs[0].shape[:2]) > 1 / 3
    mask[:, :1] = True
    return call._replace(options=options, mask=mask)


def _variants() -> dict[str, Callable[[Call], Call | None]]:
    """Every pooling with and without norms and mask; scale and eps."""
    found: dict[str, Callable[[Call], Call | None]] = {
        f"{pooling}{', norms' * qk_norm}{', mask' * masked}": functools.partial(
            _variant, pooling, qk_norm, masked
        )
        for pooling, qk_norm, masked in itertools.product(
            reference.POOLINGS, (True, False), (False, True)
        )
    }
    found["negative scale"] = lambda call: call._replace(
        options=call.options._replace(pooling="softmax", scale=-0.5)
    )
    found["large eps"] = lambda call: call._replace(options=call.options._replace(eps=2.0))
    return found


def _heads(call: Call) -> Call:
    batch, n_tokens, in_dims = call.inputs[0].shape
    other = _example(batch, n_tokens, in_dims, call.weights.token_dim, num_heads=2)
    return other._replace(backend=call.backend)


def _image(call: Call) -> Call | None:
    """Images [B, C, H, W], which the fused kernels read in place."""
    if call.backend == "aten":
        return None
    x = call.inputs[0]
    return call._replace(inputs=(x.mT.unflatten(2, (math.gcd(x.shape[1], 12), -1)),))


_PACKAGE = "swiftkernels.ops.additive_attention"
_TRITON = Backend(f"{_PACKAGE}.triton.launch", why_not_triton, torch_state.triton_is_automatic)
_ATEN = Backend(f"{_PACKAGE}.eager", lambda x, width: "", lambda x: False)

SELF_ATTENTION = Operator(
    "additive_self_attention",
    inputs=("x",),
    weights=Weights,
    options=Options,
    reference=_definition,
    backends={
        "triton": _TRITON,
        "cpu": Backend(f"{_PACKAGE}.cpu", why_not_cpu),
        "aten": _ATEN,
    },
    eager=_eager,
    flops=_flops,
    function=f"{_PACKAGE}.api:additive_self_attention",
    example=_example,
    variants={**_variants(), "two heads": _heads, "image": _image},
    layer=f"{_PACKAGE}.layer:AdditiveAttention",
)
QUERY_KEY_ATTENTION = Operator(
    "additive_attention",
    inputs=("q", "k"),
    weights=OutputWeights,
    options=Options,
    reference=reference.additive_attention,
    backends={
        "triton": _TRITON,
        "cpu": Backend(
            "",
            lambda x, width: (
                "takes tokens and computes queries and keys itself (additive_self_attention)"
            ),
        ),
        "aten": _ATEN,
    },
    eager=_eager,
    flops=_flops,
    function=f"{_PACKAGE}.api:additive_attention",
    example=_query_key_example,
    variants=_variants(),
)
OPERATORS = (SELF_ATTENTION, QUERY_KEY_ATTENTION)
