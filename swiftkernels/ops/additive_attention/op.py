"""The two operators of additive attention: from tokens, and from given queries and keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from swiftkernels.backends import torch_state
from swiftkernels.backends.cpu import library
from swiftkernels.backends.layouts import as_image, as_tokens
from swiftkernels.ops.additive_attention import eager, reference
from swiftkernels.ops.additive_attention.triton import config
from swiftkernels.ops.additive_attention.weights import Options, OutputWeights, Weights
from swiftkernels.ops.operator import Backend, Call, Operator


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


def _eager(x: Tensor, width: int) -> str:
    """The backend for inputs that no kernels take.

    Measured on a CPU: "aten" is faster where the eager layer is limited by memory, that is for many
    narrow tokens. Elsewhere the larger products of the eager layer are faster.
    """
    enough = (2 if torch.is_grad_enabled() else 5) * eager.CHUNK_BYTES
    n_tokens = x.shape[1] if x.dim() == 3 else x.shape[2:].numel()
    pays = n_tokens >= 8 * width and x.numel() * x.element_size() >= enough
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


def _example(batch: int, n_tokens: int, in_dims: int, token_dim: int) -> Call:
    """A layer with one head on random tokens."""
    C, D = in_dims, token_dim

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns) / columns**0.5

    weights = Weights(
        matrix(D, C), torch.randn(D), matrix(D, C), torch.randn(D), torch.randn(D, 1),
        matrix(D, D), torch.randn(D), matrix(D, D), torch.randn(D),
    )  # fmt: skip
    options = Options("l2", True, D**-0.5, 1e-12)
    x = torch.randn(batch, n_tokens, C)
    return Call((x,), weights, None, options, "auto", "nothing")


def _query_key_example(batch: int, n_tokens: int, in_dims: int, token_dim: int) -> Call:
    call = _example(batch, n_tokens, in_dims, token_dim)
    queries = torch.randn(2, batch, n_tokens, token_dim)
    return call._replace(inputs=tuple(queries), weights=call.weights.output)


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
    example=_example,
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
    example=_query_key_example,
)
OPERATORS = (SELF_ATTENTION, QUERY_KEY_ATTENTION)
