"""Checkpoints: structure, names, types, shapes, values and bytes, and options of loading."""

from __future__ import annotations

import pickle
import tempfile
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("hypothesis")

import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor

from swiftkernels.models import (
    SwiftFormer,
    convert_state_dict,
    from_pretrained,
    load_checkpoint,
    save_checkpoint,
)
from swiftkernels.models.family import SOURCES
from swiftkernels.ops.types import Pooling
from tests.fuzz.commands import check_printable

torch.manual_seed(0)
SIZES = ((4, 8), (1, 1))
MODEL = SwiftFormer(*SIZES, num_classes=3).eval()
WEIGHTS = {name: t.clone() for name, t in MODEL.state_dict().items()}
OTHERS = {
    "one head": SwiftFormer(*SIZES, num_classes=3, distillation=False).state_dict(),
    "features": SwiftFormer(*SIZES, features_only=True).state_dict(),
    "no scales": SwiftFormer(*SIZES, num_classes=3, use_layer_scale=False).state_dict(),
    "official": convert_state_dict(WEIGHTS, "timm", "official"),
    "transformers": convert_state_dict(WEIGHTS, "timm", "transformers"),
}
DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8),
    *(torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16),
)
VALUES = (0.0, -1.0, 1e-45, 65504.0, 3.4e38, 1e300, float("inf"), float("-inf"), float("nan"))

texts = st.text(max_size=20) | st.sampled_from(
    ["stages.٣.blocks.0.attn.w_g", "stages.1.blocks.9", "network.0.0", "norm0.weight", "a\x1b[31m",
     "stages.1.blocks.4000000000.linear.fc1.weight", f"stages.{10**30}.blocks.0.attn.w_g",
     f"norm{5000 * '9'}.weight", "module.", "backbone.", "n_averaged", "\ud800", "head.weight"]
)  # fmt: skip
keys = texts | st.integers(-2, 99) | st.none() | st.booleans() | st.binary(max_size=4)
shapes = st.lists(st.integers(0, 9), max_size=5).map(tuple)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(texts, inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=6,
)


@st.composite
def tensors(draw: Any, like: Tensor) -> Any:
    """A tensor, or something else, in the place of another one."""
    kind = draw(
        st.sampled_from(
            ["shape", "dtype", "value", "meta", "expanded", "sparse", "strided", "offset", "other"]
        )
    )
    event(f"changed: {kind}")
    if kind == "shape":
        return torch.ones(draw(shapes))
    if kind == "dtype":
        return like.to(draw(st.sampled_from(DTYPES)))
    if kind == "value":
        value = draw(st.sampled_from(VALUES))
        changed = like.double() if value > 3.4e38 else like.clone()
        if changed.numel() and changed.is_floating_point():
            changed.view(-1)[draw(st.integers(0, changed.numel() - 1))] = value
        return changed
    if kind == "meta":
        return torch.empty(
            draw(st.just(like.shape) | shapes | st.just((1 << 20, 1 << 20))), device="meta"
        )
    if kind == "expanded":
        return torch.ones(()).expand(draw(st.just(like.shape) | st.just((1 << 20, 1 << 20))))
    if kind == "sparse":
        return torch.ones(3, 4).to_sparse()
    if kind == "strided":
        return torch.linspace(-1, 1, 200).as_strided(
            (3, 4), draw(st.sampled_from([(0, 1), (1, 1), (9, 2)]))
        )
    if kind == "offset":
        return torch.linspace(-1, 1, 1000)[7 : 7 + like.numel()].reshape(like.shape)
    return draw(plain)


@st.composite
def contents(draw: Any) -> Any:
    """What a file holds."""
    source = draw(st.sampled_from(["", "", *OTHERS]))
    originals = OTHERS[source] if source else WEIGHTS
    weights: dict[Any, Any] = dict(originals)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(list(weights)))
        action = draw(st.sampled_from(["delete", "rename", "replace", "replace", "add", "copy"]))
        if action == "delete":
            del weights[name]
        elif action == "rename":
            weights[draw(keys)] = weights.pop(name)
        elif action == "replace" and name in originals:
            weights[name] = draw(tensors(originals[name]))
        elif action == "add":
            weights[draw(keys)] = draw(plain)
        else:
            old, new = draw(
                st.sampled_from([(".0.", ".1."), ("stages", "module.stages"), ("1", "7")])
            )
            weights[str(name).replace(old, new)] = weights[name]
    prefix = draw(st.sampled_from(["", "", "", "module.", "backbone.", "_orig_mod.module."]))
    if prefix:
        weights = {f"{prefix}{k}": t for k, t in weights.items()}
    entry = draw(st.sampled_from(["", "model", "state_dict", "model_ema", "other"]))
    content: Any = {entry: weights} if entry else weights
    for _ in range(draw(st.integers(0, 2)) if entry else 0):
        extra = draw(
            st.sampled_from(["pooling", "args", "epoch", "model_ema", "optimizer", "model"])
        )
        value = draw(
            st.sampled_from(get_args(Pooling)) | plain | st.builds(Namespace, pooling=plain)
        )
        content[extra] = value
    return draw(st.sampled_from([content] * 9 + [OrderedDict(content), [content]]) | plain)


@st.composite
def bytes_of(draw: Any, content: Any) -> tuple[bytes, str]:
    """A file with this content, perhaps damaged, and its suffix."""
    form = draw(st.sampled_from(["zip", "zip", "zip", "legacy", "pickle", "safetensors"]))
    event(f"form: {form}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.pth")
        if form == "pickle":
            path.write_bytes(pickle.dumps(draw(plain), draw(st.sampled_from([0, 2, 4, 5]))))
        elif form == "safetensors":
            pytest.importorskip("safetensors")
            path = path.with_suffix(".safetensors")
            save_checkpoint(MODEL, path)
        else:
            torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
        data = path.read_bytes()
    damage = draw(st.sampled_from(["none", "none", "cut", "flip", "insert"]))
    event(f"damage: {damage}")
    if damage != "none" and data:
        # Most places are where structure is: the start and the end.
        near = st.integers(0, 3000)
        at = draw(near | near.map(lambda n: -1 - n) | st.integers(0, 1 << 40)) % len(data)
        if damage == "cut":
            data = data[:at]
        elif damage == "flip":
            data = data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
        else:
            data = data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at:]
    return data, path.suffix


options = st.fixed_dictionaries(
    {},
    optional={
        "source": st.sampled_from([*SOURCES, "keras", 3]),
        "prefix": st.sampled_from(["", "backbone.", "x"]),
        "ema": st.booleans(),
        "pooling": st.sampled_from([*get_args(Pooling), "max"]),
        "strict": st.booleans(),
        "fresh_heads": st.booleans(),
    },
)


def attempt(load: Callable[[], Any]) -> Any:
    """The result; None after an error that says what is wrong."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = load()
            event("loaded")
        except ValueError as error:
            check_printable(str(error))
            event(f"{type(error).__name__}: {' '.join(str(error).split()[1:6])[:40]}")
            found = None
    assert not caught
    return found


def check(content: Any, given: dict[str, Any]) -> None:
    """Load into a model and as a model; after an error the former is unchanged."""
    model = SwiftFormer(*SIZES, num_classes=3).eval()
    model.load_state_dict(WEIGHTS)
    if attempt(lambda: load_checkpoint(model, content, **given)) is None:
        assert all(torch.equal(t, WEIGHTS[name]) for name, t in model.state_dict().items())
        assert {layer.pooling for layer in model.modules() if hasattr(layer, "pooling")} == {"l2"}
    for name, t in model.state_dict().items():
        assert (t.shape, t.dtype) == (WEIGHTS[name].shape, WEIGHTS[name].dtype)
        assert t.isfinite().all()
    if not isinstance(content, Path):
        return
    choice = {k: v for k, v in given.items() if k in ("source", "prefix", "ema", "pooling")}
    built = attempt(lambda: from_pretrained(content, **choice))
    if built is not None:
        assert all(t.isfinite().all() for t in built.state_dict().values())


@given(contents(), options)
def test_contents(content, given):
    if isinstance(content, dict):
        check(content, given)


@given(contents(), options, st.data())
def test_files(content, given, data):
    written, suffix = data.draw(bytes_of(content))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{suffix}")
        path.write_bytes(written)
        check(path, given)
