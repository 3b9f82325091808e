"""Checkpoint files: names, poolings, adapted parts, rejected files, `from_pretrained`."""

from __future__ import annotations

import argparse
import copy
import doctest
import errno
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swiftkernels.models import (
    CheckpointMismatchError,
    SwiftFormer,
    checkpoint_io,
    convert_state_dict,
    family,
    from_pretrained,
    hub,
    load_checkpoint,
    save_checkpoint,
    swiftformer_s,
    swiftformer_xs,
)
from swiftkernels.models.family import SOURCES
from swiftkernels.models.swiftformer import FAMILY
from swiftkernels.models.swiftformer.checkpoints import architecture
from tests.models.test_models import images, randomise, small

POOLINGS = {"official": "l2", "timm": "l2", "transformers": "sum"}


def trained(**options: Any) -> SwiftFormer:
    """A model with random weights in all parameters and buffers."""
    model = randomise(small(**options)).eval()
    assert isinstance(model, SwiftFormer)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)), alpha=0.1)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def poolings(model: SwiftFormer) -> set[str]:
    return {stage.blocks[-1].attn.pooling for stage in model.stages}


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(images(2, 3, 40, 56))


def written(tmp_path: Path, content: object, name: str = "weights.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("entry", ["", "model", "state_dict"])
@pytest.mark.parametrize("source", SOURCES)
def test_files_of_all_sources_load_with_their_pooling(source, entry, wrapper, tmp_path):
    pooling = POOLINGS[source]
    theirs, ours = trained(pooling=pooling), small()
    weights = convert_state_dict(state(theirs), "timm", source)
    weights = {wrapper + name: t for name, t in weights.items()}
    path = written(tmp_path, {entry: weights, "epoch": 3} if entry else weights)
    report = load_checkpoint(ours, path)
    assert same(state(ours), state(theirs))
    assert poolings(ours) == {pooling}
    assert torch.equal(output(ours), output(theirs))
    assert (report.source, report.entry, report.pooling) == (source, entry, pooling)
    assert report.tensors == len(weights)
    assert str(path) in str(report)
    assert f"named as in {source}" in str(report)
    assert f"pooling: {pooling}, as " in str(report)


def test_backbone_of_a_detector_loads_with_a_prefix(tmp_path):
    theirs, ours = trained(features_only=True), small(features_only=True)
    weights = convert_state_dict(state(theirs), "timm", "official")
    weights = {f"backbone.{name}": t for name, t in weights.items()}
    weights["neck.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"it has backbone\..* prefix='backbone\.'"):
        load_checkpoint(ours, {"state_dict": weights})
    with pytest.raises(ValueError, match=r"prefix must be .* got 'head\.', and the names are back"):
        load_checkpoint(ours, {"state_dict": weights}, prefix="head.")
    load_checkpoint(ours, {"state_dict": weights}, prefix="backbone.")
    assert same(state(ours), state(theirs))


def test_files_of_the_older_torch_format_load(tmp_path):
    theirs, ours = trained(), small()
    content, path = {"model": state(theirs)}, tmp_path / "weights.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    load_checkpoint(ours, path)
    assert same(state(ours), state(theirs))


def test_requested_pooling_is_set():
    weights = convert_state_dict(state(trained()), "timm", "official")
    model = small()
    report = load_checkpoint(model, weights)
    assert "for older weights: pooling='sum'" in str(report)
    report = load_checkpoint(model, weights, pooling="sum")
    assert poolings(model) == {"sum"}
    assert "pooling: sum, as requested" in str(report)


def test_ambiguous_pooling_raises_and_changes_nothing():
    model, weights = small(pooling="softmax"), state(trained())
    before = state(model)
    with pytest.raises(
        ValueError, match=r"The model has 'softmax', timm computes 'l2'. Pass pooling="
    ):
        load_checkpoint(model, weights)
    assert same(state(model), before)
    load_checkpoint(model, weights, pooling="softmax")
    assert poolings(model) == {"softmax"}
    load_checkpoint(model, weights, source="timm")
    assert poolings(model) == {"l2"}


@pytest.mark.parametrize(
    "record",
    [
        {"pooling": "softmax"},
        {"args": {"pooling": "softmax"}},
        {"args": argparse.Namespace(pooling="softmax")},
    ],
)
def test_recorded_pooling_is_set(record, tmp_path):
    model = small(pooling="sum")
    path = written(tmp_path, {"model": state(trained()), **record})
    assert "pooling: softmax, as recorded in the file" in str(load_checkpoint(model, path))
    assert poolings(model) == {"softmax"}


def test_safe_globals_of_the_process_stay(tmp_path):
    path = written(tmp_path, {"model": state(small()), "args": argparse.Namespace(epochs=3)})
    for safe in ([], [argparse.Namespace]):
        with torch.serialization.safe_globals(safe):
            before = set(torch.serialization.get_safe_globals())
            load_checkpoint(small(), path)
            assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    ("entry", "average"), [("model", "model_ema"), ("state_dict", "state_dict_ema")]
)
def test_moving_average_is_loaded_on_request(entry, average, tmp_path):
    theirs, of_them, ours = small(), trained(), small()
    averaged = {f"module.{name}": t for name, t in state(of_them).items()}
    averaged["n_averaged"] = torch.tensor(7)
    path = written(tmp_path, {entry: state(theirs), average: averaged})
    report = load_checkpoint(ours, path)
    assert same(state(ours), state(theirs))
    assert f"also holds their moving average, '{average}'; ema=True" in str(report)
    report = load_checkpoint(ours, path, ema=True)
    assert same(state(ours), state(of_them))
    assert report.entry == average
    assert "moving average" not in str(report)


def test_missing_moving_average_raises():
    content = {"model": state(small()), "model_ema": None, "epoch": 3}
    with pytest.raises(ValueError, match=r"ema=True, in 'model_ema' or .* holds model, epoch\."):
        load_checkpoint(small(), content, ema=True)
    with pytest.raises(ValueError, match="it holds only weights"):
        load_checkpoint(small(), state(small()), ema=True)
    with pytest.raises(
        ValueError, match=r"only the moving average of the weights, 'model_ema': pass ema"
    ):
        load_checkpoint(small(), {"model_ema": state(small())})


def test_mismatch_lists_names_and_changes_nothing():
    model, weights = small(), state(trained())
    before = state(model)
    weights["stages.0.blocks.7.dwconv.bias"] = weights.pop("stages.0.blocks.0.dwconv.bias")
    weights["stem.0.weight"] = weights["stem.0.weight"][:, :1]
    with pytest.raises(CheckpointMismatchError) as caught:
        load_checkpoint(model, weights)
    error = caught.value
    assert error.missing == ["stages.0.blocks.0.dwconv.bias"]
    assert error.unexpected == ["stages.0.blocks.7.dwconv.bias"]
    assert error.mismatched == {"stem.0.weight": ((8, 1, 3, 3), (8, 3, 3, 3))}
    shapes = "stem.0.weight: (8, 1, 3, 3) in the file, (8, 3, 3, 3) in the model"
    for text in (*error.missing, *error.unexpected, shapes):
        assert text in str(error)
    assert same(state(model), before)

    report = load_checkpoint(model, weights, strict=False)
    assert list(report.missing) == error.missing
    assert list(report.unexpected) == error.unexpected
    assert list(report.mismatched) == list(error.mismatched)
    assert "missing: stages.0.blocks.0.dwconv.bias" in str(report)
    after = state(model)
    for name in (*error.missing, *error.mismatched):
        assert torch.equal(after[name], before[name])
    assert torch.equal(after["stem.0.bias"], weights["stem.0.bias"])


def test_mismatch_names_sizes_and_options():
    weights = swiftformer_s().state_dict()
    with pytest.raises(
        CheckpointMismatchError, match="is a SwiftFormer S, the model is a SwiftFormer XS"
    ):
        load_checkpoint(swiftformer_xs(), weights)
    with pytest.raises(CheckpointMismatchError, match="It has in_chans 1, the model 3"):
        load_checkpoint(small(), state(small(in_chans=1)))
    with pytest.raises(CheckpointMismatchError, match="features_only=True, without heads"):
        load_checkpoint(small(), state(small(features_only=True)))
    with pytest.raises(CheckpointMismatchError, match="of widths \\(16, 24\\), depths \\(2, 3\\)"):
        load_checkpoint(SwiftFormer((16, 24), (1, 3), features_only=True), state(small()))


def test_fresh_heads_keep_those_of_the_model():
    theirs, ours = trained(num_classes=9), small()
    before = state(ours)
    with pytest.raises(CheckpointMismatchError, match="pass fresh_heads=True"):
        load_checkpoint(ours, state(theirs))
    assert same(state(ours), before)
    report = load_checkpoint(ours, state(theirs), fresh_heads=True)
    assert "heads: unchanged" in str(report)
    for name, t in state(ours).items():
        expected = before if name.startswith("head") else state(theirs)
        assert torch.equal(t, expected[name]), name


def refused_tensors() -> dict[str, tuple[Tensor, str]]:
    name = "stages.1.blocks.2.linear.fc1.weight"
    right = small().state_dict()[name]
    return {
        "meta": (right.to("meta"), "has no data: it is on the meta device"),
        "expanded": (torch.ones(1, 1, 1, 1).expand(right.shape), "is expanded: it has less data"),
        "strided": (torch.ones(500).as_strided(right.shape, (1, 1, 1, 1)), "is expanded"),
        "sparse": (right.to_sparse(), r"is not dense: its layout is torch.sparse_coo"),
        "empty": (right[:0], r"is empty: its shape is \(0, 24, 1, 1\)"),
        "huge": (torch.ones(1).expand(1 << 20, 1 << 20), "is expanded"),
        "huge, meta": (torch.empty(1 << 20, 1 << 20, device="meta"), "has no data"),
    }


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", refused_tensors())
def test_tensors_without_data_raise_and_change_nothing(kind, strict, tmp_path):
    model, weights = small(), state(trained())
    before = state(model)
    name = "stages.1.blocks.2.linear.fc1.weight"
    weights[name], message = refused_tensors()[kind]
    with pytest.raises(ValueError, match=f"'{name}' {message}") as caught:
        load_checkpoint(model, weights, strict=strict)
    assert "\n" not in str(caught.value)
    assert same(state(model), before)
    path = written(tmp_path, weights)
    with pytest.raises(ValueError, match=name):
        from_pretrained(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda t: t.int(), "'norm.weight' has the type torch.int32"),
        (lambda t: t.bool(), "'norm.weight' has the type torch.bool"),
        (lambda t: t.cfloat(), "'norm.weight' has the type torch.complex64"),
        (lambda t: t.to(torch.float8_e4m3fn), "'norm.weight' has the type torch.float8_e4m3fn"),
        (lambda t: torch.full_like(t, float("nan")), r"finite values.* is in norm\.weight\."),
        (lambda t: torch.cat([t[1:], t.new_full((1,), float("inf"))]), r"is in norm\.weight\."),
        (lambda t: t.double() * 1e300, r"those of norm\.weight become infinite"),
    ],
)
def test_values_that_weights_cannot_have_raise(value, message, tmp_path):
    model, weights = small(), state(trained())
    before = state(model)
    weights["norm.weight"] = value(weights["norm.weight"])
    path = written(tmp_path, weights)
    for load in (lambda: load_checkpoint(model, weights), lambda: from_pretrained(path)):
        with pytest.raises(ValueError, match=message) as caught:
            load()
        assert "\n" not in str(caught.value)
    assert same(state(model), before)


def test_negative_variances_and_wrong_counters_raise():
    weights = state(trained())
    with pytest.raises(ValueError, match=r"'norm.running_var' has negative variances"):
        load_checkpoint(small(), weights | {"norm.running_var": -weights["norm.running_var"]})
    counter = "norm.num_batches_tracked"
    with pytest.raises(ValueError, match=rf"'{counter}' has the type torch.bool"):
        load_checkpoint(small(), weights | {counter: torch.tensor(True)})


def test_large_finite_values_are_no_infinity():
    weights = state(trained())
    weights["norm.weight"] = torch.full_like(weights["norm.weight"], 3e38)
    model = small()
    load_checkpoint(model, weights)
    assert torch.equal(model.norm.weight, weights["norm.weight"])


def test_casts_are_reported():
    weights = state(trained())
    assert "cast" not in str(load_checkpoint(small(), weights))
    for name in ("head.bias", "norm.bias"):
        weights[name] = weights[name].double()
    weights["norm.num_batches_tracked"] = torch.tensor(3.0)
    report = load_checkpoint(small(), weights)
    assert report.notes[1:] == (
        "cast from torch.float64 to torch.float32: norm.bias, head.bias",
        "cast from torch.float32 to torch.int64: norm.num_batches_tracked",
    )


def test_names_are_escaped(tmp_path):
    name = "stages.0.\x1b[31m\nred"
    for weights, folder in (({name: torch.ones(1)}, "a"), (state(trained()), "b\x1b")):
        (tmp_path / folder).mkdir()
        path = written(tmp_path / folder, weights | {name: torch.ones(1)})
        with pytest.raises(ValueError, match="must hold the weights of a SwiftFormer") as caught:
            load_checkpoint(small(), path)
        assert str(caught.value).isprintable()
    mismatch = CheckpointMismatchError("x", [name], [name], {name: ((1,), (2,))})
    assert all(line.isprintable() for line in str(mismatch).split("\n"))
    assert str(mismatch).count("\\x1b[31m\\nred") == 3


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> object:
        return self.parts


@pytest.mark.parametrize("function", [os.system, eval, getattr, subprocess.Popen])
@pytest.mark.parametrize("form", ["archive", 0, 2, 4])
def test_files_with_code_say_so(function, form, tmp_path):
    """In archives of torch.save, and as plain pickles of several protocols."""
    path, ran = tmp_path / "weights.pth", tmp_path / "ran"
    content = {"model": Call(function, f"touch {ran}")}
    if form == "archive":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, form))
    with pytest.raises(ValueError, match=r"holds code, a call of .*, which was not run") as caught:
        load_checkpoint(small(), path)
    assert function.__name__ in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "weights_only=False" not in str(caught.value)
    assert not ran.exists()


def test_archives_that_claim_more_data_than_they_have_raise(tmp_path):
    path = written(tmp_path, state(small()))
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(1 << 25) if name.endswith("data/0") else old.read(name))
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match=r"it claims to hold 33,\d+,\d+ bytes, more than its size"):
        load_checkpoint(small(), bomb)


class Unwilling(Tensor):
    """A tensor that cannot be copied."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.copy_:
            raise cls.error
        return super().__torch_function__(func, types, args, kwargs or {})

    error: BaseException = RuntimeError("out of copies")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("error", [RuntimeError("out of copies"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["norm.running_var", "stages.1.blocks.2.attn.w_g"])
def test_failing_copy_changes_nothing(name, error, strict, monkeypatch):
    model, weights = small(dtype=torch.float64), state(trained())
    before = state(model)
    monkeypatch.setattr(Unwilling, "error", error)
    weights[name] = weights[name].as_subclass(Unwilling)
    expected = ValueError if isinstance(error, Exception) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        load_checkpoint(model, weights, pooling="sum", strict=strict)
    if expected is ValueError:
        assert "cannot be copied into the model, which is unchanged" in str(caught.value)
        assert "out of copies" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert same(state(model), before)
    assert all(t.dtype == before[k].dtype for k, t in state(model).items())
    assert poolings(model) == {"l2"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stages.1.blocks.2.", "stages.1.blocks.4000000000.", "blocks of stage 1 are 0, 1, 400000"),
        ("stages.0.blocks.1.", "stages.0.blocks.7.", "blocks of stage 0 are 0, 7"),
        ("stages.1.", "stages.4000000000.", "stages are 0, 4000000000"),
        ("stages.", "stages.1", "stages are 10, 11"),
        ("stages.", "stem.3.", "names of official, timm, transformers"),
    ],
)
def test_gaps_in_stages_and_blocks_raise(old, new, message, tmp_path):
    weights = {name.replace(old, new): t for name, t in state(trained()).items()}
    path = written(tmp_path, weights)
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(path)
    assert "\n" not in str(caught.value)


def test_small_file_allocates_no_huge_model(tmp_path, monkeypatch):
    """Sizes that no other tensor confirms are a mismatch, before memory is allocated."""
    built = []
    watched = replace(
        FAMILY, build=lambda **options: built.append(options) or SwiftFormer(**options)
    )
    monkeypatch.setattr(checkpoint_io, "families", lambda: (watched,))
    wide, long = torch.ones(2, 1 << 16), torch.ones(1 << 16, 2)
    for first, second in ((wide, wide), (long, wide), (wide, long)):
        weights = state(trained())
        weights["stages.0.blocks.1.linear.fc1.weight"] = first
        weights["stages.1.blocks.2.linear.fc1.weight"] = second
        with pytest.raises(CheckpointMismatchError):
            from_pretrained(written(tmp_path, weights))
    assert [options["device"] for options in built] == ["meta"] * 3
    for shape in ((), (5,)):
        weights["stages.0.blocks.1.linear.fc1.weight"] = torch.ones(shape)
        with pytest.raises(ValueError, match=r"two dimensions in 'stages\.0\.blocks\.1\.lin"):
            from_pretrained(written(tmp_path, weights))


@pytest.mark.parametrize("key", [3, None, ("a", 1)])
def test_keys_that_are_no_strings_raise(key):
    for content in ({key: torch.ones(1)}, {"model": {**state(small()), key: torch.ones(1)}}):
        with pytest.raises(ValueError, match="must hold tensors by their names; got"):
            load_checkpoint(small(), content)


def test_pickled_models_load_as_their_error_says(tmp_path):
    theirs = trained(pooling="softmax")
    for content in (theirs, {"model": theirs, "epoch": 3}):
        path = written(tmp_path, content)
        with pytest.raises(ValueError, match=r"holds a .*, which is neither a tensor") as caught:
            from_pretrained(path)
        first, second = re.findall(
            r"\w+_checkpoint\(model, .*?'?\)+(?=\.| writes)", str(caught.value)
        )
        names = {"model": small(), "path": path, "torch": torch, "load_checkpoint": load_checkpoint}
        report = eval(first, names)
        assert report.pooling == "softmax"
        assert same(state(names["model"]), state(theirs))
        new = second.replace("weights.pth", str(tmp_path / "new.pth"))
        eval(new, {"model": names["model"], "save_checkpoint": save_checkpoint})
        assert torch.equal(output(from_pretrained(tmp_path / "new.pth")), output(theirs))


def test_modules_load_like_their_state_dicts(timm):
    ours = small()
    theirs = trained(pooling="sum")
    for module in (theirs, nn.Sequential(OrderedDict(module=theirs))):
        report = load_checkpoint(ours, module)
        assert same(state(ours), state(theirs))
        assert poolings(ours) == {"sum"}
        assert f"from the {type(module).__name__}, named as in timm" in str(report)
    sizes = {"layers": [2, 3], "embed_dims": [16, 24], "downsamples": [False, True]}
    other = randomise(timm.models.SwiftFormer(num_classes=5, **sizes)).eval()
    load_checkpoint(ours, other, source="timm")
    torch.testing.assert_close(output(ours), output(other))
    with pytest.raises(ValueError, match="names of official, timm"):
        load_checkpoint(ours, nn.Linear(2, 2))


def test_stages_that_the_model_lacks_are_ignored(tmp_path):
    theirs = trained()
    path = written(tmp_path, state(theirs))
    model = from_pretrained(path, features_only=True, out_indices=(0,))
    report = str(model.pretrained.report)
    assert "ignored, as the model has none: head, head_dist, stages.1, norm" in report
    x = images(1, 3, 40, 24)
    expected = theirs.eval().forward_intermediates(x, indices=(0,), intermediates_only=True)
    found = model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one = trained(features_only=True, out_indices=(1,))
    assert same(state(from_pretrained(written(tmp_path, state(one)))), state(one))


def test_two_heads_become_their_mean_and_one_head_becomes_two():
    two, one, two_again = trained(), small(distillation=False), small()
    assert "head: the mean of the two" in str(load_checkpoint(one, state(two)))
    torch.testing.assert_close(output(one), output(two))
    assert "heads: both are copies of the only" in str(load_checkpoint(two_again, state(one)))
    torch.testing.assert_close(output(two_again), output(two))


@pytest.mark.parametrize("options", [{"features_only": True}, {"num_classes": 0}])
def test_models_without_heads_ignore_heads(options):
    theirs, ours = trained(), small(**options)
    report = load_checkpoint(ours, state(theirs))
    assert "ignored, as the model has none: head" in str(report)
    assert same(state(ours.stages), state(theirs.stages))
    assert ("feature_norms: unchanged" in str(report)) == ("features_only" in options)
    x = images(1, 3, 40, 24)
    pairs = (m.forward_intermediates(x, intermediates_only=True) for m in (ours.eval(), theirs))
    for a, b in zip(*pairs, strict=True):
        assert torch.equal(a, b)
    load_checkpoint(small(**options), state(trained(**options)))  # own weights


def test_old_files_in_half_precision_load():
    theirs, ours = trained(), small()
    weights = {
        name: t.half().flatten() if "gamma" in name else t
        for name, t in state(theirs).items()
        if "num_batches" not in name
    }
    load_checkpoint(ours, weights)
    for name, t in ours.named_parameters():
        assert t.dtype == torch.float32
        torch.testing.assert_close(t, state(theirs)[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a dict of weights; it holds a list"),
        ({"model": {"a": 1}}, "not a tensor: a"),
        ({"model": {}}, "it is empty"),
        ({"layer1.weight": torch.ones(1)}, r"names of official, .*; it has layer1\.weight"),
        ({"model": Path("x")}, r"holds a pathlib\.[\w.]+, which is neither .* weights_only=False"),
    ],
)
def test_files_without_weights_raise(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(small(), written(tmp_path, content))


def test_unreadable_files_raise(tmp_path):
    with pytest.raises(ValueError, match=r"none\.pth does not exist"):
        load_checkpoint(small(), tmp_path / "none.pth")
    with pytest.raises(ValueError, match="is a folder"):
        load_checkpoint(small(), str(tmp_path))
    path = written(tmp_path, state(small()))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_checkpoint(small(), path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"\(EOFError: the file is empty\)"):
        load_checkpoint(small(), path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a regular file"):
        load_checkpoint(small(), tmp_path / "pipe")


def test_files_without_permission_say_so(tmp_path, monkeypatch):
    for name in ("a.pth", "a.safetensors"):
        save_checkpoint(trained(), tmp_path / name)

        def refuse(path: Path, *_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(ValueError, match=rf"{name}: Permission denied\."):
            load_checkpoint(small(), tmp_path / name)
        monkeypatch.undo()


def test_reading_prints_no_warnings_of_other_packages(tmp_path, recwarn):
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"model": 3}, 4))
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(small(), path)
    assert not recwarn


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": nn.Linear(2, 2)}, TypeError, "model must be a SwiftFormer of swiftkernels"),
        ({"checkpoint": 3}, TypeError, "checkpoint must be a path"),
        ({"source": "keras"}, ValueError, "source must be one of"),
        ({"pooling": "max"}, ValueError, "pooling must be one of"),
        ({"ema": "yes"}, ValueError, "ema must be one of"),
        ({"source": "official"}, ValueError, "They look like source='timm'"),
    ],
)
def test_wrong_arguments_raise(arguments, error, message):
    right = {"model": small(), "checkpoint": state(small())}
    with pytest.raises(error, match=message):
        load_checkpoint(**right | arguments)


def test_model_without_memory_raises():
    with torch.device("meta"):
        model = small()
    with pytest.raises(ValueError, match="to_empty"):
        load_checkpoint(model, state(small()))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("distillation", [True, False])
@pytest.mark.parametrize("target", SOURCES)
def test_saved_files_give_the_same_outputs(target, distillation, suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    theirs = trained(pooling="sum", distillation=distillation)
    path = tmp_path / f"weights{suffix}"
    save_checkpoint(theirs, path, target)
    model = from_pretrained(path)
    report = model.pretrained.report
    assert (report.source, report.pooling) == (target, "sum")
    assert model.distillation == (distillation or target != "timm")
    assert torch.equal(output(model), output(theirs))


def test_saving_for_a_target_with_another_pooling_raises(tmp_path):
    with pytest.raises(ValueError, match="'transformers' computes pooling sum; the model has 'l2'"):
        save_checkpoint(small(), tmp_path / "weights.pth", "transformers")
    with pytest.raises(ValueError, match="'official' computes pooling l2 or sum"):
        save_checkpoint(small(pooling="linear"), tmp_path / "weights.pth", "official")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_classes": 0},
        {"features_only": True},
        {"distillation": False, "in_chans": 1, "mlp_ratio": 2.0},
        {"mlp_ratio": 2.7},  # 43.2 and 64.8 rounded down
    ],
)
def test_shapes_give_the_options_of_the_model(options):
    weights = small(**options).state_dict()
    found = SwiftFormer(**architecture(weights)).state_dict()
    assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in weights.items()}
    del weights["stem.0.weight"]
    with pytest.raises(ValueError, match=r"it has no 'stem\.0\.weight'"):
        architecture(weights)


def folder_of_timm(timm: Any, folder: Path) -> nn.Module:
    safetensors = pytest.importorskip("safetensors.torch")
    sizes = {"layers": [1, 2], "embed_dims": [16, 24], "downsamples": [False, True]}
    model = randomise(timm.models.SwiftFormer(num_classes=5, **sizes)).eval()
    safetensors.save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "swiftformer_xs", "num_classes": 5, "label_names": list("abcde")}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def test_folder_of_timm_loads(timm, tmp_path):
    theirs = folder_of_timm(timm, tmp_path)
    model = from_pretrained(tmp_path)
    assert not model.training
    report = model.pretrained.report
    assert (report.source, report.pooling) == ("timm", "l2")
    torch.testing.assert_close(output(model), output(theirs))
    assert model.pretrained.class_names == list("abcde")
    assert model.pretrained.config["architecture"] == "swiftformer_xs"


def test_folder_of_transformers_loads(transformers, tmp_path):
    config = transformers.SwiftFormerConfig(
        depths=[1, 2, 1], embed_dims=[16, 24, 32], downsamples=[True] * 3, num_labels=5
    )
    theirs = randomise(transformers.SwiftFormerForImageClassification(config)).eval()
    theirs.save_pretrained(tmp_path)
    model = from_pretrained(str(tmp_path))
    report = model.pretrained.report
    assert (report.source, report.pooling) == ("transformers", "sum")
    save_checkpoint(model, tmp_path / "model.safetensors", "transformers")
    back = type(theirs).from_pretrained(tmp_path).eval()
    assert same(state(back), state(theirs))
    with torch.no_grad():
        torch.testing.assert_close(output(model), back(images(2, 3, 40, 56)).logits)
    assert model.pretrained.class_names == [f"LABEL_{i}" for i in range(5)]


def test_transformers_without_layer_scales(transformers, tmp_path):
    """Its convolutions still have layer scales: they are folded into the weights."""
    config = transformers.SwiftFormerConfig(
        depths=[1, 2], embed_dims=[16, 24], downsamples=[True] * 2, num_labels=5,
        use_layer_scale=False,
    )  # fmt: skip
    theirs = randomise(transformers.SwiftFormerForImageClassification(config)).eval()
    theirs.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    assert not any("layer_scale" in name for name in model.state_dict())
    report = str(model.pretrained.report)
    assert "layer scales of convolutions: multiplied into pwconv2" in report
    x = images(2, 3, 40, 56)
    with torch.no_grad():
        exact = theirs.double()(x.double()).logits
        torch.testing.assert_close(model.double()(x.double()), exact, rtol=1e-5, atol=1e-6)
        save_checkpoint(model.float(), tmp_path / "model.safetensors", "transformers")
        back = type(theirs).from_pretrained(tmp_path).eval().double()
        torch.testing.assert_close(back(x.double()).logits, exact, rtol=1e-5, atol=1e-6)


def test_timm_without_layer_scales(timm):
    sizes = {"layers": [2, 3], "embed_dims": [16, 24], "downsamples": [False, True]}
    theirs = randomise(timm.models.SwiftFormer(num_classes=5, use_layer_scale=False, **sizes))
    weights = state(theirs)
    assert architecture(weights)["use_layer_scale"] is False
    ours = small(use_layer_scale=False)
    load_checkpoint(ours, weights, source="timm")
    assert same(state(ours), weights)
    torch.testing.assert_close(output(ours), output(theirs))


@pytest.mark.parametrize("target", SOURCES)
def test_models_without_layer_scales_in_all_formats(target, tmp_path):
    theirs = trained(use_layer_scale=False, pooling="sum")
    save_checkpoint(theirs, tmp_path / "weights.pth", target)
    model = from_pretrained(tmp_path / "weights.pth")
    assert same(state(model), state(theirs))
    with pytest.raises(CheckpointMismatchError, match="build the model with use_layer_scale=False"):
        load_checkpoint(small(), tmp_path / "weights.pth")
    save_checkpoint(trained(pooling="sum"), tmp_path / "with.pth", target)
    with pytest.raises(CheckpointMismatchError, match="build the model with use_layer_scale=True"):
        load_checkpoint(small(use_layer_scale=False), tmp_path / "with.pth")


def test_unsupported_configurations_raise(tmp_path):
    written(tmp_path, state(trained()), "pytorch_model.bin")
    from_pretrained(tmp_path)
    for config, message in (
        (
            {"model_type": "swiftformer", "hidden_act": "relu"},
            "must have hidden_act = 'gelu', .* got 'relu'",
        ),
        ({"architecture": "resnet50"}, "must be for a swiftformer; it is for 'resnet50'"),
        ([1], "must hold a JSON object"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        from_pretrained(tmp_path)


def test_options_of_a_pretrained_model(tmp_path):
    path = written(tmp_path, state(trained()))
    model = from_pretrained(path, num_classes=3, drop_path_rate=0.2, pooling="sum")
    assert output(model).shape == (2, 3)
    assert copy.deepcopy(model).pretrained == model.pretrained
    assert model.stages[1].blocks[-1].drop_path.rate == 0.2
    assert poolings(model) == {"sum"}
    assert "heads: unchanged" in str(model.pretrained.report)
    assert model.pretrained.config == {}
    assert model.pretrained.class_names is None
    assert not hasattr(small(), "pretrained")
    assert len(output(from_pretrained(path, features_only=True))) == 2
    assert output(from_pretrained(path, num_classes=0)).shape == (2, 24)
    headless = written(tmp_path, state(trained(num_classes=0)), "headless.pth")
    assert output(from_pretrained(headless, num_classes=3)).shape == (2, 3)
    with pytest.raises(ValueError, match="options must not have widths"):
        from_pretrained(path, widths=(8, 16))


class NotThere(Exception):  # noqa: N818
    """As raised by huggingface_hub for a file that a repository lacks."""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Mocks huggingface_hub: the folder `tmp_path` is a repository. Yields the requests."""
    requests = []

    def hf_hub_download(name: str, file: str, revision: str | None = None) -> str:
        requests.append((name, file, revision))
        if name != "owner/name":
            raise OSError("404: no such repository\nand more")
        if not (tmp_path / file).is_file():
            raise NotThere(file)
        return str(tmp_path / file)

    class Other(Exception):  # noqa: N818
        """Never raised here."""

    errors = SimpleNamespace(
        EntryNotFoundError=NotThere,
        LocalEntryNotFoundError=Other,
        HfHubHTTPError=Other,
        HFValidationError=Other,
    )
    parts = {
        "huggingface_hub": SimpleNamespace(hf_hub_download=hf_hub_download),
        "huggingface_hub.errors": errors,
    }
    monkeypatch.setattr(hub, "need", lambda package, *_: parts[package])
    return requests


def test_repository_is_downloaded(repository, tmp_path):
    theirs = trained()
    written(tmp_path, state(theirs), "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"label_names": list("abcde")}))
    model = from_pretrained("owner/name", revision="v1")
    assert torch.equal(output(model), output(theirs))
    assert model.pretrained.class_names == list("abcde")
    files = ("model.safetensors", "pytorch_model.bin", "config.json")
    assert repository == [("owner/name", file, "v1") for file in files]


def test_missing_repositories_raise(repository, tmp_path):
    with pytest.raises(ValueError, match=r"the download failed: 404: no such repository$"):
        from_pretrained("owner/other")
    with pytest.raises(ValueError, match=r"must hold model\.safetensors or pytorch_model\.bin"):
        from_pretrained("owner/name")
    with pytest.raises(ValueError, match="must hold"):
        from_pretrained(tmp_path)
    for checkpoint in ("none.pth", "./no/where", tmp_path / "none.pth"):
        with pytest.raises(ValueError, match=r"checkpoint must be a file, .* does not exist"):
            from_pretrained(checkpoint)


def test_missing_packages_raise_with_their_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[hub\]'"):
        from_pretrained("owner/name")
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(ImportError, match=r"safetensors .*pip install '\.\[hub\]'"):
        load_checkpoint(small(), tmp_path / "weights.safetensors")


@pytest.mark.parametrize("module", [checkpoint_io, family, hub])
def test_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
