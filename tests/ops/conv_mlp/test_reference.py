"""The definition of conv_mlp against a formula in NumPy, its gradients, and its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from swiftkernels.ops.conv_mlp.op import conv_mlp
from swiftkernels.ops.conv_mlp.reference import ACTIVATIONS
from tests.ops.conv_mlp.cases import KERNELS, make_tensors


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("residual", [True, False])
def test_definition_follows_the_formula(kernel: int | None, residual: bool) -> None:
    tensors = make_tensors((2, 5, 4, 6), 7, kernel)
    x, w, b, w1, b1, w2, b2, scale = (0 if t is None else t.numpy() for t in tensors)
    convolved = x
    if kernel:
        reach = kernel // 2
        padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
        convolved = np.zeros_like(x) + b[:, None, None]
        for i, j in np.ndindex(kernel, kernel):
            convolved += padded[:, :, i : i + 4, j : j + 6] * w[:, 0, i, j][:, None, None]
    hidden = np.maximum(np.einsum("hc,bcyx->bhyx", w1, convolved) + b1[:, None, None], 0)
    branch = np.einsum("dh,bhyx->bdyx", w2, hidden) + b2[:, None, None]
    expected = scale[:, None, None] * branch + residual * x
    out = conv_mlp(*tensors, activation="relu", residual=residual, backend="reference")
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_the_definition(activation: str) -> None:
    tensors = [t.requires_grad_() for t in make_tensors((2, 3, 3, 2), 4) if t is not None]

    def run(*tensors: Tensor) -> Tensor:
        return conv_mlp(*tensors, activation=activation, backend="reference")

    assert torch.autograd.gradcheck(run, tensors)


def test_auto_takes_the_definition_where_a_gradient_is_wanted() -> None:
    tensors = [t.float().requires_grad_() for t in make_tensors((2, 3, 3, 2), 4) if t is not None]
    assert "Function" not in str(conv_mlp(*tensors).grad_fn)


def test_errors_say_what_to_do() -> None:
    x, dw, db, w1, b1, w2, b2, scale = make_tensors((2, 16, 5, 4), 40)
    for call, message in (
        (lambda: conv_mlp(x[:, 1:], dw, db, w1, b1, w2, b2), r"x must be \[B, 16, H, W\].*order"),
        (lambda: conv_mlp(x[0], dw, db, w1, b1, w2, b2), r"x must be \[B, 16, H, W\]"),
        (lambda: conv_mlp(x, dw, db, w1[..., None], b1, w2, b2), "weight1 must be a matrix, or"),
        (lambda: conv_mlp(x, dw, db, w1, b1, w2[:, 1:], b2), "H = 40 columns.*got 39"),
        (lambda: conv_mlp(x, dw, db, w1, b1, w2[1:], b2[1:]), "C = 16 rows.*residual=False"),
        (lambda: conv_mlp(x, dw, db, w1, b1[1:], w2, b2), r"bias1 must have shape \(40,\)"),
        (lambda: conv_mlp(x, dw, db, w1, b1, w2, b2[1:]), r"bias2 must have shape \(16,\)"),
        (lambda: conv_mlp(x, dw, db, w1, b1, w2, b2, scale[1:]), r"scale must have shape \(16,\)"),
        (lambda: conv_mlp(x, dw, db[1:], w1, b1, w2, b2), r"depthwise_bias must have shape"),
        (lambda: conv_mlp(x, dw[1:], db, w1, b1, w2, b2), "one kernel for each.*groups=16"),
        (lambda: conv_mlp(x, dw[..., 1:], db, w1, b1, w2, b2), "with k 3, 5 or 7; got shape"),
        (lambda: conv_mlp(x, None, db, w1, b1, w2, b2), "must be None without depthwise_weight"),
        (lambda: conv_mlp(x, dw, db, w1, b1, w2, b2, activation="tanh"), "activation must be one"),
        (lambda: conv_mlp(x, dw, db, w1, b1, w2, b2, backend="fast"), "backend must be one of"),
        (lambda: conv_mlp(x, dw, db, w1, b1, w2, b2, backend="cpu"), "got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in (
        (lambda: conv_mlp(x, dw, db, w1.float(), b1, w2, b2), "weight1 must have the dtype"),
        (lambda: conv_mlp(x, dw, db, None, b1, w2, b2), "weight1 must be a torch.Tensor"),
        (lambda: conv_mlp(x.int(), dw, db, w1, b1, w2, b2), "Convert it first"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
