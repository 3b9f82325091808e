"""Bad input: the error names the argument, what was expected, what came and what to do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from swiftkernels import AdditiveAttention, additive_attention, additive_self_attention, warmup
from swiftkernels.backends import torch_state
from swiftkernels.testing.cases import (
    QUERY_KEY_NAMES,
    SELF_NAMES,
    make_query_key_tensors,
    make_tensors,
)

BATCH, N, C, D, E = 2, 3, 5, 4, 8
"""With two heads, so that C, D and E all differ."""


def self_arguments() -> dict[str, Tensor | None]:
    return dict(zip(SELF_NAMES, make_tensors(BATCH, N, C, D, 2, dtype=torch.float32), strict=True))


def query_key_arguments() -> dict[str, Tensor | None]:
    tensors = make_query_key_tensors(BATCH, N, C, D, 2, dtype=torch.float32)
    return dict(zip(QUERY_KEY_NAMES, tensors, strict=True))


FORMS = {
    "tokens": (additive_self_attention, self_arguments),
    "queries and keys": (additive_attention, query_key_arguments),
}


def assert_raises(
    error: type[Exception], call: Callable[[], object], *parts: str, starts: str
) -> None:
    """`call` raises `error`, in whose message the parts stand in this order."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert message.startswith(starts), message
    position = 0
    for part in parts:
        found = message.find(part, position)
        assert found >= 0, f"{part!r} is not in {message[position:]!r} of {message!r}"
        position = found + len(part)


def test_the_arguments_are_right_before_they_are_made_wrong():
    for function, arguments in FORMS.values():
        assert function(**arguments()).shape == (BATCH, N, D)


# What is changed: how, the error, and what its message holds after the name of the argument.
TENSOR_CHANGES = {
    "an integer": (
        lambda t: t.to(torch.int64),
        TypeError,
        ["torch.float32", "got torch.int64", "Convert"],
    ),
    "of another float type": (
        lambda t: t.double(),
        TypeError,
        ["must have the dtype of", "torch.float32", "got torch.float64", "Convert"],
    ),
    "on another device": (
        lambda t: t.to("meta"),
        ValueError,
        ["must be on the device of", "cpu", "got meta", ".to('cpu')"],
    ),
    "too long": (
        lambda t: torch.cat((t, t)),
        ValueError,
        ["must have shape", "(", "got (", "Check that all weights come from one layer"],
    ),
    "with an axis too many": (
        lambda t: t.unsqueeze(0),
        ValueError,
        ["[", "got", "(1, ", "."],
    ),
    "an array": (
        lambda t: t.numpy(),
        TypeError,
        ["must be a torch.Tensor", "got ndarray", "torch.as_tensor"],
    ),
    "a list": (
        lambda t: t.tolist(),
        TypeError,
        ["must be a torch.Tensor", "got list", "torch.as_tensor"],
    ),
}


@pytest.mark.parametrize("change", TENSOR_CHANGES)
@pytest.mark.parametrize(
    ("form", "name"),
    [
        *(("tokens", name) for name in SELF_NAMES[1:]),
        *(("queries and keys", name) for name in QUERY_KEY_NAMES[2:]),
    ],
)
def test_a_bad_weight_is_named(form, name, change):
    function, arguments = FORMS[form]
    apply, error, parts = TENSOR_CHANGES[change]
    arguments = arguments()
    arguments[name] = apply(arguments[name])
    starts = name
    if change == "too long" and name in ("w_g", "query_weight", "final_weight"):
        # The other shapes are read off these: the first that disagrees is named.
        starts = {
            "w_g": "query_weight" if form == "tokens" else "q ",
            "query_weight": "query_weight",
            "final_weight": "final_bias",
        }[name]
        parts = [] if name == "final_weight" else ["w_g"]
    assert_raises(error, lambda: function(**arguments), *parts, starts=starts)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        *(("tokens", n) for n in SELF_NAMES[1:] if "bias" not in n),
        *(("queries and keys", n) for n in QUERY_KEY_NAMES[1:] if "bias" not in n),
    ],
)
def test_a_missing_weight_is_named(form, name):
    function, arguments = FORMS[form]
    arguments = arguments() | {name: None}
    parts = ["must be a torch.Tensor", "got NoneType"]
    assert_raises(TypeError, lambda: function(**arguments), *parts, starts=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((N, "width"), ["3 dimensions [B, N, ", "got shape (3, ", "AdditiveAttention"]),
        ((2, 2, 2, "width"), ["3 dimensions [B, N, ", "got shape (2, 2, 2, ", "flatten(2)"]),
        ((BATCH, N, 9), ["wide in its last dimension", "got shape (2, 3, 9)", "order of the axes"]),
    ],
)
def test_tokens_of_wrong_rank_or_width_are_named(form, shape, parts):
    function, arguments = FORMS[form]
    arguments = arguments()
    name = "x" if form == "tokens" else "q"
    width = arguments[name].shape[-1]
    arguments[name] = torch.randn(*(width if n == "width" else n for n in shape))
    assert_raises(ValueError, lambda: function(**arguments), *parts, starts=f"{name} must")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_tokens_that_are_no_real_floats_are_named(form, dtype):
    function, arguments = FORMS[form]
    arguments = {k: v.to(dtype) for k, v in arguments().items()}
    name = "x" if form == "tokens" else "q"
    parts = ["float64, float32, float16 or bfloat16", f"got {dtype}", f"{name}.to(torch.float32)"]
    assert_raises(TypeError, lambda: function(**arguments), *parts, starts=f"{name} must")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_input_and_weights_of_different_types_are_refused(dtype):
    arguments = self_arguments()
    arguments["x"] = arguments["x"].to(dtype)
    assert_raises(
        TypeError, lambda: additive_self_attention(**arguments),
        f"dtype of x, {dtype}", "got torch.float32", ".to()", "torch.autocast",
        starts="query_weight",
    )  # fmt: skip
    attention = AdditiveAttention(C, D)
    with pytest.raises(TypeError, match=f"dtype of x, {dtype}; got torch.float32"):
        attention(arguments["x"])


def test_input_and_weights_on_different_devices_are_refused():
    attention = AdditiveAttention(C, D)
    with pytest.raises(ValueError, match=r"device of x, meta; got cpu.*\.to\('meta'\)"):
        attention(torch.randn(BATCH, N, C, device="meta"))


def test_keys_of_another_shape_than_queries_are_refused():
    arguments = query_key_arguments()
    arguments["k"] = arguments["k"][:, 1:]
    parts = ["(2, 3, 8) (that of q)", "got (2, 2, 8)", "from the same tokens"]
    assert_raises(ValueError, lambda: additive_attention(**arguments), *parts, starts="k must")


def test_keys_of_another_type_or_device_than_queries_are_refused():
    arguments = query_key_arguments()
    k = arguments["k"]
    arguments["k"] = k.half()
    parts = ["dtype of q, torch.float32", "got torch.float16", ".to()"]
    assert_raises(TypeError, lambda: additive_attention(**arguments), *parts, starts="k must")
    arguments["k"] = k.to("meta")
    parts = ["device of q, cpu", "got meta", ".to('cpu')"]
    assert_raises(ValueError, lambda: additive_attention(**arguments), *parts, starts="k must")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("mask", "error", "parts"),
    [
        (torch.ones(BATCH, N), TypeError, ["bool", "got torch.float32", "mask.bool()"]),
        (torch.ones(BATCH, N, dtype=torch.int64), TypeError, ["bool", "int64", "mask.bool()"]),
        (np.ones((BATCH, N), dtype=bool), TypeError, ["torch.Tensor", "ndarray", "as_tensor"]),
        (
            torch.ones(1, N, dtype=torch.bool),
            ValueError,
            ["[B, N] = (2, 3)", "got (1, 3)", "expand"],
        ),
        (torch.ones(N, dtype=torch.bool), ValueError, ["[B, N] = (2, 3)", "got (3,)", "reshape"]),
        (
            torch.ones(BATCH, N, dtype=torch.bool, device="meta"),
            ValueError,
            ["the device of the input, cpu", "got meta", "mask.to('cpu')"],
        ),
    ],
)
def test_a_bad_mask_is_refused(form, mask, error, parts):
    function, arguments = FORMS[form]
    arguments = arguments()
    assert_raises(error, lambda: function(**arguments, mask=mask), *parts, starts="mask must")
    if form == "tokens":
        attention = AdditiveAttention(C, D)
        x = arguments["x"]
        assert_raises(error, lambda: attention(x, mask=mask), *parts, starts="mask must")


@pytest.mark.parametrize(
    "shape", [(BATCH, 1, 3, 4), (BATCH, 4, 3), (BATCH, 3, 4, 1), (1, 3, 4), (BATCH, 3, 5)]
)
def test_an_image_mask_of_wrong_shape_is_refused(shape):
    attention = AdditiveAttention(C, D)
    x = torch.randn(BATCH, C, 3, 4)
    mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^mask must have shape \[B, N\].*; got .*\. \w+"):
        attention(x, mask=mask)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "value", "error", "parts"),
    [
        ("pooling", "max", ValueError, ["'l2', 'softmax', 'sum', 'linear'", "got 'max'"]),
        ("pooling", None, ValueError, ["'l2', 'softmax', 'sum', 'linear'", "got None"]),
        (
            "backend",
            "cuda",
            ValueError,
            ["'auto', 'triton', 'cpu', 'aten', 'reference'", "got 'cuda'"],
        ),
        ("backend", None, ValueError, ["'auto', 'triton', 'cpu', 'aten', 'reference'", "got None"]),
        ("qk_norm", "yes", ValueError, ["True, False", "got 'yes'"]),
        ("qk_norm", None, ValueError, ["True, False", "got None"]),
        ("eps", -1e-6, ValueError, ["positive and finite", "got -1e-06", "default"]),
        ("eps", 0.0, ValueError, ["positive and finite", "got 0.0", "default"]),
        ("eps", float("nan"), ValueError, ["positive and finite", "got nan", "default"]),
        ("eps", None, TypeError, ["float", "got NoneType", "float(eps)"]),
        ("eps", torch.tensor(1e-6), TypeError, ["float", "got Tensor", "float(eps)"]),
        ("scale", float("nan"), ValueError, ["finite", "got nan", "default"]),
        ("scale", float("inf"), ValueError, ["finite", "got inf", "default"]),
        ("scale", "1", TypeError, ["float", "got str", "float(scale)"]),
        ("scale", torch.tensor(0.5), TypeError, ["float", "got Tensor", "float(scale)"]),
    ],
)
def test_a_bad_option_is_refused(form, name, value, error, parts):
    function, arguments = FORMS[form]
    arguments = arguments()
    assert_raises(error, lambda: function(**arguments, **{name: value}), *parts, starts=name)


@pytest.mark.parametrize(
    ("name", "value", "error", "parts"),
    [
        ("pooling", "mean", ValueError, ["'l2', 'softmax', 'sum', 'linear'", "got 'mean'"]),
        (
            "backend",
            "gpu",
            ValueError,
            ["'auto', 'triton', 'cpu', 'aten', 'reference'", "got 'gpu'"],
        ),
        ("layout", "NHWC", ValueError, ["'auto', 'channels_last', 'channels_first'", "'NHWC'"]),
        ("qk_norm", "no", ValueError, ["True, False", "got 'no'"]),
        ("eps", -1.0, ValueError, ["positive and finite", "got -1.0", "default"]),
        ("eps", "small", TypeError, ["float", "got str", "float(eps)"]),
        *(
            (name, *case)
            for name in ("in_dims", "token_dim", "num_heads")
            for case in (
                (0, ValueError, ["at least 1", "got 0", "Pass"]),
                (-8, ValueError, ["at least 1", "got -8", "Pass"]),
                (8.0, TypeError, ["an int", "got float", "int("]),
                ("8", TypeError, ["an int", "got str", "int("]),
                (True, TypeError, ["an int", "got bool", "int("]),
                (None, TypeError, ["an int", "got NoneType", "int("]),
            )
            if (name, case[0]) != ("token_dim", None)
        ),
    ],
)
def test_a_bad_constructor_argument_is_refused(name, value, error, parts):
    arguments = {"in_dims": 8, name: value}
    assert_raises(error, lambda: AdditiveAttention(**arguments), *parts, starts=f"{name} must")


@pytest.mark.parametrize(
    ("layout", "shape", "parts"),
    [
        ("auto", (C,), ["[B, N, 5] or [B, 5, *spatial]", "got shape (5,)", "unsqueeze"]),
        ("auto", (N, C), ["[B, N, 5] or [B, 5, *spatial]", "got shape (3, 5)", "unsqueeze"]),
        ("auto", (2, 3, 4), ["5 channels (in_dims)", "[B, *spatial, C]", "got 4", "layout="]),
        ("auto", (2, 3, 4, C), ["5 channels (in_dims)", "[B, C, *spatial]", "got 3", "layout="]),
        ("channels_last", (2, C, 3, 4), ["5 channels", "[B, *spatial, C]", "got 4", "layout="]),
        ("channels_first", (2, N, C), ["5 channels", "[B, C, *spatial]", "got 3", "layout="]),
    ],
)
def test_the_layer_refuses_input_of_wrong_axes(layout, shape, parts):
    attention = AdditiveAttention(C, D, layout=layout)
    assert_raises(ValueError, lambda: attention(torch.randn(shape)), *parts, starts="x must")


@pytest.mark.parametrize("x", [[[0.0]], None, np.zeros((2, 3, C), dtype=np.float32)])
def test_the_layer_refuses_what_is_no_tensor(x):
    attention = AdditiveAttention(C, D)
    parts = ["torch.Tensor", f"got {type(x).__name__}", "torch.as_tensor"]
    assert_raises(TypeError, lambda: attention(x), *parts, starts="x must")


@pytest.mark.parametrize("form", FORMS)
def test_triton_refuses_tensors_on_the_cpu(monkeypatch, form):
    monkeypatch.setattr(torch_state, "has_triton", lambda: True)
    monkeypatch.setattr(torch_state, "interpreting", lambda: False)
    function, arguments = FORMS[form]
    arguments = arguments()
    assert_raises(
        ValueError, lambda: function(**arguments, backend="triton"),
        "CUDA, ROCm or XPU device", "got one on cpu", "backend='auto'",
        starts="backend='triton' needs",
    )  # fmt: skip


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(torch_state, "has_triton", lambda: False)
    attention = AdditiveAttention(C, D, backend="triton")
    assert_raises(
        ValueError, lambda: attention(torch.randn(BATCH, N, C)),
        "the package triton", "not installed", "pip install '.[triton]'",
        starts="backend='triton' needs",
    )  # fmt: skip
    attention.backend = "auto"
    assert attention(torch.randn(BATCH, N, C)).shape == (BATCH, N, D)


@pytest.mark.parametrize(("token_dim", "num_heads"), [(1025, 1), (256, 5)])
def test_triton_refuses_wider_rows_than_it_can_hold(monkeypatch, token_dim, num_heads):
    monkeypatch.setattr(torch_state, "has_triton", lambda: True)
    width = token_dim * num_heads
    with FakeTensorMode():
        x, wq, wk, w_g, wp, wf = (
            torch.empty(shape, device="cuda")
            for shape in (
                (1, N, C),
                (width, C),
                (width, C),
                (width,),
                (width, width),
                (token_dim, width),
            )
        )

        def attend(backend: str) -> Tensor:
            arguments = (x, wq, None, wk, None, w_g, wp, None, wf, None)
            return additive_self_attention(*arguments, backend=backend)

        assert_raises(
            ValueError, lambda: attend("triton"),
            "token_dim * num_heads up to 512 in torch.float32", f"got {width}", "backend='auto'",
            starts="backend='triton' takes",
        )  # fmt: skip
        assert attend("auto").shape == (1, N, token_dim)


def test_warming_up_names_what_it_cannot_do():
    model = AdditiveAttention(C, D, 1)
    assert_raises(TypeError, lambda: warmup(model.proj.weight), "got Parameter", starts="model")
    nothing = torch.nn.Linear(2, 2)
    assert_raises(ValueError, lambda: warmup(nothing), "Linear holds none", starts="model")
    for size in ((4,), (4, 0), (1, 2, 3)):
        assert_raises(
            ValueError,
            lambda size=size: warmup(model, image_sizes=[size]),
            str(size),
            "image_sizes=[(14, 14)]",
            starts="image_sizes",
        )
