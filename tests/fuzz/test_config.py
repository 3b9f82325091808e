"""config.json next to weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")

from hypothesis import event, given
from hypothesis import strategies as st

from swiftkernels.models import from_pretrained, save_checkpoint
from swiftkernels.models.swiftformer import FAMILY
from tests.fuzz.commands import check_printable
from tests.fuzz.test_checkpoints import MODEL, texts

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
known = st.fixed_dictionaries(
    {},
    optional={
        "model_type": st.sampled_from(["swiftformer", "resnet"]) | values,
        "architecture": st.sampled_from(["swiftformer_xs", "\x1b[31m"]) | values,
        "label_names": st.lists(texts, min_size=3, max_size=3) | values,
        "label_descriptions": values,
        "id2label": st.fixed_dictionaries({"0": values, "1": texts, "2": values}) | values,
        **{name: values | st.just(value) for name, value in FAMILY.fixed_config.items()},
    },
)
files = (
    known.map(json.dumps).map(str.encode)
    | values.map(json.dumps).map(str.encode)
    | st.binary(max_size=60)
    | st.just(b"[" * 100_000)
    | st.just(b'{"a": ' + b"9" * 5000 + b"}")
)


@given(files)
def test_configurations(content):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not _weights:
            save_checkpoint(MODEL, folder / "w.pth")
            _weights.append((folder / "w.pth").read_bytes())
        (folder / "pytorch_model.bin").write_bytes(_weights[0])
        (folder / "config.json").write_bytes(content)
        try:
            found: Any = from_pretrained(folder).pretrained
        except ValueError as error:
            check_printable(str(error))
            event(f"{' '.join(str(error).split()[1:5])[:40]}")
            return
        event("loaded with names" if found.class_names else "loaded without names")
        assert found.class_names is None or (
            len(found.class_names) == 3 and all(isinstance(n, str) for n in found.class_names)
        )


_weights: list[bytes] = []
